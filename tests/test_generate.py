"""decoder.py and sampling.py: plain generation against the naive decoder and transformers, and from logits to tokens.

    python -m pytest tests/test_generate.py -q

Tiny random models in fp32, where a greedy text has one right answer; the demo model for the last test.
"""
import functools
import shutil
import types
import weakref

import numpy as np
import pytest
import torch

import runtime
from decoder import Decoder
from generate import generate
from linears import Format, PackedLinear, can_pack, quantize_in_place
from model import RMSNorm, Transformer, bucket, prefill
from reference import assert_close, expected, naive_decode, tiny, tokens_of
from runtime import PackedRMSNorm, is_faster_in_float32, pack_for_cpu
from sampling import Sampling, logits_to_probs, sample

CONTEXT = 400  # slots: bucket borders at 128, 192, 256, 384 and the end of the cache


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """zoo(kind) -> a private model, its folder, and oracle(prompt, n) that decodes the naive way and remembers."""

    @functools.cache
    def load_kind(kind):
        folder, hf = tiny(kind, tmp_path_factory.mktemp(kind), max_position_embeddings=CONTEXT)
        model, other = load(folder), load(folder)

        longest = {}

        def oracle(prompt, n):
            known = longest.get(tuple(prompt), [])
            if len(known) < n:
                with torch.inference_mode():
                    known = longest[tuple(prompt)] = naive_decode(other, prompt, n)
            return known[:n]

        return types.SimpleNamespace(folder=folder, hf=hf, model=model, oracle=oracle)

    return load_kind


@pytest.fixture
def gqa(zoo):
    return zoo("gqa")


def load(folder, dtype=torch.float32):
    return Transformer.from_pretrained(folder, device="cpu", dtype=dtype)


def make_decoder(model, n_row=1, n_slot=CONTEXT, sampling=Sampling(), **options):
    model.setup_caches(n_row, n_slot)
    return Decoder(model, n_row, sampling, **options)


def watch_features(model, monkeypatch):
    """A list that grows by the positions [T] (row 0) of every pass."""
    passes, run = [], model.hidden_states

    def watched(tokens, input_pos, *args, **kwargs):
        passes.append(input_pos.expand(tokens.shape)[0].tolist())
        return run(tokens, input_pos, *args, **kwargs)

    monkeypatch.setattr(model, "hidden_states", watched)
    return passes


# --- greedy decoding --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["gqa", "llama2_tied", "llama3.1", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_greedy_generate_equals_naive_decoding(zoo, kind):
    z = zoo(kind)
    for length in (1, 2, 33):
        prompt = tokens_of(length, seed=length)
        assert generate(z.model, [prompt], 24).tokens == [z.oracle(prompt, 24)]


def test_decoding_to_the_last_slot_of_the_cache_equals_naive_decoding(gqa):
    """On the way the view of the cache grows over every bucket border."""
    prompt = tokens_of(5)
    result = generate(gqa.model, [prompt], 10 ** 6)
    assert result.tokens == [gqa.oracle(prompt, CONTEXT - 5)]
    assert result.finish_reason == ["length"]


@pytest.mark.parametrize("border", [128, 192, 256, 384, CONTEXT])
def test_prompts_that_end_at_a_bucket_border_equal_naive_decoding(gqa, border):
    """A slot too few to look at moves only some greedy choices: several prompts of each length."""
    for length in (border - 1, border, border + 1):
        n = min(2, CONTEXT - length)
        if n > 0:
            prompts = [tokens_of(length, seed=seed) for seed in range(6)]
            assert generate(gqa.model, prompts, n, max_seq_length=CONTEXT).tokens == [
                gqa.oracle(prompt, n) for prompt in prompts]


@pytest.mark.parametrize("length", [512, 513, 514, 1024, 1025, 1026, 1300])
def test_prompts_longer_than_a_prefill_chunk_equal_naive_decoding(tmp_path, length):
    folder, _ = tiny("gqa", tmp_path, max_position_embeddings=1400)
    model, prompt = load(folder), tokens_of(length)
    ours = generate(model, [prompt], 3).tokens
    assert ours == [naive_decode(model, prompt, 3)]


@torch.inference_mode()
@pytest.mark.parametrize("n_cached", [0, 200, 255])
def test_a_prefill_by_chunks_fills_the_caches_as_one_pass_does(gqa, n_cached):
    """Whatever chunk a token is in, it sees all before it: of greedy texts a narrow view changes few."""
    prompts = [tokens_of(330, seed=1), tokens_of(300, seed=2)]
    pos = torch.arange(330).expand(2, -1)
    tokens = torch.tensor([prompt + [0] * (330 - len(prompt)) for prompt in prompts])
    gqa.model.setup_caches(2, CONTEXT)
    features = gqa.model.features(tokens, pos)
    whole = gqa.model.kv_cache.clone()
    gqa.model.kv_cache[..., n_cached:, :] = 9.0
    chunks = list(prefill(gqa.model, prompts, n_cached, chunk=60))
    assert_close(gqa.model.kv_cache[..., :330, :], whole[..., :330, :])
    assert_close(torch.cat([chunk.features for chunk in chunks], dim=1), features[:, n_cached:])
    assert torch.cat([chunk.following for chunk in chunks], dim=1)[0].tolist() == [*prompts[0][n_cached + 1:], 0]
    last, found = torch.tensor([[329], [299]]), None
    for chunk in chunks:
        found = chunk.at(last, chunk.features, found)
    assert_close(found[:, 0], features[[0, 1], [329, 299]])


