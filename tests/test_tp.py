"""tp.py and scripts/plan.py: a model split over processes says what it says in one, and what ends a run.

    python -m pytest tests/test_tp.py -q

Tiny random models, in fp32, over gloo on the CPU. A group of processes is started once and runs functions of this
file, the same on every rank.
"""
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import checkpoint
import generate as cli
import quantize
import tp
from decoder import setup_caches
from draft_tree import DynamicTree, StaticTree, load_tree
from eagle_head import EagleHead
from eagle_step import EagleStep
from generate import generate
from linears import QuantLinear
from model import Transformer
from reference import assert_close, edited_json, tiny, tokens_of, write_checkpoint
from scripts import plan
from test_eagle import head_config, head_weights, write_head

ROOT = Path(__file__).resolve().parent.parent
KINDS = {   # kind of reference.py, and changes of its config.json so that its sizes divide
    "gqa": ("gqa", {}),                                             # 8 heads on 2: four ranks share two key/value heads
    "tied": ("llama2_tied", dict(num_key_value_heads=1, vocab_size=97)),    # the last rank has fewer rows
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe_mixed": ("qwen3_moe_mixed", {}),                     # dense layers of another width than the experts
    "windows, dynamic": ("qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1,
                                       max_position_embeddings=32, rope=dict(rope_type="dynamic", factor=8.0))),
    "head held whole": ("llama2", dict(hidden_size=96, num_attention_heads=12, num_key_value_heads=12)),
}
# The same, options of quantize.py, and more options for the target. On four ranks a row of wo has 16 weights.
QUANTISED = {
    "gqa, int4": ("gqa", dict(intermediate_size=128), ["--mode", "int4", "--group-size", "32"]),
    "gqa, int8": ("gqa", {}, ["--mode", "int8"], ["--lm-head", "int8"]),
    "mixtral, int8": ("mixtral", {}, ["--mode", "int8"]),
    "mixtral, int4": ("mixtral", dict(hidden_size=64, intermediate_size=64), ["--mode", "int4", "--group-size", "32"]),
    "qwen3_moe, int8": ("qwen3_moe_mixed", {}, ["--mode", "int8"]),
    "qwen3_moe, int4": ("qwen3_moe", dict(hidden_size=64, moe_intermediate_size=64),
                        ["--mode", "int4", "--group-size", "32"]),
}
HEADS = {   # changes of a head's config.json; the heads of quantised targets are quantised in the same way
    "head held whole": dict(num_key_value_heads=3),                 # neither divides nor is divided
    "qwen2": dict(qkv_bias=True, bias=False),
    "gqa, int4": dict(intermediate_size=64), "mixtral, int4": dict(intermediate_size=64),
    "qwen3_moe, int4": dict(intermediate_size=64),
}
REPEATS = {"repeats itself": ("gqa", dict(vocab_size=12))}      # few tokens: there is something to copy
WORLDS = (2, 4)
LIMIT = 240     # seconds that a rank may take for a function: ranks that went different ways wait for ever


class Group:
    """`world` processes. group(function, *args) runs the function on each and returns all results."""

    def __init__(self, context, world, folder):
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            args = rank, world, str(folder / "store"), theirs
            self.processes.append(context.Process(target=serve, args=args, daemon=True))
            self.processes[-1].start()

    def __call__(self, function, *args):
        for pipe in self.pipes:
            pipe.send((function.__name__, args))
        end, results = time.monotonic() + LIMIT, []
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(max(end - time.monotonic(), 0)):
                    raise TimeoutError(f"no answer within {LIMIT} s")
                results.append(pipe.recv())
            except (EOFError, OSError) as error:
                for process in self.processes:
                    process.kill()
                raise RuntimeError(f"{function.__name__}: rank {rank} has ended or hangs") from error
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self):
        for pipe in self.pipes:
            with contextlib.suppress(OSError):      # it was killed
                pipe.send(None)
        for process in self.processes:
            process.join(10)


