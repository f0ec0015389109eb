"""What only a GPU can show: compiled and captured steps do what eager ones do, and EAGLE stays greedy decoding.

    python -m pytest -q tests/test_gpu.py       # needs torch, pytest, safetensors and tqdm; skipped without CUDA

Tiny random models: in fp32 the reference is the same model's eager decoding on the same device, and a decoder without a
cache; with quantised weights, which need 16 bits, what that model says of the tokens afterwards.
"""
from dataclasses import replace

import pytest
import torch

from benchmarks.shapes import random_head, random_model, shape
from benchmarks.simulate import simulated_decoder
from decoder import Decoder, setup_caches
from draft_tree import DynamicTree, StaticTree
from linears import Format, quantize_in_place
from reference import VOCAB, assert_near_greedy, naive_decode, tokens_of
from runtime import tune
from sampling import Sampling
from test_eagle_lossless import head_of, randomise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICE = torch.device("cuda")
DENSE = shape(64, 2, 8, 2, 96, 96, 1024)
MIXTRAL = replace(DENSE, model_type="mixtral", n_expert=4, n_expert_active=2)
TREES = {"chain": StaticTree.chain(3), "paper": StaticTree.paper(), "dynamic": DynamicTree(3, 3, 8)}
BRANCHES = {f"{name}, branch": replace(tree, n_copy=5) for name, tree in TREES.items()}
BRANCHES["branch alone"] = replace(StaticTree.root(), n_copy=5)
ALL_TREES = {"plain": None} | TREES | BRANCHES
N_SLOT, N_NEW = 256, 120    # over two sizes of graphs, 128 and 192 slots
PROMPTS = [tokens_of(n, seed=n) for n in (5, 40)]
EVERY_PAIR = [token for second in range(VOCAB) for token in (11, second)] + [11]     # whatever comes next has followed
all_trees = pytest.mark.parametrize("tree", ALL_TREES.values(), ids=list(ALL_TREES))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=[DENSE, MIXTRAL], ids=["dense", "mixtral"])
def target(request):
    """A model on the GPU, a head that is right half of the time, and what greedy decoding says to each prompt."""
    torch.manual_seed(0)
    model = random_model(request.param, DEVICE, torch.float32)
    with torch.no_grad(), DEVICE:
        randomise(model, 0.25)
        head = head_of(model)
        wanted = [naive_decode(model, prompt, N_NEW) for prompt in PROMPTS]
        head.tell([prompt + tokens for prompt, tokens in zip(PROMPTS, wanted)])
    return model, head, wanted


def decoder_of(target, tree=None, batch_size=1, sampling=Sampling(), compile=True):
    model, head, _ = target
    head = head if tree and tree.depth else None
    setup_caches(model, head, batch_size, N_SLOT)
    return Decoder(model, batch_size, sampling, compile=compile, head=head, tree=tree)


def with_known(head, rows):
    """The head's hints for these rows alone, in memory that a captured graph goes on reading."""
    return head.known[rows].clone()


@all_trees
def test_captured_steps_decode_what_eager_ones_do(target, tree, monkeypatch):
    model, head, wanted = target
    monkeypatch.setattr(head, "known", with_known(head, [1]))
    for compile in (False, True):
        decoder = decoder_of(target, tree, compile=compile)
        for _ in range(2):      # captured, then replayed only
            # Layers stay compiled from before.
            with torch.compiler.set_stance("default" if compile else "force_eager"):
                result = decoder.generate([PROMPTS[1]], N_NEW)
            assert result.tokens == [wanted[1]]
            assert decoder.head is None or result.mean_accept_length > 1.2
        captured = [graph for graph in decoder.graphs.values() if graph is not None]
        assert len(captured) >= 2 if compile else not captured


@all_trees
def test_a_captured_batch_decodes_what_each_row_does_alone(target, tree):
    assert decoder_of(target, tree, batch_size=2).generate(PROMPTS, N_NEW).tokens == target[2]


