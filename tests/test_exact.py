"""In bf16, int8 and int4 on a CPU, EAGLE computes the same bits as plain decoding: logits, keys and values.

    EXACT_ALL=1 python -m pytest tests/test_exact.py -q     # each seed with all cases, not with one in turn

Shapes: B batch, N tree nodes including the root, D tree depth, V vocabulary.
"""
import itertools
import os
from dataclasses import replace

import pytest
import torch

import exact
import test_exact
from attention import ROW_GROUP, attend, path_slots, rows_seen
from decoder import Decoder, PlainStep, setup_caches
from draft_tree import DynamicTree, StaticTree, lineage
from eagle_step import EagleStep
from exact import make_exact
from linears import ROWS, Format, PackedLinear, QuantLinear, quantize_in_place
from model import Transformer, attention_bias, causal_mask
from reference import tiny, tokens_of
from runtime import pack_for_cpu
from sampling import Sampling, logits_to_probs
from test_eagle_lossless import head_of

TREES = {"chain:1": StaticTree.chain(1), "chain:3": StaticTree.chain(3),
         "shipped": StaticTree.from_paths([[0], [1], [0, 0], [0, 1]]), "paper": StaticTree.paper(),
         "dynamic": DynamicTree(3, 3, 8)}


class RecordingPlain(PlainStep):
    @property
    def state(self):
        return [*super().state, self.kept]

    def finish(self, logits):
        self.kept[:, :1].copy_(logits[:, -1:])
        super().finish(logits)


class RecordingEagle(EagleStep):
    @property
    def state(self):
        return [*super().state, self.kept]

    def accept(self, logits, draft):
        accepted = super().accept(logits, draft)
        path = accepted.path
        self.kept[:, :path.shape[1]].copy_(logits[self.plan.row, path])
        return accepted


