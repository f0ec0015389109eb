"""What the measuring scripts share: the clock, runs in turn, the memory's speed, the environment, a table.

    times = interleave({"a": run_a, "b": run_b}, repeats=20, device=torch.device("cpu"))
    print_table(["", "ms"], [[name, 1e3 * statistics.median(seconds)] for name, seconds in times.items()])

Runs take turns, so that a drifting clock or a busy neighbour hits all alike.
"""
import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from console import check_writable, device_name, pick_device
from eagle_step import EagleStep
from runtime import trace

REPO = Path(__file__).resolve().parent.parent
BUFFER = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes copied and summed to measure bandwidth: far beyond any cache


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(runs: dict, repeats: int, device: torch.device) -> dict:
    """Seconds of each run, `repeats` of them, taking turns; a first round warms up and is not kept."""
    times = {name: [] for name in runs}
    for _ in tqdm(range(repeats + 1), "measure", leave=False, disable=None):
        for name, run in runs.items():
            times[name].append(elapsed(run, device))
    return {name: values[1:] for name, values in times.items()}


def traced(job: Callable[[], object], modules: list[torch.nn.Module]) -> Callable[[], None]:
    """The trace of a job on a CPU, ready to run. What the job does not return, a trace leaves out."""
    replay = trace(lambda _: job(), modules)
    replay(0)
    return lambda: replay(0)


def restoring(step: EagleStep, run: Callable[[], object]) -> Callable[[], list]:
    """`run`, after which the step's state is as before. Returns what was written, for a trace to keep it."""
    state = [tensor.clone() for tensor in step.state]
    return lambda: [run(), step.report.clone(), *(tensor.copy_(value) for tensor, value in zip(step.state, state))]


def elapsed(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()  # keeps the device busy while the host launches the timed run: device time without launch gaps
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def spread(values: list[float], name: str) -> dict:
    """Median, minimum and maximum, under keys that begin with `name`."""
    return {f"{name}_median": statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def milliseconds(times: list[float]) -> dict:
    return spread([1e3 * seconds for seconds in times], "ms")


def measure_bandwidth(device: torch.device) -> dict:
    """Bytes a second of a large copy (read and written) and of a large sum (read only).

    A step mostly reads. The yardstick is the copy on a GPU, as is customary, and the sum on a CPU, where the traffic
    behind a written byte differs from processor to processor.
    """
    n = BUFFER[device.type] // 4
    source = torch.rand(n, device=device)  # written: memory that is only reserved reads as one shared page
    target = source.clone()
    runs = {"copy": lambda: target.copy_(source), "read": lambda: source.sum()}
    seconds = {name: statistics.median(times) for name, times in interleave(runs, 10, device).items()}
    copied, read = 8 * n / seconds["copy"], 4 * n / seconds["read"]
    yardstick = "copy" if device.type == "cuda" else "read"
    return {"copy_bytes_per_second": copied, "read_bytes_per_second": read, "yardstick": yardstick,
            "bytes_per_second": copied if yardstick == "copy" else read}


def environment(device: torch.device, command: str) -> dict:
    """The facts that belong to every figure."""
    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", REPO, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")  # other measurements' results do not count
        commit = git("rev-parse", "--short", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a clone, or no git
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "commit": commit,
        "device": str(device), "device_name": device_name(device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(),
    }


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured as one JSON object")


def settle_run_options(args: argparse.Namespace) -> None:
    """Refuse what cannot be used or written; `device` becomes a torch.device, `compile` a bool."""
    if args.json:
        check_writable("--json", args.json)
    args.device = pick_device(args.device)
    args.compile = args.device.type == "cuda" if args.compile is None else args.compile


def print_table(header: list[str], rows: list[list]) -> None:
    """Text to the left, numbers to the right, three decimals below ten."""
    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
        return "-" if value is None else str(value)

    cells = [header, *([text(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    adjust = [str.ljust if isinstance(value, str) else str.rjust for value in rows[0]]
    for row in cells:
        print("  ".join(to_width(cell, width) for to_width, cell, width in zip(adjust, row, widths)).rstrip())
