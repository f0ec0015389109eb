"""Do the exact kernels give a token the same bits in any block on this GPU, and what do they cost? It decides whether
exact decoding can be offered there.

    python benchmarks/exact_kernels.py --shape llama-2-7b --json exact.json
    python benchmarks/exact_kernels.py --shape tiny --device cpu        # a dry run, in Triton's interpreter

On random weights. Products of all formats, attention and RMS norm are compared bit for bit, alone and in blocks. Passes
of the exact products and attention are timed beside the ordinary ones: cuBLAS, the fastest quantised kernel, SDPA.

Shapes: B batch, T tokens, N tree nodes including the root, S cache slots read, K key/value heads, G query heads each,
D head dim.
"""
import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import root  # noqa: F401
from attention import path_slots
from benchmarks.shapes import SHAPES, TINY, random_model
from benchmarks.timing import environment, interleave, print_table
from console import Parser, check_writable, command, number, pick_device, say, write_atomically
from draft_tree import lineage
from grid import Format
from linears import QuantLinear, quantize_in_place
from model import Transformer, attention_bias, causal_mask
from runtime import capture, tune

BLOCKS = (1, 5, 26, 60)     # rows of activations, tokens
FORMATS = {"16 bits": None, "int8": Format("int8"), "int4 of 128": Format("int4", 128),
           "int4 of 32": Format("int4", 32)}
# Of trees: each sequence's first position, nodes, and how far before a node its parent may be. 1 makes a chain.
TREES = ((70,), 60, 1), ((70,), 5, 3), ((70, 3), 26, 5)
LONG_TREES = ((700,), 60, 1), ((1500, 700, 0), 60, 5)
LIMIT = 1.5     # times that an exact pass may take of an ordinary one: EAGLE gains about 2.5 by all that it does


@command()
@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    check(args)
    config, is_cuda = SHAPES.get(args.shape, TINY), args.device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16)[:2 if is_cuda else 1]
    heads = config.n_kv_head if is_cuda else 1
    group, head_dim = config.n_head // config.n_kv_head, max(16, config.head_dim)
    apart, times = {}, []
    for dtype in dtypes:
        of = str(dtype).removeprefix("torch.")
        for name, format in FORMATS.items():
            if format and config.dim % (format.group_size or 1):
                continue
            model = random_model(replace(config, n_layer=2), args.device, dtype)
            for linear in layer_products(model):
                linear.weight.copy_(mirrored(linear.weight, 1))
            if format:
                quantize_in_place(model, format)
            for linear in (*layer_products(model)[:4], *(() if format else (model.output,))):
                x = torch.randn(192 if is_cuda else 61, linear.in_features, dtype=dtype, device=args.device)
                x = x if linear is model.output else mirrored(x, -1)
                apart[f"{name}, {of}: {linear.in_features} to {linear.out_features}"] = rows_apart(
                    exact_product(linear), x, 1 if is_cuda else 60)
            if dtype == dtypes[0]:
                times += time_products(model, name, args)
        apart[f"RMS norm, {of}"] = rows_apart(model.norm, torch.randn(192, config.dim, dtype=dtype, device=args.device))
        apart[f"attention, {of}"] = attention_apart(heads, group, head_dim, dtype, args.device, args.trees)
    times += time_attention(heads, group, head_dim, dtypes[0], args)
    differing = sorted(what for what, sizes in apart.items() if sizes)
    passes = relative_passes(times, config.n_layer)
    report = environment(args.device, args.command) | {
        "model": args.shape, "random_weights": True, "apart": apart, "times": times, "passes": passes, "limit": LIMIT,
        "offer": not differing and all(row["relative"] <= LIMIT for row in passes)}
    show(report, differing)
    if args.json:
        write_atomically(args.json, json.dumps(report, indent=1) + "\n")


def check(args: argparse.Namespace) -> None:
    args.device = pick_device(args.device)
    is_cuda = args.device.type == "cuda"
    if args.json:
        check_writable("--json", args.json)
    if not is_cuda:
        if args.shape != "tiny":
            raise ValueError("on a CPU there is only the dry run: --shape tiny")
        os.environ["TRITON_INTERPRET"] = "1"    # read when Triton is imported
        add_products_in_order()
    args.rows, args.slots, args.trees = (1, 26, 60), (256, 2048), TREES + LONG_TREES
    if not is_cuda:     # the interpreter is slow
        args.rows, args.slots, args.trees = (1,), (256,), TREES[1:2]


