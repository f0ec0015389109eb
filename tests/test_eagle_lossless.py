"""EAGLE changes no token: greedy decoding exactly, sampling in distribution.

    python -m pytest tests/test_eagle_lossless.py -q

Shapes: B batch, N tree nodes including the root, D tree depth, V vocabulary.
"""
import copy
import functools

import pytest
import torch

from config import ModelArgs
from decoder import Decoder, setup_caches
from draft_tree import DynamicTree, StaticTree
from eagle_head import EagleHead
from eagle_step import Accepted, EagleStep
from generate import generate
from model import Transformer
from reference import VOCAB, naive_decode, tiny, tokens_of
from sampling import Sampling

KINDS = ("gqa", "llama2", "qwen2", "mixtral", "gqa", "qwen3_moe", "qwen3_moe_mixed")   # 7: each has seeds of all kinds
# Cache slots: a few EAGLE steps, then plain ones where the tree no longer fits.
TREES = {"chain": (StaticTree.chain(3), 16), "paper": (StaticTree.paper(), 34), "dynamic": (DynamicTree(3, 3, 8), 18)}
all_trees = pytest.mark.parametrize("tree, n_slot", TREES.values(), ids=list(TREES))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class PartlyRightHead(EagleHead):
    """A random head that is right with chance `right` where `known` holds the next token, by position in the row."""
    known: torch.Tensor | None = None       # [B, S] tokens of greedy decoding; -1 where the head is not told
    right = 0.5

    def forward(self, tokens, features, input_pos, *rest, **kwargs):
        out = super().forward(tokens, features, input_pos, *rest, **kwargs)
        if self.known is None:
            return out
        pos = input_pos.expand(tokens.shape)        # the pair at position i drafts token i + 2
        following = self.known.gather(1, (pos + 2).clamp(max=self.known.shape[1] - 1))
        chance = (pos * 37 + tokens * 11 + 5) % 16 / 16    # of the draft so far, so that trees are right here and there
        rows = self.target.output.weight
        told = 20 * rows[following] / rows[following].norm(dim=-1, keepdim=True)
        return torch.where(((following >= 0) & (chance < self.right))[..., None], told, out)

    def tell(self, sequences, told=None):
        """sequences: prompt and continuation of each row; told: which rows, default all."""
        if not sequences:
            self.known = None
            return
        width = max(map(len, sequences)) + 64
        told = range(len(sequences)) if told is None else told
        self.known = torch.tensor([(row if b in told else []) + [-1] * (width - len(row) * (b in told))
                                   for b, row in enumerate(sequences)])


def head_of(target, scale=0.3):
    head = PartlyRightHead(ModelArgs(**vars(target.config) | dict(n_layer=1, n_expert=0, qk_norm=False)), target)
    randomise(head, scale)
    head.layer.ffn_norm.weight.fill_(1)
    return head


def randomise(module, scale):
    for parameter in module.parameters():
        parameter.normal_(0, scale)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """zoo(kind) -> a tiny target."""

    @functools.cache
    def load_kind(kind):
        overrides = {"mixtral": dict(num_local_experts=4, num_hidden_layers=1), "llama2": dict(num_hidden_layers=1)}
        folder, _ = tiny(kind, tmp_path_factory.mktemp(kind), **overrides.get(kind, {}))
        return Transformer.from_pretrained(folder, device="cpu", dtype=torch.float32)

    return load_kind


@pytest.fixture
def llama(zoo):
    """Target, head told what follows, three ragged prompts, and 40 tokens of naive decoding of each."""
    target = zoo("llama2")
    head = head_of(target)
    prompts = [tokens_of(n, seed=n) for n in (3, 7, 1)]
    wanted = [naive_decode(target, prompt, 40) for prompt in prompts]
    head.tell([p + w for p, w in zip(prompts, wanted)])
    return target, head, prompts, wanted


def cut(tokens, stop_ids):
    """As plain decoding stops: at the first stop token, which is kept."""
    stops = [n for n, i in enumerate(tokens) if i in stop_ids]
    return (tokens[:stops[0] + 1], "stop") if stops else (tokens, "length")


# ---------------------------------------------------------------------------------------------------------------------
# Greedy

