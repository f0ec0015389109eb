"""Tensor parallelism over torch.distributed: each process holds a slice of every large weight.

    torchrun --nproc-per-node 4 generate.py --checkpoint meta-llama/Llama-2-70b-chat-hf --eagle yuhuili/EAGLE-llama2-chat-70B
    python tp.py --plan llama-2-70b --world-size 4 --mode int4 --head --gpu-memory 40       # will it fit? (plan.py)

Acts on a model from outside. `Shard` says which slices a rank holds; an ordinary, smaller model is built and loaded
with them, and `connect` then adds the communication (Megatron-LM, arXiv 1909.08053, section 3): one all-reduce after
attention, one after the feed-forward, one after the embedding. Heads are dealt out to the ranks; where there are more
ranks than key/value heads, several hold the same one. The LM head gives each rank the logits of its part of the
vocabulary, and `ShardedLogits` answers what decoding asks of logits by exchanging candidates instead of all of them.
An EAGLE head that does not divide (13 key/value heads of Vicuna-33B's) is held whole by every rank.

Every rank walks through the same program on the same numbers: features are whole everywhere, and draws come from
generators seeded alike. EAGLE_TP_CHECK=1 compares the tokens of all ranks after each step.

Shapes: B batch, T new tokens, V vocabulary, W ranks, n vocabulary rows of one rank (the last rank may have fewer).
"""
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # noqa: F401  (registers torch.ops._c10d_functional)
import torch.nn.functional as F
from torch import Tensor, nn

from eagle_head import EagleHead
from config import ModelArgs
from model import Transformer, TransformerBlock