def serve(rank, world, store, pipe):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    os.environ["EAGLE_TP_CHECK"] = "1"
    with torch.no_grad():
        while (job := pipe.recv()) is not None:
            name, args = job
            try:
                pipe.send(globals()[name](*args))
            except Exception as error:
                pipe.send(RuntimeError(f"rank {rank}: {type(error).__name__}: {error}"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def group(forkserver, tmp_path_factory):
    """group(world) -> the Group of that many processes, started once."""
    make = functools.cache(lambda world: Group(forkserver, world, tmp_path_factory.mktemp("group")))
    made = {}

    def get(world):
        made[world] = make(world)
        return made[world]

    yield get
    for one in made.values():
        one.close()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """zoo(kind) -> folders of a tiny target and a head for it."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("zoo")
        torch.manual_seed(1)
        base, keys, *options = (KINDS | QUANTISED | REPEATS)[kind]
        tiny(base, folder / "target", **keys)
        target = Transformer.from_pretrained(folder / "target", dtype=torch.float32)
        config = head_config(target, **HEADS.get(kind, {}))
        write_head(folder / "head", config, head_weights(config, target.tok_embeddings.weight))
        if not options:
            return str(folder / "target"), str(folder / "head")
        for name, own in (("target", sum(options, [])), ("head", options[0])):
            argv = ["--checkpoint", folder / name, "--out", folder / f"{name}-q", "--device", "cpu", *own]
            assert quantize.main(quantize.parse_args(list(map(str, argv)))) == 0
        return str(folder / "target-q"), str(folder / "head-q")

    return make


@functools.cache
def load(folder, head_folder):
    """Target and head: a rank's part of them or, without a group, the whole."""
    shard = tp.Shard.world() if torch.distributed.is_initialized() else None
    model = Transformer.from_pretrained(folder, dtype=torch.float32, shard=shard)
    return model, EagleHead.from_pretrained(head_folder, model, shard=shard)


def whole(logits):
    return logits if isinstance(logits, torch.Tensor) else logits.full()


def passes(folder, head_folder):
    """Logits and features of a batch of three, for a prefill and a block, from the target and from the head."""
    model, head = load(folder, head_folder)
    head.set_draft_vocab(None)
    tokens = torch.tensor([tokens_of(12, seed) for seed in range(3)])
    model.setup_caches(3, 32)
    head.setup_caches(3, 32)
    outs = []
    for pos in (torch.arange(8), torch.arange(8, 12)):
        logits, features = model(tokens[:, pos], pos)
        hidden = head(tokens[:, pos], features, pos)
        outs += [whole(logits), features, hidden, whole(head.draft_logits(hidden))]
    return outs


def answers(folder, head_folder, cases, batches=(1, 3)):
    """New tokens for batches of these sizes, for each case: tree, draft vocabulary, options of generate.

    Greedy cases may not put all logits together.
    """
    model, head = load(folder, head_folder)
    found = []
    for tree, draft_vocab, options in cases:
        head.set_draft_vocab(draft_vocab)
        greedy = "temperature" not in options
        with mock.patch.object(tp.ShardedLogits, "full", forbidden) if greedy else contextlib.nullcontext():
            found += [generate(model, [tokens_of(5 + seed, seed) for seed in range(B)], 6, tree=tree or "static",
                               head=None if tree is None else head, **options).tokens for B in batches]
    return found


def forbidden(logits):
    raise AssertionError("all logits are put together")


FEW = StaticTree.from_paths([[0], [1], [0, 0], [0, 1]])
VOCABULARY = list(range(60, 11, -1))        # 49 tokens: they do not divide
CASES = {
    "plain": (None, None, {}),
    "plain, drawn": (None, None, dict(temperature=1.0, top_p=0.9, seed=3)),
    "static": (FEW, None, {}),
    "dynamic": (DynamicTree(2, 3, 8), None, {}),
    "draft vocabulary": (DynamicTree(2, 3, 8), VOCABULARY, {}),
    "static, drawn drafts": (FEW, None, dict(temperature=1.0, top_k=20, seed=4)),
    "static, drawn from a draft vocabulary": (FEW, VOCABULARY, dict(temperature=1.0, seed=4)),
    "dynamic, drawn": (DynamicTree(2, 3, 8), None, dict(temperature=0.7, seed=5)),
}


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers and the same text

@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_features_equal_one_process(group, zoo, kind, world):
    expected = passes(*zoo(kind))
    for outs in group(world)(passes, *zoo(kind)):
        for ours, theirs in zip(outs, expected, strict=True):
            assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_two_equals_one_process(group, zoo, kind):
    expected = answers(*zoo(kind), list(CASES.values()))
    assert group(2)(answers, *zoo(kind), list(CASES.values())) == [expected] * 2


def copied_answers(folder, head_folder, cases):
    """Of a ragged batch of three, for each case (tree or None for no head, options of generate): tokens, accepted
    lengths, copied drafts and the kinds of steps."""
    model, head = load(folder, head_folder)
    head.set_draft_vocab(None)
    prompts = [tokens_of(n, seed=n, vocab=12) for n in (5, 17, 9)]
    found = []
    for tree, options in cases:
        result = generate(model, prompts, 40, head=tree and head, tree=tree or "static", copy=4, **options)
        found.append((result.tokens, result.accept_lengths, result.copied, result.kinds))
    return found


def test_a_copied_branch_gives_two_ranks_what_it_gives_one_process(group, zoo):
    """With a head, where levels are left out too, and without one. Ranks that took different kinds of steps would hang
    (LIMIT), or add up what does not belong together."""
    folders, drawn = zoo("repeats itself"), dict(temperature=1.0, top_p=0.95, seed=3)
    cases = [(tree, options) for tree in (None, FEW, DynamicTree(3, 3, 4)) for options in ({}, drawn)]
    cases += [(FEW, drawn | dict(draw_drafts=False))]
    expected = copied_answers(*folders, cases)
    assert group(2)(copied_answers, *folders, cases) == [expected] * 2
    for tokens, lengths, copied, kinds in expected:
        assert list(map(len, tokens)) == [40] * 3 and set(kinds) == {"tree", "copy"}
        assert max(map(max, lengths)) > 2 and max(map(max, copied)) > 1


@pytest.mark.parametrize("kind, world", [
    ("gqa, int4", 2), ("gqa, int8", 4), ("mixtral, int8", 4), ("mixtral, int4", 2), ("qwen3_moe, int8", 4),
    ("qwen3_moe, int4", 2)])
def test_quantised_logits_and_text_equal_one_process(group, zoo, kind, world):
    cases = [CASES[name] for name in ("plain, drawn", "draft vocabulary")]
    assert group(world)(answers, *zoo(kind), cases) == [answers(*zoo(kind), cases)] * world
    expected = passes(*zoo(kind))
    for outs in group(world)(passes, *zoo(kind)):
        for ours, theirs in zip(outs, expected, strict=True):
            assert_close(ours, theirs, 1e-5)


def test_a_group_that_two_ranks_would_share_is_refused(zoo):
    with pytest.raises(ValueError, match="group size 32 does not divide a row of 16 weights"):
        Transformer.from_pretrained(zoo("gqa, int4")[0], shard=tp.Shard(0, 4))


@pytest.mark.parametrize("kind, names", {
    "gqa": ["plain", "plain, drawn", "static", "static, drawn from a draft vocabulary", "dynamic"],
    "tied": ["draft vocabulary"],
    "mixtral": ["plain", "plain, drawn", "static", "dynamic, drawn"],
    "qwen2": ["plain", "plain, drawn", "draft vocabulary", "static, drawn drafts"],
    "qwen3_moe": ["static"], "qwen3_moe_mixed": ["plain, drawn", "dynamic"],
    "head held whole": ["static, drawn from a draft vocabulary"]}.items())
def test_text_of_four_equals_one_process(group, zoo, kind, names):
    cases = [CASES[name] for name in names]
    assert group(4)(answers, *zoo(kind), cases, (3,)) == [answers(*zoo(kind), cases, (3,))] * 4


@pytest.mark.parametrize("kind, names", {
    "mixtral": ["plain, drawn", "static"], "gqa, int4": ["static, drawn drafts"]}.items())
def test_compiled_text_equals_one_process(group, zoo, kind, names):
    """Runs after the others, because the layers stay compiled."""
    cases = [CASES[name] for name in names]
    compiled = [(tree, draft_vocab, options | dict(compile=True)) for tree, draft_vocab, options in cases]
    assert group(2)(answers, *zoo(kind), compiled, (1,)) == [answers(*zoo(kind), cases, (1,))] * 2


# ---------------------------------------------------------------------------------------------------------------------
# The vocabulary

def ties(logits):
    """The answers of ShardedLogits where each rank has its part of the logits [..., V]."""
    shard = tp.Shard.world()
    n = -(-logits.shape[-1] // shard.size)
    padded = torch.nn.functional.pad(logits, (0, n * shard.size - logits.shape[-1]), value=-torch.inf)
    ours = tp.ShardedLogits(padded[..., shard.rank * n:(shard.rank + 1) * n], shard, logits.shape[-1])
    return ours.max(-1), ours.topk(7), ours.logsumexp(-1, keepdim=True), ours.full(), ours[:1].float().full()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_go_to_the_lowest_token_and_all_ranks_agree(group, dtype):
    logits = torch.randint(-4, 4, (3, 2, 50)).to(dtype)
    logits[0] = -1e30
    found = group(4)(ties, logits)
    (values, indices), top, lse, full, first = found[0]
    assert torch.equal(values, logits.max(-1).values) and torch.equal(indices, logits.max(-1).indices)
    assert torch.equal(top.values, logits.topk(7).values)
    assert torch.equal(logits.gather(-1, top.indices), top.values)
    assert all(len(set(row)) == 7 for row in top.indices.flatten(0, -2).tolist())
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(lse, logits.logsumexp(-1, keepdim=True), rtol=rtol, atol=0)
    assert torch.equal(full, logits) and torch.equal(first, logits[:1].float())
    for other in found[1:]:
        assert torch.equal(other[0].indices, indices) and torch.equal(other[1].indices, top.indices)


def disagree():
    tp.check_ranks(torch.tensor([[5, tp.Shard.world().rank]]))


def draw_apart(folder, head_folder):
    generate(load(folder, head_folder)[0], [tokens_of(5)], 6, temperature=1.0, seed=tp.Shard.world().rank)


def test_ranks_with_different_tokens_are_noticed(group, zoo):
    with pytest.raises(RuntimeError, match=r"ranks disagree: \[\[5, 0\], \[5, 1\]\]"):
        group(2)(disagree)
    with pytest.raises(RuntimeError, match="the ranks disagree"):
        group(2)(draw_apart, *zoo("gqa"))


# ---------------------------------------------------------------------------------------------------------------------
# Loading

@pytest.mark.parametrize("binary", [False, True])
def test_a_rank_reads_only_its_slices(zoo, tmp_path, monkeypatch, binary):
    tiny("gqa", tmp_path, binary=binary, sharded=True)
    read = {}
    iterate = checkpoint.iterate_weights

    def spy(folder, part):
        for key, tensor, file in iterate(folder, part=part):
            read[key] = tuple(tensor.shape)
            yield key, tensor, file

    monkeypatch.setattr(checkpoint, "iterate_weights", spy)
    full = Transformer.from_pretrained(tmp_path, dtype=torch.float32)
    model = Transformer.from_pretrained(tmp_path, dtype=torch.float32, shard=tp.Shard(3, 4))
    # dim 64, 8 heads of 8 on 2 key/value heads, 56 hidden, 96 tokens
    layer = "model.layers.1."
    assert read["model.embed_tokens.weight"] == read["lm_head.weight"] == (24, 64)
    assert read[layer + "self_attn.q_proj.weight"] == (16, 64) and read[layer + "self_attn.k_proj.weight"] == (8, 64)
    assert read[layer + "self_attn.o_proj.weight"] == (64, 16) and read[layer + "mlp.down_proj.weight"] == (64, 14)
    assert read[layer + "mlp.up_proj.weight"] == (14, 64) and read[layer + "input_layernorm.weight"] == (64,)
    ours, theirs = model.layers[1], full.layers[1]
    q, k, v = theirs.attention.wqkv.weight.split((64, 16, 16))
    assert torch.equal(ours.attention.wqkv.weight, torch.cat((q[48:], k[8:], v[8:])))
    assert torch.equal(ours.attention.wo[0].weight, theirs.attention.wo.weight[:, 48:])
    gate, up = theirs.feed_forward.w13.weight.chunk(2)
    assert torch.equal(ours.feed_forward.w13.weight, torch.cat((gate[42:], up[42:])))
    assert torch.equal(ours.feed_forward.w2[0].weight, theirs.feed_forward.w2.weight[:, 42:])
    assert torch.equal(model.output.weight, full.output.weight[72:])


@pytest.mark.parametrize("size, message", [
    (3, "8 heads, 2 key/value heads and a feed-forward of 56 do not divide over 3 processes; 1, 2, 4, 8 do"),
    (16, "over 16 processes; 1, 2, 4, 8 do")])
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(zoo, size, message):
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(zoo("gqa")[0], shard=tp.Shard(0, size))


def test_only_widths_that_the_layers_have_must_divide(zoo):
    folder, _ = zoo("qwen3_moe_mixed")
    config, _ = plan.describe(folder)
    assert (config.intermediate_size, config.expert_size, config.n_head) == (56, 160, 4)
    sizes = lambda **changes: [n for n in (1, 2, 4) if tp.divides(dataclasses.replace(config, **changes), n)]
    assert sizes() == [1, 2, 4]
    assert sizes(intermediate_size=58) == sizes(moe_intermediate_size=158) == [1, 2]
    assert sizes(intermediate_size=57, dense_layers=()) == sizes(moe_intermediate_size=57, n_expert=0) == [1, 2, 4]
    with pytest.raises(ValueError, match="a feed-forward of 56 and 160 do not divide over 3 processes; 1, 2, 4 do"):
        tp.Shard(0, 3).local(config)
    part = tp.Shard(1, 2).part(config)
    assert part("model.layers.3.mlp.experts.7.up_proj.weight", [160, 32]) == (slice(80, 160),)
    assert part("model.layers.0.mlp.down_proj.weight", [32, 56]) == (slice(None), slice(28, 56))
    for key, shape, message in (("model.layers.3.mlp.experts.7.gate_proj.weight", [56, 32], "160 rows"),
                                ("model.layers.3.mlp.experts.7.down_proj.weight", [32, 56], "160 columns"),
                                ("model.layers.0.mlp.gate_proj.weight", [160, 32], "56 rows")):
        with pytest.raises(ValueError, match=f"{re.escape(key)}.*{message}"):
            part(key, shape)


@pytest.mark.parametrize("vocab_size, sizes", [(9, [1, 2]), (10, [1, 2, 4]), (16, [1, 2, 4, 8]), (3, [1, 2])])
def test_every_rank_has_a_part_of_the_vocabulary(zoo, vocab_size, sizes):
    """If four ranks took three of 9 tokens each, the last one would have none."""
    config = dataclasses.replace(plan.describe(zoo("gqa")[0])[0], vocab_size=vocab_size)
    assert [size for size in (1, 2, 4, 8) if tp.divides(config, size)] == sizes
    for size in sizes:
        parts = [tp.Shard(rank, size).vocab(vocab_size) for rank in range(size)]
        assert all(part.start < part.stop for part in parts)
        assert [i for part in parts for i in range(vocab_size)[part]] == list(range(vocab_size))


def test_the_demo_model_in_two_processes_is_refused_with_the_numbers_that_work(demo_folder):
    with pytest.raises(ValueError, match="9 heads, 3 key/value heads .* over 2 processes; 1, 3 do"):
        Transformer.from_pretrained(demo_folder, shard=tp.Shard(0, 2))


def test_a_weight_of_the_wrong_size_is_refused(zoo, tmp_path):
    shutil.copytree(zoo("gqa")[0], tmp_path / "broken")
    with edited_json(tmp_path / "broken/config.json") as config:
        config["intermediate_size"] = 40
    message = r"down_proj.weight has shape \[64, 56\], config.json makes it 40 columns wide"
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(tmp_path / "broken", shard=tp.Shard(0, 2))
    config, _ = plan.describe(str(tmp_path / "broken"))     # the loader refuses it later, as unexpected
    assert tp.Shard(1, 2).part(config)("model.layers.0.self_attn.o_proj.bias", [64]) == (slice(None),)


# ---------------------------------------------------------------------------------------------------------------------
# The plan

@pytest.mark.parametrize("kind, world", [*itertools.product(KINDS, (1, 2, 4)), *((kind, 2) for kind in QUANTISED)])
def test_the_plan_counts_what_a_rank_allocates(zoo, kind, world):
    folder, head_folder = zoo(kind)
    shard = tp.Shard(0, world)
    model = Transformer.from_pretrained(folder, dtype=torch.float32, shard=shard)
    head = EagleHead.from_pretrained(head_folder, model, shard=shard)
    setup_caches(model, head, 3, 64)
    config, settings = plan.describe(folder)
    planned = plan.make_plan(config, world, head=plan.describe_head(head_folder, config, folder), settings=settings,
                             context=64, batch=3)

    def size(tensors):
        """Bytes, with 16 bits for each float."""
        return sum(tensor.numel() * (2 if tensor.is_floating_point() else 1) for tensor in tensors)

    def stored(module):
        """Without the copies that a CPU's kernels made."""
        return size(tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())
                    if name not in ("inv_freq", "kv_cache") and ".layouts." not in name)

    quantised = [module for module in (model, head) if any(isinstance(part, QuantLinear) for part in module.modules())]
    assert len(quantised) == (2 if kind in QUANTISED else 0)
    assert (planned.weights, planned.head) == (stored(model), stored(head))
    assert planned.caches == size([model.kv_cache, head.kv_cache])


def test_the_plan_of_llama_2_70b_recomputed_from_its_shape(capsys):
    """4 ranks, int4 in groups of 32: half a byte and 4/32 bytes of scale and zero point for each weight."""
    argv = "llama-2-70b --world-size 4 --mode int4 --head --context 4096 --gpu-memory 40 --accept-length 3.8"
    assert plan.main(plan.parse_args(argv.split())) == 0
    out = capsys.readouterr().out
    dim, hidden, vocab, n_layer = 8192, 28672, 32000, 80
    matrices = dim * (64 + 2 * 8) * 128 + dim * dim + 3 * dim * hidden      # of a layer: wqkv, wo, gate, up, down
    assert n_layer * (matrices + 2 * dim) + dim + 2 * vocab * dim == 68_976_648_192
    weights = n_layer * matrices / 4 * (0.5 + 4 / 32) + 2 * (n_layer * 2 * dim + dim) + 2 * 2 * vocab * dim / 4
    head = 2 * ((matrices + 2 * dim * dim + dim) / 4 + dim)
    caches = (n_layer + 1) * 2 * (8 / 4) * 4096 * 128 * 2
    lines = {line.split()[0]: line for line in out.splitlines()}
    for name, n_byte in (("weights", weights), ("head", head), ("caches", caches)):
        assert f" {n_byte / 1e9:.2f} GB" in lines[name], (name, n_byte, out)
    assert "of 40: fits" in lines["total"]
    # plain: 161 sums of one row and a decision, 20 us each and the row over a link of 100 GB/s
    seconds = (weights - 2 * vocab * dim / 4 + caches * 80 / 81) / 1.3e12
    seconds += 162 * 20e-6 + 161 * 2 * 3 / 4 * dim * 2 / 1e11
    assert f"at most {1 / seconds:.0f} tokens/s" in out


@pytest.mark.parametrize("name, n_kv_head, hidden, split", [
    ("vicuna-33b", 13, 17920, False), ("mixtral-8x7b", 32, 14336, True)])
def test_a_shapes_head_is_the_published_one(capsys, name, n_kv_head, hidden, split):
    assert plan.main(plan.parse_args(f"{name} --world-size 2 --head --context 2048".split())) == 0
    out, dim = capsys.readouterr().out, plan.SHAPES[name].dim
    # fc, q and o; k and v; the feed-forward; fc's bias
    matrices = dim * (4 * dim + 2 * n_kv_head * 128 + 3 * hidden) + dim
    n_byte = 2 * (matrices / (2 if split else 1) + dim)
    head_line, = (line for line in out.splitlines() if line.startswith("  head"))
    assert f" {n_byte / 1e9:.2f} GB a rank{'' if split else ', whole'}" in head_line


def test_the_plans_speed_with_eagle_is_the_papers_bound():
    """accepted length / (1 + levels * (head + LM head) / target), for one process with nothing else to read."""
    config = plan.SHAPES["llama-2-7b"]
    target, lm_head = 2 * 6_607_343_616, 2 * 32000 * 4096       # without the embedding table
    head = 2 * 235_937_792
    for accept_length in (1.0, 3.6):
        planned = plan.make_plan(config, 1, head=plan.describe_head("", config, "llama-2-7b"), context=1,
                                 accept_length=accept_length)
        bound = accept_length / (1 + 5 * (head + lm_head) / target)
        assert planned.eagle / planned.plain == pytest.approx(bound, rel=1e-3)


def peak(folder, head_folder):
    """Bytes that a prefill of 200 tokens and a step allocate beside weights and caches, in 16 bits."""
    shard = tp.Shard.world()
    model = Transformer.from_pretrained(folder, dtype=torch.bfloat16, shard=shard)
    head = EagleHead.from_pretrained(head_folder, model, shard=shard)
    setup_caches(model, head, 3, 256)
    step = EagleStep(model, head, load_tree("static"), 3)
    with torch.profiler.profile(profile_memory=True) as profile:
        step.prefill([tokens_of(200)] * 3)
        step(256)
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(n for _, n in sorted(events)))


def test_the_plans_workspace_is_enough_and_not_far_too_much(group, zoo):
    folder, head_folder = zoo("gqa")
    config, _ = plan.describe(folder)
    planned = plan.make_plan(config, 2, head=plan.describe_head(head_folder, config, folder), context=256, batch=3)
    for n_byte in group(2)(peak, folder, head_folder):
        assert n_byte <= planned.workspace <= 1.5 * n_byte


def test_a_plan_fetches_no_weights(zoo, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **options: asked.append(options) or zoo("gqa")[0])
    assert plan.describe("someone/tiny")[0].n_head == 8
    assert len(asked) == 1 and not any("safetensors" in p or "bin" in p for p in asked[0]["allow_patterns"])


@pytest.mark.parametrize("argv, message", [
    ("llama-2-70b --world-size 3", "1, 2, 4, 8, 16, 32, 64 do"),
    ("nothing --world-size 2", "shapes are llama-2-7b"),
    ("llama-2-7b --world-size 2 --context 5000", "beyond the model's context of 4096"),
    ("smollm2-135m --world-size 3 --mode int4 --group-size 128", "group size 128 does not divide a row of 576")])
def test_the_plan_refuses_in_one_line(capsys, argv, message):
    assert plan.main(plan.parse_args(argv.split())) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Under torchrun

def torchrun(n, *argv, nodes=(), **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), *map(str, (*nodes, *argv))]
    return subprocess.Popen(command, cwd=ROOT, **options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"EAGLE_TP_CHECK": "1"})


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def alone(capsys, *argv):
    """What generate.py writes in this one process."""
    assert cli.main(cli.parse_args(list(map(str, argv)))) == 0
    return capsys.readouterr().out


