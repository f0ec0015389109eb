"""Attention on a GPU that gives a token the same bits in any block: alone, among others, or as a node of a tree.

    y = exact_attention(q, *kv_cache[:, :, :, :n_slot], input_pos)              # slots are positions
    y = exact_attention(q, *kv_cache[:, :, :, :n_slot], input_pos, slots)       # a tree: attention.path_slots

What attention.py is on a CPU. A program computes one token's query heads of one key/value head. It walks over the
positions that the token sees, from the first to its own, BLOCK at a time, with an online softmax (FlashAttention, arXiv
2205.14135). Where the key of a position stands is looked up. So neither the other tokens, nor the slots that are read,
nor the slot where an accepted node was computed change what a program adds, and in which order.

Nothing offers it yet: benchmarks/exact_kernels.py says whether it holds on a GPU, and what it costs.

Shapes: B batch, T new tokens, S cache slots read, W positions at the end of S that are looked up, K key/value heads,
G query heads each, D head dim. Runs on a CPU, slowly, under TRITON_INTERPRET=1.
"""
# pyright: reportArgumentType=false
# (constexpr parameters take plain numbers)
import math

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from linears_triton import aligned

BLOCK = 64      # positions; part of what decides the bits


# One compiled kernel for all numbers of tokens and slots, for trees and without one.
@triton.jit(do_not_specialize=["T", "S", "W", "input_pos", "slots"])
def _attention(q, keys, values, input_pos, slots, out, scale, T, S, W, n_kv_head, stride_b, stride_h, stride_s,
               G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(2) * T + tl.program_id(0)     # of B * T
    head = tl.program_id(1)
    base = tl.program_id(2).to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    end = tl.minimum(tl.load(input_pos + token) + 1, S)     # a finished row may be past the slots that are read
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    where_q = ((token * n_kv_head + head) * G + g[:, None]) * D + d[None, :]
    has_q = (g[:, None] < G) & (d[None, :] < D)
    query = tl.load(q + where_q, mask=has_q, other=0.0)
    highest = tl.full((BLOCK_G,), -float("inf"), dtype=tl.float32)
    mass = tl.zeros((BLOCK_G,), dtype=tl.float32)
    total = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    for begin in range(0, end, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        is_seen = position < end
        column = position - (S - W)
        slot = tl.load(slots + token * W + column, mask=is_seen & (column >= 0), other=position)
        where = base + slot[:, None] * stride_s + d[None, :]
        has_key = is_seen[:, None] & (d[None, :] < D)
        key = tl.load(keys + where, mask=has_key, other=0.0)
        value = tl.load(values + where, mask=has_key, other=0.0)
        score = tl.where(is_seen[None, :], tl.dot(query, tl.trans(key)) * scale, -float("inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        weight, shrink = tl.exp2(score - higher[:, None]), tl.exp2(highest - higher)
        mass = mass * shrink + tl.sum(weight, 1)
        total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None])
        highest = higher
    tl.store(out + where_q, total / mass[:, None], mask=has_q)


@library.custom_op("eagle::exact_attention", mutates_args=())
def exact_attention(q: Tensor, keys: Tensor, values: Tensor, input_pos: Tensor, slots: Tensor | None = None) -> Tensor:
    """q [B, T, K*G, D], keys and values [B, K, S, D], input_pos [B, T] int64 -> [B, T, K*G, D].

    A token sees all positions up to its own. slots [B, T, W] int64 has the slots of the last W of S positions, as they
    are on each token's path; other positions stand in the slot of their number.
    """
    B, T, H, D = q.shape
    K, S = keys.shape[1:3]
    assert keys.stride() == values.stride() and keys.stride(3) == 1 and D % 16 == 0, (keys.stride(), values.stride(), D)
    q, input_pos = aligned(q), input_pos.contiguous()
    table, W = (input_pos, 0) if slots is None else (slots.contiguous(), slots.shape[2])
    out = torch.empty_like(q)
    _attention[(T, K, B)](
        q, keys, values, input_pos, table, out, D ** -0.5 * math.log2(math.e), T, S, W, K, *keys.stride()[:3],
        G=H // K, D=D, BLOCK_G=max(16, triton.next_power_of_2(H // K)), BLOCK_D=triton.next_power_of_2(D), BLOCK=BLOCK)
    return out


@exact_attention.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, input_pos: Tensor, slots: Tensor | None = None) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
