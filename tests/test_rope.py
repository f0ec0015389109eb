"""Long contexts: RoPE of each type, and layers with a sliding window, against transformers past the original context.

    python -m pytest tests/test_rope.py -q

The models have an original context of 32 tokens, or a window of 16. Shapes: B batch, T new tokens, S cache slots.
"""
import dataclasses
import functools

import pytest
import torch
from reference import assert_close, edited_json, expected, randomize, tiny, tokens_of
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import model as model_module
import quantize
from decoder import Decoder, generate, setup_caches
from draft_tree import load_tree
from eagle_head import Eagle3Head, EagleHead
from head_config import Eagle3Spec
from model import Transformer
from rope import attention_factor, knows_length, rope_inv_freq
from scripts.batching import Request, Rows
from test_eagle import head_config, head_weights, write_head
from train_data import Dialogue
from train_features import Features

ORIGINAL, WINDOW, N_SLOT = 32, 16, 128
TABLES = dict(short_factor=[1.0, 1.1, 1.3, 1.7], long_factor=[1.5, 2.5, 4.0, 8.0])
ROPES = {
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=ORIGINAL),
    "yarn_all": dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=ORIGINAL, beta_fast=16.0,
                     beta_slow=0.5, mscale=1.2, mscale_all_dim=0.4, truncate=False),
    "yarn_factor": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, attention_factor=1.4),
    "longrope": dict(rope_type="longrope", original_max_position_embeddings=ORIGINAL, **TABLES),
    "longrope_factor": dict(rope_type="longrope", original_max_position_embeddings=ORIGINAL, factor=16.0, **TABLES),
    "dynamic": dict(rope_type="dynamic", factor=4.0),
}
ROPE = lambda name: dict(rope=ROPES[name], rope_theta=100.0, max_position_embeddings=(
    ORIGINAL if name == "dynamic" else N_SLOT))
WINDOWED = dict(use_sliding_window=True, sliding_window=WINDOW, max_position_embeddings=N_SLOT)
# name -> kind of reference.py, and its keys
CASES = {name: ("llama2", ROPE(name)) for name in ROPES} | {
    "llama3": ("llama3.1", dict(max_position_embeddings=N_SLOT)),
    "yarn of qwen3": ("qwen3", ROPE("yarn") | dict(rope=ROPES["yarn"])),
    "mistral": ("mistral", dict(sliding_window=WINDOW, max_position_embeddings=N_SLOT)),
    "mixtral": ("mixtral", dict(sliding_window=WINDOW, max_position_embeddings=N_SLOT)),
    "qwen2, last layer": ("qwen2", WINDOWED | dict(max_window_layers=1)),
    "qwen2, first layer": ("qwen2", WINDOWED | dict(layer_types=["sliding_attention", "full_attention"])),
    "qwen3, all layers": ("qwen3", WINDOWED | dict(max_window_layers=0)),
    "qwen3_moe": ("qwen3_moe", WINDOWED),
    "window and yarn": ("mistral", ROPE("yarn") | dict(sliding_window=WINDOW, head_dim=8)),
    "window and dynamic": ("mistral", ROPE("dynamic") | dict(sliding_window=WINDOW, head_dim=8)),
}
# One of each mechanism, for the slower tests.
FEW = ["yarn", "longrope", "dynamic", "mistral", "qwen2, last layer", "window and dynamic"]
BY_LENGTH = ["longrope", "dynamic", "window and dynamic"]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """case(name) -> our model and transformers', with the same weights."""
    @functools.cache
    def make(name):
        kind, keys = CASES[name]
        folder, hf = tiny(kind, tmp_path_factory.mktemp("case"), **keys)
        return Transformer.from_pretrained(folder, dtype=torch.float32), hf
    return make


def model_of(case, name, rows=1):
    model = case(name)[0]
    model.setup_caches(rows, N_SLOT)
    return model