@pytest.mark.parametrize("seed", range(70))
def test_greedy_eagle_equals_plain_decoding_to_the_last_slot_of_the_cache(zoo, seed):
    """Chain, paper tree and dynamic tree; alone and in a ragged batch; all tokens drafted and few; a random head and
    one that is right half of the time, by turns or, in the batch, side by side."""
    target = zoo(KINDS[seed % len(KINDS)])
    torch.manual_seed(seed)
    head = head_of(target)
    prompts = [tokens_of(1 + int(torch.randint(7, ())), seed=100 * seed + row) for row in range(3)]
    wanted = [naive_decode(target, prompt, TREES["paper"][1] - len(prompt)) for prompt in prompts]
    sequences = [p + w for p, w in zip(prompts, wanted)]
    vocab = torch.randperm(VOCAB)[:VOCAB // 3].tolist()
    one, told = seed % 3, [(seed + 1) % 3, (seed + 2) % 3]
    accepted = []
    for tree, n_slot in TREES.values():
        for ids, alone in ((None, seed % 2), (vocab, 1 - seed % 2)):
            head.set_draft_vocab(ids)
            for rows, known in (([one], [sequences[one]] if alone else []), ([0, 1, 2], sequences)):
                head.tell(known, told if len(rows) > 1 else None)
                result = generate(target, [prompts[row] for row in rows], 99, head=head, tree=tree,
                                  max_seq_length=n_slot)
                for row, tokens, lengths in zip(rows, result.tokens, result.accept_lengths):
                    assert tokens == wanted[row][:n_slot - len(prompts[row])], (tree, ids, rows, row)
                    cut_off = 1 + sum(lengths) - len(tokens)    # by the end of the cache; one is the prefill's
                    assert 0 <= cut_off < max(lengths[-1:], default=1)
                assert result.finish_reason == ["length"] * len(rows)
                if known and ids is None:
                    accepted += [n for row in result.accept_lengths for n in row]
    assert max(accepted) > 1, "some drafts should be accepted"


@pytest.mark.parametrize("tree", [StaticTree.chain(1), StaticTree.from_paths([[1], [3], [1, 2]]), DynamicTree(1, 3, 3),
                                  DynamicTree(2, 5, 31), DynamicTree(6, 4, 12), DynamicTree(5, 6, 7)], ids=str)
def test_greedy_eagle_equals_plain_decoding_with_any_tree(llama, tree):
    target, head, prompts, wanted = llama
    result = generate(target, prompts, 40, head=head, tree=tree)
    assert result.tokens == wanted
    n_slot = max(tree.n_room, 7) + 5
    result = generate(target, prompts, 40, head=head, tree=tree, max_seq_length=n_slot)
    assert result.tokens == [w[:n_slot - len(p)] for p, w in zip(prompts, wanted)]


@all_trees
def test_a_head_that_is_right_makes_the_longest_steps(llama, tree, n_slot):
    target, head, prompts, wanted = llama
    head.right = 1.0
    result = generate(target, prompts, 40, head=head, tree=tree)
    assert result.tokens == wanted
    assert result.mean_accept_length > 0.8 * (tree.depth + 1)


@all_trees
def test_a_stop_or_a_limit_inside_a_step_cuts_where_plain_decoding_stops(llama, tree, n_slot):
    target, head, prompts, wanted = llama
    cuts = set()
    decoder = decoder_of(target, head, tree, 3, 80)
    for n in range(1, 9):
        for right in (0.5, 1.0):
            head.right = right
            for stop_ids, limit in (((), n), ({wanted[0][n], wanted[1][2 * n]}, 30)):
                streamed = [[], [], []]
                result = decoder.generate(prompts, limit, stop_ids=stop_ids,
                                          on_tokens=lambda row, ids, n_draft: streamed[row].append((ids, n_draft)))
                for row in range(3):
                    tokens, reason = cut(wanted[row][:limit], stop_ids)
                    assert result.tokens[row] == tokens and result.finish_reason[row] == reason
                    lengths = result.accept_lengths[row]
                    cut_off = 1 + sum(lengths) - len(tokens)
                    assert 0 <= cut_off < max(lengths[-1:], default=1)      # of the last step only
                    cuts.add(cut_off)
                    assert [i for ids, _ in streamed[row] for i in ids] == tokens
                    assert [n_draft + 1 for _, n_draft in streamed[row]] == [1, *lengths]
    assert cuts == set(range(tree.depth + 1)), "stops should fall on every place of a step"


@all_trees
def test_once_a_tree_no_longer_fits_all_rows_are_plain_to_the_end(zoo, tree, n_slot, monkeypatch):
    """The head has not seen what plain steps said: drafts that went on from there would be wrong for nothing."""
    target = zoo("gqa")
    head = head_of(target)
    prompts = [tokens_of(n_slot - 3, seed=1), tokens_of(2, seed=2)]
    decoder, kinds = decoder_of(target, head, tree, 2, n_slot), []
    run = decoder.run
    monkeypatch.setattr(decoder, "run", lambda eagle, length: (kinds.append(eagle), run(eagle, length))[1])
    result = decoder.generate(prompts, 12)
    assert result.tokens == [naive_decode(target, prompts[0], 3), naive_decode(target, prompts[1], 12)]
    assert kinds == sorted(kinds, reverse=True) and kinds.count("plain") > 3


def test_a_head_and_a_model_that_do_not_belong_together_are_refused(zoo):
    target, other = zoo("gqa"), zoo("llama2")
    head, tree = head_of(target), StaticTree.chain(2)
    with pytest.raises(ValueError, match="head without caches"):
        target.setup_caches(1, 40)
        Decoder(target, 1, head=head, tree=tree)
    setup_caches(other, head, 1, 40)
    with pytest.raises(ValueError, match="another target"):
        Decoder(other, 1, head=head, tree=tree)
    setup_caches(target, head, 1, 40)
    head.setup_caches(1, 32)
    with pytest.raises(ValueError, match="32 slots.*40"):
        Decoder(target, 1, head=head, tree=tree)
    setup_caches(target, head, 1, 40)
    with pytest.raises(ValueError, match="is no tree"):
        EagleStep(target, head, [[0]], 1)
    with pytest.raises(ValueError, match="temperature -1"):
        EagleStep(target, head, tree, 1, Sampling(-1.0))
    assert Decoder(target, 1, head=head).eagle.tree == StaticTree.paper()    # where none is named


def test_a_kept_eagle_decoder_goes_on_with_its_own_caches(zoo):
    target = zoo("gqa")
    head = head_of(target)
    prompts = [tokens_of(n, seed=n) for n in (20, 9, 12)]
    decoder = decoder_of(target, head, StaticTree.chain(2), 1, 120)
    first = decoder.generate(prompts[:1], 64)
    wanted = decoder.generate(prompts[2:], 64)
    caches = target.kv_cache, head.kv_cache
    generate(target, prompts[1:], 20, head=head)
    assert target.kv_cache is caches[0] and head.kv_cache is caches[1]
    assert decoder.generate(prompts[:1], 64).accept_lengths == first.accept_lengths
    generate(target, prompts[:1], 20, head=head)
    again = decoder.generate(prompts[2:], 64)
    assert (again.tokens, again.accept_lengths) == (wanted.tokens, wanted.accept_lengths)


def decoder_of(target, head, tree, batch, n_slot, **options):
    setup_caches(target, head, batch, n_slot)
    return Decoder(target, batch, head=head, tree=tree, **options)


@all_trees
def test_rows_that_have_finished_do_not_disturb_running_ones(zoo, tree, n_slot):
    """One row stops at once and idles, to the end of the cache and beyond, while others go on to the last slot."""
    target = zoo("gqa")
    head = head_of(target)
    for seed in range(4):
        prompts = [tokens_of(n, seed=10 * seed + n) for n in (2, 6, 4)]
        wanted = [naive_decode(target, prompt, n_slot + 20 - len(prompt)) for prompt in prompts]
        head.tell([p + w for p, w in zip(prompts, wanted)])
        head.right = 1.0 if seed % 2 else 0.5
        for stop_ids in ({wanted[seed % 3][0]}, {wanted[0][0], wanted[1][0]}):
            result = generate(target, prompts, 99, head=head, tree=tree, stop_ids=stop_ids, max_seq_length=n_slot + 20)
            expected = [cut(row, stop_ids) for row in wanted]
            assert result.tokens == [tokens for tokens, _ in expected]
            assert result.finish_reason == [reason for _, reason in expected]


def test_a_row_that_ends_on_the_last_slot_in_one_long_step_may_idle_there(zoo):
    """Its root is then one past the cache, while plain steps go on with the other row. With other lengths an index was
    out of bounds; on a GPU that is somebody else's memory."""
    target = zoo("gqa")
    head = head_of(target)
    head.right = 1.0
    prompts = [tokens_of(n, seed=n) for n in (7, 5)]
    wanted = [naive_decode(target, prompt, 40 - len(prompt)) for prompt in prompts]
    head.tell([p + w for p, w in zip(prompts, wanted)])
    for n_slot in range(12, 36):
        result = generate(target, prompts, 99, head=head, tree=StaticTree.chain(3), max_seq_length=n_slot)
        assert result.tokens == [row[:n_slot - len(prompt)] for prompt, row in zip(prompts, wanted)], n_slot


@all_trees
def test_a_decoder_serves_many_prompts_one_after_another(llama, tree, n_slot):
    target, head, prompts, wanted = llama
    head.tell([])
    decoder = decoder_of(target, head, tree, 1, n_slot)
    for _ in range(2):
        for prompt, tokens in zip(prompts, wanted):
            for limit in (99, 3):
                assert decoder.generate([prompt], limit).tokens == [tokens[:min(limit, n_slot - len(prompt))]]


@pytest.mark.parametrize("tree", [StaticTree.chain(3), StaticTree.paper(), DynamicTree(3, 3, 8)],
                         ids=["chain", "paper", "dynamic"])
def test_a_second_turn_on_what_is_cached_equals_a_fresh_prefill(tree):
    """Tokens, and accepted lengths too, which tell whether the head's cache is the same. Vocabulary 6: the random head
    is right now and then."""
    torch.manual_seed(4)
    target = Transformer(ModelArgs(model_type="llama", dim=32, n_layer=2, n_head=4, n_kv_head=2, head_dim=8,
                                   vocab_size=6, intermediate_size=48, block_size=256, norm_eps=1e-5, rope_theta=1e4))
    randomise(target, 0.3)
    head = head_of(target)
    chat = decoder_of(target, head, tree, 1, 150)
    caches = target.kv_cache, head.kv_cache
    cached, lengths = [], []
    for n, drop in enumerate((0, 0, 3, 0, 7)):      # tokens of the cache that the next turn does not share
        target.kv_cache, head.kv_cache = caches
        cached = cached[:len(cached) - drop]
        prompt = cached + tokens_of(4 if n else 5, seed=n, vocab=6)
        stop_ids = {n % 6} if n % 2 else ()
        result = chat.generate([prompt], 14, n_cached=len(cached), stop_ids=stop_ids)
        again = decoder_of(target, head, tree, 1, 150).generate([prompt], 14, stop_ids=stop_ids)
        assert result.tokens == again.tokens == [cut(naive_decode(target, prompt, 14), stop_ids)[0]]
        assert result.accept_lengths == again.accept_lengths, n
        lengths += result.accept_lengths[0]
        cached = prompt + result.tokens[0][:-1]
    assert max(lengths) > 1 or tree.is_chain


def test_a_shorter_turn_after_plain_steps_counts_on_the_heads_keys_only_where_eagle_wrote_them(llama):
    """The last slots of the cache are filled by plain steps, which the head does not see."""
    target, head, prompts, wanted = llama
    head.right = 1.0
    tree, n_slot = StaticTree.chain(4), 20
    decoder = decoder_of(target, head, tree, 1, n_slot)
    decoder.generate(prompts[:1], 99)
    assert decoder.n_ingested <= n_slot     # pairs up to the last root that EAGLE leaves
    sequence = prompts[0] + wanted[0]
    for n_cached in (18, 15, 9):
        result = decoder.generate([sequence[:n_cached + 1]], 99, n_cached=n_cached)
        assert result.tokens == [sequence[n_cached + 1:n_slot]]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: the joint distribution of the first three tokens against the exact one

V = 16
PROMPT = [3, 11]
T1, CUT = Sampling(1.0), Sampling(0.7, 5, 0.9)
CHAIN, WIDE, DYNAMIC = StaticTree.chain(2), StaticTree.from_paths([[0], [1], [2], [0, 0]]), DynamicTree(2, 2, 4)
FEW = [2, 9, 14, 0, 7, 5, 12]       # a draft vocabulary


@pytest.fixture(scope="module")
def small():
    """Target, head, and the exact distributions {sampling: [V, V, V]}."""
    with torch.no_grad():
        torch.manual_seed(5)
        target = Transformer(ModelArgs(model_type="llama", dim=8, n_layer=1, n_head=1, n_kv_head=1, head_dim=8,
                                       vocab_size=V, intermediate_size=8, block_size=64, norm_eps=1e-5,
                                       rope_theta=100.0))
        randomise(target, 0.5)
        head = EagleHead(target.config, target)
        randomise(head, 0.5)
        return target, head, {sampling: exact(target, sampling) for sampling in (T1, CUT)}


def exact(target, sampling):
    """[V, V, V] fp64, by enumeration of all prefixes."""
    target = copy.deepcopy(target).double()
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))                      # [V * V, 2]
    tokens = torch.cat((torch.tensor(PROMPT).expand(V * V, -1), pairs), dim=1)
    logits = target(tokens, torch.arange(tokens.shape[1]))[0][:, len(PROMPT) - 1:]      # [V * V, 3, V]
    first, second, third = processed(logits, sampling).unbind(1)
    second = second.view(V, V, V)[:, 0]                                                 # after each first token
    return first[0][:, None, None] * second[:, :, None] * third.view(V, V, V)