@pytest.mark.parametrize("tree", BRANCHES.values(), ids=list(BRANCHES))
@pytest.mark.parametrize("rows", [[1], [0, 1]], ids=["alone", "ragged"])
def test_both_kinds_of_steps_are_captured_for_every_size_before_the_first(target, tree, rows, monkeypatch):
    """And both are what eager ones are. The first step has something to copy, later ones have not."""
    prompts, results = [[PROMPTS[0], EVERY_PAIR][row] for row in rows], []
    monkeypatch.setattr(target[1], "known", torch.full_like(with_known(target[1], rows), -1))
    for compile in (False, True):
        decoder = decoder_of(target, tree, len(rows), compile=compile)
        seen, prefill = [], decoder.eagle.prefill

        def prefill_after_looking(*args, seen=seen, prefill=prefill, decoder=decoder):
            seen.append(dict(decoder.graphs))
            prefill(*args)

        monkeypatch.setattr(decoder.eagle, "prefill", prefill_after_looking)
        with torch.compiler.set_stance("default" if compile else "force_eager"):
            results.append(decoder.generate(prompts, N_NEW))
        assert seen == [decoder.graphs]     # nothing was captured later
    sizes = {kind: {n_slot for other, n_slot in decoder.graphs if other == kind} for kind in ("tree", "copy")}
    assert all(decoder.graphs.values()) and sizes["tree"] == sizes["copy"] and len(sizes["tree"]) >= len(rows)
    eager, captured = results
    assert captured.tokens == eager.tokens and captured.accept_lengths == eager.accept_lengths
    assert captured.kinds == eager.kinds and captured.copied == eager.copied
    assert captured.kinds[0] == "copy" and {"copy", "tree"} <= set(captured.kinds)


@all_trees
@pytest.mark.parametrize("longest_ends", [0, 1])
def test_every_step_of_a_ragged_batch_is_a_captured_one(target, tree, longest_ends, monkeypatch):
    """Also after the longest row has ended, when fewer slots are looked at."""
    decoder, prompts = decoder_of(target, tree, batch_size=2), [PROMPTS[0], tokens_of(130, seed=1)]
    monkeypatch.setattr(target[1], "known", torch.full_like(target[1].known, -1))
    stops = decoder.generate(prompts, 1).tokens[1] if longest_ends else []
    asked, n_slot_of = set(), decoder._n_slot

    def n_slot(kind, length):
        asked.add((kind, n_slot_of(kind, length)))
        return n_slot_of(kind, length)

    monkeypatch.setattr(decoder, "_n_slot", n_slot)
    decoder.generate(prompts, N_NEW, stop_ids=stops)
    assert asked and all(decoder.graphs.get(key) is not None for key in asked), (asked, decoder.graphs)