def add_products_in_order() -> None:
    """Triton's interpreter multiplies by a library that has other bits for other rows of a tile, and takes bfloat16 for
    whole numbers (triton issue 11584). Whether a tensor core has other bits for other rows, a GPU shows."""
    import numpy as np
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, total: Any, *_: object) -> TensorHandle:
        a, b = (self.cast_impl(t, language.float32).data for t in (a, b))
        return TensorHandle(np.einsum("mk,kn->mn", a, b) + total.data, total.dtype.scalar)
    InterpreterBuilder.create_dot = create_dot      # pyright: ignore[reportAttributeAccessIssue]


# Bits


def mirrored(x: Tensor, sign: int) -> Tensor:
    """x [..., K] whose second half of columns is the first one times `sign`.

    A product of rows mirrored by -1 and weights by 1 is 0 but for the rounding of its sums. All of that is in the 16
    bits that come out; of other rows, they would be the same for most other orders of the sum.
    """
    half = x.shape[-1] // 2
    return torch.cat((x[..., :half], sign * x[..., :half], x[..., 2 * half:] * 0), -1)


def rows_apart(product: Callable[[Tensor], Tensor], x: Tensor, step: int = 1) -> list[int]:
    """The numbers of rows for which this product's bits are not those of all rows x [M, K] at once.

    step: compare only blocks that begin so many rows apart, or more.
    """
    whole = product(x)
    return [n for n in BLOCKS if any(not torch.equal(product(x[i:i + n]), whole[i:i + n])
                                     for i in range(0, len(x) - n + 1, max(n, step)))]


def attention_apart(K: int, G: int, D: int, dtype: torch.dtype, device: torch.device,
                    trees: Iterable[tuple[tuple[int, ...], int, int]] = TREES) -> list[str]:
    """What gives other bits: tokens of a path in blocks, against the path as a branch of a tree, at other slots.

    Of one sequence, then of a ragged batch. What no token sees is NaN.
    """
    from exact_triton import exact_attention
    generator = torch.Generator().manual_seed(0)
    found = set()

    def compare(what: str, ours: Tensor, theirs: Tensor) -> None:
        if not torch.equal(ours, theirs) or ours.isnan().any():
            found.add(what)

    for begin, N, reach in trees:
        pos, B, n_slot = torch.tensor(begin)[:, None], len(begin), max(begin) + N
        parents, depths = torch.zeros(2, B, N, dtype=torch.long)
        for n in range(1, N):
            parents[:, n] = n - 1 - torch.randint(min(n, reach), (B,), generator=generator)
            depths[:, n] = depths.gather(1, parents[:, n:n + 1])[:, 0] + 1
        above = lineage(parents, int(depths.max()), torch.arange(N)[None])
        cache = torch.randn(2, B, K, n_slot + 40, D, generator=generator).to(device, dtype)
        for row, first in enumerate(begin):
            cache[:, row, :, first + N:] = torch.nan
        q = torch.randn(B, N, K * G, D, generator=generator).to(device, dtype)

        def of_tree(n_slot: int) -> Tensor:
            width = N + 15 if B == 1 else n_slot
            slots, _ = path_slots(depths, above, pos, torch.arange(n_slot)[-width:])
            return exact_attention(q, *cache[:, :, :, :n_slot], (pos + depths).to(device), slots.to(device))
        tree = of_tree(n_slot)
        compare("again", of_tree(n_slot), tree)
        compare("more slots", of_tree(n_slot + (15 if B == 1 else 40)), tree)
        for row, first in enumerate(begin):
            deepest = int(depths[row].argmax())
            path = above[row, deepest, :depths[row, deepest] + 1].flip(0).to(device)
            plain = torch.full_like(cache[:, row:row + 1], torch.nan)
            plain[:, :, :, :first] = cache[:, row:row + 1, :, :first]
            plain[:, 0, :, first:first + len(path)] = cache[:, row][:, :, first + path]
            at = first + torch.arange(len(path), device=device)[None]
            for size in BLOCKS:
                for i in range(0, len(path), max(size, 7)):     # 7: to save time
                    block = path[i:i + size]
                    ours = exact_attention(q[row:row + 1, block], *plain[:, :, :, :n_slot], at[:, i:i + size])
                    compare(f"{size} tokens", ours[0], tree[row, block])
    return sorted(found)


# Time


def layer_products(model: Transformer) -> list[nn.Linear | QuantLinear]:
    """Four of a layer, in the order of its parts."""
    return [part for part in model.layers.modules() if isinstance(part, nn.Linear | QuantLinear)]


def exact_product(linear: nn.Linear | QuantLinear) -> Callable[[Tensor], Tensor]:
    from linears_triton import exact_matmul
    parts = linear.parts() if isinstance(linear, QuantLinear) else (linear.weight,)
    return lambda x: exact_matmul(x, *parts)