def test_the_demo_model_in_three_processes_says_what_it_says_in_one(demo_folder, tmp_path, capsys):
    argv = ["--eagle", "--prompt", "Name three birds.", "--max-new-tokens", "12", "--dtype", "float32",
            "--device", "cpu"]
    run = torchrun(3, "generate.py", *argv, "--json", tmp_path / "out.json", nodes=["--standalone"])
    expected = alone(capsys, *argv)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert out == expected
    assert len(err.splitlines()) == 2, err      # loaded, and the speed: only rank 0 speaks
    assert json.loads((tmp_path / "out.json").read_text())["text"][0] == out.rstrip("\n")


def test_two_nodes_say_what_one_process_says(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "tiny")
    argv = ["--checkpoint", checkpoint, "--prompt", "fox", "--max-new-tokens", "5", "--dtype", "float32",
            "--temperature", "1", "--seed", "7", "--device", "cpu"]
    port = free_port()
    address = ["--nnodes", "2", "--master-addr", "localhost", "--master-port", str(port)]
    nodes = [torchrun(1, "generate.py", *argv, nodes=[*address, "--node-rank", str(rank)]) for rank in range(2)]
    (silence, err), (out, more) = [node.communicate(timeout=60) for node in reversed(nodes)]
    assert [node.returncode for node in nodes] == [0, 0], err + more
    assert out == alone(capsys, *argv) and silence == ""


