"""What each step of a decoder did: its tree, what the target said of it, and the time of each part.

    decoder = Decoder(model, 1, head=head, tree=tree, record=True)
    result = decoder.generate([prompt_ids], 100)
    result.steps[0][7].nodes                    # of row 0, its eighth step; page.py shows them

The step writes what it did into tensors that stay where they are, so it can be captured or traced like any other. The
host reads them once a step, beside the step's report.

Shapes: B batch, N tree nodes including the root and the copied branch.
"""
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_tree import Draft

PARTS = ("draft", "verify", "accept", "record", "commit")   # of an EAGLE step; what is left of its time is the host's


class Step(NamedTuple):
    """What one decode step of a row did."""
    kind: str                   # decoder.Kind
    tokens: list[int]           # produced, before any cut by a stop: accepted drafts, then the target's own token
    n_copied: int               # of the accepted drafts that were copied: all or none
    seconds: dict[str, float]   # of PARTS and "host"; of the whole "step" on a GPU, and of plain steps
    nodes: list[int] = []       # tokens of the tree's nodes, the root first; none in a plain step
    parents: list[int] = []     # node index; the root is its own parent
    probs: list[float | None] = []      # the head's probability of each node, given its parent; None: root, copied
    said: list[int] = []        # the target's likeliest token after each node
    accepted: list[int] = []    # nodes of the accepted path, in order, without the root
    n_tree: int = 0             # nodes from this index on are copied


class Recorder:
    """The tensors that a step writes, and the clock.

    `nodes` [B, 5, N] fp32 holds of each node its token, its parent (-1: there is no such node), its log probability
    (NaN: it has none), what the target said, and whether it was accepted. fp32 is exact up to token 2^24.
    """

    def __init__(self, batch_size: int, n_tree: int, n_copy: int, device: torch.device):
        self.n_tree = n_tree
        self.nodes = torch.full((batch_size, 5, n_tree + n_copy), -1.0, device=device)
        self.clock = torch.zeros(len(PARTS) + 1, dtype=torch.double)
        self.has_parts = device.type == "cpu"       # a replayed CUDA graph has no place for the host's clock
        self.last = 0.0                             # when the step before was over, the host's part included

    @property
    def tensors(self) -> list[Tensor]:
        return [self.nodes, self.clock]

    def mark(self, part: int) -> None:
        """The part before this one is over."""
        if self.has_parts:
            mark(self.clock, part)

    def note(self, draft: Draft, path: Tensor, n_accepted: Tensor, said: Tensor) -> None:
        """Keep a draft, the accepted path (see Accepted), and the target's likeliest token after each node, [B, N]."""
        n = draft.tokens.shape[1]
        log_q = torch.full_like(draft.tokens, math.nan, dtype=torch.float) if draft.log_q is None else draft.log_q
        last = path.gather(1, n_accepted)                                                   # [B, 1] node
        is_accepted = draft.ancestors.gather(1, last[:, :, None].expand(-1, -1, n))[:, 0]   # [B, N]
        log_q = F.pad(log_q, (0, n - log_q.shape[1]), value=math.nan)
        parents = draft.parents
        if draft.copied is not None:    # of a batch some rows may have found nothing to copy: they have no such branch
            parents = parents.masked_fill(draft.copied.found_nothing, -1)
        rows = (draft.tokens, parents, log_q, said, is_accepted)
        nodes = torch.stack([row.float() for row in rows], dim=1)
        self.nodes.copy_(F.pad(nodes, (0, self.nodes.shape[2] - n), value=-1.0))

    def begin(self) -> None:
        """Decoding begins now."""
        self.last = time.perf_counter()

    def steps(self, kind: str, report: list[list[int]]) -> list[Step]:
        """What every row did in the step whose report (see EagleStep) has just been read."""
        now = time.perf_counter()
        seconds = {"step": now - self.last}
        if kind != "plain" and self.has_parts:
            clock = self.clock.tolist()
            seconds = {part: end - begin for part, begin, end in zip(PARTS, clock, clock[1:])}
            seconds["host"] = now - self.last - sum(seconds.values())
        self.last = now
        trees = [()] * len(report)
        if kind != "plain":
            trees = [self._tree(row) for row in self.nodes.tolist()]    # sync: one more, when recording
        return [Step(kind, [i for i in ids if i >= 0], n_copied, seconds, *tree)
                for (*ids, n_copied, _), tree in zip(report, trees)]

    def _tree(self, row: list[list[float]]) -> tuple:
        tokens, parents, log_q, said, is_accepted = row
        n = parents.index(-1) if -1 in parents else len(parents)
        probs = [None if i == 0 or math.isnan(q) else math.exp(q) for i, q in enumerate(log_q[:n])]
        accepted = [i for i in range(1, n) if is_accepted[i] == 1]
        ints = [list(map(int, values[:n])) for values in (tokens, parents, said)]
        return ints[0], ints[1], probs, ints[2], accepted, self.n_tree


@torch.jit.ignore(drop=False)
def read_clock(clock: Tensor, part: int) -> Tensor:
    clock[part] = time.perf_counter()
    return clock


@torch.jit.script_if_tracing
def mark(clock: Tensor, part: int) -> Tensor:
    """clock[part] is the time now. Scripted: so a trace calls Python here, and does not keep the time of tracing."""
    return read_clock(clock, part)
