"""Tensor parallelism: each process that torchrun starts holds a slice of every large weight.

    torchrun --nproc-per-node 4 generate.py --checkpoint meta-llama/Llama-2-70b-chat-hf \\
        --eagle yuhuili/EAGLE-llama2-chat-70B
    python scripts/plan.py llama-2-70b --world-size 4 --mode int4 --head --gpu-memory 40       # will it fit?

It changes a model from outside, as Megatron-LM does (arXiv 1909.08053, section 3). `Shard` says which slices a rank
holds. An ordinary, smaller model is built and loaded with them; `connect` then adds an all-reduce after attention, one
after the feed-forward and one after the embedding. Query heads are dealt out; if there are more ranks than key/value
heads, some ranks share one. The LM head gives each rank the logits of its part of the vocabulary, and `ShardedLogits`
answers what decoding asks of logits by exchanging candidates. EAGLE-3 heads, and any that do not divide, stay whole.

All ranks run the same program on the same numbers, seeded alike. EAGLE_TP_CHECK=1 compares their tokens at each step.

Shapes: B batch, T new tokens, V vocabulary, W ranks, n vocabulary rows of one rank (the last rank may have fewer).
"""
import argparse
import contextlib
import functools
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # noqa: F401  (registers torch.ops._c10d_functional)
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from checkpoint import read_json, refuse_parts, resolve_checkpoint
from config import ModelArgs
from console import command, launched, say
from eagle_head import EagleHead
from linears import install_quantized, weight_bytes
from model import Transformer

ROWS = {"q_proj", "gate_proj", "up_proj", "w1", "w3", "fc"}      # split by output
COLUMNS = {"o_proj", "down_proj", "w2"}                         # split by input: partial sums to be added up
KV, VOCAB = {"k_proj", "v_proj"}, {"embed_tokens", "lm_head"}