def forget(hf):
    """transformers keeps the frequencies of the longest text that it has seen."""
    if hasattr(hf.model.rotary_emb, "original_inv_freq"):
        hf.model.rotary_emb.inv_freq = hf.model.rotary_emb.original_inv_freq.clone()
        hf.model.rotary_emb.max_seq_len_cached = ORIGINAL


def whole(hf, tokens):
    """Logits [T, V] and features [T, dim] of transformers without a cache."""
    forget(hf)
    return expected(hf, tokens)


@torch.no_grad()
def with_cache(hf, tokens, n_prompt):
    """Logits [T, V] of transformers: the prompt in one pass, then token by token."""
    forget(hf)
    out = hf(torch.tensor([tokens[:n_prompt]]), use_cache=True)
    logits = [out.logits[0]]
    for i in range(n_prompt, len(tokens)):
        out = hf(torch.tensor([tokens[i:i + 1]]), position_ids=torch.tensor([[i]]), past_key_values=out.past_key_values,
                 use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits)


@torch.no_grad()
def cached(model, tokens, n_prompt):
    """The same of ours."""
    at = torch.arange(len(tokens))
    logits = [model(torch.tensor([tokens[:n_prompt]]), at[:n_prompt])[0][0]]
    return torch.cat(logits + [model(torch.tensor([tokens[i:i + 1]]), at[i:i + 1])[0][0]
                               for i in range(n_prompt, len(tokens))])


# ---------------------------------------------------------------------------------------------------------------------
# against transformers

@pytest.mark.parametrize("name", [name for name in ROPES if name != "dynamic"])
def test_frequencies_and_attention_factor_are_those_of_transformers(case, name):
    model, hf = case(name)
    for row, length in enumerate((None, ORIGINAL + 1)[:2 if "longrope" in name else 1]):
        theirs, factor = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](hf.config, "cpu", seq_len=length)
        ours = rope_inv_freq(model.config)
        torch.testing.assert_close(ours[row] if "longrope" in name else ours, theirs)
        assert attention_factor(model.config.rope_scaling) == pytest.approx(factor)
    assert factor != 1


@pytest.mark.parametrize("name", CASES)
def test_a_text_past_the_original_context_is_that_of_transformers_without_a_cache(case, name):
    model, hf = case(name)
    for length in (ORIGINAL - 2, 3 * ORIGINAL):
        tokens = tokens_of(length)
        model.kv_cache = None
        logits, features = model(torch.tensor([tokens]), torch.arange(length))
        theirs, their_features = whole(hf, tokens)
        assert_close(logits[0], theirs)
        assert_close(features[0], their_features)
        model.setup_caches(1, N_SLOT)
        assert_close(model(torch.tensor([tokens]), torch.arange(length))[0][0], theirs)


@pytest.mark.parametrize("n_prompt", [5, 31, 45])
@pytest.mark.parametrize("name", CASES)
def test_decoding_token_by_token_is_that_of_transformers_with_its_cache(case, name, n_prompt):
    model, tokens = model_of(case, name), tokens_of(3 * ORIGINAL)
    assert_close(cached(model, tokens, n_prompt), with_cache(case(name)[1], tokens, n_prompt))


@pytest.mark.parametrize("name", FEW)
def test_old_and_new_style_config_json_give_the_same_config(tmp_path, name):
    kind, keys = CASES[name]
    configs = [Transformer.from_pretrained(tiny(kind, tmp_path / str(old), old_style=old, **keys)[0]).config
               for old in (True, False)]
    assert configs[0] == configs[1]


def test_longrope_may_have_its_original_context_beside_rope_scaling_as_phi_3_has_it(case, tmp_path):
    folder, _ = tiny("llama2", tmp_path, **ROPE("longrope"))
    with edited_json(folder / "config.json") as config:
        config["original_max_position_embeddings"] = config["rope_scaling"].pop("original_max_position_embeddings")
    assert Transformer.from_pretrained(folder).config == case("longrope")[0].config


# ---------------------------------------------------------------------------------------------------------------------
# prompts in chunks and in batches