@pytest.mark.parametrize("lengths, n_new", [((1, 250), 150), ((120, 130), 9), ((120,), 10), ((300,), 99)])
def test_every_step_of_a_ragged_batch_was_made_ready(gqa, monkeypatch, lengths, n_new):
    """Whichever row stops early. Those of the longest row alone were captured: the other row's ran without a graph."""
    monkeypatch.setattr("decoder.compile_layers", lambda layers: None)
    for early in (None, *range(len(lengths))):
        decoder = make_decoder(gqa.model, len(lengths), compile=True)
        prompts, taken = [tokens_of(n, seed=n) for n in lengths], []
        run = decoder.run
        monkeypatch.setattr(decoder, "run", lambda eagle, length: (
            taken.append((eagle, decoder._n_slot(eagle, length))), run(eagle, length))[1])
        stops = set() if early is None else {gqa.oracle(prompts[early], 3)[2]}
        decoder.generate(prompts, n_new, stop_ids=stops)
        assert set(taken) <= set(decoder.graphs)
        if early is None and len(lengths) == 1:     # and no other
            assert set(taken) == set(decoder.graphs)


def test_attention_follows_the_used_length_not_the_allocated_one(gqa):
    widths = []
    hook = gqa.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["mask"].shape[-1]), with_kwargs=True)
    decoder = make_decoder(gqa.model)
    decoder.generate([tokens_of(120)], 20)
    hook.remove()
    assert set(widths[-20:-11]) == {128} and set(widths[-11:]) == {144}  # step n writes slot 119 + n


# --- batches ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["gqa", "mixtral", "qwen3", "qwen3_moe_mixed"])
def test_each_row_of_a_ragged_batch_gets_what_it_gets_alone(zoo, kind):
    z, prompts = zoo(kind), [tokens_of(130, seed=1), tokens_of(1, seed=2), tokens_of(40, seed=3)]
    together = generate(z.model, prompts, 20)
    assert together.tokens == [z.oracle(prompt, 20) for prompt in prompts]
    assert together.tokens == [generate(z.model, [prompt], 20).tokens[0] for prompt in prompts]


def test_rows_that_reach_the_end_of_their_cache_do_not_disturb_the_others(gqa):
    prompts = [tokens_of(60, seed=1), tokens_of(5, seed=2), tokens_of(30, seed=3)]
    result = generate(gqa.model, prompts, 1000, max_seq_length=64)
    assert result.tokens == [gqa.oracle(prompt, 64 - len(prompt)) for prompt in prompts]
    assert result.finish_reason == ["length"] * 3
    assert result.target_passes == 58       # a row's first token comes from the prefill


def test_rows_that_stop_early_do_not_disturb_the_others(gqa):
    prompts = [tokens_of(9, seed=n) for n in range(3)]
    whole = [gqa.oracle(prompt, 50) for prompt in prompts]
    for row in whole:
        stop = row[4]
        result = generate(gqa.model, prompts, 50, stop_ids=[stop])
        assert result.tokens == [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in whole]
        assert result.finish_reason == ["stop" if stop in ids else "length" for ids in whole]


# --- stopping, lengths, streaming -------------------------------------------------------------------------------------

def test_generation_ends_with_the_first_stop_token_itself(gqa):
    prompt = tokens_of(9, seed=4)
    whole = gqa.oracle(prompt, 40)
    for stops in ({whole[0]}, {whole[7]}, {whole[12], whole[30]}):
        end = min(whole.index(stop) for stop in stops) + 1
        for room in (end, end + 1, 40):  # a stop token in the last place allowed is still a stop
            result = generate(gqa.model, [prompt], room, stop_ids=stops)
            assert result.tokens == [whole[:end]] and result.finish_reason == ["stop"]
        if end > 1:
            result = generate(gqa.model, [prompt], end - 1, stop_ids=stops)
            assert result.tokens == [whole[:end - 1]] and result.finish_reason == ["length"]


def test_a_stop_token_in_the_prompt_does_not_stop(gqa):
    prompt = tokens_of(20)
    whole = gqa.oracle(prompt, 20)
    stops = set(prompt) - set(whole)
    assert stops and generate(gqa.model, [prompt], 20, stop_ids=stops).tokens == [whole]