ROWS = {"q_proj", "gate_proj", "up_proj", "w1", "w3", "fc"}      # split by output
COLUMNS = {"o_proj", "down_proj", "w2"}                         # split by input: partial sums to be added up
KV, VOCAB = {"k_proj", "v_proj"}, {"embed_tokens", "lm_head"}


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`, and the name of their process group."""
    rank: int
    size: int
    group: str = ""

    @classmethod
    def world(cls) -> "Shard":
        """Of the default process group, which must be there."""
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name)

    def from_rank_0(self, value: object) -> object:
        """What rank 0 has, for all."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    # Which slices

    def local(self, config: ModelArgs) -> ModelArgs:
        """The config of one rank's part; vocab_size and dim stay the whole's. Raises ValueError, naming the sizes that work."""
        check_divides(config, self.size)
        return replace(config, n_head=config.n_head // self.size, n_kv_head=max(config.n_kv_head // self.size, 1),
                       intermediate_size=config.intermediate_size // self.size)

    def even(self, n: int) -> slice:
        return slice(self.rank * (n // self.size), (self.rank + 1) * (n // self.size))

    def vocab(self, n_vocab: int) -> slice:
        """The rows of this rank; the last one's are fewer where the vocabulary does not divide."""
        n = -(-n_vocab // self.size)
        return slice(self.rank * n, min((self.rank + 1) * n, n_vocab))

    def part(self, config: ModelArgs) -> Callable[[str, list[int]], tuple[slice, ...]]:
        """A function from a checkpoint's key and the shape stored under it to the slice this rank reads.

        config describes the whole model. Of quantised weights, scales and zero points are cut like the weights; of a
        head that does not divide, only the target's embedding is cut. The function raises ValueError for a size that
        cannot be its.
        """
        first_kv = self.rank * config.n_kv_head // self.size        # with fewer heads than ranks some share one
        n_kv = max(config.n_kv_head // self.size, 1)
        kv_rows = slice(first_kv * config.head_dim, (first_kv + n_kv) * config.head_dim)
        q_rows, hidden = config.n_head * config.head_dim, config.intermediate_size
        whole = {"q_proj": q_rows, "o_proj": q_rows, "fc": config.dim}
        whole |= dict.fromkeys(KV, config.n_kv_head * config.head_dim) | dict.fromkeys(VOCAB, config.vocab_size)
        whole |= dict.fromkeys(("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"), hidden)
        if not divides(config, self.size):
            whole = dict.fromkeys(VOCAB, config.vocab_size)

        def part(key: str, shape: list[int]) -> tuple[slice, ...]:
            *_, name, kind = "", *key.split(".")
            if name not in whole or len(shape) <= (name in COLUMNS):    # too few axes, such as a bias of o_proj: refused later
                return (slice(None),)
            if name in COLUMNS:     # two columns of int4 share a byte, a group of them a scale; int8 has one scale a row
                if kind == "weight" and shape[1:] not in ([whole[name]], [whole[name] // 2]):
                    raise ValueError(f"{key} has shape {list(shape)}, config.json makes it {whole[name]} columns wide")
                return slice(None), slice(None) if shape[1] == 1 else self.even(shape[1])
            if shape[0] != whole[name]:
                raise ValueError(f"{key} has shape {list(shape)}, config.json gives it {whole[name]} rows")
            return (kv_rows if name in KV else self.vocab(shape[0]) if name in VOCAB else self.even(shape[0]),)
        return part

    # The smaller model, and its connections

    def build_target(self, config: ModelArgs) -> Transformer:
        """This rank's part of a target, with weights of the right shapes and no communication yet."""
        local, rows = self.local(config), self.vocab(config.vocab_size)
        model = Transformer(replace(local, vocab_size=rows.stop - rows.start))
        model.config = local
        return model

    def build_head(self, config: ModelArgs, target: Transformer, bias: bool = True) -> EagleHead:
        """This rank's part of a head, or the whole of one that does not divide."""
        if not divides(config, self.size):
            return EagleHead(config, target, bias=bias)
        head = EagleHead(self.local(config), target, bias=bias)
        head.fc = nn.Linear(2 * config.dim, config.dim // self.size, bias=bias).requires_grad_(False)
        return head

    def connect(self, module: Transformer | EagleHead) -> Transformer | EagleHead:
        """Add the communication to a part, once its weights are there. In place."""
        if isinstance(module, EagleHead):
            if module.fc.out_features < module.config.dim:      # else every rank has the whole
                module.fc = nn.Sequential(module.fc, AllGather(self))
                self.connect_block(module.layer)
            return module
        module.tok_embeddings = ShardedEmbedding(module.tok_embeddings, self, module.config.vocab_size)
        module.output = ShardedOutput(module.output, self, module.config.vocab_size)
        for block in module.layers:
            self.connect_block(block)
        return module

    def connect_block(self, block: TransformerBlock) -> None:
        block.attention.wo = nn.Sequential(block.attention.wo, AllReduce(self))
        if hasattr(block.feed_forward, "gate"):     # each expert is split, and their sum is linear in the parts
            block.feed_forward = nn.Sequential(block.feed_forward, AllReduce(self))
        else:
            block.feed_forward.w2 = nn.Sequential(block.feed_forward.w2, AllReduce(self))


def check_divides(config: ModelArgs, size: int) -> None:
    """Raises ValueError unless a model can be split over `size` ranks."""
    if not divides(config, size):
        sizes = ", ".join(str(n) for n in range(1, config.n_head + 1) if divides(config, n))
        raise ValueError(f"{config.n_head} heads, {config.n_kv_head} key/value heads and a feed-forward of "
                         f"{config.intermediate_size} do not divide over {size} processes; {sizes} do")


def divides(config: ModelArgs, size: int) -> bool:
    kv = config.n_kv_head
    rows = -(-config.vocab_size // size)
    return (not any(n % size for n in (config.n_head, config.intermediate_size, config.dim))
            and (kv % size == 0 or size % kv == 0) and (size - 1) * rows < config.vocab_size)


# Collectives: the functional ones, which torch.compile takes into its graphs and a CUDA graph captures


def all_reduce(x: Tensor, shard: Shard) -> Tensor:
    """The sum of x over the ranks, the same bits on all of them."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", shard.group))


def all_gather(x: Tensor, shard: Shard) -> Tensor:
    """x [..., m] of every rank -> [..., W * m], in the order of the ranks."""
    parts = torch.ops._c10d_functional.all_gather_into_tensor(x[None].contiguous(), shard.size, shard.group)
    return torch.ops._c10d_functional.wait_tensor(parts).movedim(0, -2).flatten(-2)


class AllReduce(nn.Module):
    def __init__(self, shard: Shard):
        super().__init__()
        self.shard = shard

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(x, self.shard)


class AllGather(nn.Module):
    def __init__(self, shard: Shard):
        super().__init__()
        self.shard = shard

    def forward(self, x: Tensor) -> Tensor:
        return all_gather(x, self.shard)


# The vocabulary


class ShardedEmbedding(nn.Module):
    """Rows of other ranks count as zero, and the sum over the ranks has every row."""

    def __init__(self, embedding: nn.Embedding, shard: Shard, n_vocab: int):
        super().__init__()
        self.embedding, self.shard, self.rows = embedding, shard, shard.vocab(n_vocab)

    @property
    def weight(self) -> Tensor:
        """[n, dim], this rank's."""
        return self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        elsewhere = (tokens < self.rows.start) | (tokens >= self.rows.stop)
        x = self.embedding((tokens - self.rows.start).clamp(0, self.rows.stop - self.rows.start - 1))
        return all_reduce(x.masked_fill(elsewhere[..., None], 0), self.shard)


class ShardedOutput(nn.Module):
    """LM head over this rank's part of a vocabulary."""

    def __init__(self, linear: nn.Module, shard: Shard, n_vocab: int):
        super().__init__()
        self.linear, self.shard, self.n_vocab = linear, shard, n_vocab

    @property
    def weight(self) -> Tensor:
        """[n, dim], this rank's."""
        return self.linear.weight

    def forward(self, features: Tensor) -> "ShardedLogits":
        logits = self.linear(features)
        n = -(-self.n_vocab // self.shard.size)
        if logits.shape[-1] < n:
            logits = F.pad(logits, (0, n - logits.shape[-1]), value=-torch.inf)
        return ShardedLogits(logits, self.shard, self.n_vocab)

    def rows(self, ids: Tensor) -> "ShardedOutput":
        """The same over a draft vocabulary, ids [Vd], dealt out anew: its rows come from whichever rank has them."""
        own, weight = self.shard.vocab(self.n_vocab), self.weight   # a quantised one's rows are kept in 16 bits
        for rank in range(self.shard.size):     # one part at a time, for all of them together can be large
            wanted = ids[replace(self.shard, rank=rank).vocab(len(ids))]
            elsewhere = (wanted < own.start) | (wanted >= own.stop)
            rows = weight[(wanted - own.start).clamp(0, own.stop - own.start - 1)]
            rows = all_reduce(rows.masked_fill(elsewhere[:, None], 0), self.shard)
            if rank == self.shard.rank:
                mine = rows
        linear = nn.Linear(mine.shape[1], mine.shape[0], bias=False, device="meta", dtype=mine.dtype)
        linear.weight = nn.Parameter(mine, requires_grad=False)
        return ShardedOutput(linear, self.shard, len(ids))


class Top(NamedTuple):
    values: Tensor
    indices: Tensor


@dataclass(frozen=True)
class ShardedLogits:
    """Logits [..., V] of which this rank has part [..., n], padded at the end with -inf.

    Answers as the whole tensor would, and the same on every rank. Only `full` exchanges all logits.
    """
    part: Tensor
    shard: Shard
    n_vocab: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.part.shape[:-1], self.n_vocab))

    @property
    def device(self) -> torch.device:
        return self.part.device

    def __getitem__(self, rows) -> "ShardedLogits":
        """Of leading axes; the vocabulary stays as it is."""
        return replace(self, part=self.part[rows])

    def float(self) -> "ShardedLogits":
        return replace(self, part=self.part.float())

    def full(self) -> Tensor:
        """[..., V]"""
        return all_gather(self.part, self.shard)[..., :self.n_vocab]

    def logsumexp(self, dim: int, keepdim: bool = False) -> Tensor:
        assert dim == -1, dim
        return all_gather(self.part.logsumexp(-1, keepdim=True), self.shard).logsumexp(-1, keepdim=keepdim)

    def max(self, dim: int) -> Top:
        """Of equal logits the lowest token, as in one process."""
        top = self.topk(1, dim)
        return Top(top.values[..., 0], top.indices[..., 0])

    def topk(self, k: int, dim: int = -1) -> Top:
        """Each rank's best k, then the best k of them all: values and indices [..., k]."""
        assert dim == -1, dim
        values, indices = self.part.max(-1, keepdim=True) if k == 1 else self.part.topk(min(k, self.part.shape[-1]))
        indices = indices + self.shard.rank * self.part.shape[-1]
        # Both in one message: the values travel as the integers that their bits are.
        message = torch.stack((values.float().view(torch.int32), indices.int()), dim=-2)        # [..., 2, k]
        message = all_gather(message, self.shard)                                               # [..., 2, W * k]
        values, indices = message[..., 0, :].view(torch.float), message[..., 1, :].long()
        top = values.sort(dim=-1, descending=True, stable=True)     # stable: of equals, the lower rank's, so token, first
        order = top.indices[..., :k]
        return Top(top.values[..., :k].to(self.part.dtype), indices.gather(-1, order))


def check_ranks(tokens: Tensor) -> None:
    """With EAGLE_TP_CHECK=1: raise RuntimeError unless all ranks have the same tokens."""
    if os.environ.get("EAGLE_TP_CHECK") != "1" or not dist.is_initialized():
        return
    shard = Shard.world()
    every = all_gather(tokens[..., None], shard)
    if (every != tokens[..., None]).any():
        raise RuntimeError(f"the ranks disagree: {every.flatten(0, -2).T.tolist()}, one row a rank")


if __name__ == "__main__":
    import sys

    import plan
    sys.exit(plan.main(plan.parse_args()))
