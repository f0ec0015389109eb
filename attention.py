"""Attention on a CPU that gives a token the same bits in any block: alone, among others, or as a node of a tree.

    seen = rows_seen(bias, kv_cache, n_token)   # once a pass
    y = attend(q, k, kv_cache[1], seen)         # in each layer

torch's fused attention (MKL inside) adds in an order that depends on the number of rows and of slots. Here each sum has
an order of its own:

    scores          a product in fp32 with rows padded to whole groups of ROW_GROUP: MKL has other kernels for the rest
    softmax         torch adds slot s into lane s % LANES. So a node at depth d takes a slot with (pos + d) % LANES,
                    the lane that plain decoding gives it (`spread_slots`). Slots not seen add zeros
    weighted sum    embedding_bag adds slot after slot, for each row by itself. Slots not seen add zeros

Shapes: B batch, N tree nodes including the root, T new tokens, S cache slots read, K key/value heads, G = H / K query
heads each, M = G * T rows padded to groups, D head dim.
"""
from typing import NamedTuple

import torch
from torch import Tensor

LANES = 16          # fp32 numbers of the widest vector register, AVX-512; with 8 lanes 16 are right too
ROW_GROUP = 4
MAX_TOKENS = 64     # of a sequence: larger blocks are prefill, where the fused attention is faster


class Seen(NamedTuple):
    """What the rows of one pass see."""
    bias: Tensor        # [B*K, M, S] fp32
    index: Tensor       # [B*K*M*S] int32: rows of the values [B*K*slots, D]
    offsets: Tensor     # [B*K*M] int32: where each row's part of the index begins
    rows: Tensor        # [K*M] among the T*H queries of a sequence: the rows of each head, and what fills up a group
    queries: Tensor     # [T*H] where each query is among these


def rows_seen(bias: Tensor, kv_cache: Tensor, n_token: int) -> Seen:
    """bias [B, 1, G*T, S] additive, kv_cache [..., K, slots, D]."""
    B, _, rows, S = bias.shape
    K, slots = kv_cache.shape[-3:-1]
    G, M = rows // n_token, -(-rows // ROW_GROUP) * ROW_GROUP
    # The rows that fill up a group are copies of the last one. Nobody reads what comes out.
    order = torch.arange(M).clamp(max=rows - 1)
    head = torch.arange(K)[:, None]
    wide = bias.float().index_select(2, order).expand(-1, K, -1, -1).reshape(B * K, M, S)
    first = torch.arange(B * K, dtype=torch.int32)[:, None, None] * slots
    index = (first + torch.arange(S, dtype=torch.int32)).expand(-1, M, -1).reshape(-1)
    token, query = torch.arange(n_token)[:, None, None], torch.arange(G)
    return Seen(wide, index, torch.arange(B * K * M, dtype=torch.int32) * S,
                (order % n_token * (K * G) + head * G + order // n_token).view(-1),
                (head * M + query * n_token + token).view(-1))


def attend(q: Tensor, k: Tensor, values: Tensor, seen: Seen) -> Tensor:
    """q [B, T, H, D], k [B, K, S, D], values [rows of the cache, K, slots, D] -> [B, T, H * D]."""
    B, T, H, D = q.shape
    n_head, M, S = seen.bias.shape
    wide = q.reshape(B, T * H, D).index_select(1, seen.rows).float().view(n_head, M, D)
    keys = k.float().view(n_head, S, D)
    weights = torch.baddbmm(seen.bias, wide, keys.transpose(1, 2), alpha=D ** -0.5).softmax(-1).to(values.dtype)
    y = torch.embedding_bag(values.view(-1, D), seen.index, seen.offsets, False, 0, False, weights.view(-1))[0]
    return y.view(B, -1, D).index_select(1, seen.queries).view(B, T, H * D)


def spread_slots(depths: Tensor, order: Tensor) -> Tensor:
    """depths [B, N] -> [B, N]: a slot for each node, from the root's on. The j-th node of a depth has depth + j LANES.

    order is [1, N]: 0, 1, 2, ...
    """
    is_before = (depths[:, None] == depths[:, :, None]) & (order[:, None] < order[:, :, None])
    return depths + LANES * is_before.sum(-1)


def spread_seen(seen: Tensor, slots: Tensor, n_room: int) -> Tensor:
    """seen [B, N, N + 2] as draft_tree.visible makes it, nodes side by side -> [B, N, n_room + 2] over slots."""
    B, N = slots.shape
    wide = seen.new_full((B, N, n_room + 2), -torch.inf)
    wide[:, :, 0] = 0
    return wide.scatter(2, (slots + 1)[:, None].expand(-1, N, -1), seen[:, :, 1:-1].expand(B, -1, -1))