def test_accept_lengths_of_plain_decoding_are_ones_that_sum_to_the_tokens_after_the_first(gqa):
    prompts = [tokens_of(9, seed=n) for n in range(3)]
    result = generate(gqa.model, prompts, 30, stop_ids=[gqa.oracle(prompts[1], 30)[4]])
    assert len(result.tokens[1]) <= 5
    assert result.accept_lengths == [[1] * (len(ids) - 1) for ids in result.tokens]
    assert result.copied == [[0] * (len(ids) - 1) for ids in result.tokens]
    assert result.mean_accept_length == 1
    assert result.target_passes == max(map(len, result.tokens)) - 1 and set(result.kinds) == {"plain"}


def test_an_answer_of_one_token_takes_the_prefill_and_no_step(gqa):
    prompts, n_pass, forward = [tokens_of(9, seed=1), tokens_of(600, seed=2)[:200]], 0, gqa.model.hidden_states

    def counted(tokens, *args):
        nonlocal n_pass
        n_pass += 1
        return forward(tokens, *args)
    gqa.model.hidden_states = counted
    try:
        result = generate(gqa.model, prompts, 1)
    finally:
        del gqa.model.hidden_states
    assert result.tokens == [gqa.oracle(prompt, 1) for prompt in prompts] and n_pass == 1
    assert (result.target_passes, result.mean_accept_length, result.tokens_per_second) == (0, 0, 0)
    assert result.finish_reason == ["length"] * 2


def test_timings_are_those_of_the_contract_and_make_the_speed(gqa):
    result = generate(gqa.model, [tokens_of(9), tokens_of(5)], 10)
    assert set(result.timings) == {"compile_seconds", "prefill_seconds", "decode_seconds"}
    assert min(result.timings.values()) >= 0
    assert result.tokens_per_second == pytest.approx(20 / result.timings["decode_seconds"])


def test_streamed_tokens_are_the_result_as_it_grows(gqa):
    prompts, seen = [tokens_of(9, seed=n) for n in range(3)], [[], [], []]
    stop = gqa.oracle(prompts[1], 30)[4]
    result = generate(gqa.model, prompts, 30, stop_ids=[stop], on_tokens=lambda row, ids, *_: seen[row].append(ids))
    assert [sum(pieces, []) for pieces in seen] == result.tokens
    assert [[len(piece) for piece in pieces[1:]] for pieces in seen] == result.accept_lengths
    assert [len(pieces[0]) for pieces in seen] == [1, 1, 1]


@pytest.mark.parametrize("prompts, names", [
    ([[]], "empty"), ([[1, 2], []], "empty"), ([tokens_of(CONTEXT)], str(CONTEXT)),
    ([[1, 2], tokens_of(CONTEXT + 100)], str(CONTEXT + 100)),
])
def test_a_prompt_that_is_empty_or_fills_the_context_is_refused(gqa, prompts, names):
    with pytest.raises(ValueError, match=names):
        generate(gqa.model, prompts, 4)
    with pytest.raises(ValueError, match=names):
        make_decoder(gqa.model, len(prompts)).generate(prompts, 4)


def test_more_slots_than_the_context_has_are_refused(gqa):
    with pytest.raises(ValueError, match=str(CONTEXT + 1)):
        generate(gqa.model, [[1]], 4, max_seq_length=CONTEXT + 1)


# --- caches and the Decoder between calls -----------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("rows, slots", [(1, 30), (4, 200), (1, CONTEXT), (3, 10)])
def test_caches_that_exist_already_change_nothing(gqa, rows, slots):
    prompt = tokens_of(20)
    gqa.model.setup_caches(rows, slots)
    gqa.model.kv_cache.normal_(std=50)  # of another conversation
    assert generate(gqa.model, [prompt], 20).tokens == [gqa.oracle(prompt, 20)]


def test_the_length_limit_is_the_one_asked_for_whatever_the_caches_were(gqa):
    gqa.model.setup_caches(2, CONTEXT)
    assert len(generate(gqa.model, [tokens_of(20)], 100, max_seq_length=30).tokens[0]) == 10


@torch.no_grad()
def test_what_a_cache_held_before_is_never_seen(gqa):
    prompts = [tokens_of(40, seed=1), tokens_of(3, seed=2)]
    decoder = make_decoder(gqa.model, 2)
    gqa.model.kv_cache.normal_(std=50)
    assert decoder.generate(prompts, 20).tokens == [gqa.oracle(prompt, 20) for prompt in prompts]


def test_one_decoder_answers_many_prompts_each_as_if_it_were_the_first(gqa):
    decoder = make_decoder(gqa.model)
    for length in (150, 3, 40, 1, 3):
        prompt = tokens_of(length, seed=length)
        assert decoder.generate([prompt], 12).tokens == [gqa.oracle(prompt, 12)]


