"""How long a fresh process takes to its first token: python benchmarks/cold_start.py --shape llama-2-7b

    TORCHINDUCTOR_CACHE_DIR=/tmp/new python benchmarks/cold_start.py --shape llama-2-7b --tree static   # compiles anew

The weights are random and made on the device: reading a checkpoint would come on top. All else is included: Python and
torch, prefill, compilation and graph capture for the whole answer, as generate.py does them.
"""
# ruff: noqa: E402
import time

BEGIN = time.perf_counter()     # before torch is imported, which takes seconds

import argparse
import contextlib
import json
import shlex
import sys

import torch

import root  # noqa: F401
from benchmarks.shapes import SHAPES, TINY, random_head, random_model
from benchmarks.timing import add_run_options, clock, environment, print_table, settle_run_options
from console import Parser, command, number, write_atomically
from decoder import Decoder, setup_caches, slots_for
from draft_tree import load_tree
from exact import make_exact
from runtime import pack_for_cpu
from sampling import Sampling


@command()
def main(args: argparse.Namespace) -> None:
    imported = time.perf_counter()
    settle_run_options(args)
    report = measure(args, imported)
    shown = [[name, value] for name, value in report.items() if name.endswith(("seconds", "graphs", "per_step"))]
    print_table([args.shape, ""], shown)
    if args.json:
        write_atomically(args.json, json.dumps(report, indent=1) + "\n")


@torch.inference_mode()
def measure(args: argparse.Namespace, imported: float) -> dict:
    """Seconds since the process began at each stage; those of a stage are differences."""
    tree = load_tree(args.tree) if args.tree else None
    model = random_model(SHAPES.get(args.shape, TINY), args.device, torch.bfloat16)
    head = random_head(model, args.shape) if tree else None
    if not args.compile:
        for module in filter(None, (model, head)):
            pack_for_cpu(module)
        with contextlib.suppress(ValueError):   # as generate.py does by default
            make_exact(model)
    setup_caches(model, head, 1, slots_for(args.prompt_tokens + args.new_tokens + (tree.n_room if tree else 0), model))
    decoder = Decoder(model, 1, Sampling(args.temperature), compile=args.compile, head=head, tree=tree)
    made, came = clock(args.device), []
    result = decoder.generate([[1] * args.prompt_tokens], args.new_tokens, seed=0,
                              on_tokens=lambda *_: came.append(time.perf_counter()))
    return environment(args.device, args.command) | {
        "model": args.shape, "tree": args.tree, "dtype": "bfloat16", "compiled": args.compile,
        "temperature": args.temperature, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens,
        "import_seconds": imported - BEGIN, "model_seconds": made - imported,
        "prefill_seconds": result.timings["prefill_seconds"], "compile_seconds": result.timings["compile_seconds"],
        "first_token_seconds": came[0] - BEGIN, "whole_answer_seconds": came[-1] - BEGIN,
        "ms_per_step": 1e3 * (came[-1] - came[0]) / max(len(came) - 1, 1),
        "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] if args.compile else 0,
        "captured_graphs": sum(graph is not None for graph in decoder.graphs.values()),
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description="How long a fresh process takes to its first token.")
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], required=True, help="random weights of a published shape")
    parser.add_argument("--tree", help="decode by EAGLE with this tree: static, chain:4, dynamic, ... (default: plain)")
    parser.add_argument("--prompt-tokens", type=number(int, 1), default=128, metavar="N")
    parser.add_argument("--new-tokens", type=number(int, 1), default=256, metavar="N")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, metavar="X")
    add_run_options(parser)
    parser.set_defaults(command=shlex.join(["python", "benchmarks/cold_start.py", *argv]))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
