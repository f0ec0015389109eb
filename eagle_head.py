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

from model import (NOT_FINITE, ModelArgs, Sampling, Transformer, TransformerBlock, attention_bias, block_targets,
                   causal_mask, install_quantized, iterate_weights, load_weights, logits_to_probs, next_tokens, prefill,
                   read_json, refuse_lfs_pointer, resolve_checkpoint, rope_cos_sin, rope_inv_freq, sample, stored)


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
        """Load a head in the official format from a folder or hub id, to the target's device and dtype; what serving
        engines' converters make of one is read too (`official_config`, `official_key`).

        `shard` is the target's, if it has one (tp.py). Raises FileNotFoundError or ValueError, naming both
        sides, for a head that does not fit the target.
        """
        folder = resolve_checkpoint(checkpoint)
        config = official_config(read_json(folder / "config.json"))
        args = head_args(config, target.config)
        if config.get("attention_bias"):
            refuse_output_bias(folder)
        weight = target.norm.weight
        with torch.device("meta"):
            build = cls if shard is None else shard.build_head
            head = build(args, target, bias=config.get("bias", True))
            is_quantized = install_quantized(head, folder)
        head.to(weight.dtype).to_empty(device=weight.device)
        head.inv_freq = rope_inv_freq(args, weight.device)
        # Official files carry the target's embedding once more, converted ones its LM head too.
        embedding = target.tok_embeddings.weight
        optional = {"embed_tokens.weight": embedding, "lm_head.weight": embedding}
        if config.get("attention_bias"):
            optional["layers.0.self_attn.o_proj.bias"] = torch.empty(args.dim, device="meta")
        load_weights(head.weights(), folder, optional, None if shard is None else shard.part(args), official_key)
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
                mask: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Next features [B, T, dim] from tokens t_{i+1} [B, T], features f_i [B, T, dim] and positions i [B, T] or [T].

        cache_pos and mask as in `Transformer.forward`; rope is `rope_cos_sin` of the positions where it is known
        already. Before `setup_caches` the block attends to itself alone.
        """
        input_pos = input_pos.expand(tokens.shape)
        cache_pos = input_pos if cache_pos is None else cache_pos.expand(tokens.shape)
        x = self.fc(torch.cat((self.target.tok_embeddings(tokens), features), dim=-1))
        if mask is None:
            mask = causal_mask(input_pos, None if self.kv_cache is None else self.kv_cache.shape[3])
        bias = attention_bias(mask, self.config.n_head // self.config.n_kv_head, x.dtype)
        rope = rope_cos_sin(input_pos, self.inv_freq, x.dtype) if rope is None else rope
        return self.layer(x, rope, bias, cache_pos, self.kv_cache)

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


def official_config(config: dict) -> dict:
    """A head's config.json with the keys of the official format, which other formats nest and rename:

    vLLM's converters   {"model_type": "eagle", "model": {...}, "eagle_fc_bias": bool, "truncated_vocab_size": int}
    speculators         {"speculators_model_type": "eagle", "transformer_layer_config": {...}, "fusion_bias": bool}

    Raises ValueError for a head of another kind, by key and value.
    """
    outer = dict(config)
    places = [outer.pop(key, None) for key in ("model", "transformer_layer_config")]
    nested = next((place for place in places if isinstance(place, dict)), {})
    flat = {**outer, **nested, "architectures": [outer.get("architectures"), nested.get("architectures")]}
    if flat.get("speculators_model_type", "eagle") not in ("eagle", "eagle3"):
        raise ValueError(f"the head's config.json: speculators_model_type {flat['speculators_model_type']!r} is not "
                         "supported (eagle is)")
    if flat.get("speculators_model_type") == "eagle3":
        flat["eagle_version"] = 3
    for key in ("layernorms", "add_para_norm"):
        if flat.get(key):
            raise ValueError(f"the head's config.json: {key} {flat[key]!r}, more norms than EAGLE has: not supported")
    if flat.get("truncated_vocab_size") not in (None, flat.get("vocab_size")):
        raise ValueError("the head's config.json: truncated_vocab_size "
                         f"{flat['truncated_vocab_size']} is not supported: its LM head is not the target's")
    for key in ("eagle_fc_bias", "fusion_bias"):
        if key in flat:
            flat.setdefault("bias", bool(flat[key]))
    if nested:
        flat.setdefault("bias", False)
    return flat


def official_key(key: str) -> str:
    """The official name of a head's weight: vLLM's loader puts "model." before it, speculators has two of its own."""
    while key.startswith("model."):
        key = key.removeprefix("model.")
    for theirs, ours in (("fusion_fc.", "fc."), ("transformer.", "layers.0.")):
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
    return key


def refuse_output_bias(folder: Path) -> None:
    """SGLang knows biases of q, k and v only together with one of o_proj, which converters set to zero."""
    for key, tensor, file in iterate_weights(folder, wanted=lambda key: key.endswith("o_proj.bias")):
        if tensor.any():
            raise ValueError(f"{file}: {key} is not zero: a head has no bias there")


def head_args(config: dict, target: ModelArgs) -> ModelArgs:
    """ModelArgs of a head from its config.json, compared with its target's."""
    config = official_config(config)
    for key, ours in (("hidden_size", target.dim), ("vocab_size", target.vocab_size)):
        if key not in config:
            raise ValueError(f"the head's config.json has no key {key!r}")
        if config[key] != ours:
            raise ValueError(f"this head does not fit its target: {key} is {config[key]} in the head, {ours} in the target")
    if config.get("eagle_version", 1) not in (1, 2) or "Eagle3" in str(config.get("architectures")):
        raise ValueError("this is an EAGLE-3 head: EAGLE-1 and EAGLE-2 heads are supported")
    try:
        # A head is a dense LLaMA layer whatever its target is, at most with Qwen2's biases.
        args = ModelArgs.from_config(config | {"model_type": "llama", "num_hidden_layers": 1, "attention_bias": False})
    except ValueError as error:
        raise ValueError(f"the head's {error}") from None
    return replace(args, qkv_bias=bool(config.get("qkv_bias") or config.get("attention_bias")))