def processed(logits, sampling):
    """Temperature, the k largest, then the fewest of these whose probabilities sum to top_p; plain Python over rows."""
    out = torch.zeros_like(logits).flatten(0, -2)
    for row, values in zip(out, logits.flatten(0, -2)):
        order = values.argsort(descending=True)[:sampling.top_k]
        weights = (values[order] / sampling.temperature).softmax(-1)
        mass = 0.0
        for token, weight in zip(order, weights):
            if sampling.top_p is not None and mass >= sampling.top_p:
                break
            row[token] = weight
            mass += weight
        row /= row.sum()
    return out.view_as(logits)


def first_three(target, head, tree, sampling, draw_drafts, rows, runs):
    """How often each triple came: [V, V, V], of rows * runs samples."""
    n_slot = len(PROMPT) + 3 + tree.n_room
    setup_caches(target, head, rows, n_slot)
    step = EagleStep(target, head, tree, rows, sampling, draw_drafts)
    return count_triples(step, lambda: step(n_slot), PROMPT, runs)


def count_triples(step, run, prompt, runs):
    """How often the step's rows begin with each triple of tokens: the prefill's, then those of two calls of `run`."""
    counts, rows = torch.zeros(V ** 3), len(step.tokens)
    for _ in range(runs):
        step.prefill([prompt] * rows)
        produced = [step.produced.clone()]
        for _ in range(2):
            run()
            produced.append(step.produced.clone())
        produced = torch.cat(produced, dim=1)
        order = (produced < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :3]       # tokens before gaps
        counts += torch.bincount(produced.gather(1, order) @ torch.tensor([V * V, V, 1]), minlength=V ** 3)
    return counts.view(V, V, V)


