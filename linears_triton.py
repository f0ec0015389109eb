"""A Triton kernel for 2 to 64 rows of 16-bit activations by int8 or int4 weights: the block of a tree of drafts.

All rows of activations are one tile, so that each weight is read once, and dequantised in registers. A weight of few
rows would not fill the GPU: then its columns are split over `split_k` programs. Their partial sums are added in a fixed
order, so that a step gives the same bits each time.

Shapes as in linears.py. Runs on a CPU, slowly, under TRITON_INTERPRET=1.
"""
# pyright: reportArgumentType=false
# (constexpr parameters take plain numbers)
import torch
import triton
import triton.language as tl
from torch import Tensor, library


@triton.jit(do_not_specialize=["M", "split_k"])
def _quant_matmul(x, q, scales, zeros, out, M, N, K, stride_x, stride_q, n_group, split_k, GROUP: tl.constexpr,
                  IS_INT4: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [split_k, M, N] fp32. A block spans several groups: Triton's dot was wrong with the few columns of one group.

    stride_q and n_group follow from K, but are arguments: Triton sees that an argument is a multiple of 16, and then
    reads 16 bytes at a time.
    """
    rows = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    has_row, has_n = rows[:, None] < M, n[None, :] < N
    if not IS_INT4:
        row_scale = tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(split, tl.cdiv(K, BLOCK_K), split_k):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        if IS_INT4:
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
            level = tl.load(q + n[None, :].to(tl.int64) * stride_q + k[:, None], mask=(k[:, None] < K) & has_n, other=0)
            weight = level.to(tl.float32) * row_scale
        block_x = tl.load(x + rows[:, None] * stride_x + k[None, :], mask=has_row & (k[None, :] < K), other=0.0)
        total = tl.dot(block_x, weight.to(block_x.dtype), total)
    tl.store(out + (split * M + rows[:, None]) * N + n[None, :], total, mask=has_row & has_n)


@library.custom_op("eagle::quant_matmul", mutates_args=())
def quant_matmul(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor | None, block_n: int, split_k: int) -> Tensor:
    """x [M, K] of up to 64 rows by a weight as linears.py stores it -> partial sums [split_k, M, N] fp32."""
    M, K = x.shape
    N, n_group = scales.shape
    assert M <= 64 and x.stride(1) == 1, (x.shape, x.stride())
    is_int4 = zeros is not None
    out = torch.empty(split_k, M, N, dtype=torch.float32, device=x.device)
    _quant_matmul[(triton.cdiv(N, block_n), split_k)](
        x, q, scales, zeros, out, M, N, K, x.stride(0), q.stride(0), n_group, split_k,
        GROUP=K // n_group if is_int4 else 0, IS_INT4=is_int4, BLOCK_M=max(16, triton.next_power_of_2(M)),
        BLOCK_N=block_n, BLOCK_K=128 if is_int4 else 64)
    return out


@quant_matmul.register_fake
def _(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor | None, block_n: int, split_k: int) -> Tensor:
    return x.new_empty(split_k, x.shape[0], scales.shape[0], dtype=torch.float32)
