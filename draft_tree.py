"""Trees of drafts: their shapes, and how a head grows them.

    tree = load_tree("dynamic:6,10,60")         # or "static", "chain:4", a JSON file of paths
    plan = plan_static(StaticTree.paper(), batch_size=1, device="cpu", dtype=torch.bfloat16)
    draft = draft_static(head, plan, root, hidden, n_slot=256, pos=pos)

A static tree has the same shape at every step (EAGLE-1, arXiv 2401.15077, called [1]). A dynamic tree expands the
likeliest nodes and keeps the best of all (EAGLE-2, arXiv 2406.16858, called [2]). Both are grown by tensor operations
of static shapes, without a host synchronisation.

Shapes: B batch, N tree nodes including the root, E nodes expanded by the head (the root not counted), D tree depth,
R children of a node, T new tokens, S cache slots, Vd draft vocabulary.
"""
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoint import refuse_lfs_pointer
from config import ModelArgs
from eagle_head import EagleHead
from rope import rope_cos_sin
from sampling import Sampling, draw_children, log_probs


class Copied(NamedTuple):
    """What acceptance must know of a copied branch. N counts its nodes too."""
    found_nothing: Tensor   # [B, N] bool: nodes of a branch without a match
    is_idle: Tensor         # [B, N] bool: these, and the branch's first node where it has the token of a head's child
    twin: Tensor            # [B, N] bool: that child

    def decide(self, is_wrong: Tensor) -> Tensor:
        """is_wrong [B, N] of a sampled acceptance. Of two children with one token the copied one carries the decision.

        A rule that is fixed before anything is drawn keeps the distribution; to take the deeper branch would not.
        """
        has_twin = self.twin.any(1, keepdim=True)
        first = self.is_idle & ~self.found_nothing
        of_twin = (is_wrong | ~self.twin).all(1, keepdim=True)
        return torch.where(first & has_twin, of_twin, is_wrong | self.found_nothing | self.twin)


class Draft(NamedTuple):
    """A tree of drafts. Node 0 is the root: the last token that is decided. Nodes are ordered by depth, so a parent
    stands before its children."""
    tokens: Tensor          # [B, N] target ids
    parents: Tensor         # [B, N] node index; the root is its own parent
    depths: Tensor          # [B, N], 0 for the root
    seen: Tensor            # [B, N, N + 2] what each node sees of the tree, in the form of `visible`
    probs: Tensor | None    # [B, E + 1, Vd] fp32: the distributions that children were drawn from, the root's first
    copied: Copied | None = None    # of a copied branch, whose nodes are the last ones
    log_q: Tensor | None = None     # [B, N] fp32 of each node, given its parent: by the head, where it was asked for

    @property
    def ancestors(self) -> Tensor:
        """[B, N, N] bool: the nodes on the path to each node, itself included."""
        return self.seen[:, :, 1:-1] == 0


# [1], figure 7: child ranks along each path.
PAPER_TREE = ("0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001").split()