def chi_square_p(counts, probs):
    """Probability of a deviation as large as this one. Cells of expectation below 5 are merged."""
    counts, expected = counts.flatten().double(), probs.flatten() * counts.sum()
    if counts[expected == 0].any():
        return 0.0
    order = expected.argsort()
    bins, total = [], [0.0, 0.0]
    for found, wanted in zip(counts[order].tolist(), expected[order].tolist()):
        total = [total[0] + found, total[1] + wanted]
        if total[1] >= 5:
            bins.append(total)
            total = [0.0, 0.0]
    bins[-1] = [bins[-1][0] + total[0], bins[-1][1] + total[1]]
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in bins)
    return torch.special.gammaincc(torch.tensor((len(bins) - 1) / 2).double(), torch.tensor(statistic / 2)).item()


def test_the_chi_square_test_is_one():
    """Known values; and p is uniform over true samples, small for false ones."""
    counts = torch.tensor([44.0, 56.0])
    assert chi_square_p(counts, torch.tensor([0.5, 0.5])) == pytest.approx(0.2301, abs=1e-4)
    counts = torch.tensor([20.0, 30.0, 50.0])
    assert chi_square_p(counts, torch.tensor([0.25, 0.25, 0.5])) == pytest.approx(0.3679, abs=1e-4)
    probs = torch.rand(500).double()
    probs[:100] *= 1e-4
    probs /= probs.sum()
    draw = lambda probs: torch.bincount(torch.multinomial(probs, 20000, replacement=True), minlength=500)
    p_values = torch.tensor([chi_square_p(draw(probs), probs) for _ in range(100)])
    assert 0.35 < p_values.mean() < 0.65 and p_values.min() > 1e-4
    assert chi_square_p(draw(probs), probs.roll(1)) < 1e-6