def test_triton_s_kernels_keep_their_values_in_registers():
    """No kernel of a block of rows spills: one that does reads its own overflow again and again."""
    from linears import QuantLinear
    import exact_triton
    import linears_triton
    for mode, group_size in (("int4", 32), ("int4", 128), ("int8", None)):
        linear = torch.nn.Linear(4096, 4096, bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
        layer = torch.nn.Sequential(linear)
        quantize_in_place(layer, Format(mode, group_size))
        module = next(m for m in layer.modules() if isinstance(m, QuantLinear))
        for rows in (4, 26, 60):
            for block_n in (64, 128):
                x = torch.randn(rows, 4096, device=DEVICE, dtype=torch.bfloat16)
                linears_triton.quant_matmul(x, module.q, module.scales, getattr(module, "zeros", None), block_n, 1)
        for n_output in (4096, 16384):      # both widths of blocks
            weight = torch.randn(n_output, 4096, device=DEVICE, dtype=torch.bfloat16)
            linears_triton.exact_matmul(x, weight)
            linears_triton.exact_matmul(x, *QuantLinear.from_weight(weight, Format(mode, group_size)).parts())
    for head_dim in (64, 128):
        q, keys = (torch.randn(1, n, 8, head_dim, device=DEVICE, dtype=torch.bfloat16) for n in (3, 64))
        keys = keys.transpose(1, 2)
        exact_triton.exact_attention(q, keys, keys, torch.arange(3, device=DEVICE)[None])
    kernels = [kernel for function in (linears_triton._matmul, exact_triton._attention)
               for cache in function.device_caches.values() for kernel in cache[0].values()]
    for kernel in kernels:
        kernel._init_handles()
    spills = {f"{kernel.n_regs} registers": kernel.n_spills for kernel in kernels if kernel.n_spills}
    assert kernels and not spills, spills


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def quantised_target(request, tmp_path_factory):
    """int4 layers (groups of 32) with an int8 LM head, by the fastest kernels here; an int4 head; what plain steps say.
    """
    torch.manual_seed(0)
    model = random_model(DENSE, DEVICE, request.param)
    with torch.no_grad(), DEVICE:
        randomise(model, 0.25)
        head = head_of(model).to(request.param)
        quantize_in_place(model, Format("int4", 32), "int8")
        quantize_in_place(head, Format("int4", 32))
        for module in (model, head):
            tune(module, tmp_path_factory.mktemp("kernels") / "kernels.json")
        wanted = decoder_of((model, head, None)).generate([PROMPTS[1]], N_NEW).tokens
        head.tell([PROMPTS[1] + wanted[0]])
    return model, head, wanted


@pytest.mark.parametrize("tree", [None, TREES["paper"], TREES["dynamic"], BRANCHES["paper, branch"]],
                         ids=["plain", "paper", "dynamic", "branch"])
def test_quantised_steps_captured_and_eager_are_greedy_but_for_near_ties(quantised_target, tree):
    for compile in (False, True):
        decoder = decoder_of(quantised_target, tree, compile=compile)
        with torch.compiler.set_stance("default" if compile else "force_eager"):
            first, again = (decoder.generate([PROMPTS[1]], N_NEW) for _ in range(2))
        assert first.tokens == again.tokens     # sums in a fixed order: the same bits each time
        assert tree is None or max(first.accept_lengths[0]) > 2
        with torch.compiler.set_stance("force_eager"):
            assert_near_greedy(quantised_target[0], PROMPTS[1], first.tokens[0])


@all_trees
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_never_waits_for_the_device(target, tree, temperature, monkeypatch):
    monkeypatch.setattr(target[1], "known", with_known(target[1], [0]))
    decoder = decoder_of(target, tree, sampling=Sampling(temperature), compile=False)
    step = decoder.eagle or decoder.plain
    step.prefill([PROMPTS[0]])
    kinds = ["plain"] if tree is None else ["tree", "copy"] if tree.n_copy else ["tree"]
    with torch.compiler.set_stance("force_eager"):      # the compiler may wait
        for kind in kinds:
            decoder.run(kind, len(PROMPTS[0]) + 1)      # lazy initialisation too
            torch.cuda.set_sync_debug_mode("error")
            try:
                decoder.run(kind, len(PROMPTS[0]) + 1)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tree", [None, TREES["paper"], TREES["dynamic"], BRANCHES["paper, branch"]],
                         ids=["plain", "paper", "dynamic", "branch"])
def test_replayed_draws_follow_the_seed_and_are_not_the_same_every_time(target, tree, monkeypatch):
    monkeypatch.setattr(target[1], "known", with_known(target[1], [0]))
    decoder = decoder_of(target, tree, sampling=Sampling(1.0))
    decoder.generate([PROMPTS[0]], 48)      # captures: the draws before and after it are not the same ones
    first, again, other = (decoder.generate([PROMPTS[0]], 48, seed=seed).tokens for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(decoder.generate([PROMPTS[0]], 48).tokens[0]) for _ in range(3)}) == 3


def test_a_simulated_step_is_captured_and_keeps_its_turn():
    model = random_model(DENSE, DEVICE, torch.bfloat16)
    head = random_head(model)
    setup_caches(model, head, 1, N_SLOT)
    decoder = simulated_decoder(model, head, TREES["paper"], [3, 1, 5, 2], compile=True)
    with torch.inference_mode():
        results = [decoder.generate([PROMPTS[0]], n) for n in (14, 8)]
    assert [result.accept_lengths for result in results] == [[[3, 1, 5, 2, 3]], [[1, 5, 2]]]
    assert any(decoder.graphs.values())