# Draft trees


class Draft(NamedTuple):
    """A tree of drafts. Node 0 is the root, the last token already decided; a parent precedes its children, and no node
    follows a deeper one."""
    tokens: Tensor          # [B, N] target ids
    parents: Tensor         # [B, N] node index; the root is its own parent
    depths: Tensor          # [B, N], 0 for the root
    seen: Tensor            # [B, N, N + 2] what each node sees of the tree, as `visible` has it
    probs: Tensor | None    # [B, E + 1, Vd] fp32: what the children of the root and of the expanded nodes were drawn from

    @property
    def ancestors(self) -> Tensor:
        """[B, N, N] bool: the nodes on the path to each one, itself among them."""
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
    refuse_lfs_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        return StaticTree.from_paths(content["paths"] if isinstance(content, dict) else content)
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is not a tree: {error}") from None


# Drafting


Index = Tensor | slice      # a slice where the rows lie side by side: a view, and nothing to copy


class Level(NamedTuple):
    """How one depth of a static tree grows out of the n nodes expanded at the depth before."""
    pick: Index         # [nodes of this depth] index into those nodes' children, [n * R]
    inner: Index        # [m] the nodes of this depth that have children, among its nodes; m = 0 at the last
    above: Index        # [m] their parents, among the n
    slots: slice        # [m] their slots in the head's cache, from the root's position on
    seen: Tensor        # [1, m, E + 2] what each one sees of the expanded nodes, as `visible` has it


