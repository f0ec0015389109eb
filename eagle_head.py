"""EAGLE: a one-layer head that drafts the target's next features, trees of drafts, and lossless verification.

    head = EagleHead.from_pretrained("yuhuili/EAGLE-Vicuna-7B-v1.3", target=model)
    head.setup_caches(max_batch_size=1, max_seq_length=1024)         # as many as the model's
    step = EagleStep(model, head, tree, batch_size=1)
    step.prefill([prompt_ids])
    step(n_slot=256)                     # one target pass: step.produced [B, depth + 1], -1 where it produced fewer

EAGLE-1, arXiv 2401.15077, called [1] below; EAGLE-2, arXiv 2406.16858, called [2]. A *feature* is the target's hidden
state after its final norm. The head sees feature f_i beside token t_{i+1} and predicts f_{i+1}, whose logits are the
target's own LM head over it. A step drafts a tree of continuations, runs the target once over all its nodes, and
keeps the path that agrees with what the target itself says.

Shapes: B batch, N tree nodes including the root, E nodes expanded by the head, D tree depth, R children of a node,
T new tokens, S cache slots, V vocabulary, Vd draft vocabulary.
"""
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import (ModelArgs, Sampling, Transformer, TransformerBlock, attention_bias, block_targets, causal_mask,
                   install_quantized, load_weights, logits_to_probs, next_tokens, prefill, read_json, resolve_checkpoint,
                   rope_cos_sin, rope_inv_freq, stored)