def prefilled(model, prompts, chunk):
    """Keys and values of the prompts, and the logits after each."""
    last = {}
    for part in model_module.prefill(model, prompts, chunk=chunk):
        for row, prompt in enumerate(prompts):
            at = len(prompt) - 1 - int(part.pos[row, 0])
            if 0 <= at < part.pos.shape[1]:
                last[row] = model.output(part.hidden[row, at])
    return model.kv_cache.clone(), torch.stack([last[row] for row in range(len(prompts))])


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_a_prompt_prefilled_in_chunks_is_the_whole_prompt_of_transformers(case, name):
    prompt = tokens_of(3 * ORIGINAL)
    at_once, logits = prefilled(model_of(case, name), [prompt], 512)
    parts, chunked = prefilled(model_of(case, name), [prompt], 7)
    assert_close(parts, at_once)
    assert_close(chunked, logits)
    assert_close(chunked[0], whole(case(name)[1], prompt)[0][-1])


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_each_row_of_a_padded_batch_gets_the_frequencies_of_its_own_prompt(case, name):
    prompts = [tokens_of(n, seed=n) for n in (20, 90, 40)]
    cache, logits = prefilled(model_of(case, name, 3), prompts, 30)
    for row, prompt in enumerate(prompts):
        alone, theirs = prefilled(model_of(case, name), [prompt], 512)
        assert_close(cache[:, :, row, :, :len(prompt)], alone[:, :, 0, :, :len(prompt)])
        assert_close(logits[row], theirs[0])


@pytest.mark.parametrize("name", FEW)
def test_rows_of_different_length_get_what_each_gets_alone(case, name):
    model = case(name)[0]
    prompts = [tokens_of(n, seed=n) for n in (10, 60, 33)]
    together = generate(model, prompts, 40).tokens
    assert together == [generate(model, [prompt], 40).tokens[0] for prompt in prompts]


# ---------------------------------------------------------------------------------------------------------------------
# trees

@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_each_node_of_a_tree_gets_what_its_path_gets_token_by_token(case, name):
    """Two branches of 20 nodes from a root at position 28, in turns: their slots are not their positions, and they pass
    the original context and the window."""
    model, prompt = model_of(case, name), tokens_of(28)
    parents = [0, 0, *range(39)]
    tokens, N = tokens_of(len(parents), seed=1), len(parents)
    paths = []
    for node in range(N):
        path = [node]
        while path[0]:
            path.insert(0, parents[path[0]])
        paths.append(path)
    begin = len(prompt)
    mask = torch.zeros(1, N, N_SLOT, dtype=torch.bool)
    mask[..., :begin] = True
    for node, path in enumerate(paths):
        mask[0, node, [begin + i for i in path]] = True
    pos = torch.tensor([[begin + len(path) - 1 for path in paths]])
    model(torch.tensor([prompt]), torch.arange(begin))
    logits, _ = model(torch.tensor([tokens]), pos, begin + torch.arange(N), mask)
    for node in (0, 7, N - 2, N - 1):
        text = prompt + [tokens[i] for i in paths[node]]
        assert_close(logits[0, node], cached(model, text, begin)[-1])


def eagle1(model, **changes):
    config = dataclasses.replace(model.config, n_layer=1, n_expert=0, qkv_bias=False, qk_norm=False,
                                 sliding_window=None, full_layers=(), **changes)
    head = EagleHead(config, model)
    randomize(head, seed=1)
    return head.eval()


def eagle3(model, **changes):
    config = eagle1(model, **changes).config
    head = Eagle3Head(Eagle3Spec(config, config.dim, (0, 1), config.vocab_size, False), model)
    randomize(head, seed=1)
    head.own_ids = torch.arange(config.vocab_size)
    head.set_draft_vocab(None)
    return head.eval()


HEADS = {"chain": (eagle1, "chain"), "tree": (eagle1, "static"), "dynamic tree": (eagle1, "dynamic:4,4,20"),
         "EAGLE-3": (eagle3, "dynamic:4,4,20")}


