"""What all commands share: options, one line on stderr for what the user can mend, and the exit status.

    @command(stopped="the same command goes on from here")
    def main(args): ...
"""
import argparse
import contextlib
import functools
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def command(stopped: str = "") -> Callable[[Callable], Callable[[argparse.Namespace], int]]:
    """A decorator of main(args), which may return an exit status: 0 where it returns none; 2 with one line for what the
    user can mend; 130 on Ctrl-C, with the line `stopped`; 141 where the reader of our output has left, as `head` does."""
    from safetensors import SafetensorError

    def decorate(main: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int]:
        @functools.wraps(main)
        def status(args: argparse.Namespace) -> int:
            try:
                return main(args) or 0
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141
            except (ValueError, OSError, torch.OutOfMemoryError, SafetensorError) as error:    # SafetensorError: a full disk
                say(f"error: {' '.join(str(error).split())}")
                return 2
            except RuntimeError as error:
                if "allocate memory" not in str(error):
                    raise
                say("error: out of memory: shorter contexts, smaller batches and narrower dtypes take less")
                return 2
            except KeyboardInterrupt:
                say(stopped)
                return 130
        return status
    return decorate


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        say(f"error: {message}")
        sys.exit(2)


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], float]:
    """An argparse type that names the range it accepts."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if value == float("inf"):
                raise ValueError
            if (low < value if open_low else low <= value) and value <= high:
                return value
        above = f"above {low}" if open_low else f"of {low} or more"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {above}"
                                         + ("" if high == float("inf") else f", up to {high}"))
    return parse


def write_atomically(file: Path, text: str) -> None:
    """Beside it, then renamed: it is there whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def pick_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # streams and graphs belong to the current device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