def test_a_cached_prefix_gives_what_a_fresh_prefill_gives_and_is_not_computed_again(gqa, monkeypatch):
    first, more = tokens_of(30, seed=1), tokens_of(11, seed=2)
    decoder = make_decoder(gqa.model)
    said = decoder.generate([first], 10).tokens[0]
    whole = first + said + more
    passes = watch_features(gqa.model, monkeypatch)
    for n_cached in (39, 17, 0, 50):  # 39: all that the first turn wrote; 50: all but the last token, written since
        passes.clear()
        answer = decoder.generate([whole], 10, n_cached=n_cached).tokens
        assert answer == [gqa.oracle(whole, 10)]
        assert sorted(set(sum(passes, []))) == list(range(n_cached, len(whole) - 1 + 10))


def test_a_cached_prefix_of_every_row_of_a_batch_is_used(gqa):
    prompts = [tokens_of(30, seed=1), tokens_of(12, seed=2), tokens_of(21, seed=3)]
    decoder = make_decoder(gqa.model, 3)
    said = decoder.generate(prompts, 10).tokens
    longer = [prompt + ids + tokens_of(n, seed=9) for n, (prompt, ids) in enumerate(zip(prompts, said))]
    assert decoder.generate(longer, 10, n_cached=20).tokens == [gqa.oracle(prompt, 10) for prompt in longer]


def test_a_kept_decoder_goes_on_with_its_own_caches_whatever_else_was_decoded(gqa):
    """A call of generate() used to leave its own caches behind, and a trace went on with the old ones: wrong text."""
    prompts = [tokens_of(n, seed=n) for n in (20, 9, 31)]
    decoder = make_decoder(gqa.model)
    assert decoder.generate(prompts[:1], 64).tokens == [gqa.oracle(prompts[0], 64)] and decoder.traces
    assert generate(gqa.model, prompts[1:], 64).tokens == [gqa.oracle(prompt, 64) for prompt in prompts[1:]]
    assert decoder.generate(prompts[2:], 64).tokens == [gqa.oracle(prompts[2], 64)]
    gqa.model.setup_caches(2, 40)       # and whatever is set up
    other = Decoder(gqa.model, 2)
    assert other.generate(prompts[:2], 4).tokens == [gqa.oracle(prompt, 4) for prompt in prompts[:2]]
    said = gqa.oracle(prompts[2], 64)
    longer = prompts[2] + said + tokens_of(5, seed=7)
    assert decoder.generate([longer], 9, n_cached=len(prompts[2]) + 63).tokens == [gqa.oracle(longer, 9)]


def test_decoding_leaves_the_caches_that_the_model_had(gqa):
    gqa.model.kv_cache = None
    generate(gqa.model, [tokens_of(9)], 3)
    assert gqa.model.kv_cache is None
    assert gqa.model(torch.tensor([tokens_of(60)] * 2), torch.arange(60))[0].shape[:2] == (2, 60)
    gqa.model.setup_caches(1, 30)
    cache = gqa.model.kv_cache
    generate(gqa.model, [tokens_of(40)], 3)
    with pytest.raises(KeyboardInterrupt):
        generate(gqa.model, [tokens_of(40)], 3, on_tokens=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert gqa.model.kv_cache is cache


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, names", [
    (dict(temperature=-1.0), "temperature -1.0"), (dict(temperature=float("nan")), "temperature nan"),
    (dict(temperature=float("inf")), "temperature inf"), (dict(temperature=1.0, top_k=0), "top_k 0"),
    (dict(top_p=0.0), "top_p 0.0"), (dict(top_p=1.5), "top_p 1.5"),
    (dict(seed=-1), "seed -1"), (dict(seed=2 ** 63), "seed"),
    (dict(max_new_tokens=0), "max_new_tokens is 0"), (dict(max_seq_length=0), "0"), (dict(prompts=[]), "no prompt"),
    (dict(prompts=[[1, 96]]), "token 96, the model's vocabulary has 96"), (dict(prompts=[[1], [-1]]), "token -1"),
])
def test_options_out_of_range_are_refused_by_name_and_value(gqa, options, names):
    arguments = dict(prompts=[[1, 2]], max_new_tokens=4) | options
    with pytest.raises(ValueError, match=names):
        generate(gqa.model, **arguments)
    sampling = Sampling(*(options.get(name) for name in ("temperature", "top_k", "top_p")))
    if "max_seq_length" not in options:
        with pytest.raises(ValueError, match=names):
            make_decoder(gqa.model, max(1, len(arguments["prompts"])), sampling=sampling._replace(
                temperature=options.get("temperature", 0.0))).generate(
                    arguments["prompts"], arguments["max_new_tokens"], seed=options.get("seed"))