class StaticPlan(NamedTuple):
    """A StaticTree as tensors on the device, made once. The *expanded* nodes are those with children, the root first."""
    depth: int          # D
    row: Tensor         # [B, 1] 0, 1, ...
    order: Tensor       # [1, n] 0, 1, ..., as far as a step counts
    is_later: Tensor    # [1, N, N] bool: whether node j is no older than i, or the root
    parents: Tensor     # [1, N]
    depths: Tensor      # [1, N]
    seen: Tensor        # [1, N, N + 2] see `visible`
    inner_depths: Index     # [E] depth of each expanded node below the root, minus 1
    levels: list[Level]
    expanded: Tensor    # [E + 1]
    expanded_row: Tensor    # [N] row of each node among the expanded ones; 0 for leaves
    is_leaf: Tensor     # [N] bool
    children: Tensor    # [E + 1, R] nodes, the first one again where there are fewer
    is_child: Tensor    # [E + 1, R] bool: not such a filler
    child_slot: Tensor  # [N] where each node stands in `children`, flattened; 0 for the root


def plan_static(tree: StaticTree, batch_size: int, device: torch.device, dtype: torch.dtype) -> StaticPlan:
    def tensor(values: list) -> Tensor:
        return torch.tensor(values, device=device)

    def index(values: list[int]) -> Index:
        first = values[0] if values else 0
        return slice(first, first + len(values)) if values == list(range(first, first + len(values))) else tensor(values)

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
    return StaticPlan(
        *common_plan(tree, batch_size, device), tensor(tree.parents)[None],
        tensor(tree.depths)[None], visible(ancestors, dtype), index([tree.depths[n] - 1 for n in expanded[1:]]), levels,
        tensor(expanded), tensor([expanded.index(n) if n in expanded else 0 for n in nodes]),
        tensor([n not in expanded for n in nodes]), tensor(filled),
        tensor([[r < len(of_one) for r in range(tree.n_child)] for of_one in children]),
        tensor([slots.get(n, 0) for n in nodes]))


def common_plan(tree: Tree, batch_size: int, device: torch.device) -> tuple[int, Tensor, Tensor, Tensor]:
    """The first fields of either plan."""
    row = torch.arange(batch_size, device=device)[:, None]
    order = torch.arange(max(tree.n_room, tree.depth + 2), device=device)[None]
    nodes = order[:, :tree.n_node]
    return tree.depth, row, order, (nodes[:, None] >= nodes[:, :, None]) | (nodes[:, None] == 0)


def draft_static(head: EagleHead, tree: StaticTree, plan: StaticPlan, root: Tensor, hidden: Tensor, n_slot: int,
                 pos: Tensor, sampling: Sampling | None = None) -> Draft:
    """Grow the tree level by level: children are the likeliest tokens, or with `sampling` drawn without replacement.

    root [B, 1] token at position pos [B, 1]; hidden [B, 1, dim] the head's output for it.
    """
    B = root.shape[0]
    at = pos + plan.order
    columns = shown_columns(pos, n_slot, plan.levels[0].seen)
    cos, sin = rope_cos_sin(at[:, plan.inner_depths], head.inv_freq, hidden.dtype)
    tokens, child_probs = [root], []
    for depth, level in enumerate(plan.levels, start=1):
        drafted, probs = draw_children(head.draft_logits(hidden), tree.n_child, sampling)   # [B, n, R], [B, n, Vd]
        child_probs.append(probs)
        tokens.append(head.to_target_ids(drafted).flatten(1)[:, level.pick])
        if depth < tree.depth:
            hidden = head(tokens[-1][:, level.inner], hidden[:, level.above], at[:, depth - 1:depth], at[:, level.slots],
                          block_bias(level.seen, columns, head.config),
                          (cos[:, level.slots], sin[:, level.slots]))                       # [B, m, dim]
    return Draft(torch.cat(tokens, dim=1), plan.parents.expand(B, -1), plan.depths.expand(B, -1),
                 plan.seen.expand(B, -1, -1), None if sampling is None else torch.cat(child_probs, dim=1))


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