@pytest.mark.parametrize("draw_drafts, sampling, cases", [
    (False, T1, [(WIDE, FEW), (DYNAMIC, None)]),
    (False, CUT, [(CHAIN, None), (DYNAMIC, FEW)]),
    (True, T1, [(CHAIN, None), (WIDE, FEW)]),
    (True, CUT, [(CHAIN, FEW), (WIDE, None)]),
], ids=["top drafts, T 1", "top drafts, T 0.7, top-k, top-p", "drawn drafts, T 1", "drawn drafts, T 0.7, top-k, top-p"])
def test_sampled_eagle_has_the_distribution_of_plain_sampling(small, draw_drafts, sampling, cases):
    """200,000 samples of each acceptance rule, half of them with either tree."""
    target, head, distribution = small
    torch.manual_seed(1)
    total = torch.zeros(V, V, V)
    for tree, ids in cases:
        head.set_draft_vocab(ids)
        counts = first_three(target, head, tree, sampling, draw_drafts, rows=5000, runs=20)
        assert chi_square_p(counts, distribution[sampling]) > 1e-3, (tree, ids)
        total += counts
    assert total.sum() >= 200000 and chi_square_p(total, distribution[sampling]) > 1e-3


def test_drawn_drafts_are_lossless_or_refused_in_trees_that_skip_ranks(small):
    """The child of rank 2 is no draw from q without the child of rank 0: rank 1 was drawn between them."""
    target, head, distribution = small
    head.set_draft_vocab(FEW)
    torch.manual_seed(1)
    try:
        counts = first_three(target, head, StaticTree.from_paths([[0], [2]]), T1, True, rows=5000, runs=8)
        assert chi_square_p(counts, distribution[T1]) > 1e-3
    except ValueError as refused:
        assert "rank" in str(refused)


