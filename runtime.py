"""What makes a step fast on the device at hand. Acts on any module and any step from outside.

    graph = capture(lambda: step(n_slot=256))           # a CUDA graph: graph.replay()
    replay = trace(step, [model, head], step.state)     # a TorchScript trace on a CPU: replay(n_slot), of any size
    compile_layers(model.layers)                        # torch.compile, one code for all layers
    pack_for_cpu(model)                                 # fp32 and bf16 weights in the order that oneDNN wants
    tune(model)                                         # the fastest kernel of each quantised linear

A small model spends a fifth to a third of a step in Python (dev/log.md). Graphs and traces run the step without Python.
Both need a step whose tensors stay where they are, and whose code does not branch on their values. PYTORCH_JIT=0 runs
every traced step in Python, with its prints and breakpoints.
"""
import contextlib
import functools
import json
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from checkpoint import read_json
from console import device_name, say, write_atomically
from grid import GROUP_SIZES
from linears import ROWS, PackedLinear, QuantLinear, can_pack

COLD = 1 << 28  # bytes: while a kernel is timed, weights of this size take turns, so that no cache holds them


def capture(step: Callable[[], object], pool: Any = None,
            stream: "torch.cuda.Stream | None" = None) -> "torch.cuda.CUDAGraph":
    """One call as a CUDA graph. Two calls before let the compiler, cuBLAS and SDPA choose their kernels.

    stream  to capture on (default: the stream that torch uses for all captures). Graphs captured on one stream share
            its cuBLAS workspace, and freeing one of them may take it away from the others (pytorch#193402). So graphs
            that are freed at different times need different streams.
    """
    for _ in range(2):      # on the current stream: cuBLAS keeps up to 32 MiB for each stream it has seen
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        step()
    return graph


def can_trace(model: nn.Module) -> bool:
    """Whether `trace` can record a step of this model: on a CPU, in one process, without branches on values."""
    return (model.inv_freq.device.type == "cpu" and not torch.distributed.is_initialized()
            and not any(getattr(module, "routes_on_host", False) for module in model.modules()))