class DynamicPlan(NamedTuple):
    """What is the same in every tree of a DynamicTree, as tensors on the device.

    *Candidates* are all nodes drafted, numbered in the order of drafting, the root 0; *expanded* are the root and the R
    best of each level. Candidates come in groups of R, each group the children of one expanded node, in its order.
    """
    depth: int          # D
    row: Tensor         # [B, 1] 0, 1, ...
    order: Tensor       # [1, n] 0, 1, ..., as far as a step counts
    is_later: Tensor    # [1, N, N] bool: whether node j is no older than i, or the root
    inner_depths: Tensor    # [E] depth of each expanded node below the root, minus 1
    itself: Tensor      # [1, E, E + 2] as `visible` has it, each expanded node seeing itself alone
    before: Tensor      # [1, 1, E + 2] the same of the root's view: nothing but what lies before the tree
    first: Tensor       # [1, E + 1] of the level of each expanded node, the first candidate's number
    origin: Tensor      # [candidates, 2] the expanded node that each one is a child of, and its depth
    unseen: Tensor      # [1, N, N + 2] of nodes that see nothing of the tree
    root_scores: Tensor # [B, 2] what the root's children start from, 0, and what it is itself kept by, inf


def plan_dynamic(tree: DynamicTree, batch_size: int, device: torch.device, dtype: torch.dtype) -> DynamicPlan:
    R, E, N = tree.n_child, tree.n_expand, tree.n_node
    depths = [d for d in range(1, tree.depth) for _ in range(R)]
    first = [0] + [1 + (d > 1) * R + max(d - 2, 0) * R ** 2 for d in depths]
    origin = [[0, 0]] + [[e, d + 1] for e, d in enumerate([0, *depths]) for _ in range(R)]
    none = torch.zeros(1, N, E, dtype=torch.bool, device=device)
    return DynamicPlan(
        *common_plan(tree, batch_size, device), torch.tensor(depths, device=device).long() - 1,
        visible(torch.eye(E, device=device)[None] > 0, dtype), visible(none[:, :1], dtype),
        torch.tensor([first], device=device), torch.tensor(origin, device=device),
        visible(torch.zeros(1, N, N, dtype=torch.bool, device=device), dtype),
        torch.tensor([[0.0, torch.inf]], device=device).repeat(batch_size, 1))


def draft_dynamic(head: EagleHead, tree: DynamicTree, plan: DynamicPlan, root: Tensor, hidden: Tensor, n_slot: int,
                  pos: Tensor) -> Draft:
    """EAGLE-2: expand the best nodes of every level, then keep the best of all [2, sections 4.1 and 4.2]."""
    B, R = root.shape[0], tree.n_child
    at = pos + plan.order
    columns = shown_columns(pos, n_slot, plan.before)
    cos, sin = rope_cos_sin(at[:, plan.inner_depths], head.inv_freq, hidden.dtype)
    scores = plan.root_scores[:, :1]            # [B, n] of the expanded nodes, log probability of their paths
    seen = plan.before.expand(B, -1, -1)        # by the expanded nodes, of one another
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
        expanded.append(best)
        above, slots = best // R, slice((depth - 1) * R, depth * R)
        seen = torch.maximum(seen[plan.row, above], plan.itself[:, slots])
        hidden = head(tokens[-1].gather(1, best), hidden[plan.row, above], at[:, depth - 1:depth], at[:, slots],
                      block_bias(seen, columns, head.config), (cos[:, slots], sin[:, slots]))
    kept = torch.cat(all_scores, dim=1).topk(tree.n_node, dim=-1).indices.sort(dim=-1).values  # [B, N]; 0, the root, first
    above, depths = plan.origin[kept].unbind(-1)
    candidates = torch.cat(expanded, dim=1) + plan.first                                # [B, E + 1] the expanded nodes
    parents = torch.searchsorted(kept, candidates.gather(1, above))     # among the kept: a child never comes without it
    seen = plan.unseen.expand(B, -1, -1).scatter(2, lineage(parents, tree.depth, plan.order) + 1, 0.0)
    return Draft(torch.cat(tokens, dim=1).gather(1, kept), parents, depths, seen, None)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, n, dim], rows [B, m] -> [B, m, dim]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]


def lineage(parents: Tensor, depth: int, order: Tensor) -> Tensor:
    """parents [B, N] -> [B, N, depth + 1]: each node, its parent, the parent's parent, ..., then the root over and over."""
    above = [order[:, :parents.shape[1]].expand_as(parents), parents]
    for _ in range(depth - 1):
        above.append(parents.gather(1, above[-1]))
    return torch.stack(above, dim=-1)