COLLECTIVE = 120.0      # seconds that a collective waits for the last rank: some compile more slowly than others
PATIENCE = 7 * 86400.0  # the same where one rank may work alone for hours
GRACE = 2.0             # seconds that a rank leaves torchrun to end it, when another rank may have failed first
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size` ranks, and the name of their process group."""
    rank: int
    size: int
    group: str = ""

    @classmethod
    def world(cls) -> "Shard":
        """This process in the default process group."""
        group: Any = dist.group.WORLD
        return cls(group.rank(), group.size(), group.group_name)

    def local(self, config: ModelArgs) -> ModelArgs:
        """The config of one rank's part. vocab_size and dim stay those of the whole model.

        Raises ValueError for a model that does not divide, naming the sizes that work.
        """
        if not divides(config, self.size):
            sizes = ", ".join(str(n) for n in range(1, config.n_head + 1) if divides(config, n))
            raise ValueError(f"{config.n_head} heads, {config.n_kv_head} key/value heads and a feed-forward of "
                             f"{' and '.join(map(str, config.feed_forward_sizes))} do not divide over {self.size} "
                             f"processes; {sizes} do")
        return replace(config, n_head=config.n_head // self.size, n_kv_head=max(config.n_kv_head // self.size, 1),
                       intermediate_size=config.intermediate_size // self.size,
                       moe_intermediate_size=config.moe_intermediate_size // self.size)

    def even(self, n: int) -> slice:
        return slice(self.rank * (n // self.size), (self.rank + 1) * (n // self.size))

    def vocab(self, n_vocab: int) -> slice:
        """The vocabulary rows of this rank. The last rank has fewer where they do not divide."""
        n = -(-n_vocab // self.size)
        return slice(self.rank * n, min((self.rank + 1) * n, n_vocab))

    def part(self, config: ModelArgs) -> Callable[[str, list[int]], tuple[slice, ...]]:
        """A function that maps a checkpoint's key and the shape stored under it to the slice this rank reads.

        `config` describes the whole model. Scales and zero points of quantised weights are cut like the weights. A head
        that does not divide is read whole, except the target's embedding. Other shapes raise ValueError.
        """
        first_kv, n_kv = self.rank * config.n_kv_head // self.size, max(config.n_kv_head // self.size, 1)
        kv_rows = slice(first_kv * config.head_dim, (first_kv + n_kv) * config.head_dim)
        whole = {"fc": config.dim} | dict.fromkeys(("q_proj", "o_proj"), config.n_head * config.head_dim)
        whole |= dict.fromkeys(KV, config.n_kv_head * config.head_dim) | dict.fromkeys(VOCAB, config.vocab_size)
        whole |= dict.fromkeys(("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"), config.intermediate_size)
        if not divides(config, self.size):
            whole = dict.fromkeys(VOCAB, config.vocab_size)

        def part(key: str, shape: list[int]) -> tuple[slice, ...]:
            *_, name, kind = "", *key.split(".")
            if name not in whole or len(shape) <= (name in COLUMNS):    # a bias of o_proj, say, which loading refuses
                return (slice(None),)
            n = config.expert_size if ".experts." in key else whole[name]
            if name in COLUMNS:     # int4: a byte has two columns, a scale has a group of them. int8: a scale has a row
                if kind == "weight" and shape[1:] not in ([n], [n // 2]):
                    raise ValueError(f"{key} has shape {list(shape)}, config.json makes it {n} columns wide")
                return slice(None), slice(None) if shape[1] == 1 else self.even(shape[1])
            if shape[0] != n:
                raise ValueError(f"{key} has shape {list(shape)}, config.json gives it {n} rows")
            return (kv_rows if name in KV else self.vocab(shape[0]) if name in VOCAB else self.even(shape[0]),)
        return part

    def build_target(self, config: ModelArgs) -> Transformer:
        """This rank's part of a target, with empty weights and no communication yet."""
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

    def connect(self, module: Any) -> None:
        """Add the communication to a Transformer or EagleHead that has its weights. All ranks wait for the last one."""
        if dist.is_initialized():
            meet()
        if hasattr(module, "fc"):
            if module.fc.out_features < module.config.dim:      # else every rank has the whole
                module.fc = nn.Sequential(module.fc, Exchange(all_gather, self))
                self.connect_block(module.layer)
            return
        module.tok_embeddings = ShardedEmbedding(module.tok_embeddings, self, module.config.vocab_size)
        module.output = ShardedOutput(module.output, self, module.config.vocab_size)
        for block in module.layers:
            self.connect_block(block)

    def connect_block(self, block: Any) -> None:
        block.attention.wo = nn.Sequential(block.attention.wo, Exchange(all_reduce, self))
        if hasattr(block.feed_forward, "gate"):     # each expert is split: one sum for all of them
            block.feed_forward = nn.Sequential(block.feed_forward, Exchange(all_reduce, self))
        else:
            block.feed_forward.w2 = nn.Sequential(block.feed_forward.w2, Exchange(all_reduce, self))


def divides(config: ModelArgs, size: int) -> bool:
    """Whether a model can be split over so many ranks: each needs vocabulary rows too."""
    kv, rows = config.n_kv_head, -(-config.vocab_size // size)
    return (not any(n % size for n in (config.n_head, config.dim, *config.feed_forward_sizes))
            and (kv % size == 0 or size % kv == 0) and (size - 1) * rows < config.vocab_size)


def check_memory(checkpoint: str, world_size: int, n_byte: int) -> None:
    """Say how large the weights of a rank will be. Raises ValueError if they do not fit a GPU of n_byte."""
    folder = resolve_checkpoint(checkpoint, weights=False)
    refuse_parts(folder)
    with torch.device("meta"):
        target = Shard(0, world_size).build_target(ModelArgs.from_config(read_json(folder / "config.json")))
        install_quantized(target, folder)
    weights = weight_bytes(target.bfloat16())
    if weights > n_byte:
        raise ValueError(f"{weights / 1e9:.1f} GB of weights a rank, the GPU has {n_byte / 1e9:.1f}: more processes, "
                         "or a quantised checkpoint")
    say(f"{world_size} ranks, {weights / 1e9:.1f} GB of weights on each")


# Collectives: functional ones, which torch.compile and CUDA graphs can capture


def all_reduce(x: Tensor, shard: Shard) -> Tensor:
    """The sum of x over the ranks, the same bits on all of them."""
    total = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", shard.group)
    return torch.ops._c10d_functional.wait_tensor(total)


def all_gather(x: Tensor, shard: Shard) -> Tensor:
    """x [..., m] of each rank -> [..., W * m], in the order of the ranks."""
    parts = torch.ops._c10d_functional.all_gather_into_tensor(x[None].contiguous(), shard.size, shard.group)
    return torch.ops._c10d_functional.wait_tensor(parts).movedim(0, -2).flatten(-2)


class Exchange(nn.Module):
    """all_reduce or all_gather, to follow a layer."""

    def __init__(self, collective: Callable[[Tensor, Shard], Tensor], shard: Shard):
        super().__init__()
        self.collective, self.shard = collective, shard

    def forward(self, x: Tensor) -> Tensor:
        return self.collective(x, self.shard)


class ShardedEmbedding(nn.Module):
    """Each rank looks up the tokens of its rows and puts zeros for the others; the sum over the ranks has all."""

    def __init__(self, embedding: Any, shard: Shard, n_vocab: int):
        super().__init__()
        self.embedding, self.shard, self.rows = embedding, shard, shard.vocab(n_vocab)

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight    # [n, dim]

    def forward(self, tokens: Tensor) -> Tensor:
        elsewhere = (tokens < self.rows.start) | (tokens >= self.rows.stop)
        x = self.embedding((tokens - self.rows.start).clamp(0, self.rows.stop - self.rows.start - 1))
        return all_reduce(x.masked_fill(elsewhere[..., None], 0), self.shard)


class ShardedOutput(nn.Module):
    """LM head over this rank's part of a vocabulary."""

    def __init__(self, linear: Any, shard: Shard, n_vocab: int):
        super().__init__()
        self.linear, self.shard, self.n_vocab = linear, shard, n_vocab

    @property
    def weight(self) -> Tensor:
        return self.linear.weight       # [n, dim]

    def forward(self, features: Tensor) -> "ShardedLogits":
        logits = self.linear(features)
        n = -(-self.n_vocab // self.shard.size)
        if logits.shape[-1] < n:
            logits = F.pad(logits, (0, n - logits.shape[-1]), value=-torch.inf)
        return ShardedLogits(logits, self.shard, self.n_vocab)

    def rows(self, ids: Tensor) -> "ShardedOutput":
        """The LM head of a draft vocabulary, ids [Vd], split anew: each row comes from the rank that has it."""
        own, weight = self.shard.vocab(self.n_vocab), self.weight   # in 16 bits, also where it is quantised
        for rank in range(self.shard.size):     # one part at a time: all of them together can be large
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
    """Logits [..., V] of which this rank has part [..., n], padded with -inf at the end.

    All ranks get the same answers, those of the whole tensor. Only `full` exchanges all logits.
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

    def __getitem__(self, rows: Any) -> "ShardedLogits":
        """Indexes the leading axes, not the vocabulary."""
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
        """The largest logit; of equal ones the lowest token, as in one process."""
        top = self.topk(1, dim)
        return Top(top.values[..., 0], top.indices[..., 0])

    def topk(self, k: int, dim: int = -1) -> Top:
        """Each rank's best k, then the best k of them all: values and indices [..., k]."""
        assert dim == -1, dim
        values, indices = self.part.max(-1, keepdim=True) if k == 1 else self.part.topk(min(k, self.part.shape[-1]))
        indices = indices + self.shard.rank * self.part.shape[-1]
        # Both in one message: the bits of the values are sent as integers.
        message = torch.stack((values.float().view(torch.int32), indices.int()), dim=-2)        # [..., 2, k]
        message = all_gather(message, self.shard)                                               # [..., 2, W * k]
        values, indices = message[..., 0, :].view(torch.float), message[..., 1, :].long()
        top = values.sort(dim=-1, descending=True, stable=True)     # stable: the lower token of equals is first
        order = top.indices[..., :k]
        return Top(top.values[..., :k].to(self.part.dtype), indices.gather(-1, order))


def check_ranks(tokens: Tensor) -> None:
    """With EAGLE_TP_CHECK=1, raise RuntimeError unless all ranks have the same tokens."""
    if os.environ.get("EAGLE_TP_CHECK") != "1" or not dist.is_initialized():
        return
    shard = Shard.world()
    every = all_gather(tokens[..., None], shard)
    if (every != tokens[..., None]).any():
        raise RuntimeError(f"the ranks disagree: {every.flatten(0, -2).T.tolist()}, one row a rank")


# The processes of torchrun. What ends a run, and how fast, is in docs/multi-gpu.md


def run(main: Callable[[argparse.Namespace], int], args: argparse.Namespace, timeout: float = COLLECTIVE) -> int:
    """main(args) and its exit status; under torchrun as one rank of a process group.

    Only rank 0 prints. torchrun ends all ranks once one has failed. So a silent rank that fails first gives way to rank
    0, which may have the same error; if torchrun has not ended it then, it prints its error and exits.
    """
    if not launched():
        return main(args)
    rank, terminal = int(os.environ["RANK"]), os.dup(2)
    silence = None if rank == 0 else Silence()
    signal.signal(signal.SIGINT, interrupt)
    try:
        status = run_in_group(main, args, timeout) or 0
    except KeyboardInterrupt:   # where main does not expect it
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    if status == 0:
        return 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if silence is not None and status != 130:
        give_way()      # to rank 0
        if silence.error:
            os.write(terminal, f"error: rank {rank}: {silence.error}\n".encode())
    with contextlib.suppress(OSError):      # its reader may have gone
        sys.stdout.flush()
    os._exit(status)    # sys.exit would wait for collectives that the other ranks never join


@record     # puts the traceback of what it raises into torchrun's report
def run_in_group(main: Callable[[argparse.Namespace], int], args: argparse.Namespace, timeout: float) -> int:
    if status := place(args):
        return status
    backend, limit = "nccl" if str(args.device).startswith("cuda") else "gloo", timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        meet()
        status = main(args)
        if status == 0:
            meet()      # or a rank that is still at work would lose its connections
            dist.destroy_process_group()
        return status
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        lost = "another rank"
        with contextlib.suppress(RuntimeError):     # the store may have gone with rank 0's machine
            store.set(f"noticed {rank}", "")
            give_way()      # to the rank at fault, if it has failed
            lost = f"rank {', '.join(str(r) for r in range(size) if not store.check([f'noticed {r}']))}"
        say(f"error: {lost} does not answer: {re.sub(r'^.[^]]*[.]cc:.*?] ', '', str(error)).partition('. ')[0]}")
        return 1


class Silence(io.TextIOBase):
    """Takes the place of stdout and stderr. It drops what is printed and remembers the last error."""
    error = ""

    def __init__(self):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):       # for what C++ code prints
            os.dup2(nowhere, descriptor)
        sys.stdout = sys.stderr = self

    def write(self, text: str) -> int:
        if text.startswith("error: "):
            self.error = text.removeprefix("error: ").rstrip()
        return len(text)


@command(in_ranks=True)
def place(args: argparse.Namespace) -> None:
    """Give each process a GPU of its own."""
    if str(args.device).startswith("cuda:"):
        raise ValueError(f"--device {args.device}: under torchrun each process takes a GPU of its own; leave it out")
    if not torch.cuda.is_available() or args.device not in (None, "cuda"):
        return
    n_gpu, n_local = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if n_local > n_gpu:
        raise ValueError(f"{n_local} processes on a machine with {n_gpu} GPUs: --nproc-per-node {n_gpu}, "
                         "or --device cpu")
    args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(args.device)


def give_way() -> None:
    """Wait until torchrun would have ended this process because of another one. The lowest rank goes on first."""
    time.sleep(GRACE + 0.3 * int(os.environ["RANK"]))


def interrupt(*_) -> None:
    """Ctrl-C. A second one would disturb the end that the first one asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def writes() -> bool:
    """Whether this process writes files: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@functools.cache
def patient_group() -> Any:
    """A group of all ranks, in which some may wait for others for hours. `run` makes it, on all ranks at once."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))


def meet() -> None:
    """Wait for all ranks, however late the last one comes."""
    dist.barrier(patient_group())


def in_turn(is_mine: bool, work: Callable[[], T]) -> Any:
    """What work() returns on the rank whose turn it is; the others wait and get None."""
    result = work() if is_mine else None
    meet()
    return result


def on_rank_0(work: Callable[[], T]) -> T:
    """What work() returns on rank 0, for all ranks; the others wait."""
    if not launched():
        return work()
    values: list[Any] = [work() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0, group=patient_group())
    return values[0]
