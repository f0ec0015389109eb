"""A decode step without Python between its kernels: a CUDA graph on a GPU, a TorchScript trace on a CPU.

    graph = capture(lambda: step(n_slot=256))           # graph.replay()
    replay = trace(step, [model, head], step.state)     # replay(n_slot), of any size

A small model spends a fifth to a third of a step in Python (dev/log.md). Both recordings ask the same of a step: its
tensors stay where they are, and the host decides nothing by their values. PYTORCH_JIT=0 runs every step as it is
written, with its prints and breakpoints.
"""
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def capture(step: Callable[[], None], pool: tuple | None = None,
            stream: "torch.cuda.Stream | None" = None) -> "torch.cuda.CUDAGraph":
    """The kernels of one call as a graph, after two calls that compile and let cuBLAS and SDPA choose their kernels.

    Graphs captured on one stream share its cuBLAS workspace, which the end of one of them may take from the others
    (pytorch#193402): those that end at different times want streams of their own. None is torch's one for all.
    """
    for _ in range(2):      # on the current stream: cuBLAS keeps up to 32 MiB for each stream it has seen
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        step()
    return graph


def can_trace(model: nn.Module) -> bool:
    """Whether a step of this model runs on a CPU, in one process, and reads no value on the way."""
    return (model.inv_freq.device.type == "cpu" and not torch.distributed.is_initialized()
            and not any(getattr(module, "routes_on_host", False) for module in model.modules()))


def trace(step: Callable[[int], object], modules: Iterable[nn.Module], tensors: Iterable[Tensor] = (),
          n_slot: int = 128) -> Callable[[int], None]:
    """The operators of one call, on a CPU. The call is made once, with n_slot cache slots; the trace takes any number.

    modules   whose parameters and buffers the step uses
    tensors   what else it writes
    """
    traced = Traced(step, modules, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # of numbers that stay as they are, and that torch.jit is no longer developed
        traced = torch.jit.trace(traced, torch.tensor(n_slot), check_trace=False)

    def replay(n_slot: int) -> None:
        with torch.jit.optimized_execution(False):  # the same operators in the same order, so the same results
            traced(torch.tensor(n_slot))
    return replay


class Traced(nn.Module):
    """What torch.jit.trace takes. Tensors that are not its own would become constants of the graph."""

    def __init__(self, step: Callable[[int], object], modules: Iterable[nn.Module], tensors: Iterable[Tensor]):
        super().__init__()
        self.step = step
        own = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        for i, tensor in enumerate((own | {id(t): t for t in tensors}).values()):
            self.register_buffer(str(i), tensor)

    def forward(self, n_slot: Tensor) -> list[Tensor]:
        results = tree_leaves(self.step(n_slot))    # returned, lest the operators behind them be dropped as useless
        return [n_slot + 0, *(result for result in results if isinstance(result, Tensor))]
