"""Does a model fit on N GPUs, and how fast could it be? Computed from shapes: no weights are read.

    python scripts/plan.py llama-2-70b --world-size 4 --mode int4 --head --context 4096 --gpu-memory 40
    python scripts/plan.py FOLDER --world-size 8 --batch 4 --head HEAD --bandwidth 2800 --latency 15

The bytes of weights, head and caches are exact, because they are counted on the modules that a rank would fill. The
workspace is an upper estimate, and the reserve an allowance. The speed is an upper bound: it is computed from what a
step must read and exchange, with the figures you give for the machine. Compute and launches are not in it.

Shapes: B batch.
"""
import argparse
import sys
from typing import NamedTuple

import torch
from torch import nn

import root  # noqa: F401
from benchmarks.shapes import SHAPES, eagle3_shape, head_shape
from checkpoint import quantize_settings, read_json, resolve_checkpoint
from config import ModelArgs
from console import Parser, command, number
from draft_tree import Tree, load_tree
from eagle_head import Eagle3Head
from head_config import Eagle3Spec, eagle3_spec, head_args, head_kind, stored_shapes
from linears import install, weight_bytes
from model import PREFILL_CHUNK, MoEFeedForward
from tp import Shard, divides

ITEM = 2    # bytes of a 16-bit number


class Plan(NamedTuple):
    weights: int            # bytes, as the next three, of the rank that holds most
    head: int
    caches: int
    workspace: int
    plain: float            # tokens a second of the whole batch, at most
    eagle: float | None

    @property
    def total(self) -> int:
        return self.weights + self.head + self.caches + self.workspace


class Head(NamedTuple):
    config: ModelArgs   # of the whole head
    bias: bool          # whether fc has one
    settings: dict      # from its quantize.json
    spec: Eagle3Spec | None = None      # of an EAGLE-3 head, which every rank holds whole


class Machine(NamedTuple):
    bandwidth: float    # bytes a second that a GPU reads
    link: float         # bytes a second between two GPUs
    latency: float      # seconds that the smallest collective takes


@command()
def main(args: argparse.Namespace) -> None:
    config, settings = describe(args.checkpoint)
    if args.mode is not None:
        settings = {} if args.mode == "bf16" else {"mode": args.mode}
    if settings.get("mode") == "int4":
        settings.setdefault("group_size", args.group_size)
    tree = load_tree(args.tree)
    head = None if args.head is None else describe_head(args.head, config, args.checkpoint)
    if args.context > config.block_size:
        raise ValueError(f"--context {args.context} is beyond the model's context of {config.block_size} tokens")
    machine = Machine(args.bandwidth * 1e9, args.link * 1e9, args.latency * 1e-6)
    plan = make_plan(config, args.world_size, head=head, settings=settings, tree=tree, context=args.context,
                     batch=args.batch, machine=machine, accept_length=args.accept_length)
    mode = settings.get("mode", "bf16")
    if settings.get("group_size"):
        mode += f" in groups of {settings['group_size']}"
    print(f"{args.checkpoint}: {args.world_size} ranks, {mode}, context {args.context}, batch {args.batch}")
    is_whole = head is not None and not divides(head.config, args.world_size)
    for name in ("weights", "head", "caches", "workspace"):
        print(f"  {name:10}{getattr(plan, name) / 1e9:8.2f} GB a rank"
              + (", whole: it does not divide" if name == "head" and is_whole else ""))
    print(f"  {'reserve':10}{args.reserve:8.2f} GB a rank")
    total, verdict = plan.total / 1e9 + args.reserve, ""
    if args.gpu_memory is not None:
        verdict = f", of {args.gpu_memory:.0f}: " + ("fits" if total <= args.gpu_memory else "does not fit")
    print(f"  {'total':10}{total:8.2f} GB a rank{verdict}")
    eagle = ""
    if plan.eagle is not None:
        eagle = f", {plan.eagle:.0f} with EAGLE ({args.tree} tree, {args.accept_length} tokens a pass)"
    print(f"at most {plan.plain:.0f} tokens/s{eagle}, if a GPU reads {args.bandwidth:.0f} GB/s, "
          f"sends {args.link:.0f} GB/s, and a collective takes {args.latency:.0f} us")


