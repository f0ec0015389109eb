"""Tensor parallelism: the processes that torchrun starts, each with a slice of every large weight.

    torchrun --nproc-per-node 4 generate.py --checkpoint meta-llama/Llama-2-70b-chat-hf \\
        --eagle yuhuili/EAGLE-llama2-chat-70B
    python scripts/plan.py llama-2-70b --world-size 4 --mode int4 --head --gpu-memory 40       # will it fit?

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
import argparse
import contextlib
import functools
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # noqa: F401  (registers torch.ops._c10d_functional)
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from console import command, launched, say
from eagle_head import EagleHead
from model import ModelArgs, Transformer, TransformerBlock, install_quantized, read_json, resolve_checkpoint
from quantized import QuantLinear

ROWS = {"q_proj", "gate_proj", "up_proj", "w1", "w3", "fc"}      # split by output
COLUMNS = {"o_proj", "down_proj", "w2"}                         # split by input: partial sums to be added up
KV, VOCAB = {"k_proj", "v_proj"}, {"embed_tokens", "lm_head"}

COLLECTIVE = 120.0      # seconds a rank waits for another in a collective: ranks compile at different speeds
PATIENCE = 7 * 86400.0  # seconds it waits where one rank may work alone for hours
GRACE = 2.0             # seconds in which torchrun ends a rank, once another one has failed
T = TypeVar("T")


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

    # Which slices

    def local(self, config: ModelArgs) -> ModelArgs:
        """The config of one rank's part. vocab_size and dim stay those of the whole model.

        Raises ValueError for a model that does not divide, naming the sizes that work.
        """
        if not divides(config, self.size):
            sizes = ", ".join(str(n) for n in range(1, config.n_head + 1) if divides(config, n))
            raise ValueError(f"{config.n_head} heads, {config.n_kv_head} key/value heads and a feed-forward of "
                             f"{config.intermediate_size} do not divide over {self.size} processes; {sizes} do")
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
                module.fc = nn.Sequential(module.fc, Exchange(all_gather, self))
                self.connect_block(module.layer)
            return module
        module.tok_embeddings = ShardedEmbedding(module.tok_embeddings, self, module.config.vocab_size)
        module.output = ShardedOutput(module.output, self, module.config.vocab_size)
        for block in module.layers:
            self.connect_block(block)
        if dist.is_initialized():
            meet()      # some ranks read their slices faster than others
        return module

    def connect_block(self, block: TransformerBlock) -> None:
        block.attention.wo = nn.Sequential(block.attention.wo, Exchange(all_reduce, self))
        if hasattr(block.feed_forward, "gate"):     # each expert is split, and their sum is linear in the parts
            block.feed_forward = nn.Sequential(block.feed_forward, Exchange(all_reduce, self))
        else:
            block.feed_forward.w2 = nn.Sequential(block.feed_forward.w2, Exchange(all_reduce, self))


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


class Exchange(nn.Module):
    """all_reduce or all_gather, to follow a layer."""

    def __init__(self, collective: Callable[[Tensor, Shard], Tensor], shard: Shard):
        super().__init__()
        self.collective, self.shard = collective, shard

    def forward(self, x: Tensor) -> Tensor:
        return self.collective(x, self.shard)


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


# Whether it fits


def weight_bytes(module: nn.Module) -> int:
    """Of all weights, 16-bit ones and quantised ones; tied weights are counted once."""
    quantised = [part for part in module.modules() if isinstance(part, QuantLinear)]
    return (sum(tensor.nbytes for part in quantised for tensor in part.stored().values())
            + sum(parameter.nbytes for parameter in module.parameters()))


def check_memory(checkpoint: str, world_size: int, n_byte: int) -> None:
    """Say how many bytes of weights a rank will hold. Raises ValueError when a GPU of n_byte cannot hold them."""
    folder = resolve_checkpoint(checkpoint, weights=False)
    with torch.device("meta"):
        target = Shard(0, world_size).build_target(ModelArgs.from_config(read_json(folder / "config.json"))).bfloat16()
        install_quantized(target, folder)
    weights = weight_bytes(target.bfloat16())
    if weights > n_byte:
        raise ValueError(f"{weights / 1e9:.1f} GB of weights a rank, the GPU has {n_byte / 1e9:.1f}: more processes, "
                         "or a quantised checkpoint")
    say(f"{world_size} ranks, {weights / 1e9:.1f} GB of weights on each")


# The ranks of torchrun. What ends a run, and how fast, is in docs/multi-gpu.md


def run(main: Callable[[argparse.Namespace], int], args: argparse.Namespace, timeout: float = COLLECTIVE) -> int:
    """The exit status of main(args), which is one rank's part where torchrun has started several.

    Rank 0 prints, the others are silent. torchrun ends all of them once one has exited with an error. So a silent rank
    waits a moment with its own (give_way): it prints only an error that rank 0 does not have.
    """
    if not launched():
        return main(args)
    rank, terminal = int(os.environ["RANK"]), os.dup(2)
    silence = None if rank == 0 else Silence()
    signal.signal(signal.SIGINT, interrupt)
    try:
        status = run_in_group(main, args, timeout)
    except KeyboardInterrupt:   # where main does not expect it
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    if status == 0:
        return 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if silence is not None and status != 130:
        give_way()
        if silence.error:
            os.write(terminal, f"error: rank {rank}: {silence.error}\n".encode())
    with contextlib.suppress(OSError):      # nobody reads it any more
        sys.stdout.flush()
    os._exit(status)    # an orderly end would wait for collectives that nobody else joins


@record     # what it raises is in torchrun's report, with the traceback
def run_in_group(main: Callable[[argparse.Namespace], int], args: argparse.Namespace, timeout: float) -> int:
    if status := place(args):
        return status
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group("nccl" if str(args.device).startswith("cuda") else "gloo", store=store, rank=rank,
                            world_size=size, timeout=timedelta(seconds=timeout))
    try:
        meet()
        status = main(args)
        if status == 0:
            meet()      # before the connections are closed
            dist.destroy_process_group()
        return status
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        lost = "another rank"
        with contextlib.suppress(RuntimeError):     # the store may have gone with rank 0's machine
            store.set(f"noticed {rank}", "")
            give_way()
            lost = f"rank {', '.join(str(r) for r in range(size) if not store.check([f'noticed {r}']))}"
        say(f"error: {lost} does not answer: {' '.join(str(error).split())[:300]}")
        return 1


class Silence(io.TextIOBase):
    """In the place of stdout and stderr: drops what is printed, but for the last error."""
    error = ""

    def __init__(self):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):       # C++ code prints its warnings there
            os.dup2(nowhere, descriptor)
        sys.stdout = sys.stderr = self

    def write(self, text: str) -> int:
        if text.startswith("error: "):
            self.error = text.removeprefix("error: ").rstrip()
        return len(text)


@command(in_ranks=True)
def place(args: argparse.Namespace) -> None:
    """Give each process of a machine a GPU of its own."""
    if str(args.device).startswith("cuda:"):
        raise ValueError(f"--device {args.device}: under torchrun each process takes a GPU of its own; leave it out")
    if not torch.cuda.is_available() or args.device not in (None, "cuda"):
        return
    n_gpu, n_local = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if n_local > n_gpu:
        raise ValueError(f"{n_local} processes on a machine with {n_gpu} GPUs: --nproc-per-node {n_gpu}, or --device cpu")
    args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(args.device)


def give_way() -> None:
    """Time for torchrun to end this process because of another one. If none is at fault, the lowest rank goes on first."""
    time.sleep(GRACE + 0.3 * int(os.environ["RANK"]))


def interrupt(*_) -> None:
    """Ctrl-C, once: it comes from the terminal and from torchrun."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def writes() -> bool:
    """Whether this process writes files: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """All ranks once more, for collectives in which some may wait for hours. All must first ask for it together."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))


def meet() -> None:
    """Wait for all ranks, however late the last one comes."""
    dist.barrier(patient_group())


def in_turn(is_mine: bool, work: Callable[[], T]) -> T | None:
    """What work() returns, on the rank whose turn it is. The others wait for it, and get None."""
    result = work() if is_mine else None
    meet()
    return result


def on_rank_0(work: Callable[[], T]) -> T:
    """What work() returns on rank 0, for all ranks. The others wait for it."""
    if not launched():
        return work()
    values = [work() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0, group=patient_group())
    return values[0]