class EagleHead(nn.Module):
    """The draft model of EAGLE-1 and EAGLE-2: fc over (embedding, feature), then one decoder layer [1, section 4.1]."""

    def __init__(self, config: ModelArgs, target: Transformer, bias: bool = True):
        super().__init__()
        self.config = config
        # Not a submodule: embedding and LM head are the target's own, neither saved nor trained with the head.
        self.__dict__["target"] = target
        self.fc = nn.Linear(2 * config.dim, config.dim, bias=bias)
        self.layer = TransformerBlock(config, attention_norm=False)
        self.register_buffer("inv_freq", rope_inv_freq(config, "cpu").to(self.fc.weight.device), persistent=False)
        self.register_buffer("kv_cache", None, persistent=False)
        self.draft_output: nn.Module | None = None                  # LM head over the draft vocabulary
        self.register_buffer("draft_ids", None, persistent=False)   # [Vd] target id of each draft id; None means all
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, target: Transformer, shard: "tp.Shard | None" = None) -> "EagleHead":
        """Load a head in the official format from a folder or hub id, to the target's device and dtype.

        `shard` is the target's, if it has one (tp.py). Raises FileNotFoundError or ValueError, naming both
        sides, for a head that does not fit the target.
        """
        folder = resolve_checkpoint(checkpoint)
        config = read_json(folder / "config.json")
        args = head_args(config, target.config)
        weight = target.norm.weight
        with torch.device("meta"):
            build = cls if shard is None else shard.build_head
            head = build(args, target, bias=config.get("bias", True))
            is_quantized = install_quantized(head, folder)
        head.to(weight.dtype).to_empty(device=weight.device)
        head.inv_freq = rope_inv_freq(args, weight.device)
        # Official files carry the target's embedding once more.
        load_weights(head.weights(), folder, {"embed_tokens.weight": target.tok_embeddings.weight},
                     None if shard is None else shard.part(args))
        if is_quantized:
            from quantized import tune
            tune(head)
        return (head if shard is None else shard.connect(head)).eval()

    def weights(self) -> dict[str, Tensor]:
        """The official key -> our parameter, or the part of it that the key fills."""
        layer = {f"layers.0.{key}": part for key, part in block_targets(self.layer, self.config).items()}
        return {f"fc.{kind}": tensor for kind, tensor in stored(self.fc).items()} | layer

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Allocate `kv_cache` [2, B, K, S, head_dim], S as in the target's."""
        c, weight = self.config, self.target.norm.weight
        self.kv_cache = torch.zeros(2, max_batch_size, c.n_kv_head, max_seq_length, c.head_dim,
                                    dtype=weight.dtype, device=weight.device)

    def set_draft_vocab(self, ids: list[int] | None) -> None:
        """Draft only these tokens, the likeliest first (FR-Spec, arXiv 2502.14856): a small LM head costs little.

        Verification stays over the whole vocabulary, so the output does not change, only how often drafts are right.
        """
        self.draft_ids, self.draft_output = None, None
        if ids is None:
            return
        vocab = self.config.vocab_size
        if not (isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < vocab for i in ids)
                and len(set(ids)) == len(ids)):
            raise ValueError(f"a draft vocabulary is a list of different token ids below {vocab}")
        self.draft_ids = torch.tensor(ids, device=self.target.norm.weight.device)
        if hasattr(self.target.output, "rows"):  # quantised, or tp.ShardedOutput: so are the rows taken
            self.draft_output = self.target.output.rows(self.draft_ids)
            return
        rows = self.target.output.weight[self.draft_ids]
        output = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta", dtype=rows.dtype)
        output.weight = nn.Parameter(rows, requires_grad=False)
        self.draft_output = output

    def forward(self, tokens: Tensor, features: Tensor, input_pos: Tensor, cache_pos: Tensor | None = None,
                mask: Tensor | None = None) -> Tensor:
        """Next features [B, T, dim] from tokens t_{i+1} [B, T], features f_i [B, T, dim] and positions i [B, T] or [T].

        cache_pos and mask as in `Transformer.forward`; before `setup_caches` the block attends to itself alone.
        """
        input_pos = input_pos.expand(tokens.shape)
        cache_pos = input_pos if cache_pos is None else cache_pos.expand(tokens.shape)
        x = self.fc(torch.cat((self.target.tok_embeddings(tokens), features), dim=-1))
        if mask is None:
            mask = causal_mask(input_pos, None if self.kv_cache is None else self.kv_cache.shape[3])
        bias = attention_bias(mask, self.config.n_head // self.config.n_kv_head, x.dtype)
        return self.layer(x, rope_cos_sin(input_pos, self.inv_freq, x.dtype), bias, cache_pos, self.kv_cache)

    def draft_logits(self, features: Tensor) -> Tensor:
        """[..., dim] -> [..., Vd]: the target's LM head, over the draft vocabulary where there is one."""
        return (self.draft_output or self.target.output)(features)

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids if self.draft_ids is None else self.draft_ids[draft_ids]

    def to_target_probs(self, probs: Tensor) -> Tensor:
        """[..., Vd] -> [..., V]: no mass on tokens outside the draft vocabulary."""
        if self.draft_ids is None:
            return probs
        out = probs.new_zeros(*probs.shape[:-1], self.config.vocab_size)
        return out.index_copy_(-1, self.draft_ids, probs)


def head_args(config: dict, target: ModelArgs) -> ModelArgs:
    """ModelArgs of a head from its config.json, compared with its target's."""
    for key, ours in (("hidden_size", target.dim), ("vocab_size", target.vocab_size)):
        if key not in config:
            raise ValueError(f"the head's config.json has no key {key!r}")
        if config[key] != ours:
            raise ValueError(f"this head does not fit its target: {key} is {config[key]} in the head, {ours} in the target")
    if config.get("eagle_version", 1) not in (1, 2) or "Eagle3" in str(config.get("architectures")):
        raise ValueError("this is an EAGLE-3 head: EAGLE-1 and EAGLE-2 heads are supported")
    try:
        # A head is a dense LLaMA layer whatever its target is, at most with Qwen2's biases.
        args = ModelArgs.from_config(config | {"model_type": "llama", "num_hidden_layers": 1})
    except ValueError as error:
        raise ValueError(f"the head's {error}") from None
    return replace(args, qkv_bias=bool(config.get("qkv_bias")))


# Draft trees


class Draft(NamedTuple):
    """A tree of drafts. Node 0 is the root, the last token already decided; a parent precedes its children."""
    tokens: Tensor          # [B, N] target ids
    parents: Tensor         # [B, N] node index; the root is its own parent
    depths: Tensor          # [B, N], 0 for the root
    ancestors: Tensor       # [B, N, N] bool: the nodes each one sees, itself among them
    probs: Tensor | None    # [B, N, Vd] fp32: the distribution each node's children were drawn from, if they were drawn


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
        """The same tree with the children of each node ranked 0, 1, 2, ...: of drawn tokens none may be passed over."""
        order = [self.parents[1:n].count(parent) for n, parent in enumerate(self.parents) if n > 0]
        return replace(self, ranks=(0, *order))

    @property
    def n_expand(self) -> int:
        """E: nodes below the root that have children."""
        return len(set(self.parents[1:]) - {0})

    @property
    def n_room(self) -> int:
        """Cache slots a step needs from the root's on."""
        return self.n_node


@dataclass(frozen=True)
class DynamicTree:
    """EAGLE-2's tree [2, section 4]: each level expands its n_child likeliest nodes by the product of draft
    probabilities along their path, and the n_node likeliest of all, the root included, are verified."""
    depth: int = 6
    n_child: int = 10
    n_node: int = 60
    is_chain = False

    def __post_init__(self):
        drafted = self.n_child + (self.depth - 1) * self.n_child ** 2
        if min(self.depth, self.n_child) < 1 or not self.depth < self.n_node <= drafted + 1:
            raise ValueError(f"a dynamic tree of depth {self.depth} with {self.n_child} nodes a level has more than "
                             f"{self.depth} and at most {drafted + 1} nodes, root included, not {self.n_node}")

    @property
    def n_expand(self) -> int:
        return self.n_child * (self.depth - 1)

    @property
    def n_room(self) -> int:
        return max(self.n_node, self.n_expand)


Tree = StaticTree | DynamicTree


def load_tree(spec: str) -> Tree:
    """"static", "chain", "chain:DEPTH", "dynamic", "dynamic:DEPTH,CHILDREN,NODES", or a JSON file of paths."""
    kind, _, numbers = spec.partition(":")
    if kind in ("chain", "dynamic") and all(n.isdigit() for n in numbers.split(",") if numbers):
        values = [int(n) for n in numbers.split(",") if n]
        if kind == "dynamic" and len(values) in (0, 3):
            return DynamicTree(*values)
        if kind == "chain" and len(values) < 2 and all(values):
            return StaticTree.chain(*(values or [5]))
    if spec == "static":
        return StaticTree.paper()
    file = Path(spec)
    if not file.is_file():
        raise FileNotFoundError(f"tree {spec!r} is neither static, chain[:DEPTH] or dynamic[:DEPTH,CHILDREN,NODES], "
                                "nor a JSON file of paths")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return StaticTree.from_paths(content["paths"] if isinstance(content, dict) else content)
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a tree: {error}") from None


# Drafting


class Level(NamedTuple):
    """How one depth of a static tree grows out of the n nodes expanded at the depth before."""
    pick: Tensor        # [nodes of this depth] index into those nodes' children, [n * R]
    inner: Tensor       # [m] the nodes of this depth that have children, among its nodes; m = 0 at the last
    above: Tensor       # [m] their parents, among the n
    slots: Tensor       # [m] their slots in the head's cache, from the root's position on
    seen: Tensor        # [1, m, E] bool: the expanded nodes each one sees


class StaticPlan(NamedTuple):
    """A StaticTree as tensors on the device, made once."""
    parents: Tensor     # [1, N]
    depths: Tensor      # [1, N]
    ancestors: Tensor   # [1, N, N]
    expanded: Tensor    # [N] row of each node among the expanded ones, the root first; 0 for leaves
    levels: list[Level]


def plan_static(tree: StaticTree, device: torch.device) -> StaticPlan:
    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    ancestors = ancestor_mask(tensor(tree.parents)[None], tree.depth)
    expanded = sorted(set(tree.parents))
    levels, above = [], [0]
    for depth in range(1, tree.depth + 1):
        nodes = [n for n in range(tree.n_node) if tree.depths[n] == depth]
        inner = [n for n in nodes if n in expanded]
        levels.append(Level(
            pick=tensor([above.index(tree.parents[n]) * tree.n_child + tree.ranks[n] for n in nodes]),
            inner=tensor([nodes.index(n) for n in inner]), above=tensor([above.index(tree.parents[n]) for n in inner]),
            slots=tensor([expanded.index(n) - 1 for n in inner]), seen=ancestors[:, inner][:, :, expanded[1:]]))
        above = inner
    return StaticPlan(tensor(tree.parents)[None], tensor(tree.depths)[None], ancestors,
                      tensor([expanded.index(n) if n in expanded else 0 for n in range(tree.n_node)]), levels)


def draft_static(head: EagleHead, tree: StaticTree, plan: StaticPlan, root: Tensor, hidden: Tensor, n_slot: int,
                 pos: Tensor, sampling: Sampling | None = None) -> Draft:
    """Grow the tree level by level: children are the likeliest tokens, or with `sampling` drawn without replacement.

    root [B, 1] token at position pos [B, 1]; hidden [B, 1, dim] the head's output for it.
    """
    B = root.shape[0]
    tokens, child_probs = [root], []
    for depth, level in enumerate(plan.levels, start=1):
        drafted, probs = draw_children(head.draft_logits(hidden), tree.n_child, sampling)   # [B, n, R], [B, n, Vd]
        child_probs.append(probs)
        tokens.append(head.to_target_ids(drafted).flatten(1)[:, level.pick])
        if depth < tree.depth:
            hidden = head(tokens[-1][:, level.inner], hidden[:, level.above], pos - 1 + depth, pos + level.slots,
                          block_mask(pos, level.seen.expand(B, -1, -1), n_slot))            # [B, m, dim]
    probs = None if sampling is None else torch.cat(child_probs, dim=1)[:, plan.expanded]   # [B, N, Vd]
    return Draft(torch.cat(tokens, dim=1), plan.parents.expand(B, -1), plan.depths.expand(B, -1),
                 plan.ancestors.expand(B, -1, -1), probs)


def draw_children(logits: Tensor, n_child: int, sampling: Sampling | None) -> tuple[Tensor, Tensor | None]:
    """[..., Vd] -> draft ids [..., R] in order, and the distribution they were drawn from [..., Vd].

    Without `sampling` the likeliest. With it, the order in which exponential clocks ring: sampling without
    replacement, as multi-round speculative sampling needs it.
    """
    if sampling is None:
        return logits.topk(n_child, dim=-1).indices, None
    probs = logits_to_probs(logits, *sampling)
    clocks = torch.empty_like(probs).exponential_().clamp_min_(1e-30)
    return (probs / clocks).topk(n_child, dim=-1).indices, probs


def draft_dynamic(head: EagleHead, tree: DynamicTree, root: Tensor, hidden: Tensor, n_slot: int,
                  pos: Tensor) -> Draft:
    """EAGLE-2: expand the best nodes of every level, then keep the best of all [2, sections 4.1 and 4.2]."""
    B, R, device = root.shape[0], tree.n_child, root.device
    scores = root.new_zeros(B, 1, dtype=torch.float)    # of the expanded nodes, log probability of their paths
    parent_of = root.new_zeros(B, 1)                    # the expanded nodes' indices among all candidates; 0 is the root
    seen = torch.zeros(B, 1, tree.n_expand, dtype=torch.bool, device=device)            # expanded ancestors
    tokens, parents, all_scores = [root], [root.new_zeros(B, 1)], [torch.full_like(scores, torch.inf)]
    n_candidate = 1
    for depth in range(1, tree.depth + 1):
        logits = head.draft_logits(hidden).float()                                      # [B, n, Vd], n = 1 then R
        top = logits.topk(R, dim=-1)
        # At most -1e-4: a child then never ties with its parent, so the best nodes always make a connected tree.
        log_q = (top.values - logits.logsumexp(-1, keepdim=True)).clamp(-100, -1e-4)
        drafted = (scores[:, :, None] + log_q).flatten(1)                               # [B, n * R]
        drafted_tokens = head.to_target_ids(top.indices).flatten(1)
        tokens.append(drafted_tokens)
        parents.append(parent_of.repeat_interleave(R, dim=1))
        all_scores.append(drafted)
        if depth == tree.depth:
            break
        scores, best = drafted.topk(R, dim=-1)                                          # [B, R]
        first = (depth - 1) * R
        own = torch.arange(first, first + R, device=device)
        seen = seen.gather(1, (best // R)[:, :, None].expand(-1, -1, tree.n_expand))
        seen = seen | torch.eye(tree.n_expand, dtype=torch.bool, device=device)[own]
        hidden = head(drafted_tokens.gather(1, best), take_rows(hidden, best // R), pos - 1 + depth, pos + own,
                      block_mask(pos, seen, n_slot))
        parent_of = best + n_candidate
        n_candidate += drafted.shape[1]
    kept = torch.cat(all_scores, dim=1).topk(tree.n_node, dim=-1).indices.sort(dim=-1).values  # [B, N]; 0, the root, first
    node_of = root.new_zeros(B, n_candidate + drafted.shape[1])
    node_of.scatter_(1, kept, torch.arange(tree.n_node, device=device).expand(B, -1))
    node_parents = node_of.gather(1, torch.cat(parents, dim=1).gather(1, kept))
    ancestors = ancestor_mask(node_parents, tree.depth)
    return Draft(torch.cat(tokens, dim=1).gather(1, kept), node_parents, ancestors.sum(-1) - 1, ancestors, None)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, n, dim], rows [B, m] -> [B, m, dim]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]


def ancestor_mask(parents: Tensor, depth: int) -> Tensor:
    """parents [B, N] -> [B, N, N] bool: row n marks n and all nodes above it."""
    N = parents.shape[1]
    node = torch.arange(N, device=parents.device).expand_as(parents)
    seen = torch.zeros(*parents.shape, N, dtype=torch.bool, device=parents.device)
    for _ in range(depth + 1):
        seen = seen.scatter(2, node[:, :, None], 1)
        node = parents.gather(1, node)
    return seen


def block_mask(base: Tensor, seen: Tensor, n_slot: int) -> Tensor:
    """Mask of a block that is written from slot `base` on: all slots before it, and within it what `seen` says.

    base [B, 1], seen [B, T, M] over the block's M slots -> [B, T, n_slot] bool.
    """
    offset = torch.arange(n_slot, device=base.device) - base                            # [B, S]
    M = seen.shape[-1]
    inside = ((offset >= 0) & (offset < M))[:, None]
    index = offset.clamp(0, M - 1)[:, None].expand(-1, seen.shape[1], -1)
    return (offset < 0)[:, None] | (inside & seen.gather(2, index))


# Acceptance


class Accepted(NamedTuple):
    path: Tensor        # [B, D + 1] nodes: the root, then the accepted ones; past them each entry is its own index
    n_accepted: Tensor  # [B, 1] drafts accepted
    bonus: Tensor       # [B, 1] the target's own token after the last accepted one


def accept_deterministic(logits: Tensor, draft: Draft, depth: int, sampling: Sampling) -> Accepted:
    """Walk down from the root: draw the target's token at a node, once, and step into the child that carries it.

    logits [B, N, V]. Every token of the result is a draw of the target from its own distribution, so the output is
    lossless at any temperature; greedy decoding is the limit.
    """
    B, N = draft.tokens.shape
    node, alive = draft.tokens.new_zeros(B, 1), torch.ones(B, 1, dtype=torch.bool, device=logits.device)
    path, n_accepted, bonus = [node], 0, None
    for d in range(depth + 1):
        token = next_tokens(take_rows(logits, node), sampling)                          # [B, 1], only where we are
        bonus = token if bonus is None else torch.where(alive, token, bonus)
        if d == depth:
            break
        is_next = (draft.parents == node) & (draft.tokens == token)                     # [B, N]
        is_next[:, 0] = False                                                           # the root is its own parent
        alive = alive & is_next.any(1, keepdim=True)
        node = torch.where(alive, is_next.byte().argmax(1, keepdim=True), node)
        path.append(torch.where(alive, node, d + 1))
        n_accepted = n_accepted + alive
    return Accepted(torch.cat(path, dim=1), n_accepted, bonus)


def accept_sampled(logits: Tensor, draft: Draft, depth: int, sampling: Sampling, head: EagleHead,
                   n_child: int) -> Accepted:
    """Multi-round speculative sampling [1, algorithm 1] over children drawn without replacement from draft.probs.

    Child x is accepted with probability min(1, p(x) / q(x)); when it is not, p becomes norm(max(0, p - q)) and q
    loses x. The bonus token comes from the last p.
    """
    B, N = draft.tokens.shape
    order = torch.arange(N, device=logits.device).expand(B, -1)
    node, alive = draft.tokens.new_zeros(B, 1), torch.ones(B, 1, dtype=torch.bool, device=logits.device)
    path, n_accepted, bonus = [node], 0, None
    for d in range(depth + 1):
        p = logits_to_probs(take_rows(logits, node), *sampling)[:, 0]                   # [B, V]
        q = head.to_target_probs(take_rows(draft.probs, node)[:, 0])
        stepped, child_node = torch.zeros_like(alive), node
        is_child = (draft.parents == node) & (order > 0) & alive                        # [B, N]
        for r in range(n_child if d < depth else 0):
            child = torch.where(is_child, order, N).min(1, keepdim=True).values         # the next one in draw order
            trying = (child < N) & ~stepped
            child = child.clamp(max=N - 1)
            is_child = is_child & (order != child)
            x = draft.tokens.gather(1, child)                                           # [B, 1]
            p_x, q_x = p.gather(1, x), q.gather(1, x)
            # q(x) = 0 is no draw at all: the draft's distribution had fewer tokens than the node has children.
            trying = trying & (q_x > 0)
            accepted = trying & (torch.rand_like(p_x) * q_x < p_x)
            rest = (p - q).clamp_min(0)
            mass = rest.sum(1, keepdim=True)
            # No mass is left only where p = q, and there no draft is rejected but for rounding: p then stays.
            p = torch.where(trying & ~accepted & (mass > 0), rest / mass.clamp_min(1e-30), p)
            without = q.scatter(1, x, 0)
            q = torch.where(trying & ~accepted, without / without.sum(1, keepdim=True).clamp_min(1e-30), q)
            child_node = torch.where(accepted, child, child_node)
            stepped = stepped | accepted
        token = (p / torch.empty_like(p).exponential_().clamp_min_(1e-30)).argmax(1, keepdim=True)
        bonus = token if bonus is None else torch.where(alive, token, bonus)
        if d == depth:
            break
        alive, node = stepped, child_node
        path.append(torch.where(alive, node, d + 1))
        n_accepted = n_accepted + alive
    return Accepted(torch.cat(path, dim=1), n_accepted, bonus)



# One step


class EagleStep:
    """Draft, verify, accept and commit over static tensors, with no host synchronisation, so that a CUDA graph or
    torch.compile can take the whole of it.

    State between steps: `tokens` [B, 1] the root, the last token decided, at position `pos` [B, 1]; and the pairs that
    the head has not seen yet, `pair_tokens` [B, D + 1] with `pair_features` [B, D + 1, dim], the first n_pair [B, 1] of
    them real. The last pair carries the root.
    """

    def __init__(self, model: Transformer, head: EagleHead, tree: Tree, batch_size: int,
                 sampling: Sampling = Sampling(), draw_drafts: bool | None = None):
        """draw_drafts: children are drawn from the draft's distribution and verified by multi-round speculative
        sampling; else they are its likeliest tokens. None draws where it can be done: static trees at a temperature,
        where more drafts are accepted so (dev/log.md)."""
        sampling.check()
        if not isinstance(tree, StaticTree | DynamicTree):
            raise ValueError(f"tree {tree!r} is no tree: load_tree makes one of a name or a file")
        can_draw = isinstance(tree, StaticTree) and sampling.temperature > 0
        if draw_drafts and not can_draw:
            raise ValueError("drafts can be drawn for static trees and chains, at a temperature above 0")
        draw_drafts = can_draw if draw_drafts is None else draw_drafts
        vocab = head.config.vocab_size if head.draft_ids is None else len(head.draft_ids)
        if tree.n_child > vocab:
            raise ValueError(f"the tree takes {tree.n_child} children of a node, the draft vocabulary has {vocab} tokens")
        if draw_drafts:
            tree = tree.without_gaps()
        device, dtype = model.inv_freq.device, model.norm.weight.dtype
        self.model, self.head, self.tree, self.sampling, self.draw_drafts = model, head, tree, sampling, draw_drafts
        self.plan = plan_static(tree, device) if isinstance(tree, StaticTree) else None
        width = tree.depth + 1
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.pos = torch.zeros_like(self.tokens)
        self.n_pair = torch.ones_like(self.tokens)
        self.pair_tokens = torch.zeros(batch_size, width, dtype=torch.long, device=device)
        self.pair_features = torch.zeros(batch_size, width, model.config.dim, dtype=dtype, device=device)
        self.produced = torch.zeros(batch_size, width, dtype=torch.long, device=device)

    @property
    def state(self) -> list[Tensor]:
        return [self.tokens, self.pos, self.n_pair, self.pair_tokens, self.pair_features]

    def prefill(self, prompts: list[list[int]], n_cached: int = 0) -> None:
        """Fill both caches with the prompts; their last tokens are the roots of the first step.

        The first n_cached tokens are in both caches. The feature before them is not kept, so one is computed again.
        """
        self.tokens.copy_(torch.tensor([[prompt[-1]] for prompt in prompts]))
        self.pos.copy_(torch.tensor([[len(prompt) - 1] for prompt in prompts]))
        self.n_pair.fill_(1)
        self.pair_tokens.copy_(self.tokens.expand_as(self.pair_tokens))
        self.pair_features.zero_()      # a prompt of one token has no feature before its root
        last = (self.pos - 1).clamp(min=0)
        for pos, following, features, mask in prefill(self.model, prompts, max(n_cached - 1, 0)):
            self.head(following, features, pos, mask=mask)
            begin, end = pos[0, 0], pos[0, -1]
            feature = take_rows(features, (last - begin).clamp(0, pos.shape[1] - 1))
            here = ((last >= begin) & (last <= end) & (self.pos > 0))[:, :, None]
            self.pair_features[:, :1] = torch.where(here, feature, self.pair_features[:, :1])

    def __call__(self, n_slot: int) -> None:
        """One target pass, over caches read up to slot n_slot >= pos + tree.n_room of every row."""
        # A row that has finished idles where the tree still fits.
        self.pos.clamp_(max=self.model.kv_cache.shape[4] - self.tree.n_room)
        draft = self.grow(self.ingest(n_slot), n_slot)
        logits, features = self.verify(draft, n_slot)
        self.commit(draft, features, self.accept(logits, draft))

    def ingest(self, n_slot: int) -> Tensor:
        """Take the pending pairs into the head's cache; the last one's output [B, 1, dim] drafts the root's children."""
        pair_pos = (self.pos - self.n_pair + torch.arange(self.pair_tokens.shape[1], device=self.pos.device)).clamp(min=0)
        hidden = self.head(self.pair_tokens, self.pair_features, pair_pos, mask=causal_mask(pair_pos, n_slot))
        return take_rows(hidden, self.n_pair - 1)

    def grow(self, root_hidden: Tensor, n_slot: int) -> Draft:
        if isinstance(self.tree, DynamicTree):
            return draft_dynamic(self.head, self.tree, self.tokens, root_hidden, n_slot, self.pos)
        return draft_static(self.head, self.tree, self.plan, self.tokens, root_hidden, n_slot, self.pos,
                            self.sampling if self.draw_drafts else None)

    def verify(self, draft: Draft, n_slot: int) -> tuple[Tensor, Tensor]:
        """The target over all nodes: logits [B, N, V], features [B, N, dim]."""
        slots = self.pos + torch.arange(draft.tokens.shape[1], device=self.pos.device)
        return self.model(draft.tokens, self.pos + draft.depths, slots, block_mask(self.pos, draft.ancestors, n_slot))

    def accept(self, logits: Tensor, draft: Draft) -> Accepted:
        if self.draw_drafts:
            return accept_sampled(logits, draft, self.tree.depth, self.sampling, self.head, self.tree.n_child)
        return accept_deterministic(logits, draft, self.tree.depth, self.sampling)

    def commit(self, draft: Draft, features: Tensor, accepted: Accepted) -> None:
        """Move the accepted path's keys and values to the front, and set the state for the next step."""
        if not self.tree.is_chain:
            move_slots(self.model.kv_cache, self.pos, accepted.path)
        order = torch.arange(accepted.path.shape[1], device=self.pos.device)
        following = draft.tokens.gather(1, accepted.path.roll(-1, 1))       # the node after each; past the end unused
        self.pair_tokens.copy_(torch.where(order < accepted.n_accepted, following, accepted.bonus))
        self.produced.copy_(torch.where(order <= accepted.n_accepted, self.pair_tokens, -1))
        self.pair_features.copy_(take_rows(features, accepted.path))
        self.n_pair.copy_(accepted.n_accepted + 1)
        # A row that ends on the last slot has its root one past it; it only idles, where plain steps can look.
        self.pos.add_(self.n_pair).clamp_(max=self.model.kv_cache.shape[4] - 1)
        self.tokens.copy_(accepted.bonus)


def move_slots(kv_cache: Tensor, pos: Tensor, path: Tensor) -> None:
    """kv_cache [n_layer, 2, B, K, S, D]: slot pos + path[j] -> slot pos + j, for every layer in one gather.

    Source and target overlap: the gather's copy comes between them.
    """
    source, target = pos + path, pos + torch.arange(path.shape[1], device=pos.device)   # [B, D + 1]
    if len(pos) == 1:
        cache = kv_cache[:, :, :1]
        cache.index_copy_(4, target[0], cache.index_select(4, source[0]))
    else:
        row = torch.arange(len(pos), device=pos.device)[:, None]
        kv_cache[:, :, row, :, target] = kv_cache[:, :, row, :, source]
