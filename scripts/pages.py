"""A key/value cache in pages, for many rows of very different lengths: each reads the pages that it has, and no more.

    pages = Pages(model, n_row=32, n_slot=768)      # model.kv_cache is now [L, 2, P, K, S, D]
    pages.grow(row, n_token)                        # before the row's slots are written
    logits, hidden = model(tokens, pos, mask=pages.seen(pos, pages.n_used))     # one token a row
    pages.free(row)

Page 0 belongs to nobody: rows without a page write there. As in PagedAttention (arXiv 2309.06180), but all pages are
multiplied at once, and each row's sums are put together of its pages'.

Shapes: B rows, P pages, S slots of a page, K key/value heads, G = H / K query heads each, D head dim, L layers.
"""
import heapq
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from masks import outside
from model import Transformer

PAGE = 64


class PagesSeen(NamedTuple):
    """What a step of one token a row reads and where it writes. Takes the place of `mask` in `Transformer.forward`."""
    owner: Tensor       # [P] row of each page read; any for a page of nobody
    bias: Tensor        # [P, 1, 1, S] fp32: -inf for slots that the owner does not see
    order: Tensor       # [P] the pages, row by row, those of nobody last
    begins: Tensor      # [B + 1] where each row's pages begin among them, and those of nobody
    slots: Tensor       # [P*H*S] int32: where the values of each head stand, among P*K*S
    bags: Tensor        # [P*H] int32: where each head's begin
    page: Tensor        # [B] and slot [B]: where each row's new key and value go
    slot: Tensor
    in_window: "PagesSeen | None" = None    # what layers with a sliding window see

    def attend(self, qkv: Tensor, kv_cache: Tensor) -> Tensor:
        """qkv [B, 1, H + 2K, D], kv_cache [2, all pages, K, S, D] of a layer -> [B, 1, H*D]."""
        K, D, P = kv_cache.shape[2], kv_cache.shape[4], len(self.owner)
        q, kv = qkv[:, 0].split((qkv.shape[2] - 2 * K, 2 * K), dim=1)
        kv_cache[:, self.page, :, self.slot] = kv.unflatten(1, (2, K))                  # [B, 2, K, D]
        keys, values = kv_cache[:, :P].flatten(1, 2)                                    # [P*K, S, D]
        q = q.unflatten(1, (K, -1)).index_select(0, self.owner).flatten(0, 1)           # [P*K, G, D]
        scores = torch.bmm(keys, q.transpose(1, 2)).view(P, K, -1, q.shape[1])          # [P, K, S, G]
        scores = torch.add(self.bias, scores.transpose(2, 3), alpha=D ** -0.5)          # [P, K, G, S] fp32
        scores = scores.flatten(1, 2)                                                   # [P, H, S]
        most = self.by_row(scores.amax(-1), "max").index_select(0, self.owner)          # [P, H]
        weights = scores.sub_(most[..., None]).exp_()
        total = self.by_row(weights.sum(-1), "sum")                                     # [B, H]
        y = F.embedding_bag(self.slots, values.flatten(0, 1), self.bags, mode="sum",
                            per_sample_weights=weights.to(values.dtype).flatten())      # [P*H, D]
        y = self.by_row(y.view(P, -1), "sum").unflatten(1, (-1, D)).float()             # [B, H, D]
        y /= total[..., None].clamp_min(1e-30)      # 0 for a row without a page
        return y.to(qkv.dtype).flatten(1)[:, None]

    def by_row(self, x: Tensor, mode: str) -> Tensor:
        """[P, n] of the pages -> [B, n], the sum or the largest of each row's pages."""
        return F.embedding_bag(self.order, x, self.begins, mode=mode)[:-1]