def test_when_a_rank_is_killed_torchrun_ends_all_and_names_it(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "endless", ascii_only=True, context=100_000)
    run = torchrun(2, "generate.py", "--checkpoint", checkpoint, "--prompt", "hi", "--max-new-tokens", "90000",
                   "--temperature", "1", "--top-k", "5",    # no --seed: they agree on one, or EAGLE_TP_CHECK ends them
                   nodes=["--standalone"])
    assert run.stdout.read(3)       # it talks
    agent_children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    victim = next(pid for pid in map(int, agent_children) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert time.monotonic() - begin < 10 and run.returncode != 0
    cause = err.partition("Root Cause")[2]
    assert "rank      : 1 " in cause and f"Signal 9 (SIGKILL) received by PID {victim}" in cause
    assert not [line for line in err.splitlines() if line.startswith("error:")]
    assert not any(Path(f"/proc/{pid}").exists() for pid in agent_children)


def test_ctrl_c_ends_all_ranks_without_a_traceback(tmp_path):
    """torchrun prints a traceback of its own, so what the ranks write goes to files."""
    checkpoint = write_checkpoint(tmp_path / "endless", ascii_only=True, context=100_000)
    run = torchrun(2, "generate.py", "--checkpoint", checkpoint, "--prompt", "hi", "--max-new-tokens", "90000",
                   nodes=["--standalone", "--redirects", "3", "--log-dir", tmp_path / "logs"], start_new_session=True)
    logs = lambda name: [file.read_text() for file in sorted((tmp_path / "logs").glob(f"*/*/*/{name}.log"))]
    until = time.monotonic() + 60
    while not any(map(len, logs("stdout"))):    # it talks
        assert time.monotonic() < until and run.poll() is None, logs("stderr")
        time.sleep(0.1)
    agent_children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.killpg(run.pid, signal.SIGINT)           # as a terminal does
    run.communicate(timeout=10)
    assert run.returncode != 0 and len(logs("stderr")) == 2
    assert [line for text in logs("stderr") for line in text.split("\n") if line][1:] == [], logs("stderr")   # "loaded"
    assert not any(Path(f"/proc/{pid}").exists() for pid in agent_children)


def wait():
    torch.distributed.barrier()
    return 0


def fail(line, status):
    print(line, file=sys.stderr)
    return status


def mistake():
    raise AssertionError("a mistake")


def kill(signal_number=signal.SIGKILL):
    os.kill(os.getpid(), signal_number)


def work_alone(work=lambda: time.sleep(3) or "done"):
    """First rank 1, then rank 0, each for longer than a collective waits."""
    done = [tp.in_turn(turn == int(os.environ["RANK"]), work) for turn in (1, 0)]
    assert done == ([None, "done"] if os.environ["RANK"] == "0" else ["done", None])
    return wait() or (tp.on_rank_0(work) != "done")


def interrupted_while_the_other_leaves():
    with pytest.raises(RuntimeError, match="gloo"):
        wait()
    signal.raise_signal(signal.SIGINT)


def wait_with_handlers(signals=()):
    """As a training does: it saves before it ends."""
    noted = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: noted.append(number))
    for number in signals:
        signal.raise_signal(number)
    assert noted == list(signals)
    return wait()