@pytest.mark.parametrize("tree", HEADS)
@pytest.mark.parametrize("name", FEW)
def test_greedy_eagle_equals_plain_decoding(case, name, tree):
    """A prompt within the original context and the window, and one past them; traced steps too."""
    model, (make, spec) = case(name)[0], HEADS[tree]
    head = make(model)
    for n_prompt in (12, 50):
        prompt = tokens_of(n_prompt)
        plain = generate(model, [prompt], 60).tokens
        drafted = generate(model, [prompt], 60, head=head, tree=spec)
        assert drafted.tokens == plain
        assert generate(model, [prompt], 60, copy=6).tokens == plain


@pytest.mark.parametrize("name", FEW)
def test_rows_of_a_batch_with_a_tree_equal_plain_decoding(case, name):
    model = case(name)[0]
    prompts = [tokens_of(n, seed=n) for n in (10, 60, 33)]
    plain = generate(model, prompts, 50).tokens
    assert generate(model, prompts, 50, head=eagle1(model), tree="static").tokens == plain


@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("tree", ["plain", "static"])
def test_a_row_that_ended_past_the_slots_that_others_read_spoils_nothing(case, tree, is_exact, monkeypatch):
    """It sees none of them in its window, and a softmax over nothing is NaN: with exact attention, not in torch's."""
    name = "mistral"
    monkeypatch.setattr(case(name)[0], "is_exact", is_exact)
    model, prompts = case(name)[0], [tokens_of(90, seed=90), tokens_of(10, seed=10)]
    head = None if tree == "plain" else eagle1(model)
    alone = [generate(model, [prompt], 20).tokens[0] for prompt in prompts]
    setup_caches(model, head, 2, N_SLOT)
    decoder = Decoder(model, 2, head=head, tree=None if head is None else load_tree(tree))
    for _ in range(2):
        result = decoder.generate(prompts, 20, stop=lambda prompt: lambda token: len(prompt) == 90)
        assert result.tokens == [alone[0][:1], alone[1]]
        assert model.kv_cache.isfinite().all()


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("tree", ["plain", "static", "dynamic:4,4,20"])
def test_a_traced_step_freezes_no_branch(case, name, tree):
    """The trace is recorded within the original context and the window, and replayed past them."""
    model, prompt = case(name)[0], tokens_of(10)
    head = None if tree == "plain" else eagle1(model)
    plain = generate(model, [prompt], 100).tokens
    setup_caches(model, head, 1, N_SLOT)
    decoder = Decoder(model, 1, head=head, tree=None if head is None else load_tree(tree))
    assert decoder.can_trace
    assert decoder.generate([prompt], 100).tokens == plain
    assert decoder.traces
    assert decoder.generate([tokens_of(60)], 60).tokens == generate(model, [tokens_of(60)], 60).tokens


def test_compiled_layers_give_the_same(tmp_path):
    kind, keys = CASES["window and dynamic"]
    model = Transformer.from_pretrained(tiny(kind, tmp_path, **keys)[0], dtype=torch.float32)
    prompt = tokens_of(20)
    plain = generate(model, [prompt], 40).tokens
    assert generate(model, [prompt], 40, head=eagle1(model), tree="static", compile=True).tokens == plain


# ---------------------------------------------------------------------------------------------------------------------
# the data writer, training and quantisation