def trace(step: Callable[[int], object], modules: Iterable[nn.Module], tensors: Iterable[Tensor] = (),
          n_slot: int = 128) -> Callable[[int], None]:
    """Record the operators of one call, step(n_slot), on a CPU. The trace can be called with any number of slots.

    modules   their parameters and buffers are the step's weights and caches
    tensors   other tensors that the step reads and writes
    """
    module = Traced(step, modules, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # about constants in the trace, and that torch.jit is deprecated
        traced: Any = torch.jit.trace(module, torch.tensor(n_slot), check_trace=False)

    def replay(n_slot: int) -> None:
        with torch.jit.optimized_execution(False):  # the same operators in the same order, so the same results
            traced(torch.tensor(n_slot))
    return replay


class Traced(nn.Module):
    """The module that torch.jit.trace records. It owns all tensors of the step, or they would become constants."""

    def __init__(self, step: Callable[[Any], object], modules: Iterable[nn.Module], tensors: Iterable[Tensor]):
        super().__init__()
        self.step = step
        own = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        for i, tensor in enumerate((own | {id(t): t for t in tensors}).values()):
            self.register_buffer(str(i), tensor)

    def forward(self, n_slot: Tensor) -> list[Tensor]:
        results = tree_leaves(self.step(n_slot))    # returned, or the trace would drop the operators that make them
        return [n_slot + 0, *(result for result in results if isinstance(result, Tensor))]


def compile_layers(layers: Iterable[torch.nn.Module]) -> None:
    """Compile layer by layer. All layers share one code, so a cold start takes seconds; the whole model takes a minute.

    Four graphs are made: for one row and for a block of rows, of the target's layers and of the head's. To make no
    more, the numbers of rows and of cache slots are marked as dynamic before the first call.
    """
    torch._dynamo.config.recompile_limit = 32
    for layer in layers:
        # Coordinate descent lets inductor write one-row products as fused reductions, which reach full bandwidth.
        options = {"coordinate_descent_tuning": True} if next(layer.parameters()).is_cuda else None
        layer.compile(options=options)
        compiled: Any = layer._compiled_call_impl
        layer._compiled_call_impl = functools.partial(call_with_dynamic_sizes, compiled)


def call_with_dynamic_sizes(compiled: Callable[..., Tensor], x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor,
                            cache_pos: Tensor, kv_cache: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """A compiled TransformerBlock, told which sizes vary from call to call."""
    # Slices get the strides of contiguous tensors, or dynamo makes a graph for each kind. For one row this is a view.
    cos, sin, cache_pos = (part[0][None] if len(part) == 1 else part.contiguous() for part in (*rope, cache_pos))
    more = () if residual is None else (residual,)
    for tensor in (x, cos, sin, cache_pos, *more):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)         # new tokens
    torch._dynamo.maybe_mark_dynamic(bias, (2, 3))          # their rows, and cache slots
    return compiled(x, (cos, sin), bias, cache_pos, kv_cache, *more)


class PackedRMSNorm(nn.Module):
    """RMSNorm as the layer norm of (x, -x), whose mean is 0: one fused kernel on a CPU, where F.rms_norm runs ten."""
    weight: Tensor  # [2 dim] the norm's weight twice

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        assert norm.eps is not None
        self.eps = norm.eps
        self.register_buffer("weight", torch.cat((norm.weight.data, norm.weight.data)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(torch.cat((x, -x), -1), self.weight.shape, self.weight, None, self.eps)
        return normed.narrow(-1, 0, len(self.weight) // 2)


def pack_for_cpu(model: nn.Module) -> nn.Module:
    """Replace each linear of a model on a CPU by its packed form, in fp32 and bf16, and each RMS norm in bf16.

    fp32 norms stay: packed, they gain about 1% of a pass of one row and lose on a long prompt (dev/log.md). A tied LM
    head gets a packed copy of the embedding, which lookups go on reading.
    """
    for module in model.modules():      # not list(...), which would hold all old weights until the end
        for name, child in module.named_children():
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(module, name, PackedLinear(child))
            elif isinstance(child, nn.RMSNorm) and child.weight.dtype == torch.bfloat16 and can_pack(child.weight):
                setattr(module, name, PackedRMSNorm(child))
    return model


def is_faster_in_float32(head: nn.Module) -> bool:
    """Whether EAGLE would run faster in fp32: over 16-bit weights in bf16, on a CPU without bf16 instructions.

    There bf16 weights are not packed, and from two rows on a pass takes longer than in packed fp32. One row is faster
    in bf16, and so is plain decoding (dev/log.md).
    """
    target: Any = head.target
    weight = target.tok_embeddings.weight   # the others may be packed
    return (weight.dtype == torch.bfloat16 and not can_pack(weight)
            and can_pack(weight.new_empty(0, dtype=torch.float32))
            and not any(isinstance(module, QuantLinear) for module in target.modules()))


@torch.no_grad()
def tune(model: nn.Module, cache: Path | None = None) -> None:
    """Measure the kernels of each QuantLinear and choose the fastest, for each number of rows and shape of weight.

    The choice is kept in `cache` (default ~/.cache/eagle-kernels.json), by device and versions (`place`). A later run
    takes the same kernels, so it gives the same text. Of several ranks the first one writes the file.
    """
    found, peers = {}, defaultdict(list)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            peers[module.format, module.shape, module.scales.dtype].append(module)
    if not peers:
        return
    with contextlib.suppress(OSError, ValueError, RuntimeError):    # no file, unreadable, broken, no home: measure
        cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "eagle-kernels.json"
        found = read_json(cache)
    before = dict(found)
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    keys = defaultdict(dict)    # for each group of alike modules: rows -> key in `found`
    for peer, modules in tqdm(peers.items(), "choosing kernels", delay=2, leave=False, disable=not is_first or None):
        format, shape, dtype = peer
        for rows in ROWS:
            names = candidates(modules[0], rows)
            if len(names) == 1:
                continue
            size = "x".join(map(str, shape))
            kind = f"{format.mode} {format.group_size}" + " zeros" * format.int8_zeros
            key = f"{place(modules[0])}, {kind} {dtype}, {rows} x {size}"
            keys[peer][rows] = key
            if found.get(key) not in names:
                found[key] = fastest(modules, names, rows)
        for module in modules:
            module.lay_out(set())   # only one shape at a time has extra copies of its weights
    if torch.distributed.is_initialized():  # all ranks must compute the same bits: they take rank 0's kernels
        chosen = [found]
        torch.distributed.broadcast_object_list(chosen)
        found |= chosen[0]
    for peer, modules in peers.items():
        for module in modules:
            module.kernels = {rows: found[key] for rows, key in keys[peer].items()}
            module.lay_out(set(module.kernels.values()) or {"dense"})
    if found != before and is_first and cache is not None:
        with contextlib.suppress(OSError):  # not writable: the next run measures again
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, json.dumps(found, indent=1) + "\n")


def candidates(module: QuantLinear, rows: int) -> list[str]:
    """Names of the kernels that can run this module on its device, in its dtype."""
    dtype, device = module.scales.dtype, module.q.device.type
    is_int8, n_group = module.format.mode == "int8", module.scales.shape[-1]
    is_split = is_int8 and (n_group > 1 or module.zeros is not None)    # CPUs multiply it as int4
    if is_split and device != "cpu":    # Triton's knows int8 with one scale a row only
        return ["dense", "reduction"] if device == "cuda" and dtype != torch.float32 and rows == 1 else ["dense"]
    if device == "cuda" and dtype != torch.float32:
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401
            return ["reduction" if rows == 1 else "dense",
                    *(f"triton {block_n} {split_k}" for block_n in (32, 64, 128) for split_k in (1, 2, 4, 8))]
    # torch packs 16 int4 rows together. Its int8 product reads 16 columns at a time, past the end of other widths.
    by_sixteen = module.in_features if is_int8 and not is_split else module.out_features
    fits = not is_split or module.in_features // n_group % GROUP_SIZES[0] == 0
    if device == "cpu" and dtype == torch.bfloat16 and by_sixteen % 16 == 0 and fits:
        return ["dense", "packed"]
    return ["dense"]


def place(module: QuantLinear) -> str:
    """The device and versions that a measurement holds for."""
    where = f"{device_name(module.q.device)}, torch {torch.__version__}"
    if module.q.is_cuda:
        import triton
        return f"{where}, triton {triton.__version__}"
    return f"{where}, {torch.get_num_threads()} threads"


def fastest(modules: list[QuantLinear], names: list[str], rows: int, repeats: int = 3) -> str:
    """The name of the fastest kernel for this number of rows. The modules, all of one shape, take turns.

    A kernel that fails here is left out, with a line on stderr. "dense" if all fail.
    """
    module, is_cuda = modules[0], modules[0].q.is_cuda
    expert = 0 if module.q.dim() == 3 else None
    x = torch.randn(rows, module.in_features, dtype=module.scales.dtype, device=module.q.device)
    modules = modules[:max(2, COLD // module.parts(expert)[0].nbytes)]
    runs = {}
    for name in names:
        run = functools.partial(_run, modules, name, x, expert)
        try:
            run()   # compiles, and makes the layouts
            runs[name] = capture(run).replay if is_cuda else run    # device time alone, without launches
        except Exception as error:      # of a compiler or a driver, in any class: the other kernels will do
            say(f"kernel {name!r} does not run here ({rows} x {module.shape}): {' '.join(str(error).split())[:200]}")
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(_seconds(run, is_cuda))
    return min(times, key=lambda name: statistics.median(times[name][1:]), default="dense")


def _run(modules: list[QuantLinear], name: str, x: Tensor, expert: int | None) -> None:
    for module in modules:
        module.product(name, x, expert)


def _seconds(run: Callable[[], object], is_cuda: bool) -> float:
    synchronize = torch.cuda.synchronize if is_cuda else lambda: None       # sync: on loading only
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begin