def ancestor_mask(parents: Tensor, depth: int) -> Tensor:
    """parents [B, N] -> [B, N, N] bool: row n marks n and all nodes above it."""
    order = torch.arange(parents.shape[1], device=parents.device)[None]
    seen = torch.zeros(*parents.shape, parents.shape[1], dtype=torch.bool, device=parents.device)
    return seen.scatter(2, lineage(parents, depth, order), True)


# A block of nodes is written into the cache from the root's slot on, or from where the root's would be. Its mask is kept
# as additive bias over columns: one for all slots before the block, one for each of its own, one for all slots after it.


def visible(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, M] bool over the block's M slots -> [B, T, M + 2] additive: 0 where a node sees, else -inf."""
    seen = nn.functional.pad(nn.functional.pad(seen, (1, 0), value=True), (0, 1), value=False)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)


def shown_columns(base: Tensor, n_slot: int, seen: Tensor) -> Tensor:
    """The column of seen [..., M + 2] that each slot shows, [B, S], for a block written from slot base [B, 1] on."""
    return (torch.arange(1, n_slot + 1, device=base.device) - base).clamp(0, seen.shape[-1] - 1)


def block_bias(seen: Tensor, columns: Tensor, config: ModelArgs) -> Tensor:
    """seen [1 or B, T, M + 2], columns [B, S] -> the bias of `attention_bias` [B, 1, G*T, S]."""
    group, B = config.n_head // config.n_kv_head, columns.shape[0]
    bias = seen[:, None].expand(B, group, -1, -1)
    return bias.gather(3, columns[:, None, None].expand(-1, group, seen.shape[1], -1)).flatten(1, 2)[:, None]


# Acceptance


class Accepted(NamedTuple):
    path: Tensor        # [B, D + 1] nodes: the root, then the accepted ones; past them each entry is its own index
    n_accepted: Tensor  # [B, 1] drafts accepted
    bonus: Tensor       # [B, 1] the target's own token after the last accepted one


def accept_greedy(logits: Tensor, draft: Draft, plan: StaticPlan | DynamicPlan) -> Accepted:
    """A node is right where it carries the likeliest token of its parent. logits [B, N, V]."""
    if isinstance(plan, DynamicPlan):
        token = next_tokens(logits, Sampling())
        path, n_accepted, last = walk(draft, draft.tokens != token.gather(1, draft.parents), plan)
        return Accepted(path, n_accepted, token.gather(1, last))
    # Of the paper's 26 nodes 11 have children; to look at all of them takes a CPU 1% of a step.
    token = next_tokens(logits[:, plan.expanded], Sampling())
    is_wrong = draft.tokens != token.gather(1, plan.expanded_row[draft.parents])
    path, n_accepted, last = walk(draft, is_wrong, plan)
    return Accepted(path, n_accepted, next_tokens(logits[plan.row, last], Sampling()))


def accept_likeliest(logits: Tensor, draft: Draft, plan: StaticPlan | DynamicPlan, sampling: Sampling) -> Accepted:
    """Draw the target's token at every node, once, and step into the child that carries it. logits [B, N, V].

    Every token of the result is a draw of the target from its own distribution, so the output is lossless. Of the draw
    at a node two things are asked: which child it is, if any, which one uniform number decides; and at the last node the
    token itself, known not to be a child's.
    """
    tokens, parents = draft.tokens, draft.parents
    probs = logits_to_probs(logits, *sampling)                                          # [B, N, V]
    mass = probs[plan.row, parents, tokens]                                             # [B, N] of each node's token
    # The siblings' masses lie side by side in the unit interval, those of all other tokens behind them.
    is_no_older_sibling = (parents[:, :, None] != parents[:, None]) | plan.is_later
    begin = mass[:, None].masked_fill(is_no_older_sibling, 0).sum(-1)
    draw = torch.rand_like(mass).gather(1, parents)
    path, n_accepted, last = walk(draft, ~((begin <= draw) & (draw < begin + mass)), plan)
    p = probs[plan.row, last][:, 0]                                                     # [B, V]
    x = tokens[:, 1:]
    of_children = p.gather(1, x).masked_fill(parents[:, 1:] != last, 0)
    return Accepted(path, n_accepted, draw_rest(p.scatter_add(1, x, -of_children), p))