@dataclass(frozen=True)
class StaticTree:
    """The same shape at every step: a list of paths, each the ranks of the children taken from the root.

    Nodes are ordered by depth; among the children of a node, rank r is the r-th likeliest token. A chain is the tree
    with one path.
    """
    parents: tuple[int, ...]        # of N nodes; the root's is 0
    ranks: tuple[int, ...]          # of N nodes; the root's is 0
    depths: tuple[int, ...]
    n_copy: int = 0                 # nodes of the copied branch beside it (copy_branch.py)

    @classmethod
    def root(cls) -> "StaticTree":
        """No drafts of a head: the root alone. With a copied branch it is prompt lookup decoding."""
        return cls((0,), (0,), (0,))

    @classmethod
    def from_paths(cls, paths: list[list[int]]) -> "StaticTree":
        """Raises ValueError unless the paths make a connected tree without repetition."""
        if not isinstance(paths, list) or not paths or not all(
                isinstance(p, list) and p and all(type(r) is int and r >= 0 for r in p) for p in paths):
            raise ValueError("a tree is a list of paths, each a list of child ranks such as [0, 2]")
        ordered = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        if len(ordered) != len(paths):
            raise ValueError("the tree names a path twice")
        node = {(): 0} | {path: n + 1 for n, path in enumerate(ordered)}
        for path in ordered:
            if path[:-1] not in node:
                raise ValueError(f"the tree holds {list(path)} without its parent {list(path[:-1])}")
        return cls((0, *(node[path[:-1]] for path in ordered)), (0, *(path[-1] for path in ordered)),
                   (0, *(len(path) for path in ordered)))

    @classmethod
    def chain(cls, depth: int) -> "StaticTree":
        return cls.from_paths([[0] * d for d in range(1, depth + 1)])

    @classmethod
    def paper(cls) -> "StaticTree":
        """The 25 nodes of EAGLE-1."""
        return cls.from_paths([[int(rank) for rank in path] for path in PAPER_TREE])

    @property
    def n_node(self) -> int:
        return len(self.parents)

    @property
    def depth(self) -> int:
        return self.depths[-1]

    @property
    def n_child(self) -> int:
        """R: tokens drafted from one node, at most."""
        return max(self.ranks) + 1

    @property
    def is_chain(self) -> bool:
        return self.depth == self.n_node - 1

    def without_gaps(self) -> "StaticTree":
        """The same tree with children ranked 0, 1, 2, ...: drawn tokens have an order, and none of them is skipped."""
        order = [self.parents[1:n].count(parent) for n, parent in enumerate(self.parents) if n > 0]
        return replace(self, ranks=(0, *order))

    @property
    def n_room(self) -> int:
        """Cache slots that a step needs from the root's slot on, with those of the copied branch."""
        return self.n_node + self.n_copy


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree [2, section 4]. A node is as likely as the product of draft probabilities along its path. Each
    level expands its n_child likeliest nodes. The n_node likeliest of all, root included, are verified."""
    depth: int = 6
    n_child: int = 10
    n_node: int = 60
    n_copy: int = 0     # nodes of the copied branch beside it (copy_branch.py)
    is_chain = False

    def __post_init__(self):
        drafted = self.n_child + (self.depth - 1) * self.n_child ** 2
        if min(self.depth, self.n_child) < 1 or not self.depth < self.n_node <= drafted + 1:
            raise ValueError(f"a dynamic tree of depth {self.depth} with {self.n_child} nodes a level has more than "
                             f"{self.depth} and at most {drafted + 1} nodes, root included, not {self.n_node}")

    @property
    def n_expand(self) -> int:
        """E: nodes below the root that are expanded."""
        return self.n_child * (self.depth - 1)

    @property
    def n_room(self) -> int:
        return max(self.n_node + self.n_copy, self.n_expand)


Tree = StaticTree | DynamicTree


def load_tree(spec: str, n_copy: int | None = None) -> Tree:
    """"static", "chain", "chain:DEPTH", "dynamic", "dynamic:DEPTH,CHILDREN,NODES", or a JSON file of paths.

    n_copy: length of the copied branch (default: the file's "copy", else none)
    """
    tree = named_tree(spec) or read_tree(spec)
    return tree if n_copy is None else replace(tree, n_copy=n_copy)


def named_tree(spec: str) -> Tree | None:
    """The tree of a name and its numbers; None for a name that is none of these."""
    kind, _, numbers = spec.partition(":")
    if kind in ("chain", "dynamic") and all(n.isdigit() for n in numbers.split(",") if numbers):
        values = [int(n) for n in numbers.split(",") if n]
        if kind == "dynamic" and len(values) in (0, 3):
            return DynamicTree(*values)
        if kind == "chain" and len(values) < 2 and all(values):
            return StaticTree.chain(*(values or [5]))
    return StaticTree.paper() if spec == "static" else None


def read_tree(spec: str) -> StaticTree:
    """A JSON file: a list of paths, or {"paths": [...], "copy": N}, as scripts/tune_tree.py writes it."""
    file = Path(spec)
    if not file.is_file():
        raise FileNotFoundError(f"tree {spec!r} is neither static, chain[:DEPTH] or "
                                "dynamic[:DEPTH,CHILDREN,NODES], nor a JSON file of paths")
    refuse_lfs_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        content = content if isinstance(content, dict) else {"paths": content}
        n_copy = content.get("copy", 0)
        if type(n_copy) is not int or n_copy < 0:
            raise ValueError(f'"copy" is {n_copy!r}, not a number of tokens')
        return replace(StaticTree.from_paths(content["paths"]), n_copy=n_copy)
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is not a tree: {error}") from None


# Drafting


Index = Tensor | slice      # a slice if the rows lie side by side: that takes a view, not a copy


class Level(NamedTuple):
    """How one depth of a static tree grows out of the n nodes expanded at the depth above."""
    pick: Index         # [nodes of this depth] index into the children of those n nodes, [n * R]
    inner: Index        # [m] the nodes of this depth that have children, among its nodes; m = 0 at the last
    above: Index        # [m] their parents, among the n
    slots: Index        # [m] their slots in the head's cache, from the root's position on
    seen: Tensor        # [1, m, E + 2] what each one sees of the expanded nodes, in the form of `visible`


class StaticPlan(NamedTuple):
    """A StaticTree as tensors on the device, made once. *Expanded* nodes are those with children, the root first."""
    tree: StaticTree
    row: Tensor         # [B, 1] 0, 1, ...
    order: Tensor       # [1, n] 0, 1, ..., long enough for every count in a step
    is_later: Tensor    # [1, N, N] bool at [i, j]: node j is i or comes after it, or is the root
    parents: Tensor     # [1, N]
    depths: Tensor      # [1, N]
    seen: Tensor        # [1, N, N + 2] see `visible`
    inner_depths: Index     # [E] depth of each expanded node below the root, minus 1
    levels: list[Level]
    expanded: Tensor    # [E + 1]
    expanded_row: Tensor    # [N] row of each node among the expanded ones; 0 for leaves
    is_leaf: Tensor     # [N] bool
    children: Tensor    # [E + 1, R] nodes, the first one again where there are fewer
    is_child: Tensor    # [E + 1, R] bool: False for these repetitions
    child_slot: Tensor  # [N] place of each node in `children`, flattened; 0 for the root


def plan_static(tree: StaticTree, batch_size: int, device: torch.device, dtype: torch.dtype) -> StaticPlan:
    def tensor(values: Sequence) -> Tensor:
        return torch.tensor(values, device=device)

    def index(values: list[int]) -> Index:
        first = values[0] if values else 0
        end = first + len(values)
        return slice(first, end) if values == list(range(first, end)) else tensor(values)

    nodes, expanded = range(tree.n_node), sorted(set(tree.parents))
    ancestors = ancestor_mask(tensor(tree.parents)[None], tree.depth)
    levels, above = [], [0]
    for depth in range(1, tree.depth + 1):
        own = [n for n in nodes if tree.depths[n] == depth]
        inner = [n for n in own if n in expanded]
        levels.append(Level(
            pick=index([above.index(tree.parents[n]) * tree.n_child + tree.ranks[n] for n in own]),
            inner=index([own.index(n) for n in inner]), above=index([above.index(tree.parents[n]) for n in inner]),
            slots=index([expanded.index(n) - 1 for n in inner]),
            seen=visible(ancestors[:, inner][:, :, expanded[1:]], dtype)))
        above = inner
    children = [[n for n in nodes if n > 0 and tree.parents[n] == parent] for parent in expanded]
    filled = [of_one + of_one[:1] * (tree.n_child - len(of_one)) for of_one in children]
    slots = {n: e * tree.n_child + r for e, of_one in enumerate(children) for r, n in enumerate(of_one)}
    row, order, is_later = common_plan(tree, batch_size, device)
    return StaticPlan(
        tree=tree, row=row, order=order, is_later=is_later, parents=tensor(tree.parents)[None],
        depths=tensor(tree.depths)[None], seen=visible(ancestors, dtype),
        inner_depths=index([tree.depths[n] - 1 for n in expanded[1:]]), levels=levels, expanded=tensor(expanded),
        expanded_row=tensor([expanded.index(n) if n in expanded else 0 for n in nodes]),
        is_leaf=tensor([n not in expanded for n in nodes]), children=tensor(filled),
        is_child=tensor([[r < len(of_one) for r in range(tree.n_child)] for of_one in children]),
        child_slot=tensor([slots.get(n, 0) for n in nodes]))


def common_plan(tree: Tree, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The fields row, order and is_later of both kinds of plans. N counts the copied branch too."""
    row = torch.arange(batch_size, device=device)[:, None]
    order = torch.arange(max(tree.n_room, tree.depth + 2, tree.n_copy + 2), device=device)[None]
    nodes = order[:, :tree.n_node + tree.n_copy]
    return row, order, (nodes[:, None] >= nodes[:, :, None]) | (nodes[:, None] == 0)


def draft_nothing(root: Tensor, dtype: torch.dtype) -> Draft:
    """The root [B, 1] alone."""
    none = torch.zeros_like(root)
    return Draft(root, none, none, visible(none[:, :, None] == 0, dtype), None)


def draft_static(head: EagleHead, plan: StaticPlan, root: Tensor, hidden: Tensor, n_slot: int, pos: Tensor,
                 sampling: Sampling | None = None, scored: bool = False) -> Draft:
    """Grow the tree level by level. Children are the likeliest tokens; with `sampling`, draws without replacement.

    root [B, 1] is the token at position pos [B, 1]; hidden [B, 1, dim] is the head's output for it. With `scored` the
    draft has its log_q.
    """
    B, tree = root.shape[0], plan.tree
    at = pos + plan.order
    columns = shown_columns(pos, n_slot, plan.levels[0].seen, head.window)
    cos, sin = rope_cos_sin(at[:, plan.inner_depths], head.inv_freq, hidden.dtype, head.config.rope_scaling)
    tokens, child_probs, log_q = [root], [], [torch.zeros_like(root, dtype=torch.float)]
    for depth, level in enumerate(plan.levels, start=1):
        logits = head.draft_logits(hidden)                                                  # [B, n, Vd]
        drafted, probs = draw_children(logits, tree.n_child, sampling)                      # [B, n, R], [B, n, Vd]
        child_probs.append(probs)
        tokens.append(head.to_target_ids(drafted).flatten(1)[:, level.pick])
        if scored:
            log_q.append(log_probs(logits if probs is None else probs.log(), drafted).flatten(1)[:, level.pick])
        if depth < tree.depth:
            hidden = head(tokens[-1][:, level.inner], hidden[:, level.above], at[:, depth - 1:depth],
                          at[:, level.slots], block_bias(level.seen, columns, head.config),
                          (cos[:, level.slots], sin[:, level.slots]), is_draft=True)        # [B, m, h]
    return Draft(torch.cat(tokens, dim=1), plan.parents.expand(B, -1), plan.depths.expand(B, -1),
                 plan.seen.expand(B, -1, -1), None if sampling is None else torch.cat(child_probs, dim=1),
                 log_q=torch.cat(log_q, dim=1) if scored else None)


class DynamicPlan(NamedTuple):
    """What all trees of a DynamicTree have in common, as tensors on the device.

    *Candidates* are all drafted nodes, numbered in the order of drafting; the root is 0. *Expanded* are the root and
    the R best of each level. Candidates are in groups of R: the children of one expanded node, likeliest first.
    """
    tree: DynamicTree
    row: Tensor         # [B, 1] 0, 1, ...
    order: Tensor       # [1, n] 0, 1, ..., long enough for every count in a step
    is_later: Tensor    # [1, N, N] bool at [i, j]: node j is i or comes after it, or is the root
    inner_depths: Tensor    # [E] depth of each expanded node below the root, minus 1
    itself: Tensor      # [1, E, E + 2] in the form of `visible`: each expanded node sees itself alone
    before: Tensor      # [1, 1, E + 2] the same for the root: it sees only what lies before the tree
    first: Tensor       # [1, E + 1] number of the first candidate in the level of each expanded node
    origin: Tensor      # [candidates, 2] the expanded node that is its parent, and its depth
    unseen: Tensor      # [1, N, N + 2] in the form of `visible`: nodes that see nothing of the tree
    root_scores: Tensor # [B, 2] 0, the score of the root's path, and inf, so that the root is always kept


def plan_dynamic(tree: DynamicTree, batch_size: int, device: torch.device, dtype: torch.dtype) -> DynamicPlan:
    R, E, N = tree.n_child, tree.n_expand, tree.n_node
    depths = [d for d in range(1, tree.depth) for _ in range(R)]
    first = [0] + [1 + (d > 1) * R + max(d - 2, 0) * R ** 2 for d in depths]
    origin = [[0, 0]] + [[e, d + 1] for e, d in enumerate([0, *depths]) for _ in range(R)]
    row, order, is_later = common_plan(tree, batch_size, device)
    return DynamicPlan(
        tree=tree, row=row, order=order, is_later=is_later, inner_depths=torch.tensor(depths, device=device).long() - 1,
        itself=visible(torch.eye(E, device=device)[None] > 0, dtype),
        before=visible(torch.zeros(1, 1, E, dtype=torch.bool, device=device), dtype),
        first=torch.tensor([first], device=device), origin=torch.tensor(origin, device=device),
        unseen=visible(torch.zeros(1, N, N, dtype=torch.bool, device=device), dtype),
        root_scores=torch.tensor([[0.0, torch.inf]], device=device).repeat(batch_size, 1))


def draft_dynamic(head: EagleHead, plan: DynamicPlan, root: Tensor, hidden: Tensor, n_slot: int, pos: Tensor,
                  scored: bool = False) -> Draft:
    """Expand the best nodes of every level, then keep the best of all [2, sections 4.1 and 4.2].

    A level none of whose children can be among the best is not drafted where the host may look: on a CPU, in a step
    that is not traced.
    """
    may_look = hidden.is_cpu and not torch.jit.is_tracing() and not torch.compiler.is_compiling()
    B, tree, R = root.shape[0], plan.tree, plan.tree.n_child
    at = pos + plan.order
    columns = shown_columns(pos, n_slot, plan.before, head.window)
    cos, sin = rope_cos_sin(at[:, plan.inner_depths], head.inv_freq, hidden.dtype, head.config.rope_scaling)
    scores = plan.root_scores[:, :1]            # [B, n] of the expanded nodes, log probability of their paths
    seen = plan.before.expand(B, -1, -1)        # what the expanded nodes see of one another
    tokens, all_scores, expanded = [root], [plan.root_scores[:, 1:]], [plan.order[:, :1].expand(B, -1)]
    for depth in range(1, tree.depth + 1):
        logits = head.draft_logits(hidden)                                              # [B, n, Vd], n = 1 then R
        top = logits.topk(R, dim=-1)
        # At most -1e-4: a child then never ties with its parent, so the best nodes always make a connected tree.
        log_q = (top.values - logits.float().logsumexp(-1, keepdim=True)).clamp(-100, -1e-4)
        drafted = (scores[:, :, None] + log_q).flatten(1)                               # [B, n * R]
        tokens.append(head.to_target_ids(top.indices).flatten(1))
        all_scores.append(drafted)
        if depth == tree.depth:
            break
        scores, best = drafted.topk(R, dim=-1)                                          # [B, R]
        if may_look and cannot_matter(scores, torch.cat(all_scores, dim=1), tree.n_node):
            break
        expanded.append(best)
        above, slots = best // R, slice((depth - 1) * R, depth * R)
        seen = torch.maximum(seen[plan.row, above], plan.itself[:, slots])
        hidden = head(tokens[-1].gather(1, best), hidden[plan.row, above], at[:, depth - 1:depth], at[:, slots],
                      block_bias(seen, columns, head.config), (cos[:, slots], sin[:, slots]), is_draft=True)
    path_scores = torch.cat(all_scores, dim=1)
    kept = path_scores.topk(tree.n_node, dim=-1).indices.sort(dim=-1).values            # [B, N], the root first
    above, depths = plan.origin[kept].unbind(-1)
    above_all = torch.cat(expanded, dim=1)                                              # [B, E + 1] the expanded nodes
    candidates = above_all + plan.first[:, :above_all.shape[1]]
    parents = torch.searchsorted(kept, candidates.gather(1, above))     # a child is never kept without its parent
    seen = plan.unseen.expand(B, -1, -1).scatter(2, lineage(parents, tree.depth, plan.order) + 1, 0.0)
    log_q = None
    if scored:
        path_scores = path_scores.gather(1, kept).masked_fill(depths == 0, 0)
        log_q = path_scores - path_scores.gather(1, parents)
    return Draft(torch.cat(tokens, dim=1).gather(1, kept), parents, depths, seen, None, log_q=log_q)


def cannot_matter(scores: Tensor, all_scores: Tensor, n_node: int) -> bool:
    """Whether no child of the nodes with these scores [B, R] can be among the n_node best of all_scores [B, n].

    A child's score is never above its parent's.
    """
    if all_scores.shape[1] < n_node:
        return False
    return bool((scores[:, 0] < all_scores.topk(n_node, dim=-1).values[:, -1]).all())  # sync: on a CPU alone


def lineage(parents: Tensor, depth: int, order: Tensor) -> Tensor:
    """parents [B, N] -> [B, N, depth + 1]: each node, its parent, its parent's parent, ...; past the root, the root."""
    above = [order[:, :parents.shape[1]].expand_as(parents), parents]
    for _ in range(depth - 1):
        above.append(parents.gather(1, above[-1]))
    return torch.stack(above, dim=-1)


def ancestor_mask(parents: Tensor, depth: int) -> Tensor:
    """parents [B, N] -> [B, N, N] bool: row n marks n and all nodes above it."""
    order = torch.arange(parents.shape[1], device=parents.device)[None]
    seen = torch.zeros(*parents.shape, parents.shape[1], dtype=torch.bool, device=parents.device)
    return seen.scatter(2, lineage(parents, depth, order), True)


# A block of nodes lies side by side in the cache. What a node sees is an additive bias with one column for all slots
# before the block, one for each slot of the block, and one for all slots after it.


def visible(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, M] bool over the block's M slots -> [B, T, M + 2] additive: 0 where a node sees, else -inf."""
    seen = nn.functional.pad(nn.functional.pad(seen, (1, 0), value=True), (0, 1), value=False)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def shown_columns(base: Tensor, n_slot: int, seen: Tensor, window: int | None = None) -> Tensor:
    """[B, S]: for each slot its column in seen [..., M + 2], for a block that begins at slot base [B, 1].

    With a window, only so many slots before the block are seen.
    """
    column = torch.arange(1, n_slot + 1, device=base.device) - base     # of the slot before the block: 0
    end = seen.shape[-1] - 1
    shown = column.clamp(0, end)
    return shown if window is None else shown.masked_fill(column <= -window, end)


def block_bias(seen: Tensor, columns: Tensor, config: ModelArgs) -> Tensor:
    """seen [1 or B, T, M + 2], columns [B, S] -> the bias of `attention_bias` [B, 1, G*T, S]."""
    group, B = config.n_head // config.n_kv_head, columns.shape[0]
    bias = seen[:, None].expand(B, group, -1, -1)
    return bias.gather(3, columns[:, None, None].expand(-1, group, seen.shape[1], -1)).flatten(1, 2)[:, None]
