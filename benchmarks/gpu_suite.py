"""Everything that needs a GPU, one part after another: bash benchmarks/gpu_suite.sh

    bash benchmarks/gpu_suite.sh --json gpu-suite.json               # tests, speeds, cold starts on random weights
    bash benchmarks/gpu_suite.sh --checkpoint checkpoints/SmolLM2-135M-Instruct     # the demo model end to end too
    bash benchmarks/gpu_suite.sh --parts tests cold --budget 120
    bash benchmarks/gpu_suite.sh --device cpu --shapes tiny --repeats 1             # a dry run without a GPU

A part that fails does not keep the others from running; what does not fit in the budget is stopped or skipped. At the
end come a table of the main figures beside their goals, and one JSON object with the reports of all parts.
Exit status: 0; 1 when a part failed; 2 with one line for what the user can mend; 130 on Ctrl-C.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import root  # noqa: F401
from benchmarks.shapes import SHAPES
from benchmarks.timing import REPO, environment, print_table
from checkpoint import read_json
from console import Parser, check_writable, command, number, pick_device, say, write_atomically

ACCEPT_LENGTHS = {"llama-2-7b": ("3.62", "4.70")}   # MT-bench at temperature 0, static tree [EAGLE], dynamic [EAGLE-2]
LAYER_GRAPHS = 4    # compiled graphs: one row and a block of rows, of the target and of the head
SHORTEST = 20       # seconds: no part begins with less left
BENCH = 240         # seconds for a run of bench.py, which leaves no report when it is stopped


class Part(NamedTuple):
    name: str
    kind: str               # what --parts chooses by
    argv: list[str]         # arguments of python
    limit: int              # seconds
    cache: bool = False     # keep compiled code in a folder that was empty when the suite began
    makes_folder: bool = False      # its report is in a folder, --out, not in one file, --json


def all_parts(args: argparse.Namespace) -> Iterator[Part]:
    """The most telling first: the budget cuts from the end."""
    device, (shape, *shapes) = ["--device", args.device], args.shapes
    tests = ["tests/test_gpu.py", "tests/test_quantize.py", "tests/test_exact_triton.py", "-k",
             "test_gpu or (triton and cuda)"]
    # -v shows what has passed, should the part be stopped.
    yield Part("tests", "tests", ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *tests], 240)
    yield bench_part(shape, args)
    # The first finds nothing compiled, the second what the first left behind.
    cold = ["benchmarks/cold_start.py", "--shape", shape, "--tree", "static", *device]
    for start in "cold start", "second start":
        yield Part(f"{shape}, {start}", "cold", cold, 90, cache=True)
    # Acceptance takes many more operators at a temperature: the second start's steps tell what they cost.
    yield Part(f"{shape}, at temperature 1", "sampled", [*cold, "--temperature", "1"], 90, cache=True)
    if args.checkpoint:
        generate = ["generate.py", "--checkpoint", args.checkpoint, "--max-new-tokens", "256", *device]
        yield Part("demo, plain", "demo", generate, 60)
        yield Part("demo, EAGLE", "demo", [*generate, "--eagle", *([args.eagle] if args.eagle else [])], 60)
        # Questions that ask for copying: with a copied branch beside the tree, without one, and with the branch alone.
        yield Part("demo, copying", "copying", [
            "scripts/evaluate.py", "--checkpoint", args.checkpoint, *(["--eagle", args.eagle] if args.eagle else []),
            "--questions", "benchmarks/copying.jsonl", "--limit", str(min(8, 2 * args.repeats)),
            "--max-new-tokens", "256", "--tree", "tuned+8", "tuned+off", "none+8", *device], 120, makes_folder=True)
    for mode, group_size in (("int4", 128), ("int8", None), ("int4", 32)):  # 128: as others measure; 32: our default
        yield bench_part(shape, args, mode, group_size)
    # What decides whether exact decoding is offered here. After the parts that choose the ordinary kernels.
    yield Part(f"{shape}, exact", "exact", ["benchmarks/exact_kernels.py", "--shape", shape, "--repeats",
                                            str(args.repeats), *device], BENCH)
    for other in shapes:
        yield bench_part(other, args)
    yield Part(f"{shape}, eager", "eager", ["benchmarks/bench.py", "--shape", shape, "--rows", "1", "--slots", "256",
                                            "--repeats", str(args.repeats), "--no-compile", *device], 60)


def bench_part(shape: str, args: argparse.Namespace, mode: str | None = None, group_size: int | None = None) -> Part:
    accept = ACCEPT_LENGTHS.get(shape)
    command = ["benchmarks/bench.py", "--shape", shape, "--rows", "1", "10", "26", "60", "--slots", "256", "2048",
               "--trees", "static", "dynamic", "--copy", "8", *(["--simulate-accept", *accept] if accept else []),
               "--repeats", str(args.repeats), "--device", args.device]
    if mode is None:
        return Part(shape, "bench", command, BENCH)
    command += ["--mode", mode]
    if group_size is None:
        return Part(f"{shape}, {mode}", "quantised", command, BENCH)
    return Part(f"{shape}, {mode} of {group_size}", "quantised", [*command, "--group-size", str(group_size)], BENCH)


@command()
def main(args: argparse.Namespace) -> int:
    check(args)
    report = environment(torch.device(args.device), args.command) | {"budget_seconds": args.budget}
    report["parts"] = run_parts([part for part in all_parts(args) if part.kind in args.parts], args, report)
    print_summary(report["parts"])
    say(f"wrote {args.json}")
    return int(any(part["status"] in ("failed", "stopped") for part in report["parts"]))


def check(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here (--device cpu --shapes tiny is a dry run)")
    pick_device(args.device)
    if args.eagle and not args.checkpoint:
        raise ValueError("--eagle needs --checkpoint")
    for option in "checkpoint", "eagle":
        if getattr(args, option) and not (REPO / getattr(args, option)).is_dir():
            raise ValueError(f"--{option} {getattr(args, option)}: no such folder, seen from {REPO}")
    if args.json is None:
        args.json = REPO / "build/gpu-suite.json"
        args.json.parent.mkdir(exist_ok=True)
    check_writable("--json", args.json)


def run_parts(parts: list[Part], args: argparse.Namespace, report: dict) -> list[dict]:
    """A row of the report for each part. The report is written after every part."""
    end, rows = time.monotonic() + args.budget, []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for n, part in enumerate(parts):
            left = end - time.monotonic()
            row = {"part": part.name, "kind": part.kind, "seconds": 0.0, "status": "skipped"}
            if left < SHORTEST:
                say(f"[{n + 1}/{len(parts)}] {part.name}: skipped, the {args.budget:.0f} seconds are used up")
            else:
                row |= run_part(part, min(part.limit, left), Path(folder), f"[{n + 1}/{len(parts)}] {part.name}")
            rows.append(row)
            write_atomically(args.json, json.dumps(report | {"parts": rows}, indent=1) + "\n")
    return rows


def run_part(part: Part, limit: float, folder: Path, title: str) -> dict:
    """Run a part in a process group of its own: a part that is stopped takes the compiler's workers with it."""
    out = folder / part.name if part.makes_folder else folder
    file = out / "report.json"
    file.unlink(missing_ok=True)
    to = ["--out", str(out)] if part.makes_folder else ["--json", str(file)]
    argv = part.argv if part.kind == "tests" else [*part.argv, *to]
    say(f"{title}: python {shlex.join(part.argv)}")
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TRITON_CACHE_DIR": str(folder / "cache/triton")}
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, *argv], cwd=REPO, env=os.environ | (cache if part.cache else {}),
                               start_new_session=True, stdin=subprocess.DEVNULL)
    try:
        status = "passed" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "stopped"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - begin
    if status != "passed":
        say(f"{title}: {status} after {seconds:.0f} s" + (f", exit status {process.returncode}" * (status == "failed")))
    return {"command": shlex.join(["python", *part.argv]), "status": status, "exit_status": process.returncode,
            "seconds": seconds, "report": read_json(file) if file.exists() else None}


