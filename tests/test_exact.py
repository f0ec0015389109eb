"""In bf16 and int4 on a CPU, EAGLE computes the same bits as plain decoding: logits, keys and values.

    EXACT_SEEDS=40 python -m pytest tests/test_exact.py -q      # more of them

Shapes: B batch, N tree nodes including the root, D tree depth, V vocabulary.
"""
import os
from dataclasses import replace

import pytest
import torch

from decoder import Decoder, PlainStep, setup_caches
from draft_tree import DynamicTree, StaticTree
from eagle_step import EagleStep
from exact import make_exact
from linears import Format, quantize_in_place
from model import Transformer
from reference import tiny, tokens_of
from runtime import pack_for_cpu, tune
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


def target(kind, folder, mode, seed):
    folder, _ = tiny(kind, folder, seed=seed, max_position_embeddings=1024, intermediate_size=96)
    model = Transformer.from_pretrained(folder, dtype=torch.bfloat16)
    if mode != "bf16":
        quantize_in_place(model, Format(mode, 32 if mode == "int4" else None))
        tune(model)
    make_exact(pack_for_cpu(model))
    return model


@pytest.mark.parametrize("seed", range(int(os.environ.get("EXACT_SEEDS", 1))))
@pytest.mark.parametrize("kind, mode, rows", [("llama2", "bf16", 1), ("gqa", "bf16", 3), ("head_dim", "int4", 1),
                                              ("gqa", "int4", 3), ("qwen3", "int8", 3)])
def test_eagle_computes_the_bits_of_plain_decoding(kind, mode, rows, seed, tmp_path):
    model = target(kind, tmp_path, mode, seed)
    torch.manual_seed(seed)
    head = head_of(model).bfloat16()
    length = 3 + seed + seed % 2 * 200
    prompts = [tokens_of(length + 5 * row, seed=10 * seed + row) for row in range(rows)]
    accepted = {}
    for name, tree in TREES.items():
        for copy in (0, 4):
            accepted[name, copy] = assert_same_bits(model, prompts, 70 if seed == 0 else 30, head,
                                                    replace(tree, n_copy=copy))
    assert max(accepted.values()) > 1.3


def test_exact_decoding_is_refused_where_it_is_not_known_to_hold(tmp_path):
    for kind, dtype, names in (("gqa", torch.float32, "float32"), ("gqa", torch.float16, "float16"),
                               ("mixtral", torch.bfloat16, "dense models")):
        folder, _ = tiny(kind, tmp_path / f"{kind}-{names}")
        with pytest.raises(ValueError, match=names):
            make_exact(Transformer.from_pretrained(folder, dtype=dtype))
    model = target("gqa", tmp_path / "exact", "bf16", 0)
    head = head_of(model).bfloat16()
    setup_caches(model, head, 1, 256)
    with pytest.raises(ValueError, match="60 nodes and 8 copied"):
        Decoder(model, 1, head=head, tree=DynamicTree(n_copy=8))
    with pytest.raises(ValueError, match="compiled"):
        Decoder(model, 1, head=head, tree=TREES["chain:1"], compile=True)