def describe(name: str) -> tuple[ModelArgs, dict]:
    """Config and quantize.json of a shape, a folder or a hub id."""
    if name in SHAPES:
        return SHAPES[name], {}
    try:
        folder = resolve_checkpoint(name, weights=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; shapes are {', '.join(SHAPES)}") from None
    settings = quantize_settings(folder)
    return ModelArgs.from_config(read_json(folder / "config.json")), settings if "mode" in settings else {}


def describe_head(name: str, target: ModelArgs, target_name: str) -> Head:
    """The head of a folder or hub id. Without a name, the head published for a shape, or a dense layer. "eagle3" is the
    EAGLE-3 head of a shape. An EAGLE-3 head's weights are fetched: their shapes say what it is."""
    if name == "":
        return Head(*head_shape(target, target_name), {})
    if name == "eagle3":
        spec = eagle3_shape(target, target_name)
        return Head(spec.args, False, {}, spec)
    folder = resolve_checkpoint(name, weights=False)
    config = read_json(folder / "config.json")
    if head_kind(config) == "eagle3":
        folder = resolve_checkpoint(name)
        spec = eagle3_spec(config, stored_shapes(folder), target)
        return Head(spec.args, False, quantize_settings(folder), spec)
    return Head(head_args(config, target), config.get("bias", True), quantize_settings(folder))


def make_plan(config: ModelArgs, world_size: int, *, head: Head | None = None, settings: dict | None = None,
              tree: Tree | None = None, context: int = 4096, batch: int = 1,
              machine: Machine = Machine(1.3e12, 1e11, 2e-5), accept_length: float = 3.5) -> Plan:
    """The plan of rank 0, which holds most: the last rank may have fewer vocabulary rows.

    Raises ValueError for a model that cannot be split over world_size ranks, naming the sizes that work.
    """
    tree = tree or load_tree("static")
    shard = Shard(0, world_size)
    with torch.device("meta"):
        target = shard.build_target(config).bfloat16()
        draft = None
        if head is not None:
            draft = Eagle3Head(head.spec, target) if head.spec else shard.build_head(head.config, target, head.bias)
        for module, how in ((target, settings), (draft, head and head.settings)):
            if module is not None and how:
                install(module, how)
            if module is not None:
                module.bfloat16()   # the scales too
    n_node = 1 if head is None else tree.n_node
    weights, head_weights = weight_bytes(target), 0 if draft is None else weight_bytes(draft)
    parts = [module.config for module in (target, draft) if module is not None]
    caches = [cache_bytes(part, context, batch) for part in parts]

    tied = isinstance(target.output, nn.Linear) and target.output.weight is target.tok_embeddings.weight
    embedding, experts = 0 if tied else target.tok_embeddings.weight.nbytes, expert_bytes(target)

    def read(n_row: int) -> int:
        """Bytes that a pass over [B, n_row] reads: all but the embedding table and the experts that no token needs."""
        routed = min(config.n_expert, batch * n_row * config.n_expert_active)
        return weights - embedding - int(experts * (1 - routed / max(config.n_expert, 1))) + caches[0]

    def exchange(n_row: int, n: int) -> float:
        """Seconds that n all-reduces of [B, n_row, dim] take."""
        sent = 2 * (world_size - 1) / world_size * batch * n_row * config.dim * ITEM
        return 0.0 if world_size == 1 else n * (machine.latency + sent / machine.link)

    def pass_seconds(n_row: int, decisions: int) -> float:
        return read(n_row) / machine.bandwidth + exchange(n_row, 2 * config.n_layer + 1) + exchange(0, decisions)

    eagle, states = None, 0     # tokens a second, and bytes of the captured hidden states of a prefill chunk
    if head is not None:
        sums = 4 if head.spec is None and divides(head.config, world_size) else 1   # 1: the embeddings of a whole head
        once, each, tops = 0, head_weights + weight_bytes(target.output), 2
        if isinstance(draft, Eagle3Head):   # fc is read once a step, and the LM head is the head's own, on every rank
            once = weight_bytes(draft.fc)
            each, tops = head_weights - once - (0 if draft.embedding is None else weight_bytes(draft.embedding)), 0
            states = batch * min(PREFILL_CHUNK, context) * len(draft.capture) * config.dim * ITEM
        level = (each + caches[1]) / machine.bandwidth + exchange(tree.n_child, sums) + exchange(0, tops)
        step = pass_seconds(tree.n_node, tree.depth + 1) + once / machine.bandwidth + tree.depth * level
        eagle = batch * accept_length / step
    workspace = states + max(workspace_bytes(part, shard, context, batch, n_node) for part in parts)
    return Plan(weights, head_weights, sum(caches), workspace, batch / pass_seconds(1, 1), eagle)


def expert_bytes(module: nn.Module) -> int:
    return sum(weight_bytes(part) - weight_bytes(part.gate) for part in module.modules()
               if isinstance(part, MoEFeedForward))


def cache_bytes(local: ModelArgs, context: int, batch: int) -> int:
    return local.n_layer * 2 * batch * local.n_kv_head * context * local.head_dim * ITEM


def workspace_bytes(local: ModelArgs, shard: Shard, context: int, batch: int, n_node: int) -> int:
    """Bytes of the largest pass beside weights and caches: a prefill chunk's activations, or a tree's logits."""
    rows = batch * min(PREFILL_CHUNK, context)
    qkv = (local.n_head + 2 * local.n_kv_head) * local.head_dim
    activations = rows * (4 * local.dim + 2 * qkv + 3 * local.intermediate_size) * ITEM
    mask = rows * context * (1 + ITEM + local.n_head // local.n_kv_head * ITEM)
    part = -(-local.vocab_size // shard.size)
    logits = batch * n_node * part * (ITEM + 4) + 4 * batch * local.vocab_size * 4
    return max(activations + mask, logits)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Whether a model fits on so many GPUs, and a bound on its speed.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT|SHAPE", help="folder, hub id (only its JSON files "
                        "are fetched) or a shape of benchmarks/shapes.py")
    parser.add_argument("--world-size", type=number(int, 1), required=True, metavar="N")
    parser.add_argument("--mode", choices=("bf16", "int8", "int4"), help="default: as the checkpoint is")
    parser.add_argument("--group-size", type=number(int, 1), default=32, metavar="N", help="of int4 (default 32)")
    parser.add_argument("--head", nargs="?", const="", metavar="HEAD", help="with this head (no value: the one "
                        "published for a shape, else a layer of the target's shape; eagle3: its EAGLE-3 head)")
    parser.add_argument("--tree", default="static", help="as in generate.py")
    parser.add_argument("--context", type=number(int, 1), default=4096, metavar="N")
    parser.add_argument("--batch", type=number(int, 1), default=1, metavar="N")
    parser.add_argument("--gpu-memory", type=number(float, 0, open_low=True), metavar="GB")
    parser.add_argument("--reserve", type=number(float, 0), default=2.0, metavar="GB",
                        help="allowed for the CUDA context, NCCL's buffers and fragmentation (default 2)")
    parser.add_argument("--bandwidth", type=number(float, 0, open_low=True), default=1300.0, metavar="GB/s",
                        help="of a GPU's memory (default 1300)")
    parser.add_argument("--link", type=number(float, 0, open_low=True), default=100.0, metavar="GB/s",
                        help="between two GPUs (default 100)")
    parser.add_argument("--latency", type=number(float, 0), default=20.0, metavar="US",
                        help="microseconds of a collective (default 20)")
    parser.add_argument("--accept-length", type=number(float, 1), default=3.5, metavar="X",
                        help="tokens a target pass (default 3.5)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