def accept_sampled(logits: Tensor, draft: Draft, plan: StaticPlan, sampling: Sampling, head: EagleHead) -> Accepted:
    """Multi-round speculative sampling [1, algorithm 1] over children drawn without replacement from draft.probs.

    Child x is accepted with probability min(1, p(x) / q(x)); when it is not, p becomes norm(max(0, p - q)) and q loses x
    and is normalised. The bonus token comes from the last p. logits [B, N, V].

    After k rejections p is norm(max(0, P - c Q)) of the first P and Q with a number c: to subtract q again is to take
    more of Q away, for where a token was lost nothing was left of P. From one round to the next c grows by m / s,
    m being the sum of max(0, P - c Q) and s what is left of Q.
    """
    P = logits_to_probs(logits[:, plan.expanded], *sampling)                            # [B, E + 1, V]
    Q = head.to_target_probs(draft.probs.nan_to_num(0.0))
    x = draft.tokens[:, plan.children]                                                  # [B, E + 1, R]
    P_x, Q_x = P.gather(2, x), Q.gather(2, x) * plan.is_child
    # Q(x) = 0 is no draw at all: the draft's distribution had fewer tokens than the node has children.
    is_drawn = Q_x > 0
    s = Q.scatter(2, x, 0.0).sum(-1, keepdim=True) + Q_x.flip(-1).cumsum(-1).flip(-1)   # before each round
    weight = is_drawn / s.clamp_min(1e-30)
    c, m = [torch.zeros_like(s[:, :, :1])], [torch.ones_like(s[:, :, :1])]
    for r in range(x.shape[2]):
        c.append(torch.addcmul(c[-1], m[-1], weight[:, :, r:r + 1]))
        if r + 1 < x.shape[2]:
            m.append(torch.addcmul(P, c[-1], Q, value=-1).clamp_min_(0).sum(-1, keepdim=True))
    c_all = torch.cat(c, dim=2)                                                         # [B, E + 1, R + 1]
    odds = torch.addcmul(P_x, c_all[:, :, :-1], Q_x, value=-1) * s
    accepted = (torch.rand_like(Q_x) * Q_x * torch.cat(m, dim=2) < odds) & is_drawn     # [B, E + 1, R]
    is_wrong = accepted.cumsum(2) * accepted != 1                                       # all but the first accepted
    path, n_accepted, last = walk(draft, is_wrong.flatten(1)[:, plan.child_slot], plan)
    expanded = plan.expanded_row[last]
    c_last = c_all[plan.row, expanded][:, 0, -1:].masked_fill(plan.is_leaf[last], 0)
    p = logits_to_probs(logits[plan.row, last], *sampling)[:, 0]
    return Accepted(path, n_accepted, draw_rest(torch.addcmul(p, c_last, Q[plan.row, expanded][:, 0], value=-1), p))


def draw_rest(rest: Tensor, p: Tensor) -> Tensor:
    """One token a row from what is positive of rest [B, V], [B, 1]. Where that is nothing, from p [B, V]: it can only be for
    rounding that the draw was not a child's."""
    return sample(torch.maximum(rest, p * 1e-20))[:, None]


