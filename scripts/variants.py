"""Which way of running the model is fastest here? A table on stdout, one JSON object in a file.

    python scripts/variants.py --shape smollm2-135m --slots 128 --ways eager packed traced block whole

The ways take turns, in bfloat16 and float32. Compilation starts from an empty cache; with --compile-cache FOLDER, the
second run shows how long it takes from a filled one.
"""
import argparse
import copy
import itertools
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from console import command  # noqa: E402
from runtime import compile_layers  # noqa: E402
from linears import PackedLinear  # noqa: E402
from model import Transformer  # noqa: E402
from runtime import pack_for_cpu  # noqa: E402
from runtime import can_trace  # noqa: E402
from scripts.bench import check_model, load, model_parser, ready, run, setup_caches, target_pass  # noqa: E402
from scripts.timing import clock, interleave, milliseconds, print_table  # noqa: E402


@command()
def main(args: argparse.Namespace) -> None:
    run(args, check_model, compare_variants)


def compare_variants(args: argparse.Namespace) -> dict:
    """The variants of both dtypes take turns at every row count, all over the first of --slots."""
    models = dict(variants(args))
    runs, compiling = {}, {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        cache = str(args.compile_cache or empty)
        with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton"):
            start_seconds = start_compiler(args) if {"block", "whole"} & set(args.ways) else 0
            for key, n_row in tqdm(list(itertools.product(models, args.rows)), "compile", leave=False, disable=None):
                args.compile = key[0] in ("block", "whole")
                begin = clock(args.device)
                step = target_pass(models[key], n_row, args.slots[0])
                if args.compile or key[0] == "traced":
                    step = ready(step, args, [models[key]])
                else:
                    step()
                runs[*key, n_row] = step
                compiling[*key, n_row] = clock(args.device) - begin
            times = interleave(runs, args.repeats, args.device)
    rows = [{"variant": key[0], "dtype": key[1], "rows": key[2], "used_slots": args.slots[0],
             "first_call_seconds": compiling[key], **milliseconds(times[key])} for key in runs]
    print_table(["variant", "dtype", "first calls s", *(f"ms at {n_row}" for n_row in args.rows)],
                [[*key, sum(compiling[*key, n_row] for n_row in args.rows),
                  *(statistics.median(times[*key, n_row]) * 1e3 for n_row in args.rows)] for key in models])
    print(f"\nfirst calls: sum over the row counts, from {args.compile_cache or 'an empty cache'}, after "
          f"{start_seconds:.1f} s to start the compiler; {args.slots[0]} used slots")
    return {"compiled": None, "dtype": None, "compile_cache": args.compile_cache and str(args.compile_cache),
            "compiler_start_seconds": start_seconds, "variants": rows}


def start_compiler(args: argparse.Namespace) -> float:
    """Seconds to load the compiler and start its workers, which the first graph would pay for."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than time eager code without a word
    torch._dynamo.config.recompile_limit = 256  # every row count of every variant compiles the same code
    begin = clock(args.device)
    torch.compile(lambda x: x + 1)(torch.zeros(1, device=args.device))
    return clock(args.device) - begin


def variants(args: argparse.Namespace) -> Iterator[tuple[tuple[str, str], Transformer]]:
    """((variant, dtype), model) pairs; those of a dtype share their weights and cache."""
    for dtype in (torch.bfloat16, torch.float32):
        model = load(args, dtype)
        setup_caches(model, args.slots[0])
        for name in args.ways:
            # A deep copy in which the tensors are the same ones.
            twin = copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})
            if name == "block":
                compile_layers(twin.layers)
            elif name == "whole":
                options = {"coordinate_descent_tuning": True} if twin.inv_freq.is_cuda else None  # as compile_layers
                twin.compile(dynamic=False, options=options)
            elif name in ("packed", "traced"):
                is_packed = any(isinstance(m, PackedLinear) for m in pack_for_cpu(twin).modules())
                if (name == "packed" and not is_packed) or not can_trace(twin):
                    continue  # nothing to pack, or another device
            yield (name, str(dtype).removeprefix("torch.")), twin


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parser = model_parser(__doc__.split("\n")[0], [1, 4, 16])
    parser.add_argument("--ways", nargs="+", choices=("eager", "packed", "traced", "block", "whole"),
                        default=["eager", "packed", "traced", "block"])
    parser.add_argument("--compile-cache", type=Path, metavar="FOLDER", help="where compiled code is kept")
    parser.set_defaults(command=shlex.join(["python", "scripts/variants.py", *argv]), dtype="bfloat16", compile=None,
                        mode=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