@torch.inference_mode()
def decode(model, prompts, n, head=None, tree=None):
    """Tokens, the logits [n - 1, V] that chose all but the first, and the cache up to the last token, by row."""
    setup_caches(model, head, len(prompts), -(-(max(map(len, prompts)) + n + 300) // 8) * 8)
    decoder = Decoder(model, len(prompts), head=head, tree=tree)
    kept = torch.zeros(len(prompts), 40, model.config.vocab_size, dtype=torch.bfloat16)
    decoder.plain.__class__, decoder.plain.kept = RecordingPlain, kept
    if decoder.eagle is not None:
        decoder.eagle.__class__, decoder.eagle.kept = RecordingEagle, kept
    logits = [[] for _ in prompts]
    begun = set()

    def take(row, ids, n_draft):
        if row in begun:    # the first token comes from the prefill
            logits[row] += kept[row, :len(ids)].clone()
        begun.add(row)

    result = decoder.generate(prompts, n, on_tokens=take)
    caches = [model.kv_cache[:, :, row, :, :len(p) + n - 1].clone() for row, p in enumerate(prompts)]
    return result, [torch.stack(rows) for rows in logits], caches


def assert_same_bits(model, prompts, n, head, tree):
    """Returns the mean accepted length. Rows are compared up to the first token that differs, and none may."""
    plain, logits, caches = decode(model, prompts, n)
    head.tell([p + t for p, t in zip(prompts, plain.tokens)])
    eagle, logits_e, caches_e = decode(model, prompts, n, head, tree)
    for row in range(len(prompts)):
        same = min(len(logits[row]), len(logits_e[row]))
        equal = (logits[row][:same] == logits_e[row][:same]).all(1)
        assert equal.all(), f"row {row}: {int((~equal).sum())} of {same}, first at {int((~equal).long().argmax())}"
        assert plain.tokens[row] == eagle.tokens[row]
        assert torch.equal(caches[row], caches_e[row]), "keys or values"
    return eagle.mean_accept_length


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> a tiny checkpoint, whose weights each seed makes anew."""
    kinds = {kind: tiny(kind, tmp_path_factory.mktemp(kind), max_position_embeddings=1024, intermediate_size=96)[0]
             for kind in ("llama2", "gqa", "head_dim", "qwen3")}
    return kinds.__getitem__


def target(folder, mode, seed):
    model = Transformer.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.normal_(float(name.endswith("norm.weight")), 0.25)
    if mode != "bf16":
        quantize_in_place(model, Format(mode, 32 if mode == "int4" else None))
    make_exact(pack_for_cpu(model))
    return model


def compare(folder, mode, rows, cases, seed):
    """Plain decoding and EAGLE for these trees. Returns the largest accepted length."""
    model = target(folder, mode, seed)
    head = head_of(model).bfloat16()
    length = 3 + seed + seed % 2 * 200
    prompts = [tokens_of(length + 5 * row, seed=10 * seed + row) for row in range(rows)]
    return max(assert_same_bits(model, prompts, 24, head, replace(TREES[name], n_copy=copy)) for name, copy in cases)


CASES = list(itertools.product(("bf16", "int4", "int8"), (1, 3), TREES, (0, 4)))     # format, batch, tree, copies


@pytest.mark.parametrize("decade", range(20))
def test_eagle_computes_the_bits_of_plain_decoding(decade, folders):
    """200 seeds. Each takes another case, which all come three times, and another architecture."""
    kinds = itertools.cycle(("llama2", "gqa", "head_dim", "qwen3"))
    accepted = []
    for seed, kind in zip(range(10 * decade, 10 * decade + 10), kinds):
        cases = CASES if os.environ.get("EXACT_ALL") else [CASES[seed % len(CASES)]]
        for (mode, rows), group in itertools.groupby(cases, key=lambda case: case[:2]):
            accepted.append(compare(folders(kind), mode, rows, [case[2:] for case in group], seed))
    assert max(accepted) > 1.3


@pytest.mark.parametrize("keys", [dict(max_window_layers=0), dict(max_window_layers=1), dict(
    max_window_layers=1, max_position_embeddings=128, rope=dict(rope_type="dynamic", factor=8.0))], ids=str)
def test_sliding_windows_keep_the_bits(keys, tmp_path):
    """Of a prompt within the window of 64 tokens, of one past it, and of three rows."""
    folder, _ = tiny("qwen3", tmp_path, **{"max_position_embeddings": 1024} | keys, intermediate_size=96,
                     use_sliding_window=True, sliding_window=64)
    for mode, rows, seed in (("bf16", 1, 2), ("bf16", 1, 3), ("int8", 3, 1), ("bf16", 3, 5)):
        compare(folder, mode, rows, [("paper", 4), ("chain:3", 0), ("dynamic", 0)], seed)


@torch.inference_mode()
def test_later_turns_of_a_chat_have_the_bits_of_plain_decoding(folders):
    model = target(folders("gqa"), "bf16", 5)
    head = head_of(model).bfloat16()
    caches, texts = [], []
    for tree in (None, replace(TREES["paper"], n_copy=4)):
        setup_caches(model, head, 1, 600)
        decoder, text, n_cached = Decoder(model, 1, head=tree and head, tree=tree), tokens_of(40, seed=5), 0
        for turn in range(3):
            text += decoder.generate([text], 30 + turn, n_cached=n_cached).tokens[0]
            n_cached = len(text) - 1        # the last token is in no cache
            text += tokens_of((9, 80, 1)[turn], seed=turn)
        head.tell([text])                   # EAGLE drafts what plain decoding said
        texts.append(text)
        caches.append(model.kv_cache[..., :n_cached, :].clone())
    assert texts[0] == texts[1] and torch.equal(*caches)


def test_a_kernel_that_only_one_row_takes_is_noticed(folders, monkeypatch):
    """The same quantised weights by two kernels, as ordinary decoding has it: one row packed, blocks dequantised."""
    monkeypatch.setattr(test_exact, "make_exact", lambda model: exact.make_exact(model) or with_two_kernels(model))
    for mode in ("int4", "int8"):
        with pytest.raises(AssertionError, match="row 0: "):
            compare(folders("gqa"), mode, 1, [("paper", 4)], seed=3)


def with_two_kernels(model):
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.kernels = {rows: "packed" if rows == 1 else "dense" for rows in ROWS}


@pytest.mark.parametrize("by_group", [False, True])
def test_the_bits_of_attention_do_not_depend_on_where_the_keys_of_a_path_stand(by_group):
    """In fp32, where nothing hides the order of a sum: a chain token by token, and as a branch of a tree."""
    torch.manual_seed(0)
    K, G, D, pos, n_slot, width = 2, 3, 16, 117, 160, 48
    parents = torch.tensor([[0, 0, 0, 1, 2, 4, 0, 6, 5, 8, 7]])
    depths, branch = torch.tensor([[0, 1, 1, 2, 2, 3, 1, 2, 4, 5, 3]]), [0, 2, 4, 5, 8, 9]
    qkv, cache = torch.randn(1, 11, K * (G + 2), D), torch.randn(2, 1, K, 200, D)
    above = lineage(parents, 5, torch.arange(11)[None])
    slots, seen = path_slots(depths, above, torch.tensor([[pos]]), torch.arange(n_slot)[-width:])
    assert slots[0, 9][seen[0, 9]].tolist() == [*range(n_slot - width, pos), *(pos + node for node in branch)]
    whole = rows_seen(attention_bias(seen, G, torch.float), cache, 11, n_slot, slots, width, by_group)
    of_tree = attend(qkv, cache[0, :, :, :n_slot], cache[1], whole).view(11, -1)
    in_order = cache.clone()
    in_order[:, :, :, pos:pos + len(branch)] = cache[:, :, :, [pos + node for node in branch]]
    for depth, node in enumerate(branch):
        bias = attention_bias(causal_mask(torch.tensor([[pos + depth]]), 128), G, torch.float)
        alone = attend(qkv[:, [node]], in_order[0, :, :, :128], in_order[1], rows_seen(bias, cache, 1, 128))
        assert torch.equal(alone.view(-1), of_tree[node]), f"node {node}"


def test_probabilities_have_the_same_bits_for_one_row_and_for_a_block():
    logits = 4 * torch.randn(1, 26, 49152, generator=torch.Generator().manual_seed(0)).bfloat16()
    for sampling in (Sampling(0.7), Sampling(1.0, top_k=50), Sampling(1.0, top_p=0.9)):
        whole = logits_to_probs(logits, *sampling)
        for n in range(26):
            assert torch.equal(whole[:, [n]], logits_to_probs(logits[:, [n]], *sampling))


def test_a_promise_is_not_given_where_products_or_attention_depend_on_the_block(folders, monkeypatch):
    product = PackedLinear.product
    for rows in (5, 1):
        monkeypatch.setattr(PackedLinear, "product", lambda self, x, rows=rows: product(self, x) * (
            1.01 if x.shape[:-1].numel() == rows else 1))
        if rows == 5:
            with pytest.raises(ValueError, match=r"of 64 columns to \d+ is another for \[5\] rows"):
                target(folders("gqa"), "bf16", 0)
        else:   # one row alone gets a companion
            assert all(module.rows_at_least == 2 for module in target(folders("gqa"), "bf16", 0).modules()
                       if isinstance(module, PackedLinear))
    monkeypatch.setattr(PackedLinear, "product", lambda self, x: product(self, x) * (
        1.01 if 32 < x.shape[:-1].numel() or x.shape[:-1].numel() == 1 else 1))
    model = target(folders("gqa"), "bf16", 0)       # blocks are cut, and what is left alone gets a companion
    for module in model.modules():
        if isinstance(module, PackedLinear):
            assert (module.rows_at_least, module.rows_at_most) == (2, 32)
            x = torch.randn(3, 11, module.in_features).bfloat16()
            alone = torch.cat([module(row[None, None]) for row in x.flatten(0, 1)])
            assert torch.equal(module(x), alone.view(3, 11, -1))
    monkeypatch.undo()
    monkeypatch.setattr(exact, "attend", lambda *args: attend(*args) + (args[-1].rows_at_once > ROW_GROUP))
    assert target(folders("gqa"), "bf16", 0).by_group       # then rows are multiplied by groups
    monkeypatch.setattr(exact, "attend", lambda qkv, *args: attend(qkv, *args) + (qkv.shape[1] == 12))
    with pytest.raises(ValueError, match="attention depends"):
        target(folders("gqa"), "bf16", 0)


def test_exact_decoding_is_refused_where_it_is_not_known_to_hold(folders, tmp_path):
    for kind, dtype, names in (("gqa", torch.float32, "float32"), ("gqa", torch.float16, "float16"),
                               ("mixtral", torch.bfloat16, "dense models")):
        folder, _ = tiny(kind, tmp_path / f"{kind}-{names}")
        model = Transformer.from_pretrained(folder, dtype=dtype)
        with pytest.raises(ValueError, match=names):
            make_exact(model)
    with pytest.raises(ValueError, match="not available on a GPU"):
        make_exact(model.to("meta"))
    model = target(folders("gqa"), "bf16", 0)
    head = head_of(model).bfloat16()
    setup_caches(model, head, 1, 256)
    Decoder(model, 1, head=head, tree=DynamicTree(n_copy=8))    # the default beside a head of EAGLE-3
    with pytest.raises(ValueError, match="70 nodes and 8 copied"):
        Decoder(model, 1, head=head, tree=DynamicTree(n_node=70, n_copy=8))
    with pytest.raises(ValueError, match="compiled"):
        Decoder(model, 1, head=head, tree=TREES["chain:1"], compile=True)