def interrupted_with_handlers():
    return wait_with_handlers((signal.SIGINT, signal.SIGTERM))


class Mishap(NamedTuple):
    zero: Callable[[], int]         # what rank 0 does, once both have met
    one: Callable[[], int]          # what rank 1 does
    statuses: list[int]             # with which they exit
    said: str                       # by both on stderr
    cause: str = ""                 # in torchrun's report
    seconds: float = 10             # after which all have ended
    machines: int = 1               # torchruns
    timeout: float = 30             # of a collective


SHUTDOWN = 3                        # seconds that torchrun gives a rank to follow its SIGTERM; 30 by default
TERM = -signal.SIGTERM
LATE = "error: rank 1 does not answer: Timed out waiting ...\n"
GONE = "error: rank 1 does not answer: ...Connection ... by peer...\n"     # closed, or reset
MISHAPS = {
    "nothing": Mishap(lambda: print("a word", end="") or wait(), lambda: print("silence") or wait(), [0, 0], ""),
    "a handler of its own": Mishap(wait, interrupted_with_handlers, [0, 0], ""),
    "1 is killed": Mishap(wait, kill, [TERM, -9], "", "rank      : 1 ...Signal 9 (SIGKILL) received"),
    "1 is killed, 0 has a handler": Mishap(wait_with_handlers, kill, [1, -9], GONE),
    "1 is stuck": Mishap(wait, lambda: time.sleep(60), [1, TERM], LATE, timeout=3),
    "1 is stopped": Mishap(wait, lambda: kill(signal.SIGSTOP), [1, -9], LATE, timeout=3, seconds=10 + SHUTDOWN),
    "1 fails": Mishap(wait, lambda: fail("error: out of memory", 2), [TERM, 2], "error: rank 1: out of memory\n",
                      "rank      : 1 ...exitcode  : 2 "),
    "0 fails": Mishap(lambda: fail("error: no space left", 2), wait, [2, TERM], "error: no space left\n",
                      "rank      : 0 ...exitcode  : 2 "),
    "both fail": Mishap(*2 * [lambda: fail("error: no such file", 2)], [2, TERM], "error: no such file\n"),
    "nobody reads 0": Mishap(lambda: 141, wait, [141, TERM], ""),
    "1 is mistaken": Mishap(wait, mistake, [TERM, 1], "", "rank      : 1 ...AssertionError: a mistake"),
    "0 is mistaken": Mishap(mistake, wait, [1, TERM], "Traceback...AssertionError: a mistake\n",
                            "rank      : 0 ...AssertionError: a mistake"),
    "both are mistaken": Mishap(mistake, mistake, [1, TERM], "Traceback...AssertionError: a mistake\n",
                                "rank      : ...AssertionError: a mistake"),
    "one works alone": Mishap(work_alone, work_alone, [0, 0], "", timeout=1, seconds=20),
    # on two machines, where no torchrun sees both
    "Ctrl-C": Mishap(interrupted_while_the_other_leaves, lambda: signal.raise_signal(signal.SIGINT), [130, 130], "",
                     machines=2),
    "1 is killed far away": Mishap(wait, kill, [1, -9], GONE, machines=2),
    "1 is killed at work": Mishap(work_alone, lambda: work_alone(kill), [1, -9], GONE, machines=2, timeout=1),
    "0 is killed far away": Mishap(kill, wait, [-9, 1], "error: rank 1: another rank does not answer: ...\n",
                                   machines=2),
    "1 fails far away": Mishap(wait, lambda: fail("error: out of memory", 2), [1, 2],
                               "error: rank 1: out of memory\n" + GONE, machines=2),
}