def test_generate_passes_the_options_of_sampling_on(small):
    target, head, distribution = small
    head.set_draft_vocab(None)
    for tree, draw_drafts in ((DYNAMIC, False), (CHAIN, True)):
        result = generate(target, [PROMPT] * 10000, 3, head=head, tree=tree, draw_drafts=draw_drafts, temperature=0.7,
                          top_k=5, top_p=0.9, seed=7)
        tokens = torch.tensor(result.tokens)
        counts = torch.bincount(tokens @ torch.tensor([V * V, V, 1]), minlength=V ** 3)
        assert chi_square_p(counts, distribution[CUT]) > 1e-3


def test_the_same_seed_gives_the_same_tokens(small):
    target, head, _ = small
    head.set_draft_vocab(None)
    draw = functools.partial(generate, target, [PROMPT] * 3, 20, head=head, tree=CHAIN, draw_drafts=True,
                             temperature=1.0)
    draws = [draw(seed=seed).tokens for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2] and len({tuple(row) for row in draws[0]}) == 3


def bonus_without_temperature(step, logits, accepted):
    return accepted._replace(bonus=draw_bonus(logits, accepted, step.sampling._replace(temperature=1.0)))


def rejection_leaves_p(step, logits, accepted):
    return accepted._replace(bonus=draw_bonus(logits, accepted, step.sampling))


def everything_accepted(step, logits, accepted):
    accepted = Accepted(torch.arange(step.tree.depth + 1).expand_as(accepted.path),
                        torch.full_like(accepted.n_accepted, step.tree.depth), accepted.bonus)
    return accepted._replace(bonus=draw_bonus(logits, accepted, step.sampling))


def draw_bonus(logits, accepted, sampling):
    rows = torch.arange(len(logits))[:, None]
    last = logits[rows, accepted.path.gather(1, accepted.n_accepted)][:, 0].double()
    return torch.multinomial(processed_rows(last, sampling), 1)


def processed_rows(logits, sampling):
    """`processed`, once for each different row."""
    different, index = logits.unique(dim=0, return_inverse=True)
    return processed(different, sampling)[index]


@pytest.mark.parametrize("fault, tree, sampling, draw_drafts", [
    (bonus_without_temperature, WIDE, CUT, False),
    (bonus_without_temperature, CHAIN, CUT, True),
    (rejection_leaves_p, CHAIN, T1, True),
    (rejection_leaves_p, WIDE, CUT, True),
    (everything_accepted, CHAIN, T1, False),
    (everything_accepted, CHAIN, CUT, True),
])
def test_a_planted_fault_is_found(small, fault, tree, sampling, draw_drafts, monkeypatch):
    """The tests above can fail: with each of these mistakes the same samples are off by p < 1e-6."""
    target, head, distribution = small
    head.set_draft_vocab(None)
    accept = EagleStep.accept
    monkeypatch.setattr(EagleStep, "accept",
                        lambda step, logits, draft: fault(step, logits, accept(step, logits, draft)))
    torch.manual_seed(1)
    counts = first_three(target, head, tree, sampling, draw_drafts, rows=10000, runs=1)
    assert chi_square_p(counts, distribution[sampling]) < 1e-6