# The table at the end


def print_summary(rows: list[dict]) -> None:
    print()
    print_table(["part", "status", "seconds"], [[row["part"], row["status"], row["seconds"]] for row in rows])
    found = [[row["part"], *figure] for row in rows if row.get("report")
             for figure in figures(row["kind"], row["report"])]
    if found:
        print()
        print_table(["part", "figure", "value", "unit", "goal", ""], found)


def figures(kind: str, report: dict) -> Iterator[tuple[str, float, str, str, str]]:
    """(figure, value, unit, goal, whether it is met) of a part; bench.py has the rest."""
    def at_most(name: str, value: float, limit: float, unit: str = "x") -> tuple[str, float, str, str, str]:
        return name, value, unit, f"<= {limit:.3g}", "met" if value <= limit else "MISSED"

    if kind in ("cold", "sampled"):
        yield f"a step at temperature {report['temperature']:g}", report["ms_per_step"], "ms", "", ""
    if kind == "cold":
        yield at_most("first token", report["first_token_seconds"], 60, "s")
        yield "of it, compilation and capture", report["compile_seconds"], "s", "", ""
        yield at_most("compiled graphs, of target and head", report["compiled_graphs"], LAYER_GRAPHS, "")
    elif kind == "demo":
        yield "decoding", report["tokens_per_second"], "tokens/s", "", ""
        yield "accepted length", report["mean_accept_length"], "tokens/pass", "", ""
    elif kind == "copying":
        for arm, figure in report["overall"].items():
            yield arm, figure["tokens_per_second"], "tokens/s", "", ""
            if arm != "plain":
                yield f"{arm}, speedup", figure["speedup"], "x", "", ""
                yield f"{arm}, accepted length", figure["mean_accept_length"], "tokens/pass", "", ""
    elif kind == "exact":
        yield at_most("parts whose bits differ", sum(map(bool, report["apart"].values())), 0, "")
        for row in report["passes"]:
            yield at_most(f"{row['format']}, {row['rows']} rows, {row['used_slots']} slots: exact pass / ordinary",
                          row["relative"], report["limit"])
    elif kind in ("bench", "quantised", "eager"):
        yield "plain decoding", report["decode"]["tokens_per_second_median"], "tokens/s", "", ""
    if kind in ("bench", "quantised"):
        n_used = report["plain"]["used_slots"]
        steps = {(row["part"], row["rows"]): row for row in report["steps"] if row["used_slots"] == n_used}
        one = steps["target pass", 1]
        share = one["bandwidth_share"]
        yield "one row, of the copy's speed", 100 * share, "%", ">= 85", "met" if share >= 0.85 else "MISSED"
        for n_row, limit in ((26, 1.15), (60, 1.35)):
            yield at_most(f"{n_row} rows / one", steps["target pass", n_row]["relative_to_one_row"], limit)
        for row in report["eagle"]:
            tree = row["tree"]
            level = next(step for step in report["steps"]
                         if (step["part"], step["used_slots"]) == (f"{tree}: one draft level", n_used))
            yield at_most(f"{tree}: draft level / plain step", level["relative_to_one_row"],
                          1.1 * level["bytes"] / one["bytes"])
            yield at_most(f"{tree}: outside the models", 100 * row["outside_models_share"], 5, "%")
        for row in report["copying"]:
            if row["used_slots"] == max(other["used_slots"] for other in report["copying"]):
                yield at_most(f"{row['tree']}: lookup in {row['used_slots']} tokens / step",
                              100 * row["lookup_share"], 2, "%")
            if row["used_slots"] == n_used:
                yield at_most(f"{row['tree']}: nothing to copy / without a branch",
                              row["ms_no_match"] / row["ms_whole_step"], 1.03)
                copying = row["ms_copying"] / row["ms_whole_step"]
                yield f"{row['tree']}: copying / without a branch", copying, "x", "", ""
        for row in report["simulated"][1:]:
            name = f"{row['arm']}: SIMULATED at {row['mean_accept_length']:.2f} tokens/pass"
            yield name, row["tokens_per_second_median"], "tokens/s", "", ""
            yield f"{name}, speedup", row["speedup_median"], "x", "", ""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    kinds = ("tests", "bench", "cold", "sampled", "quantised", "exact", "demo", "copying", "eager")
    parser = Parser(description="Everything that needs a GPU, one part after another.")
    parser.add_argument("--parts", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "tiny"], default=["llama-2-7b", "llama-3-8b"])
    parser.add_argument("--checkpoint", metavar="FOLDER", help="a model to answer a prompt with, plainly and by EAGLE")
    parser.add_argument("--eagle", metavar="FOLDER", help="its head (default: the one that ships for it)")
    parser.add_argument("--budget", type=number(float, 1), default=480, metavar="SECONDS")
    parser.add_argument("--repeats", type=number(int, 1), default=20, metavar="N", help="timed runs of each step")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a dry run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: build/gpu-suite.json")
    parser.set_defaults(command=shlex.join(["bash", "benchmarks/gpu_suite.sh", *argv]))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
