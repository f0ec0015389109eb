"""tp.py: a model split over processes says what it says in one. gloo on the CPU, in fp32, tiny random models.

    python -m pytest tests/test_tp.py -q

The processes of a group are started once and run functions of this file, the same on every rank, as torchrun would.
"""
import contextlib
import functools
import multiprocessing
import os
import sys
import types
from pathlib import Path

import pytest
import torch

import tp
from eagle_head import DynamicTree, EagleHead, StaticTree, load_tree
from generate import Decoder, generate, setup_caches
from model import Sampling, Transformer
from reference import VOCAB, tiny, tokens_of
from test_eagle import head_config, head_weights, write_head

ROOT = Path(__file__).resolve().parent.parent
KINDS = {   # what the processes share out: heads, key/value heads and the rest must divide
    "gqa": {},                                              # 8 heads on 2: four ranks share two key/value heads
    "llama2_tied": dict(num_key_value_heads=1, vocab_size=97),  # the last rank has fewer rows
    "mixtral": {},
    "qwen2": {},
}
WORLDS = (2, 4)


class Group:
    """`world` processes; group(function, *args) runs it on all and returns what each returned."""

    def __init__(self, world, folder):
        context = multiprocessing.get_context("forkserver")     # torch is imported once for all
        context.set_forkserver_preload(["test_tp"])
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=serve, args=(rank, world, str(folder / "store"), theirs), daemon=True))
            self.processes[-1].start()

    def __call__(self, function, *args):
        for pipe in self.pipes:
            pipe.send((function.__name__, args))
        results = [pipe.recv() for pipe in self.pipes]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self):
        for pipe in self.pipes:
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
def group(tmp_path_factory):
    """group(world) -> the Group of so many processes."""
    os.environ |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    make = functools.cache(lambda world: Group(world, tmp_path_factory.mktemp("group")))
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
    def make(kind, **overrides):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(1)
        tiny(kind, folder / "target", **(KINDS.get(kind, {}) | overrides))
        target = Transformer.from_pretrained(folder / "target", dtype=torch.float32)
        config = head_config(target)
        write_head(folder / "head", config, head_weights(config, None))
        return str(folder / "target"), str(folder / "head")

    return make


@functools.cache
def load(folder, head_folder):
    """On a rank its part, in a process without a group the whole."""
    shard = tp.Shard.world() if torch.distributed.is_initialized() else None
    model = Transformer.from_pretrained(folder, dtype=torch.float32, shard=shard)
    return model, EagleHead.from_pretrained(head_folder, model, shard=shard)


def whole(logits):
    return logits if isinstance(logits, torch.Tensor) else logits.full()


def passes(folder, head_folder):
    """Logits and features of a batch of three, by a prefill and a block; and the head's over them."""
    model, head = load(folder, head_folder)
    tokens = torch.tensor([tokens_of(12, seed) for seed in range(3)])
    model.setup_caches(3, 32)
    head.setup_caches(3, 32)
    outs = []
    for pos in (torch.arange(8), torch.arange(8, 12)):
        logits, features = model(tokens[:, pos], pos)
        hidden = head(tokens[:, pos], features, pos)
        outs += [whole(logits), features, hidden, whole(head.draft_logits(hidden))]
    return outs


def answers(folder, head_folder, tree, draft_vocab, options):
    model, head = load(folder, head_folder)
    if tree is None:
        head = None
    else:
        head.set_draft_vocab(draft_vocab)
    return [generate(model, [tokens_of(5 + seed, seed) for seed in range(B)], 12, head=head, tree=tree or "static", **options).tokens
            for B in (1, 3)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_features_equal_one_process(group, zoo, kind, world):
    expected = passes(*zoo(kind))
    for outs in group(world)(passes, *zoo(kind)):
        for ours, theirs in zip(outs, expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


CASES = {
    "plain": (None, None, {}),
    "plain, drawn": (None, None, dict(temperature=1.0, top_p=0.9, seed=3)),
    "static": ("static", None, {}),
    "dynamic": ("dynamic:3,4,12", None, {}),
    "draft vocabulary": ("dynamic:3,4,12", list(range(60, 11, -1)), {}),
    "static, drawn drafts": ("static", None, dict(temperature=1.0, top_k=20, seed=4)),
    "static, drawn from a draft vocabulary": ("static", list(range(60, 11, -1)), dict(temperature=1.0, seed=4)),
    "dynamic, drawn": ("dynamic:3,4,12", None, dict(temperature=0.7, seed=5)),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_text_equals_one_process(group, zoo, kind, case, world):
    expected = answers(*zoo(kind), *CASES[case])
    for ours in group(world)(answers, *zoo(kind), *CASES[case]):
        assert ours == expected