def test_caches_that_do_not_fit_are_refused(gqa):
    gqa.model.kv_cache = None
    with pytest.raises(ValueError, match="setup_caches"):
        Decoder(gqa.model, 1)
    with pytest.raises(ValueError, match="4 rows.*2"):
        gqa.model.setup_caches(2, 40)
        Decoder(gqa.model, 4)
    decoder = make_decoder(gqa.model, 3, 40)
    with pytest.raises(ValueError, match="2 prompts for a decoder of 3 rows"):
        decoder.generate([[1], [2]], 4)
    for n_cached in (-1, 1, 9):
        with pytest.raises(ValueError, match=f"n_cached is {n_cached}"):
            decoder.generate([[1], [2, 3], [4]], 4, n_cached=n_cached)
    for tokens, names in (([[1] * 41], "41 tokens"), ([[1]] * 4, "4 rows"), ([1, 2], r"\[2\]"), ([[1.0]], "float32")):
        with pytest.raises(ValueError, match=names):
            gqa.model(torch.tensor(tokens), torch.arange(1))
    for rows, slots in ((0, 9), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            gqa.model.setup_caches(rows, slots)


# --- numbers that are not finite --------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("dtype, remedy", [(torch.float16, "bfloat16 or float32"),
                                           (torch.float32, "weights may hold NaN")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(1.0, 5), Sampling(1.0, 5, 0.9),
                                      Sampling(1.0, None, 0.9)])
def test_logits_that_are_not_finite_end_decoding_by_dtype_and_token(gqa, dtype, remedy, sampling):
    """fp16 ends at 65504: Qwen2 in it said "!" for ever, with exit status 0."""
    model = load(gqa.folder, dtype)
    decoder, seen = make_decoder(model, 2, 100, sampling), []
    fine = decoder.generate([[1, 2], [3]], 70, seed=0).tokens    # traced from here on
    model.layers[0].feed_forward.w2.weight.mul_(torch.inf if dtype == torch.float32 else 6e4)
    model.layers[0].feed_forward.w13.weight.mul_(100)
    with pytest.raises(ValueError, match=f"not finite in {str(dtype)[6:]} at new token 1 of prompt [12]: .*{remedy}"):
        decoder.generate([[1, 2], [3]], 70, seed=0, on_tokens=lambda *what: seen.append(what))
    assert not seen and len(fine[0]) == 70
    model.load_state_dict(load(gqa.folder, dtype).state_dict())
    assert decoder.generate([[1, 2], [3]], 70, seed=0).tokens == fine    # no NaN is left in the caches


@torch.no_grad()
def test_a_token_whose_embedding_is_nan_is_named_by_its_place(gqa):
    """Not at the first token, and not for a row that has finished."""
    model, prompts = load(gqa.folder), [tokens_of(9, seed=1), tokens_of(5, seed=2)]
    whole = [gqa.oracle(prompt, 20) for prompt in prompts]
    n, bad = next((n, token) for n, token in enumerate(whole[1])
                  if n > 3 and token not in sum(prompts, whole[0] + whole[1][:n]))
    model.tok_embeddings.weight[bad] = torch.nan
    with pytest.raises(ValueError, match=f"at new token {n + 2} of prompt 2"):
        generate(model, prompts, 20)
    assert generate(model, prompts, 20, stop_ids=[bad]).tokens[1] == whole[1][:n + 1]


# --- drawing ----------------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_text_and_another_seed_another(gqa):
    prompts = [tokens_of(9), tokens_of(4), tokens_of(9)]
    draw = lambda seed: generate(gqa.model, prompts, 30, temperature=1.5, seed=seed).tokens
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    decoder = make_decoder(gqa.model, 3, sampling=Sampling(1.5))
    assert decoder.generate(prompts, 30, seed=1).tokens == decoder.generate(prompts, 30, seed=1).tokens == draw(1)


def test_equal_prompts_in_one_batch_are_drawn_independently(gqa):
    rows = generate(gqa.model, [tokens_of(9)] * 8, 30, temperature=1.5, seed=0).tokens
    assert len(set(map(tuple, rows))) == 8


def test_without_a_seed_two_calls_draw_different_texts(gqa):
    first, second = (generate(gqa.model, [tokens_of(9)], 30, temperature=1.5).tokens for _ in range(2))
    assert first != second


def test_top_k_1_is_greedy_at_any_temperature(gqa):
    prompt = tokens_of(9)
    assert generate(gqa.model, [prompt], 20, temperature=3.0, top_k=1).tokens == [gqa.oracle(prompt, 20)]


@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(temperature=2.0, top_k=7),
                                     dict(temperature=1.7, top_p=0.8), dict(temperature=1.5, top_k=12, top_p=0.9)])
def test_drawn_tokens_follow_the_distribution_of_the_options(gqa, options):
    prompt, n = tokens_of(6), 4000
    logits = expected(gqa.hf, prompt)[0][-1].numpy()
    probs, _ = reference_probs(logits, **options)
    drawn = generate(gqa.model, [prompt] * n, 1, seed=0, **options).tokens
    assert_drawn_from(torch.tensor(drawn)[:, 0], probs)