@pytest.mark.parametrize("name", FEW)
def test_rows_in_pages_say_what_each_prompt_gets_alone(case, name):
    """Prompts that begin alike share what they may: none passes the original context, or its keys are its own."""
    model = case(name)[0]
    prompts = [tokens_of(20, seed=0) + tokens_of(n, seed=n) for n in (1, 5, 70, 9, 3, 60, 2)]
    requests = [Request(prompt, 30) for prompt in prompts]
    waiting, rows = list(requests), Rows(model, 3, N_SLOT, group=2, keep_features=True)
    rows.pages.cache.fill_(torch.nan)
    assert len(list(rows.run(lambda: waiting.pop(0) if waiting else None))) == len(prompts)
    for request in requests:
        assert request.tokens == generate(model, [request.prompt], 30).tokens[0]
    assert rows.n_copied > 0


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_features_to_train_on_are_those_of_transformers_whatever_the_batch(case, name):
    model, hf = case(name)
    model.kv_cache = None
    rows = [tokens_of(n, seed=n) for n in (20, 90, 40)]
    features = Features(model, [Dialogue(1, torch.tensor(row), torch.ones(len(row)).bool()) for row in rows])
    states = features.states([0, 1, 2])
    for row, ours in zip(rows, states):
        assert_close(ours[:len(row)], whole(hf, row)[1])


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_calibration_passes_dialogues_through_the_layers_as_the_model_does(case, name):
    model = case(name)[0]
    model.kv_cache = None
    calibration = object.__new__(quantize.Calibration)
    calibration.config, calibration.inv_freq = model.config, model.inv_freq
    tokens = torch.tensor([tokens_of(90)])
    x = model.tok_embeddings(tokens)
    for layer in model.layers:
        x = calibration._run(layer, x)
    assert_close(model.norm(x), model.features(tokens, torch.arange(90)))


# ---------------------------------------------------------------------------------------------------------------------
# heads

@torch.no_grad()
@pytest.mark.parametrize("name", ["yarn", "longrope", "dynamic"])
@pytest.mark.parametrize("make", [eagle1, eagle3])
def test_a_head_rotates_by_its_own_config(case, name, make):
    """A draft gets its frequencies from its position, a prompt from its length."""
    model = model_of(case, name)
    head = make(model)
    head.kv_cache = None
    width = head.config.dim * (2 if make is eagle3 else 1)
    tokens, features = torch.tensor([tokens_of(60)]), torch.randn(1, 60, width)
    whole = head(tokens, features, torch.arange(60))
    head.setup_caches(1, N_SLOT)
    parts = [head(tokens[:, i:i + 20], features[:, i:i + 20], torch.arange(i, i + 20),
                  mask=torch.ones(20, 60).tril(i).bool()[None], rope_length=torch.tensor([[60]])) for i in (0, 20, 40)]
    assert_close(torch.cat(parts, 1), whole)
    plain = make(model, rope_scaling=None)
    plain.kv_cache = None
    assert (plain(tokens, features, torch.arange(60)) - whole).abs().max() > 1e-2
    mask = torch.ones(60, 60).tril().bool()[None]
    head.kv_cache = None
    own = head(tokens, features, torch.arange(60), mask=mask)
    assert torch.allclose(own, whole, atol=1e-5) != knows_length(head.config.rope_scaling)


@torch.no_grad()
def test_a_head_in_a_folder_has_the_rope_of_its_config_json(case, tmp_path):
    model = case("yarn")[0]
    config = head_config(model) | dict(rope_theta=100.0, rope_scaling=ROPES["yarn"], max_position_embeddings=N_SLOT)
    write_head(tmp_path, config, head_weights(config, model.tok_embeddings.weight))
    head = EagleHead.from_pretrained(tmp_path, model)
    assert head.config.rope_scaling == model.config.rope_scaling
    torch.testing.assert_close(head.inv_freq, model.inv_freq)
    prompt = tokens_of(50)
    drafted = generate(model, [prompt], 40, head=head, tree="static")
    assert drafted.tokens == generate(model, [prompt], 40).tokens


def test_a_model_without_windows_has_one_bias_for_all_layers(case):
    model = model_of(case, "yarn")
    mask = torch.ones(1, 1, 8, dtype=torch.bool)
    full, in_window = model.shown(mask, torch.tensor([[7]]), torch.tensor([[7]]), torch.float32)
    assert full is in_window
    model = model_of(case, "mistral")
    full, in_window = model.shown(torch.ones(1, 1, 64, dtype=torch.bool), torch.tensor([[63]]), torch.tensor([[63]]),
                                  torch.float32)
    assert (full == 0).all() and (in_window[..., -WINDOW:] == 0).all() and (in_window[..., :-WINDOW] < 0).all()
    model.setup_caches(1, WINDOW)
    full, in_window = model.shown(mask, torch.tensor([[7]]), torch.tensor([[7]]), torch.float32)
    assert full is in_window