def suffer(name, folder, env):
    """What a rank of this mishap runs."""
    os.setsid()
    os.environ |= env
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # the fork has torchrun's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    mishap = MISHAPS[name]

    def main(args):
        options = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options
        assert options._timeout == timedelta(seconds=60)
        wait()
        # Only now: on a busy machine, connecting takes longer.
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=mishap.timeout))
        Path(folder, "begin").write_text(str(time.time()))
        return mishap.one() if os.environ["RANK"] == "1" else mishap.zero()

    sys.exit(tp.run(main, types.SimpleNamespace(device="cpu"), timeout=60))


class Program:
    """Replaces subprocess.Popen in torchrun: a fork does not have to import torch again."""

    def __init__(self, args, env):
        self.process = multiprocessing.get_context("fork").Process(target=suffer, args=(*args[1:], env))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a rank", timeout)


def launch(name, machine, port, folder):
    """What torchrun does on one machine. Leaves each rank's exit status, its report, and the time at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    SubprocessHandler._popen = lambda self, args, env: Program(args, env)
    close = SubprocessContext._close
    SubprocessContext._close = lambda self, death_sig, timeout: close(self, death_sig, SHUTDOWN)
    n_machine = MISHAPS[name].machines
    config = LaunchConfig(n_machine, n_machine, 2 // n_machine, run_id="test", max_restarts=0, rdzv_backend="static",
                          rdzv_endpoint=f"localhost:{port}", rdzv_configs={"rank": machine, "timeout": 60})
    statuses, report = dict.fromkeys(range(machine, 2, n_machine), 0), ""
    try:
        elastic_launch(config, "suffer")(name, str(folder))
    except ChildFailedError as error:
        statuses, report = {rank: failure.exitcode for rank, failure in error.failures.items()}, str(error)
    (folder / f"{machine}.json").write_text(json.dumps([statuses, report, time.time()]))


@pytest.fixture(scope="module")
def launchers(forkserver, tmp_path_factory):
    """For each mishap its folder, and a process for each torchrun. All run at the same time."""
    started = {}
    for name, mishap in MISHAPS.items():
        folder, port = tmp_path_factory.mktemp("mishap"), free_port()
        started[name] = folder, [forkserver.Process(target=launch, args=(name, machine, port, folder))
                                 for machine in range(mishap.machines)]
        for process in started[name][1]:
            process.start()
    return started


@pytest.mark.parametrize("name", MISHAPS)
def test_what_ends_a_run_how_fast_and_what_is_said(launchers, name):
    (folder, processes), mishap = launchers[name], MISHAPS[name]
    for process in processes:
        process.join(200)
    ends = [json.loads((folder / f"{machine}.json").read_text()) for machine in range(mishap.machines)]
    statuses = {int(rank): status for end, *_ in ends for rank, status in end.items()}
    err, report = (folder / "err").read_text(), "".join(report for _, report, _ in ends)
    err = re.sub(r".*hostname of the client socket cannot be retrieved.*\n", "", err)   # torch's, without a name server
    assert [statuses[rank] for rank in range(2)] == mishap.statuses, (err, report)
    said, cause = ("(?s:.*)".join(map(re.escape, text.split("..."))) for text in (mishap.said, mishap.cause))
    assert re.fullmatch(said, err) and err.count("Traceback") == said.count("Traceback"), err
    assert re.search(cause, report.partition("Root Cause")[2]), report
    seconds = max(end for *_, end in ends) - float((folder / "begin").read_text())
    print(f"{name}: {seconds:.1f} s")
    assert seconds < mishap.seconds
    assert (folder / "out").read_text() == ("a word" if name == "nothing" else "")


def test_ranks_that_load_at_different_speeds_wait_for_one_another(zoo, monkeypatch):
    folder, met = zoo("gqa")[0], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(tp, "meet", lambda: met.append("met"))
    Transformer.from_pretrained(folder, shard=tp.Shard(0, 2))
    assert met == ["met"]


@pytest.mark.parametrize("device, message", [
    ("cuda:1", "--device cuda:1: under torchrun each process takes a GPU of its own"),
    (None, "4 processes on a machine with 2 GPUs: --nproc-per-node 2")])
def test_processes_that_cannot_be_placed_are_refused_in_one_line(monkeypatch, capfd, device, message):
    for key, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4).items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        tp.run(None, types.SimpleNamespace(device=device))
    err = capfd.readouterr().err
    assert ended.value.code == 2 and message in err and err.count("\n") == 1


def test_what_does_not_fit_a_gpu_is_refused_before_loading(zoo, monkeypatch, capsys):
    folder, _ = zoo("gqa")
    tp.check_memory(folder, 2, 10 ** 6)
    assert "weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match="0.0 GB of weights a rank, the GPU has 0.0: more processes"):
        tp.check_memory(folder, 2, 1000)