def time_products(model: Transformer, name: str, args: argparse.Namespace) -> list[dict]:
    """Of a layer, and in 16 bits of the LM head. Two layers take turns, so that no cache holds the weights."""
    tune(model)
    parts, rows = {f"{name}, a layer": layer_products(model)}, []
    if not any(isinstance(linear, QuantLinear) for linear in layer_products(model)):
        parts["LM head"] = [model.output] * 2
    for part, linears in parts.items():
        for n_row in args.rows:
            xs = [torch.randn(1, n_row, linear.in_features, dtype=model.norm.weight.dtype, device=args.device)
                  for linear in linears]
            exact = [exact_product(linear) for linear in linears]
            rows.append(timed(part, n_row, None, args,
                              lambda: [linear(x) for linear, x in zip(linears, xs)],
                              lambda: [product(x[0]) for product, x in zip(exact, xs)]))
    return rows


def time_attention(K: int, G: int, D: int, dtype: torch.dtype, args: argparse.Namespace) -> list[dict]:
    """Of a layer, the last tokens of all slots. Two layers' caches take turns."""
    from exact_triton import exact_attention
    rows = []
    for n_slot in args.slots:
        cache = torch.randn(2, 2, 1, K, n_slot, D, device=args.device).to(dtype)
        for n_row in args.rows:
            at = torch.arange(n_slot - n_row, n_slot, device=args.device)[None]
            slots = torch.arange(n_slot - n_row, n_slot, device=args.device).expand(1, n_row, -1).contiguous()
            q = torch.randn(1, n_row, K * G, D, device=args.device).to(dtype)
            bias = attention_bias(causal_mask(at, n_slot), G, dtype)
            grouped = q.unflatten(2, (K, G)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            rows.append(timed("attention", n_row, n_slot, args,
                              lambda: [nn.functional.scaled_dot_product_attention(grouped, *kv, attn_mask=bias)
                                       for kv in cache],
                              lambda: [exact_attention(q, *kv, at, slots) for kv in cache]))
    return rows


def timed(part: str, n_row: int, n_slot: int | None, args: argparse.Namespace, ordinary: Callable[[], object],
          exact: Callable[[], object]) -> dict:
    """Both run the part twice."""
    runs = {"ordinary": ordinary, "exact": exact}
    if args.device.type == "cuda":      # device time alone, without launches
        runs = {name: capture(run).replay for name, run in runs.items()}
    ms = {name: 500 * statistics.median(seconds)
          for name, seconds in interleave(runs, args.repeats, args.device).items()}
    return {"part": part, "rows": n_row, "used_slots": n_slot, "ms_ordinary": ms["ordinary"], "ms_exact": ms["exact"],
            "relative": ms["exact"] / ms["ordinary"]}


def relative_passes(times: list[dict], n_layer: int) -> list[dict]:
    """What a pass takes in products and attention, exact and ordinary, for each format, number of rows and slots."""
    of = {(row["part"], row["rows"], row["used_slots"]): row for row in times}
    rows = []
    for name in dict.fromkeys(part.removesuffix(", a layer") for part, *_ in of if part.endswith(", a layer")):
        for n_row, n_slot in (key[1:] for key in of if key[0] == "attention"):
            layer, head = of[f"{name}, a layer", n_row, None], of["LM head", n_row, None]
            ordinary, exact = (n_layer * (layer[key] + of["attention", n_row, n_slot][key]) + head[key]
                               for key in ("ms_ordinary", "ms_exact"))
            rows.append({"format": name, "rows": n_row, "used_slots": n_slot, "ms_ordinary": ordinary,
                         "ms_exact": exact, "relative": exact / ordinary})
    return rows


def show(report: dict, differing: list[str]) -> None:
    print_table([report["model"], "rows", "slots", "ordinary ms", "exact ms", "exact / ordinary"],
                [[row.get("part") or f"{row['format']}, a pass", row["rows"], row["used_slots"], row["ms_ordinary"],
                  row["ms_exact"], row["relative"]] for row in [*report["times"], *report["passes"]]])
    for what in differing:
        say(f"other bits: {what}: {', '.join(map(str, report['apart'][what]))}")
    slowest = max(row["relative"] for row in report["passes"])
    print(f"exact decoding can{'' if report['offer'] else 'not'} be offered here: bits differ in {len(differing)} of "
          f"{len(report['apart'])} parts, and a pass takes up to {slowest:.2f} times as long (limit: {LIMIT})")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description="The bits and the cost of the exact kernels.")
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], required=True, help="random weights of a published shape")
    parser.add_argument("--repeats", type=number(int, 1), default=20, metavar="N", help="timed runs")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured as one JSON object")
    parser.set_defaults(command=shlex.join(["python", "benchmarks/exact_kernels.py", *argv]))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