def assert_drawn_from(drawn, probs):
    """Pearson's chi-square with p > 1e-3, tokens expected fewer than five times taken together; none impossible."""
    probs = np.asarray(probs, np.float64)
    seen, due = np.bincount(drawn.numpy(), minlength=len(probs)), probs * len(drawn)
    assert not seen[probs == 0].any()
    rare = due < 5
    seen, due = (np.append(x[~rare], x[rare].sum()) for x in (seen, due))
    seen, due = seen[due > 0], due[due > 0]
    statistic = ((seen - due) ** 2 / due).sum()
    half = torch.tensor([(len(due) - 1) / 2, statistic / 2], dtype=torch.float64)
    p_value = torch.special.gammaincc(*half).item() if len(due) > 1 else 1.0
    assert p_value > 1e-3, (p_value, statistic, len(due))


@pytest.mark.parametrize("name, probs", [
    ("uniform", np.full(64, 1 / 64)),
    ("geometric", 0.7 ** np.arange(64.0)),
    ("dominant", np.array([0.97, *[0.03 / 31] * 31])),
    ("nucleus", np.array([0, 0.4, 0, 0, 0.35, 0.25, 0])),
    ("pair", np.array([1e-4, 0.9999])),
])
def test_sample_draws_as_often_as_probable_and_never_what_is_impossible(name, probs):
    probs = probs / probs.sum()
    rows = torch.tensor(probs, dtype=torch.float32).expand(300_000, -1)
    assert_drawn_from(sample(rows), probs)


def test_sample_draws_the_only_possible_token():
    probs = torch.eye(50).repeat(200, 1)
    assert torch.equal(sample(probs), probs.argmax(-1))


def test_sample_keeps_every_leading_dimension():
    assert sample(torch.full((2, 3, 5), 0.2)).shape == (2, 3)


# --- from logits to probabilities -------------------------------------------------------------------------------------

GRID = [(temperature, top_k, top_p) for temperature in (0.3, 0.7, 1.0, 1.7) for top_k in (None, 1, 5, 40, 1000, 5000)
        for top_p in (None, 0.05, 0.5, 0.9, 0.99, 1.0)]


def reference_probs(logits, temperature, top_k=None, top_p=None):
    """float64, one row. Also the smallest distance of a cumulated mass from top_p: below rounding, either is right."""
    x = np.asarray(logits, np.float64) / temperature
    if top_k is not None and top_k < len(x):
        x = np.where(x >= np.sort(x)[-top_k], x, -np.inf)  # ties with the last one stay
    probs = np.exp(x - x.max())
    probs /= probs.sum()
    margin = 1.0
    if top_p is not None and top_p < 1:
        order = np.argsort(-probs, kind="stable")
        before = np.cumsum(probs[order]) - probs[order]
        margin = np.abs(before - top_p)[probs[order] > 0].min()
        probs[order[before >= top_p]] = 0
        probs /= probs.sum()
    return probs, margin


def random_logits(vocab, rows=12):
    scale = torch.tensor([0.5, 2.0, 8.0]).repeat(rows // 3)[:, None]
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * scale


@pytest.mark.parametrize("vocab", [30, 1000])
def test_probabilities_equal_a_float64_reference(vocab):
    logits, compared = random_logits(vocab), 0
    for options in GRID:
        ours = logits_to_probs(logits, *options)
        assert ours.dtype == torch.float32
        for row, probs in zip(logits.numpy(), ours.numpy()):
            theirs, margin = reference_probs(row, *options)
            if margin > 1e-5:
                compared += 1
                np.testing.assert_allclose(probs, theirs, rtol=2e-4, atol=1e-7, err_msg=str(options))
                assert np.array_equal(probs > 1e-20, theirs > 1e-20), options
    assert compared > 0.9 * len(GRID) * len(logits)


def test_probabilities_equal_those_of_the_warpers_of_transformers():
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits, compared = random_logits(200), 0
    for temperature, top_k, top_p in GRID:
        scores = TemperatureLogitsWarper(temperature)(None, logits)
        scores = scores if top_k is None else TopKLogitsWarper(top_k)(None, scores)
        scores = scores if top_p is None else TopPLogitsWarper(top_p)(None, scores)
        clear = torch.tensor([reference_probs(row, temperature, top_k, top_p)[1] > 1e-5 for row in logits.numpy()])
        compared += clear.sum().item()
        torch.testing.assert_close(logits_to_probs(logits, temperature, top_k, top_p)[clear],
                                   scores.softmax(-1)[clear], rtol=1e-4, atol=1e-7)
    assert compared > 0.9 * len(GRID) * len(logits)


def test_tied_logits_share_alike_and_the_nucleus_is_the_smallest():
    """Which of several tied tokens stay in the nucleus is open; how many, and with what mass, is not."""
    generator, compared = torch.Generator().manual_seed(0), 0
    logits = torch.randint(3, (60, 20), generator=generator).float()
    for top_k in (None, 1, 4, 15, 20, 25):
        for top_p in (None, 0.1, 0.35, 0.7, 0.95, 1.0):
            for row, probs in zip(logits.numpy(), logits_to_probs(logits, 0.8, top_k, top_p).numpy()):
                theirs, margin = reference_probs(row, 0.8, top_k, top_p)
                if margin > 1e-5:
                    compared += 1
                    np.testing.assert_allclose(np.sort(probs), np.sort(theirs), rtol=1e-4, atol=1e-7)
    assert compared > 1500
    quarter = logits_to_probs(torch.zeros(4), 1.0, None, 0.5)  # two reach 0.5 exactly
    assert sorted(quarter.tolist()) == [0, 0, 0.5, 0.5]
    assert logits_to_probs(torch.tensor([1.0, 3, 3, 2]), 1.0, 1).tolist() == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize("top_k, top_p", [(None, None), (5, 0.9)])
@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-37, 1e-39, 1e-45])
def test_greedy_is_the_limit_of_low_temperatures(temperature, top_k, top_p):
    logits = random_logits(100)
    greedy = logits_to_probs(logits, 0.0, top_k, top_p)
    assert torch.equal(greedy.argmax(-1), logits.argmax(-1)) and torch.equal(greedy.max(-1).values, torch.ones(12))
    torch.testing.assert_close(logits_to_probs(logits, temperature, top_k, top_p), greedy, rtol=0, atol=1e-4)


