"""A Triton kernel for 2 to 64 rows of 16-bit activations by int8 or int4 weights: the block of a tree of drafts.

All rows are one tile, so that the weights are read once whatever their number; what is read is dequantised in
registers. The columns are split over `split_k` programs where the rows of the weight alone would not fill the GPU;
their partial sums are added in a fixed order, so that a step gives the same bits each time.

Shapes as in quantized.py. Runs on a CPU, slowly, under TRITON_INTERPRET=1.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _quant_matmul(x, q, scales, zeros, out, M, N, K, stride_x, GROUP: tl.constexpr, IS_INT4: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """out [SPLIT_K, M, N] fp32. BLOCK_K divides GROUP, so that a block of a row has one scale."""
    rows = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    has_row, has_n = rows[:, None] < M, n < N
    n_group = K // GROUP
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(split, tl.cdiv(K, BLOCK_K), SPLIT_K):
        begin = block * BLOCK_K
        at = n * n_group + begin // GROUP
        scale = tl.load(scales + at, mask=has_n, other=0.0).to(tl.float32)
        if IS_INT4:
            zero = tl.load(zeros + at, mask=has_n, other=0.0).to(tl.float32)
            half = tl.arange(0, BLOCK_K // 2)
            byte = tl.load(q + n[None, :].to(tl.int64) * (K // 2) + begin // 2 + half[:, None], mask=has_n[None, :], other=0)
            low, high = (byte & 15).to(tl.float32) - 8, (byte >> 4).to(tl.float32) - 8      # [BLOCK_K / 2, BLOCK_N]
            where = x + rows[:, None] * stride_x + begin + 2 * half[None, :]
            even, odd = tl.load(where, mask=has_row, other=0.0), tl.load(where + 1, mask=has_row, other=0.0)
            total = tl.dot(even, (low * scale[None, :] + zero[None, :]).to(even.dtype), total)
            total = tl.dot(odd, (high * scale[None, :] + zero[None, :]).to(odd.dtype), total)
        else:
            k = begin + tl.arange(0, BLOCK_K)
            has_k = k < K
            level = tl.load(q + n[None, :].to(tl.int64) * K + k[:, None], mask=has_k[:, None] & has_n[None, :], other=0)
            row = tl.load(x + rows[:, None] * stride_x + k[None, :], mask=has_row & has_k[None, :], other=0.0)
            total = tl.dot(row, (level.to(tl.float32) * scale[None, :]).to(row.dtype), total)
    tl.store(out + (split * M + rows[:, None]) * N + n[None, :], total, mask=has_row & has_n[None, :])


@torch.library.custom_op("eagle::quant_matmul", mutates_args=())
def quant_matmul(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor | None, block_n: int, split_k: int) -> Tensor:
    """x [M, K] of up to 64 rows by a weight as quantized.py stores it -> [M, N] in the dtype of x."""
    M, K = x.shape
    N, n_group = scales.shape
    assert M <= 64 and x.stride(1) == 1, (x.shape, x.stride())
    group = K // n_group
    block_k = 64 if zeros is None else min(group, 64)   # int8 has one scale a row, whatever the block
    out = torch.empty(split_k, M, N, dtype=torch.float32, device=x.device)
    _quant_matmul[(triton.cdiv(N, block_n), split_k)](
        x, q, scales, zeros, out, M, N, K, x.stride(0), GROUP=group, IS_INT4=zeros is not None,
        BLOCK_M=max(16, triton.next_power_of_2(M)), BLOCK_N=block_n, BLOCK_K=block_k, SPLIT_K=split_k)
    return out.sum(0).to(x.dtype)


@quant_matmul.register_fake
def _(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor | None, block_n: int, split_k: int) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[0])