class Pages:
    """Which page belongs to whom. Memory is touched as pages are first used, the lowest first."""

    def __init__(self, model: Transformer, n_row: int, n_slot: int):
        self.size, window = min(PAGE, n_slot), model.config.sliding_window
        self.window = window if window is not None and window < n_slot else None
        self.most = -(-n_slot // self.size)     # pages of a row
        model.setup_caches(1, self.size)
        L, _, _, K, S, D = model.kv_cache.shape
        self.cache = model.kv_cache = model.kv_cache.new_empty(L, 2, 1 + n_row * self.most, K, S, D)
        self.cache[:, :, 0], device = 0, self.cache.device
        self.table = torch.zeros(n_row, self.most, dtype=torch.long, device=device)
        self.owner = torch.full((self.cache.shape[2],), n_row, device=device)   # n_row: nobody
        self.place = torch.zeros_like(self.owner)                               # among the pages of its row
        self.of_row: list[list[int]] = [[] for _ in range(n_row)]
        self.unused = list(range(1, len(self.owner)))
        group = model.config.n_head // model.config.n_kv_head
        self.n_head, self.in_page = K * group, torch.arange(self.size, device=device)
        first = torch.arange(len(self.owner) * K, device=device) * self.size
        self.slots = (first[:, None, None] + self.in_page).int().expand(-1, group, -1).flatten()

    @property
    def state(self) -> list[Tensor]:
        return [self.table, self.owner, self.place]

    @property
    def n_used(self) -> int:
        """Pages up to the last one in use."""
        return 1 + max((page for pages in self.of_row for page in pages), default=0)

    def grow(self, row: int, n_slot: int) -> None:
        """Give a row pages for n_slot slots."""
        pages = self.of_row[row]
        while len(pages) * self.size < n_slot:
            page = heapq.heappop(self.unused)
            self.cache[:, :, page] = 0      # a slot not seen has weight 0, but 0 times NaN is NaN
            self.table[row, len(pages)], self.owner[page], self.place[page] = page, row, len(pages)
            pages.append(page)

    def free(self, row: int) -> None:
        self.table[row] = 0
        for page in self.of_row[row]:
            self.owner[page] = len(self.table)
            heapq.heappush(self.unused, page)
        self.of_row[row] = []

    def read(self, row: int, n_slot: int) -> Tensor:
        """Keys and values of a row's first slots, [L, 2, K, n_slot, D]."""
        pages = self.of_row[row][:-(-n_slot // self.size)]
        return self.cache[:, :, pages].permute(0, 1, 3, 2, 4, 5).flatten(3, 4)[..., :n_slot, :]

    def write(self, row: int, states: Tensor) -> None:
        """Make [L, 2, K, n, D] a row's first slots."""
        self.grow(row, states.shape[3])
        for page, part in zip(self.of_row[row], states.split(self.size, dim=3)):
            self.cache[:, :, page, :, :part.shape[3]] = part

    def seen(self, pos: Tensor, n_page: int) -> PagesSeen:
        """For a token a row at pos [B, 1], reading the first n_page pages."""
        n_row = len(self.table)
        by_owner, order = self.owner[:n_page].sort(stable=True)
        begins = torch.searchsorted(by_owner, torch.arange(n_row + 1, device=pos.device))
        owner = self.owner[:n_page].clamp(max=n_row - 1)
        slots = self.place[:n_page, None] * self.size + self.in_page
        at = pos[owner]
        bias = torch.zeros(slots.shape, device=pos.device).masked_fill_(slots > at, -torch.inf)
        page = self.table.gather(1, pos // self.size)
        bags = torch.arange(n_page * self.n_head, dtype=torch.int32, device=pos.device) * self.size
        seen = PagesSeen(owner, bias[:, None, None], order, begins, self.slots[:len(bags) * self.size], bags,
                         page[:, 0], pos[:, 0] % self.size)
        if self.window is None:
            return seen
        near = bias.masked_fill(outside(slots[:, None], at, self.window)[:, 0], -torch.inf)
        return seen._replace(in_window=seen._replace(bias=near[:, None, None]))