def walk(draft: Draft, is_wrong: Tensor, plan: StaticPlan | DynamicPlan) -> tuple[Tensor, Tensor, Tensor]:
    """The way down over right nodes: path [B, D + 1] and number of drafts [B, 1] as in Accepted, and its last node [B, 1].

    is_wrong [B, N] of each node as a child of its parent; the root's entry is not asked. Of siblings one is right at most.
    """
    N, end = is_wrong.shape[1], plan.depth + 1
    above = draft.ancestors                                                             # [B, N, N]
    is_cut_off = (above[:, :, 1:] & is_wrong[:, None, 1:]).any(-1)
    # One node of a depth is reached at most, and the deeper ones come later.
    last = plan.order[:, :N].masked_fill(is_cut_off, 0).amax(1, keepdim=True)
    depths = torch.where(above[plan.row, last][:, 0], draft.depths, plan.order[:, end:end + 1])     # off the path, the end
    path = plan.order[:, :end + 1].expand(len(last), -1).scatter(1, depths, plan.order[:, :N].expand_as(depths))
    return path[:, :end], draft.depths.gather(1, last), last


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
        self.plan = (plan_static if isinstance(tree, StaticTree) else plan_dynamic)(tree, batch_size, device, dtype)
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
        pair_pos = (self.pos - self.n_pair + self.plan.order[:, :self.tree.depth + 1]).clamp(min=0)
        hidden = self.head(self.pair_tokens, self.pair_features, pair_pos, mask=causal_mask(pair_pos, n_slot))
        return hidden[self.plan.row, self.n_pair - 1]

    def grow(self, root_hidden: Tensor, n_slot: int) -> Draft:
        if isinstance(self.tree, DynamicTree):
            return draft_dynamic(self.head, self.tree, self.plan, self.tokens, root_hidden, n_slot, self.pos)
        return draft_static(self.head, self.tree, self.plan, self.tokens, root_hidden, n_slot, self.pos,
                            self.sampling if self.draw_drafts else None)

    def verify(self, draft: Draft, n_slot: int) -> tuple[Tensor, Tensor]:
        """The target over all nodes: logits [B, N, V], features [B, N, dim]."""
        slots = self.pos + self.plan.order[:, :self.tree.n_node]
        columns = shown_columns(self.pos, n_slot, draft.seen)
        return self.model(draft.tokens, self.pos + draft.depths, slots, block_bias(draft.seen, columns, self.model.config))

    def accept(self, logits: Tensor, draft: Draft) -> Accepted:
        if self.draw_drafts:
            return accept_sampled(logits, draft, self.plan, self.sampling, self.head)
        if self.sampling.temperature > 0:
            return accept_likeliest(logits, draft, self.plan, self.sampling)
        return accept_greedy(logits, draft, self.plan)

    def commit(self, draft: Draft, features: Tensor, accepted: Accepted) -> None:
        """Move the accepted path's keys and values to the front, and set the state for the next step."""
        order = self.plan.order[:, :self.tree.depth + 1]
        if not self.tree.is_chain:
            move_slots(self.model.kv_cache, self.pos + accepted.path, self.pos + order, self.plan.row)
        following = draft.tokens.gather(1, accepted.path.roll(-1, 1))       # the node after each; past the end unused
        bonus = accepted.bonus.clamp(min=0)                                 # NOT_FINITE is no token: nothing follows it
        self.pair_tokens.copy_(torch.where(order < accepted.n_accepted, following, bonus))
        self.produced.copy_(self.pair_tokens.masked_fill(order > accepted.n_accepted, -1))
        self.produced[:, :1].masked_fill_(accepted.bonus < 0, NOT_FINITE)
        self.pair_features.copy_(features[self.plan.row, accepted.path])
        self.n_pair.copy_(accepted.n_accepted + 1)
        # A row that ends on the last slot has its root one past it; it only idles, where plain steps can look.
        self.pos.add_(self.n_pair).clamp_(max=self.model.kv_cache.shape[4] - 1)
        self.tokens.copy_(bonus)


def move_slots(kv_cache: Tensor, source: Tensor, target: Tensor, row: Tensor) -> None:
    """kv_cache [n_layer, 2, B, K, S, D]: slots source [B, D + 1] -> target [B, D + 1], for every layer in one gather.

    Source and target overlap: the gather's copy comes between them.
    """
    if len(source) == 1:
        cache = kv_cache[:, :, :1]
        cache.index_copy_(4, target[0], cache.index_select(4, source[0]))
    else:
        kv_cache[:, :, row, :, target] = kv_cache[:, :, row, :, source]
