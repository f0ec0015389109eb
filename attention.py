"""Attention on a CPU that gives a token the same bits in any block: alone, among others, or as a node of a tree.

    seen = rows_seen(bias, kv_cache, n_token, n_slot)   # once a pass
    y = attend(q, k, kv_cache[1], seen)                 # in each layer

torch's fused attention (MKL inside) adds in an order that depends on the number of rows and of slots. Here each sum has
an order of its own. Columns are positions: a node's own key is the last that it sees and its parent's the one before,
wherever in the cache they stand. Columns not seen add zeros, at the end or before a sliding window.

    scores          a product in fp32 with rows padded to whole groups of ROW_GROUP: MKL has other kernels for the rest.
                    Where larger blocks have another one too, group by group
    softmax         torch adds column c into lane c % 16 of a vector register, or c % 8
    weighted sum    embedding_bag adds column after column, for each row by itself

Shapes: B batch, T new tokens, N tree nodes including the root, S cache slots read, K key/value heads, G = H / K query
heads each, M = G * T rows padded to groups, D head dim, W columns at the end of S, all that drafts can take.
"""
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ROW_GROUP = 4
LEAST_SLOTS = 32    # read by a step: MKL has another kernel for 16
MAX_TOKENS = 72     # of a sequence: 60 nodes and 8 copied ones. Longer prompts take the fused attention: it is faster


class Seen(NamedTuple):
    """What the rows of one pass see."""
    n_slot: int         # S
    biases: list[Tensor]    # [B*K, rows_at_once, S] fp32 each; for a tree [1], 0
    end: tuple[Tensor, Tensor] | None   # of a tree's last W columns: slots, counted from S - W, and bias, [B*K, M, W]
    n_end: int          # W or more
    index: Tensor       # [B*K*M*S] int32: rows of the values [B*K*slots, D]
    offsets: Tensor     # [B*K*M] int32: where each row's part of the index begins
    rows: Tensor        # [B*K*M] among the B*T*(H + 2K) vectors of qkv: each head's queries, and what fills up a group
    queries: Tensor     # [B*T*H] where each query is among these
    rows_at_once: int   # of a product
    in_window: "Seen | None" = None     # what they see in layers with a sliding window


class OwnCache(Protocol):
    """Takes the place of a mask where keys and values are kept in another way: scripts/pages.py."""
    @property
    def in_window(self) -> "OwnCache | None":
        """The same for layers with a sliding window; None where nothing lies outside of it."""
        ...

    def attend(self, qkv: Tensor, kv_cache: Tensor) -> Tensor:
        """qkv [B, T, H + 2K, D], rotated, and a layer's cache -> [B, T, H*D]. Writes the new keys and values too."""
        ...


def rows_seen(bias: Tensor, kv_cache: Tensor, n_token: int, n_slot: int, slots: Tensor | None = None,
              n_end: int = 0, by_group: bool = False, begin: Tensor | None = None) -> Seen:
    """bias [B, 1, G*T, S] additive, kv_cache [..., K, slots, D], n_slot = S.

    For a tree: bias [B, 1, G*T, W], and the slots [B, T, W] whose keys stand at these positions on each node's path.
    W is n_end, or S if that is less. begin [B, 1, G*T, S] is what a sliding window hides before them. by_group: see
    above.
    """
    B, _, rows, width = bias.shape
    K, n_all = kv_cache.shape[-3:-1]
    G, M = rows // n_token, -(-rows // ROW_GROUP) * ROW_GROUP
    # The rows that fill up a group are copies of the last one. Nobody reads what comes out.
    order = torch.arange(M).clamp(max=rows - 1)
    first, head = torch.arange(B)[:, None, None], torch.arange(K)[:, None]
    token, query = torch.arange(n_token)[:, None, None], torch.arange(G)

    def for_heads(x: Tensor) -> Tensor:     # [B, M, W] -> [B*K, M, W]
        return x[:, None].expand(-1, K, -1, -1).flatten(0, 1)

    wide, end = for_heads(bias[:, 0].float().index_select(1, order)), None
    column = torch.arange(n_slot, dtype=torch.int32).expand(B * K, M, -1)
    if slots is not None:
        slots = for_heads(slots.index_select(1, order % n_token))
        column = torch.cat((column[..., :-n_end], slots.int()), dim=-1)
        end, wide = (slots - (n_slot - width), wide), wide.new_zeros(1)
        if begin is not None:
            wide = for_heads(begin[:, 0].float().index_select(1, order))
    index = torch.arange(B * K, dtype=torch.int32)[:, None, None] * n_all + column
    vector = (first * n_token + order % n_token) * (K * G + 2 * K) + head * G + order // n_token    # [B, K, M]
    place = (first[..., None] * K + head) * M + query * n_token + token                             # [B, T, K, G]
    at_once = ROW_GROUP if by_group else M
    biases = list(wide.split(at_once, dim=1)) if wide.dim() > 1 else [wide] * (M // at_once)
    return Seen(n_slot, biases, end, n_end, index.flatten(), torch.arange(B * K * M, dtype=torch.int32) * n_slot,
                vector.flatten(), place.flatten(), at_once)


def path_slots(depths: Tensor, above: Tensor, pos: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [W] -> the slot [B, N, W] that each one has on the path to each node, and whether the node sees it.

    depths [B, N] below the root, above [B, N, depth + 1] each node and what is above it (`draft_tree.lineage`). The
    root is at pos [B, 1], the nodes stand side by side from there on.
    """
    below = (positions - pos)[:, None]                                  # [B, 1, W] depth below the root
    depths = depths[:, :, None]
    node = above.gather(2, (depths - below).clamp(0, above.shape[2] - 1).expand(*above.shape[:2], -1))
    seen = below <= depths
    slots = (pos[:, None] + node).clamp(max=positions[-1])     # a finished row may be past the slots that are read
    return torch.where(seen & (below > 0), slots, positions), seen


def attend(qkv: Tensor, k: Tensor, values: Tensor, seen: Seen) -> Tensor:
    """qkv [B, T, H + 2K, D], k [B, K, S, D], values [rows of the cache, K, slots, D] -> [B*T*H, D]."""
    D = int(k.shape[-1])    # a constant of a trace, which has no need to ask again at each step
    keys = k.flatten(0, 1).float()
    q = qkv.flatten(0, 2).index_select(0, seen.rows).float().view(len(keys), -1, D)             # [B*K, M, D]
    parts = [torch.baddbmm(bias, rows, keys.transpose(1, 2), alpha=D ** -0.5)
             for bias, rows in zip(seen.biases, q.split(seen.rows_at_once, dim=1))]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)                           # [B*K, M, S]
    if seen.end is not None:
        slots, bias = seen.end
        last = scores[..., -seen.n_end:]
        torch.add(last.gather(2, slots), bias, out=last)
    weights = scores.softmax(-1).to(values.dtype)
    y = torch.embedding_bag(values.view(-1, D), seen.index, seen.offsets, False, 0, False, weights.view(-1))[0]
    return y.index_select(0, seen.queries)