def test_probabilities_of_half_precision_logits_are_computed_in_fp32():
    logits = random_logits(1000).bfloat16()
    assert torch.equal(logits_to_probs(logits, 0.7, 50, 0.9), logits_to_probs(logits.float(), 0.7, 50, 0.9))


def test_probabilities_keep_every_leading_dimension():
    logits = random_logits(30).view(3, 4, 30)
    torch.testing.assert_close(logits_to_probs(logits, 0.7, 5, 0.9)[1, 2], logits_to_probs(logits[1, 2], 0.7, 5, 0.9))


# --- buckets ----------------------------------------------------------------------------------------------------------

def test_a_bucket_is_the_smallest_of_the_ladder_that_holds_the_length_and_wastes_at_most_a_third():
    ladder = sorted([128 << n for n in range(12)] + [192 << n for n in range(12)])
    for n_slot in (1, 100, 128, 129, 192, 500, 4096, 8192):
        for length in range(1, n_slot + 1):
            size = bucket(length, n_slot)
            assert size == min(next(step for step in ladder if step >= length), n_slot)
            assert length <= size <= n_slot and (length <= 128 or 3 * (size - length) <= size)


# --- compiled, packed -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A compiled decoder of a model of one layer, and an eager one of the same weights."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    folder, _ = tiny("gqa", tmp_path_factory.mktemp("compiled"), num_hidden_layers=1)
    yield make_decoder(load(folder), n_slot=140, compile=True), make_decoder(load(folder), n_slot=140)
    torch._dynamo.reset()


def test_compiled_decoding_equals_eager_decoding(compiled):
    decoder, eager = compiled
    prompt = tokens_of(120)  # then from the bucket of 128 slots into that of 140
    for _ in range(2):
        assert decoder.generate([prompt], 20).tokens == eager.generate([prompt], 20).tokens


def test_prompts_of_new_lengths_compile_nothing(compiled):
    """Or each turn of a chat would wait for the compiler, until dynamo reaches its limit and runs eager code."""
    from torch._dynamo.utils import counters

    decoder, eager = compiled
    decoder.generate([tokens_of(120)], 20)  # as above, if that ran
    graphs = counters["stats"]["unique_graphs"]
    for length in (2, 30):
        assert decoder.generate([tokens_of(length)], 5).tokens == eager.generate([tokens_of(length)], 5).tokens
    assert counters["stats"]["unique_graphs"] == graphs > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gqa", "qwen2", "llama2_tied", "mixtral", "qwen3_moe_mixed"])
def test_packed_modules_give_close_logits_and_text_that_the_plain_model_finds_likely(zoo, kind):
    z, prompt = zoo(kind), tokens_of(40)
    plain, packed = load(z.folder, torch.bfloat16), pack_for_cpu(load(z.folder, torch.bfloat16))
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert not any(type(module) in (torch.nn.Linear, RMSNorm) for module in packed.modules())
        assert isinstance(packed.output, PackedLinear)
    for length in (1, 7, 40):
        ours, theirs = (model(torch.tensor([prompt[:length]]), torch.arange(length))[0] for model in (packed, plain))
        assert_close(ours, theirs, tolerance=3e-2)
    text = generate(packed, [prompt], 20).tokens[0]
    logits = load(z.folder)(torch.tensor([prompt + text]), torch.arange(60))[0][0, 39:59]  # fp32
    chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < 0.05 * (logits.max() - logits.min())


