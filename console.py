"""What all commands share: options, one line on stderr for what the user can mend, and the exit status.

    @command(stopped="the same command goes on from here")
    def main(args): ...
"""
import argparse
import contextlib
import functools
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch


def command(stopped: str = "", in_ranks: bool = False) -> Callable[[Callable], Callable[[argparse.Namespace], int]]:
    """A decorator of main(args) that makes it return an exit status: main's own, or 0 if it returns none.

    2 after one line on stderr, for what the user can mend. 130 on Ctrl-C, after the line `stopped`. 141 if the reader
    of our output has left, as `head` does. Under torchrun a main that does not work `in_ranks` is refused: every
    process would do the same work on the same files.
    """
    from safetensors import SafetensorError

    def decorate(main: Callable[[argparse.Namespace], int | None]) -> Callable[[argparse.Namespace], int]:
        @functools.wraps(main)
        def status(args: argparse.Namespace) -> int:
            if launched() and not in_ranks:
                if os.environ.get("RANK", "0") == "0":
                    say(f"error: {Path(sys.argv[0]).name} runs in one process: start it without torchrun")
                return 2
            try:
                replace_unprintable()
                return main(args) or 0
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141
            except (ValueError, OSError, torch.OutOfMemoryError, SafetensorError) as error:     # last: a disk is full
                say(f"error: {' '.join(str(error).split())}")
                return 2
            except (RuntimeError, subprocess.CalledProcessError) as error:
                if (line := remedy(error)) is None:
                    raise
                say(f"error: {line}")
                return 2
            except KeyboardInterrupt:
                say(stopped)
                return 130
        return status
    return decorate


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def replace_unprintable() -> None:
    """From now on write "?" for a character that the output's encoding lacks, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def remedy(error: Exception) -> str | None:
    """What the user can do about an error of Python's or torch's own kinds, in one line. None for all other errors."""
    text = f"{type(error).__name__}: {error}"
    if "allocate memory" in text:
        return "out of memory: shorter contexts, smaller batches and narrower dtypes take less"
    if "home directory" in text:    # where huggingface-hub keeps what it fetches
        return "this user has no home directory: set HF_HOME to a folder for what is fetched, or name a local folder"
    if "C++ compiler" in text or "C compiler" in text:      # inductor's words, and Triton's
        return "there is no working C or C++ compiler to compile with: install gcc and g++, or give --no-compile"
    if "C++ compile error" in text or "CalledProcessError" in text and "cc" in text:
        why = text.partition("Output:")[2].strip().partition("\n")[0]
        return f"the C or C++ compiler fails{why and f' ({why})'}: mend it, or give --no-compile"
    return None


def say(line: str, end: str = "\n") -> None:
    if sys.stderr is not None:      # None if it was closed at the start
        print(line, end=end, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if not launched() or os.environ.get("LOCAL_RANK", "0") == "0":     # torchrun: once on each machine
            say(f"error: {message}")
        sys.exit(2)


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], float]:
    """An argparse type: a number from low to high, or above low if open_low. Its error names that range."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text)
            is_above = low < value if open_low else low <= value
            if is_above and value <= high and value != float("inf"):
                return value
        above = f"above {low}" if open_low else f"of {low} or more"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {above}"
                                         + ("" if high == float("inf") else f", up to {high}"))
    return parse


def json_object(text: str) -> dict:
    """An argparse type: {"name": value, ...}."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as {{\"enable_thinking\": false}}")


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """How dialogues become text. Tokenizer.from_pretrained has arguments of the same names."""
    parser.add_argument("--chat-template", help="vicuna, llama2, mixtral or a jinja file, instead of the checkpoint's")
    parser.add_argument("--template-args", type=json_object, metavar="JSON",
                        help="more variables for the chat template, such as '{\"enable_thinking\": false}'")


def check_writable(option: str, path: Path, is_folder: bool = False) -> None:
    """Raise ValueError unless `path` can be written. To be called before the work whose result goes there.

    path is a file in an existing folder; with is_folder, a folder that may be missing, and its parents too.
    """
    full = path.absolute()
    if not is_folder and (full.exists() and not full.is_file() or not full.parent.is_dir()):
        raise ValueError(f"{option} {path}: not a file in an existing folder")
    place = next(place for place in ((full, *full.parents) if is_folder else full.parents) if place.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{option} {path}: {place} is no folder that can be written to")


def write_atomically(file: Path, text: str) -> None:
    """Write a text file that is never seen half written. Raises OSError that names it."""
    with whole_or_nothing(file, ".part") as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_or_nothing(file: Path, suffix: str) -> Iterator[Path]:
    """Yields a path beside `file` to write to. At the end it is renamed to `file`; after an error it is removed."""
    part = file.with_name(file.name + suffix)
    try:
        yield part
        part.replace(file)
    except OSError as error:
        raise OSError(f"{file} could not be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def read_text(file: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark. All line ends become \\n.

    Raises FileNotFoundError, or ValueError naming the byte that does not fit.
    """
    try:
        return file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: byte {error.start} does not fit") from None


def read_records(file: Path, bad: Callable[[int, str], None] | None = None) -> Iterator[tuple[int, object]]:
    """Yields (line, value) of a file of JSON lines, or (place, value) of a file that is one JSON array, from 1 on.

    Only a line feed ends a line: U+2028 and the like may stand inside a string. bad(line, why) is called for each line
    that is not JSON, not UTF-8 or holds half a character (a lone surrogate). Without `bad` such a line raises
    ValueError that names the file and the line.
    """
    def refuse(line: int, why: str) -> None:
        raise ValueError(f"{file}, line {line}: {why}")

    bad = bad or refuse
    with open(file, "rb") as content:
        begin = 3 if content.read(3) == b"\xef\xbb\xbf" else 0    # after a byte order mark
        content.seek(begin)
        while (first := content.read(1)).isspace():
            pass
        if first == b"[":
            entries = parse_json(first + content.read(),
                                 lambda why: refuse(1, f"a JSON array that cannot be read: {why}"))
            for place, entry in enumerate(entries, start=1):
                if is_text(entry):
                    yield place, entry
                else:
                    bad(place, "half a character (a lone surrogate)")
            return
        content.seek(begin)
        for line, text in enumerate(content, start=1):
            if not text.strip():
                continue
            reasons = []
            value = parse_json(text, reasons.append)
            if not reasons and b"\\u" in text and not is_text(value):
                reasons = ["half a character (a lone surrogate)"]
            if reasons:
                bad(line, reasons[0])
            else:
                yield line, value


def parse_json(text: bytes, bad: Callable[[str], None]) -> Any:
    """The value. If there is none, calls bad(why) and returns None."""
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        bad(f"not UTF-8: byte {error.start} does not fit")
    except json.JSONDecodeError as error:
        bad(f"not JSON: {error}")
    except RecursionError:
        bad("not JSON: nested too deeply")


def is_text(value: object) -> bool:
    """Whether all strings of a JSON value can be written as UTF-8: no lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def pick_device(name: str | None) -> torch.device:
    """The device of --device. Raises ValueError with torch's reason for one that cannot hold a tensor."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)   # streams and graphs are made on the current device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
