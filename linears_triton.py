"""A Triton kernel for blocks of 16-bit activations by int8, int4 or 16-bit weights.

    sums = quant_matmul(x, *linear.parts(), block_n=64, split_k=2)  # the block of a tree of drafts, fast
    y = exact_matmul(x, weight)     # or exact_matmul(x, *linear.parts()): a row has the same bits in any block

Weights are dequantised in registers. A weight of few rows would not fill the GPU: then its columns are split over
`split_k` programs. Their partial sums are added in a fixed order, so that a step gives the same bits each time.

`quant_matmul` takes 2 to 64 rows as one tile, so that each weight is read once. `exact_matmul` takes any number of rows
in tiles of ROW_TILE. No size that it works with, nor any compiled kernel, depends on how many there are.

Shapes as in linears.py. Runs on a CPU, slowly, under TRITON_INTERPRET=1.
"""
# pyright: reportArgumentType=false
# (constexpr parameters take plain numbers)
import torch
import triton
import triton.language as tl
from torch import Tensor, library

ROW_TILE = 16   # the fewest rows of a product on tensor cores
BLOCK_K = {16: 64, 8: 64, 4: 128}       # columns at a time, by the bits of a weight


# Triton compiles another kernel for an argument that is 1 or a multiple of 16: not so for M, the number of rows.
@triton.jit(do_not_specialize=["M", "split_k"])
def _matmul(x, q, scales, zeros, out, M, N, K, stride_x, stride_q, n_group, split_k, GROUP: tl.constexpr,
            BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [split_k, M, N]. A block spans several groups: Triton's dot was wrong with the few columns of one group.

    stride_q and n_group follow from K, but are arguments: Triton sees that an argument is a multiple of 16, and then
    reads 16 bytes at a time. Programs that read the same weights are neighbours.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    has_row, has_n = rows[:, None] < M, n[None, :] < N
    if BITS == 8:
        row_scale = tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(split, tl.cdiv(K, BLOCK_K), split_k):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        if BITS == 4:
            byte = block * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
            where, has_byte = n[None, :].to(tl.int64) * stride_q + byte[:, None], (byte[:, None] < stride_q) & has_n
            pair = tl.load(q + where, mask=has_byte, other=0)
            level = tl.join(pair & 15, pair >> 4).permute(0, 2, 1).to(tl.float32) - 8       # [BLOCK_K / 2, 2, BLOCK_N]
            group = block * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
            at, has_group = n[None, :] * n_group + group[:, None], (group[:, None] < n_group) & has_n
            scale = tl.load(scales + at, mask=has_group, other=0.0).to(tl.float32)[:, None, :]
            zero = tl.load(zeros + at, mask=has_group, other=0.0).to(tl.float32)[:, None, :]
            weight = (level.reshape(BLOCK_K // GROUP, GROUP, BLOCK_N) * scale + zero).reshape(BLOCK_K, BLOCK_N)
        else:
            where, has_weight = n[None, :].to(tl.int64) * stride_q + k[:, None], (k[:, None] < K) & has_n
            weight = tl.load(q + where, mask=has_weight, other=0)
            if BITS == 8:
                weight = weight.to(tl.float32) * row_scale
        block_x = tl.load(x + rows[:, None] * stride_x + k[None, :], mask=has_row & (k[None, :] < K), other=0.0)
        total = tl.dot(block_x, weight.to(block_x.dtype), total)
    tl.store(out + (split * M + rows[:, None]) * N + n[None, :], total, mask=has_row & has_n)


@library.custom_op("eagle::quant_matmul", mutates_args=())
def quant_matmul(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor | None, block_n: int, split_k: int) -> Tensor:
    """x [M, K] of up to 64 rows by a weight as linears.py stores it -> partial sums [split_k, M, N] fp32."""
    M, K = x.shape
    N, n_group = scales.shape
    assert M <= 64 and x.stride(1) == 1, (x.shape, x.stride())
    bits = 8 if zeros is None else 4
    out = torch.empty(split_k, M, N, dtype=torch.float32, device=x.device)
    _matmul[(1, triton.cdiv(N, block_n), split_k)](
        x, q, scales, zeros, out, M, N, K, x.stride(0), q.stride(0), n_group, split_k,
        GROUP=K // n_group if bits == 4 else 0, BITS=bits, BLOCK_M=max(16, triton.next_power_of_2(M)),
        BLOCK_N=block_n, BLOCK_K=BLOCK_K[bits])
    return out


@quant_matmul.register_fake
def _(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor | None, block_n: int, split_k: int) -> Tensor:
    return x.new_empty(split_k, x.shape[0], scales.shape[0], dtype=torch.float32)


# The same bits for a row, alone or among others


@library.custom_op("eagle::exact_matmul", mutates_args=())
def exact_matmul(x: Tensor, weight: Tensor, scales: Tensor | None = None, zeros: Tensor | None = None) -> Tensor:
    """x [M, K] in 16 bits by weight [N, K] in the same dtype, or as linears.py stores it -> [M, N].

    A row's sums run over the same columns in the same order for every M: M is nowhere but in the number of programs.
    """
    (M, K), N = x.shape, len(weight)
    bits = 16 if scales is None else 8 if zeros is None else 4
    assert bits < 16 or weight.dtype == x.dtype, (weight.dtype, x.dtype)
    x = aligned(x)
    block_n, split_k = exact_blocks(N, K)
    n_group = 0 if scales is None else scales.shape[1]
    sums = torch.empty(split_k, M, N, dtype=x.dtype if split_k == 1 else torch.float32, device=x.device)
    _matmul[(triton.cdiv(M, ROW_TILE), triton.cdiv(N, block_n), split_k)](
        x, weight, scales, zeros, sums, M, N, K, K, weight.stride(0), n_group, split_k,
        GROUP=K // n_group if bits == 4 else 0, BITS=bits, BLOCK_M=ROW_TILE, BLOCK_N=block_n, BLOCK_K=BLOCK_K[bits])
    if split_k == 1:
        return sums[0]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    _add_splits[(triton.cdiv(M * N, 1024),)](sums, out, M * N, SPLITS=split_k, BLOCK=1024)
    return out


@exact_matmul.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor | None = None, zeros: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def exact_blocks(N: int, K: int) -> tuple[int, int]:
    """Output rows of a program and splits of the columns, by shape alone: where there are columns enough, 256 programs
    for a tile of rows, two for each processor of an A100 or H100."""
    block_n = 64 if N >= 16384 else 32
    n_block = -(-N // block_n)
    return block_n, max(1, min(8, K // 256, -(-256 // n_block)))


def aligned(x: Tensor) -> Tensor:
    """x without gaps and from a multiple of 16 bytes on: Triton compiles other kernels for other addresses."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@triton.jit(do_not_specialize=["n"])
def _add_splits(sums, out, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """sums [SPLITS, n] fp32 -> out [n]. torch's sum may take another order for another n."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sums + at, mask=at < n, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(sums + split * n + at, mask=at < n, other=0.0)
    tl.store(out + at, total, mask=at < n)