def test_packed_norm_is_the_rms_norm_to_the_last_bit_but_one():
    norm = RMSNorm(48, 1e-5).to(torch.bfloat16).requires_grad_(False)
    norm.weight.normal_(1, 0.3)
    x = 3 * torch.randn(2, 5, 48).bfloat16()
    x[0, 0] *= 1e-3  # so small that eps matters
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
    assert torch.all((PackedRMSNorm(norm)(x).double() - exact).abs() <= 2 ** -8 * exact.abs())


@torch.inference_mode()
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (48, 64), (40, 33), (257, 96)])
def test_a_packed_fp32_linear_is_the_linear_but_for_rounding(shape, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], bias).requires_grad_(False)
    packed = PackedLinear(linear)
    assert torch.equal(packed.weight, linear.weight)
    traced = torch.jit.trace(packed, torch.randn(1, 2, shape[1]), check_trace=False)
    for lead in ((1,), (2,), (5,), (26,), (130,), (0,), (1, 1), (2, 7), (1, 0)):
        x = torch.randn(*lead, shape[1])
        wide = torch.cat((x, x), -1)[..., :shape[1]]    # not contiguous
        exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
        for ours in (packed(x), packed(wide)) + ((traced(x),) if len(lead) == 2 else ()):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gqa", "qwen2", "llama2_tied", "mixtral"])
def test_packed_fp32_models_decode_what_naive_decoding_does(zoo, kind):
    z, model, prompts = zoo(kind), load(zoo(kind).folder), [tokens_of(9), tokens_of(70)]
    kinds = {type(part) for part in pack_for_cpu(model).modules()}
    if torch.backends.mkldnn.is_available():
        assert PackedLinear in kinds and torch.nn.Linear not in kinds
    assert PackedRMSNorm not in kinds
    assert generate(model, prompts, 20).tokens == [z.oracle(prompt, 20) for prompt in prompts]


def test_packing_keeps_no_linear_beyond_its_turn(gqa, monkeypatch):
    """Or a model would be held twice until the last linear is packed."""
    alive, most = weakref.WeakSet(), []

    def pack(linear):
        alive.add(linear)
        most.append(len(alive))
        return torch.nn.Identity()

    monkeypatch.setattr(runtime, "can_pack", lambda weight: True)
    monkeypatch.setattr(runtime, "PackedLinear", pack)
    model = pack_for_cpu(load(gqa.folder))
    assert len(most) == 4 * len(model.layers) + 1 and max(most) <= 2    # a module's own: wqkv and wo, or w13 and w2


def test_fp16_and_other_devices_are_not_packed():
    with torch.device("meta"):
        assert not can_pack(torch.empty(2, 2))
    assert not can_pack(torch.empty(2, 2, dtype=torch.float16))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_only_eagle_in_bf16_without_instructions_for_it_is_faster_in_fp32(gqa, monkeypatch):
    def forge(knows_bf16):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: knows_bf16)

    def asked(model):
        return is_faster_in_float32(types.SimpleNamespace(target=model))

    model = load(gqa.folder, torch.bfloat16)
    for knows_bf16 in (False, True):
        forge(knows_bf16)
        assert can_pack(model.output.weight) == knows_bf16
        assert asked(model) == (not knows_bf16)
        assert not asked(load(gqa.folder, torch.float32)) and not asked(load(gqa.folder, torch.float16))
    forge(False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not asked(model)     # fp32 would not be packed either
    assert asked(pack_for_cpu(model))
    quantize_in_place(model, Format("int8"))
    assert not asked(model)


# --- the real model ---------------------------------------------------------------------------------------------------

QUESTIONS = ["Why is the sky blue?", "Name three birds.", "Write a short poem about rain.", "Tell me a joke.",
             "What is the capital of France?", "How do I boil an egg?", "Explain gravity to a child.",
             "What is 12 plus 30?", "Who was Ada Lovelace?", "Où est la bibliothèque ?"]


def test_greedy_text_of_the_demo_model_equals_transformers(demo_folder):
    """Ten prompts of 64 new tokens, one ragged batch on either side; past the end of an answer too."""
    import transformers

    from tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(demo_folder)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in QUESTIONS]
    result = generate(Transformer.from_pretrained(demo_folder, dtype=torch.float32), prompts, 64)

    transformers.utils.logging.disable_progress_bar()
    hf = transformers.AutoModelForCausalLM.from_pretrained(demo_folder, dtype=torch.float32).eval()
    hf.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])  # on the left
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = hf.generate(padded, attention_mask=seen, max_new_tokens=64, do_sample=False, pad_token_id=0)[:, width:]
    assert result.tokens == theirs.tolist()
    assert [len(ids) for ids in result.tokens] == [64] * 10
    assert [tokenizer.decode(ids) for ids in result.tokens] == [tokenizer.decode(ids) for ids in theirs.tolist()]
    assert "Paris" in tokenizer.decode(result.tokens[4])
