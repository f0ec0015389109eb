"""runtime.py: a step replayed from its trace does what the step itself does, for any number of cache slots.

    python -m pytest tests/test_runtime.py -q

What a captured CUDA graph does is in tests/test_gpu.py. What it asks of a step is seen here without a GPU.
"""
import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sampling as sampling_file
from benchmarks.shapes import TINY
from decoder import Decoder, PlainStep, setup_caches
from draft_tree import DynamicTree, StaticTree
from eagle_head import EagleHead
from eagle_step import EagleStep
from generate import generate
from linears import Format, QuantLinear, quantize_in_place
from model import Transformer
from reference import naive_decode, tiny, tokens_of
from runtime import pack_for_cpu, tune
from sampling import Sampling, logits_to_probs
from test_eagle_lossless import head_of

TREES = {"plain": None, "chain": StaticTree.chain(3), "paper": StaticTree.paper(), "dynamic": DynamicTree(3, 3, 8)}
N_SLOT, N_NEW = 200, 16     # prompts end before slot 128, answers behind it: two sizes of the view of the cache


@pytest.fixture(autouse=True)
def always_traced(monkeypatch, tmp_path):
    monkeypatch.setattr(Decoder, "TRACE_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(kind, tmp_path, dtype=torch.float32, **overrides):
    overrides |= dict(max_position_embeddings=256)
    return Transformer.from_pretrained(tiny(kind, tmp_path / kind, **overrides)[0], device="cpu", dtype=dtype)


def answers(model, head, tree, prompts, *, traced, sampling=Sampling(), seed=None):
    """Two generations of one decoder: the trace is made in the first, and only replayed in the second."""
    setup_caches(model, head, len(prompts), N_SLOT)
    decoder = Decoder(model, len(prompts), sampling, head=head if tree else None, tree=tree)
    decoder.can_trace = traced and decoder.can_trace
    results = [decoder.generate(prompts, N_NEW, seed=seed) for _ in range(2)]
    assert list(decoder.traces) == (["plain" if tree is None else "tree"] if traced else [])
    assert results[0].tokens == results[1].tokens or seed is None and sampling.temperature > 0
    return results[1]


@pytest.mark.parametrize("tree", TREES.values(), ids=list(TREES))
@pytest.mark.parametrize("kind, n_row", [("gqa", 1), ("gqa", 3), ("qwen2", 1), ("mixtral", 3), ("qwen3_moe", 1)])
def test_traced_steps_decode_what_naive_decoding_does(tree, kind, n_row, tmp_path):
    model = load(kind, tmp_path)
    head = head_of(model)
    prompts = [tokens_of(122 - row, seed=row) for row in range(n_row)]
    wanted = [naive_decode(model, prompt, N_NEW) for prompt in prompts]
    head.tell([p + w for p, w in zip(prompts, wanted)])
    eager, traced = (answers(model, head, tree, prompts, traced=traced) for traced in (False, True))
    assert traced.tokens == wanted
    assert traced.accept_lengths == eager.accept_lengths
    assert tree is None or traced.mean_accept_length > 1.2


@pytest.mark.parametrize("tree", TREES.values(), ids=list(TREES))
def test_traced_draws_follow_the_seed_and_are_not_the_same_every_time(tree, tmp_path):
    model, prompts, warm = load("gqa", tmp_path), [tokens_of(122)], Sampling(1.0)
    head = head_of(model)
    eager, traced, other = (answers(model, head, tree, prompts, traced=traced, sampling=warm, seed=seed).tokens
                            for traced, seed in ((False, 1), (True, 1), (True, 2)))
    assert eager == traced != other
    unseeded = [answers(model, head, tree, prompts, traced=True, sampling=warm).tokens[0] for _ in range(3)]
    assert len(set(map(tuple, unseeded))) == 3


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 1 - 1e-6])
def test_top_p_by_the_likeliest_few_equals_a_full_sort(top_p, monkeypatch):
    """Bit for bit: peaked, flat, with ties on the border, one-hot, and not a number; called, and in a trace."""
    V = 5000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, V, generator=generator)
    cases = {"peaked": 5 * noise, "broad": noise, "flat": torch.zeros(2, V), "ties": (2 * noise).round(),
             "one-hot": torch.where(noise == noise.amax(-1, keepdim=True), 0.0, -torch.inf),
             "two levels": (noise > 2.0) * 3.0, "NaN": torch.where(noise == noise[0, 7], torch.nan, noise),
             "each another": torch.stack((5 * noise[0], 0 * noise[0], noise[1], 8 * noise[1])).view(2, 2, V)}
    traced = torch.jit.trace(lambda logits: logits_to_probs(logits, 1.0, None, top_p), 5 * noise)
    for name, logits in cases.items():
        ours = logits_to_probs(logits, 1.0, None, top_p)
        with monkeypatch.context() as patch:
            patch.setattr(sampling_file, "nucleus_from_likeliest", sampling_file.nucleus)
            expected = logits_to_probs(logits, 1.0, None, top_p)
        for found in (ours, traced(logits)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("format, kernel", [(None, "dense"), *itertools.product((Format("int8"), Format("int4", 32)),
                                                                              ("dense", "packed"))], ids=str)
@pytest.mark.parametrize("tree", [None, StaticTree.chain(2)], ids=["plain", "chain"])
def test_every_kernel_of_a_cpu_can_be_traced(format, kernel, tree, tmp_path):
    torch.manual_seed(0)
    model = load("gqa", tmp_path, torch.bfloat16, hidden_size=64, intermediate_size=128, num_attention_heads=4,
                 vocab_size=256)
    head = head_of(model).to(torch.bfloat16)
    if format is not None:
        quantize_in_place(model, format, format.mode)
        tune(model)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.kernels = dict.fromkeys(module.kernels, kernel)
            module.lay_out({kernel})
    pack_for_cpu(model), pack_for_cpu(head)
    eager, traced = (answers(model, head, tree, [tokens_of(122)], traced=traced) for traced in (False, True))
    assert traced.tokens == eager.tokens and traced.accept_lengths == eager.accept_lengths


@pytest.mark.parametrize("tree", TREES.values(), ids=list(TREES))
@pytest.mark.parametrize("kind", ["gqa", "llama2_tied", "mixtral"])
def test_packed_fp32_weights_decode_what_naive_decoding_over_plain_ones_does(tree, kind, tmp_path):
    model = load(kind, tmp_path)
    head, prompt = head_of(model), tokens_of(122)
    wanted = naive_decode(model, prompt, N_NEW)
    head.tell([prompt + wanted])
    pack_for_cpu(model), pack_for_cpu(head)
    for traced in (False, True):
        result = answers(model, head, tree, [prompt], traced=traced)
        assert result.tokens == [wanted]
        assert tree is None or result.mean_accept_length > 1.2


def test_what_decides_on_the_host_is_not_traced(tmp_path, monkeypatch):
    model = load("mixtral", tmp_path, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    setup_caches(model, None, 1, N_SLOT)
    assert Decoder(model, 1).can_trace
    assert not Decoder(model, 1, compile=True).can_trace
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        assert not Decoder(model, 1).can_trace
    quantize_in_place(model, Format("int4", 32))
    assert not Decoder(model, 1).can_trace      # its experts are chosen by reading the routing


def test_a_call_of_generate_leaves_no_trace_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.jit, "trace", lambda *_, **__: pytest.fail("torch would keep it"))
    generate(load("gqa", tmp_path), [tokens_of(5)], 64)


def test_short_answers_are_not_worth_a_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(Decoder, "TRACE_FROM", 9)
    model = load("gqa", tmp_path)
    setup_caches(model, None, 1, N_SLOT)
    decoder = Decoder(model, 1)
    decoder.generate([tokens_of(5)], 8)
    assert not decoder.traces
    decoder.generate([tokens_of(5)], 9)
    assert decoder.traces


class OnDevice(TorchDispatchMode):
    """Fails where an operator touches a tensor of the host: a graph cannot hold such a copy.

    Single numbers may be on the host: they are arguments of kernels.
    """

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.dim() == 0, operator
        return result


# With a copied branch beside each tree, and the branch alone.
ALL_TREES = TREES | {f"{name}, branch": replace(tree, n_copy=5) for name, tree in TREES.items() if tree is not None}
ALL_TREES["branch alone"] = replace(StaticTree.root(), n_copy=5)


@pytest.mark.parametrize("n_expert", [0, 4], ids=["dense", "mixtral"])
@pytest.mark.parametrize("tree", ALL_TREES.values(), ids=list(ALL_TREES))
def test_a_step_reads_no_value_and_copies_nothing_from_the_host(tree, n_expert):
    """What a captured graph asks of it, seen without a GPU: tensors on the meta device have no values."""
    with torch.device("meta"):
        model = Transformer(replace(TINY, n_expert=n_expert, n_expert_active=2))
        head = EagleHead(TINY, model)
    for n_row, sampling in itertools.product((1, 3), (Sampling(), Sampling(0.7, 20, 0.9))):
        setup_caches(model, head, n_row, N_SLOT)
        if tree is None:
            tokens = torch.zeros(n_row, 1, dtype=torch.long, device="meta")
            step = PlainStep(model, tokens, torch.zeros_like(tokens), sampling)
        else:
            step = EagleStep(model, head if tree.depth else None, tree, n_row, sampling)
        with OnDevice():
            step(128)
            if tree is not None and tree.n_copy:
                step(128, copies=True)
