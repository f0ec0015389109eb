"""The exact kernels for GPUs against float64, and bit for bit in blocks of any size. On a CPU in Triton's interpreter.

    python -m pytest tests/test_exact_triton.py -q

Shapes: M rows, N and K of a weight [N, K]; B batch, T tokens, S cache slots read, W of them looked up, H query heads,
D head dim.
"""
import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import library

from benchmarks.exact_kernels import (TREES, add_products_in_order, attention_apart, exact_product, mirrored,
                                      rows_apart)
from grid import Format, unpack
from linears import QuantLinear

TESTS = Path(__file__).parent
FORMATS = (None, Format("int8"), Format("int4", 32), Format("int4", 128))
DTYPES = (torch.float16, torch.bfloat16)
devices = pytest.mark.parametrize("device", ["cpu", "cuda"])


def in_a_process(check, device):
    """Run check(device) in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton", minversion="3.7" if device == "cpu" else None)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}:{TESTS.parent / 'benchmarks'}"}
    environment |= {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    code = f"from test_exact_triton import *; run({check.__name__}, {device!r})"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def run(check, device):
    if device == "cpu":
        add_products_in_order()
    torch.manual_seed(0)
    check(device)


@devices
def test_exact_products_equal_float64(device):
    in_a_process(check_products, device)


@devices
def test_exact_products_give_a_row_the_same_bits_in_any_block(device):
    in_a_process(check_bits_of_products, device)


@devices
def test_exact_attention_equals_float64(device):
    in_a_process(check_attention, device)


@devices
def test_exact_attention_gives_a_token_the_same_bits_in_any_block_and_tree(device):
    in_a_process(check_bits_of_attention, device)


def test_the_exact_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """By the compiler in Triton's package. Rows are in tiles of 16, no value leaves the registers, none is added by an
    atomic operation."""
    pytest.importorskip("triton", minversion="3.7")
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}:{TESTS.parent / 'benchmarks'}",
                                "TRITON_CACHE_DIR": str(tmp_path)}
    code = "from test_exact_triton import check_compilation; check_compilation()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def check_compilation():
    from exact_triton import BLOCK, _attention
    from linears_triton import BLOCK_K, ROW_TILE, _add_splits, _matmul
    for capability in (80, 90):
        for bits, stored in ((16, "*bf16"), (8, "*i8"), (4, "*u8")):
            absent = {16: ["scales", "zeros"], 8: ["zeros"], 4: []}[bits]
            constants = {"GROUP": 32 if bits == 4 else 0, "BITS": bits, "BLOCK_M": ROW_TILE, "BLOCK_N": 64,
                         "BLOCK_K": BLOCK_K[bits]} | dict.fromkeys(absent)
            assert "m16n8k16" in compiled(capability, _matmul, {"q": stored, "out": "*fp32"}, constants)
        compiled(capability, _add_splits, {"sums": "*fp32"}, {"SPLITS": 8, "BLOCK": 1024})
        for G, D in ((1, 128), (4, 64)):
            constants = {"G": G, "D": D, "BLOCK_G": 16, "BLOCK_D": D, "BLOCK": BLOCK}
            types = {"input_pos": "*i64", "slots": "*i64", "scale": "fp32"}
            assert "m16n8k16" in compiled(capability, _attention, types, constants)


def compiled(capability, function, types, constants):
    """The PTX of a kernel. All pointers and whole numbers are multiples of 16 but for those not specialised."""
    import triton
    from triton.backends import nvidia
    pointers = ("x", "scales", "zeros", "out", "q", "keys", "values")
    types = {param.name: "constexpr" if param.name in constants else
             types.get(param.name, "*bf16" if param.name in pointers else "i32") for param in function.params}
    aligned = {(n,): [["tt.divisibility", 16]] for n, param in enumerate(function.params)
               if types[param.name] not in ("constexpr", "fp32") and not param.do_not_specialize}
    constants = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(function, types, constants, aligned)
    made = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32))
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin/cuobjdump"
    used = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    assert "STACK:0 " in used and "LOCAL:0 " in used, used
    assert "atom" not in made.asm["ptx"]
    return made.asm["ptx"]


def linear_of(format, weight, device):
    """With NaN behind its weight, scales and zeros, which must not be read. And its weight in float64."""
    N, K = weight.shape
    if format is None:
        linear = torch.nn.Linear(K, N, bias=False)
        wide = torch.full((N + 1, K + 3), torch.nan, dtype=weight.dtype, device=device)
        wide[:N, :K] = weight
        linear.weight = torch.nn.Parameter(wide[:N, :K], requires_grad=False)
        return linear, linear.weight.double()
    linear = QuantLinear.from_weight(weight, format).to(device)
    for name, tensor in linear.stored().items():
        if name != "weight":
            setattr(linear, name, torch.cat((tensor, torch.full_like(tensor, torch.nan)))[:N])
    groups = unpack(linear.q).double().unflatten(1, (linear.scales.shape[1], -1)) * linear.scales.double()[..., None]
    return linear, (groups if linear.zeros is None else groups + linear.zeros.double()[..., None]).flatten(1)


def check_products(device):
    """Bound: the result and a quantised weight are rounded to 16 bits (off by eps, as the interpreter truncates), and
    each of K sums to fp32 by a tensor core, which keeps a bit less than it could."""
    from linears_triton import exact_matmul
    shapes = [(40, 128), (33, 384), (40, 96), (7, 9), (70, 100), (35, 1037), (35, 1152)]
    shapes += [(16390, 96)] if device == "cuda" else []     # the interpreter is slow
    rows = itertools.cycle([1, 17, 64, 35, 5])
    for format, (N, K), dtype in itertools.product(FORMATS, shapes, DTYPES):
        if K % (format and format.group_size or 1):
            continue
        linear, weight = linear_of(format, torch.randn(N, K).to(dtype), device)
        x = torch.randn(next(rows), 2 * K, device=device).to(dtype)[:, :K]
        ours = exact_product(linear)(x)
        assert ours.dtype == dtype and ours.shape == (len(x), N)
        theirs, size, eps = x.double() @ weight.T, x.double().abs() @ weight.abs().T, torch.finfo(dtype).eps
        bound = eps * theirs.abs() + (K * 2 ** -22 + (eps if format else 0)) * size
        assert ((ours.double() - theirs).abs() <= bound).all(), (format, N, K, dtype)
    library.opcheck(exact_matmul, (x, *linear.parts()))
    library.opcheck(exact_matmul, (x, linear.weight))


@contextlib.contextmanager
def compiling(device, *functions, count):
    """On a GPU: what runs inside compiles up to `count` kernels, not one more for some number of rows or address."""
    n_compiled = lambda: sum(len(cache[0]) for function in functions for cache in function.device_caches.values())
    before = n_compiled() if device == "cuda" else 0
    yield
    assert device == "cpu" or n_compiled() <= before + count


def check_bits_of_products(device):
    import linears_triton
    # Rows at other addresses are other arguments to Triton: of 1001 columns, most rows begin at odd places.
    cases = itertools.product(FORMATS, DTYPES) if device == "cuda" else zip(FORMATS, itertools.cycle(DTYPES))
    for format, dtype in cases:
        K = 1280 if format and format.mode == "int4" else 1001
        linear, _ = linear_of(format, mirrored(torch.randn(31, K).to(dtype), 1), device)
        x = mirrored(torch.randn(131 if device == "cuda" else 61, K, device=device).to(dtype), -1)
        with compiling(device, linears_triton._matmul, linears_triton._add_splits, count=2):
            assert rows_apart(exact_product(linear), x, 1 if device == "cuda" else 20) == [], (format, dtype)


def check_attention(device):
    """Bound: weights of the values and the result are rounded to 16 bits, each off by eps; fp32 adds less than half of
    one more."""
    from exact_triton import exact_attention
    B, T, S, W = 3, 3, 197, 75
    sizes = [(1, 2, 64), (1, 1, 128), (4, 2, 80), (3, 1, 16), (20, 1, 32)]
    for (G, K, D), dtype in zip(sizes, itertools.cycle(DTYPES)):
        q, cache = torch.randn(B, T, G * K, D), torch.randn(2, B, K, S + 30, D)
        q, cache = q.to(device, dtype), cache.to(device, dtype)
        cache[:, :, :, S:] = torch.nan
        input_pos = torch.randint(S, (B, T), device=device)
        input_pos[0, 0], input_pos[1, 0], input_pos[2, 0] = 0, S - 1, 63     # a whole block, and the ends
        path = torch.stack([S - W + torch.randperm(W) for _ in range(B * T)]).view(B, T, W).to(device)
        for slots in (None, path):
            ours = exact_attention(q, *cache[:, :, :, :S], input_pos, slots)
            assert ours.dtype == dtype and ours.shape == q.shape
            at = torch.arange(S, device=device).expand(B, T, -1).clone()
            if slots is not None:
                at[:, :, -W:] = slots
            rows = torch.arange(B, device=device)[:, None, None]
            k, v = (half.double().transpose(1, 2)[rows, at].repeat_interleave(G, 3)
                    for half in cache[:, :, :, :S])                                         # [B, T, S, H, D]
            scores = torch.einsum("bthd,btshd->bths", q.double(), k) * D ** -0.5
            unseen = torch.arange(S, device=device) > input_pos[..., None, None]
            weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
            theirs, size = (torch.einsum("bths,btshd->bthd", weights, x) for x in (v, v.abs()))
            bound = 2.5 * torch.finfo(dtype).eps * size
            assert ((ours.double() - theirs).abs() <= bound).all(), (G, K, D, dtype, slots is None)
    library.opcheck(exact_attention, (q, *cache[:, :, :, :S], input_pos, path))
    library.opcheck(exact_attention, (q, *cache[:, :, :, :S], input_pos))


def check_bits_of_attention(device):
    import exact_triton
    for K, G, D, dtype, trees in ((1, 3, 16, torch.float16, TREES), (2, 1, 80, torch.bfloat16, TREES[2:])):
        with compiling(device, exact_triton._attention, count=1):
            assert attention_apart(K, G, D, dtype, torch.device(device), trees) == [], (K, G, D, dtype)
