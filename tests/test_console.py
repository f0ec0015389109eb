"""What all commands share."""
import contextlib
import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import console
from console import command


@pytest.mark.parametrize("outcome, status, line", [
    (None, 0, ""), (1, 1, ""), (ValueError("two\nlines"), 2, "error: two lines\n"),
    (FileNotFoundError("gone"), 2, "error: gone\n"), (SafetensorError("no space left"), 2, "error: no space left\n"),
    (torch.OutOfMemoryError("CUDA"), 2, "error: CUDA\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
    (RuntimeError("Could not determine home directory."), 2, "error: this user has no home directory: set HF_HOME"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch"), 2,
     "error: there is no working C or C++ compiler"),
    (RuntimeError("Failed to find C compiler. Please specify via CC"), 2,
     "error: there is no working C or C++ compiler"),
    (RuntimeError("C++ compile error\n\nCommand:\ng++ x\n\nOutput:\nno Python.h\nmore"), 2,
     "error: the C or C++ compiler fails (no Python.h)"),
    (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), 2, "error: the C or C++ compiler fails: mend it"),
    (KeyboardInterrupt(), 130, "stopped\n"), (RuntimeError("a mistake of ours"), None, "")])
def test_a_command_answers_with_an_exit_status_and_one_line(outcome, status, line, capsys):
    @command(stopped="stopped")
    def main(args):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome
    with pytest.raises(RuntimeError, match="ours") if status is None else contextlib.nullcontext():
        assert main(None) == status
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == bool(line)


def test_under_torchrun_only_commands_that_work_in_ranks_are_called(monkeypatch, capsys):
    called = []
    alone, in_ranks = command()(called.append), command(in_ranks=True)(called.append)
    monkeypatch.setattr("sys.argv", ["scripts/report.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, line in (("0", "error: report.py runs in one process: start it without torchrun\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert alone(None) == 2 and capsys.readouterr().err == line and not called
    assert in_ranks("in ranks") == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert alone("alone") == 0 and called == ["in ranks", "alone"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_records_are_read_from_lines_and_from_an_array(tmp_path, mark):
    entries = [{"n": 1, "text": "a\u2028b"}, {"n": 2, "text": "ü\u0085"}, {"n": 3}]
    lines, array = tmp_path / "lines.jsonl", tmp_path / "array.json"
    lines.write_bytes(mark + "\r\n".join(json.dumps(e, ensure_ascii=False) for e in entries).encode())
    array.write_bytes(mark + json.dumps(entries, indent=2, ensure_ascii=False).encode())
    for file in (lines, array):
        assert list(console.read_records(file)) == list(enumerate(entries, start=1))
    lines.write_bytes(mark + b"one\r\ntwo\n")
    assert console.read_text(lines) == "one\ntwo\n"


def test_bad_records_are_named_by_line_and_reason(tmp_path):
    file, heard = tmp_path / "lines.jsonl", []
    file.write_bytes(b'{"n": 1}\n\n{"n": \n{"n": "\xff"}\n{"n": "\\ud83d"}\n{"n": "\\ud83d\\ude00"}')
    assert [n for n, _ in console.read_records(file, lambda *bad: heard.append(bad))] == [1, 6]
    assert [line for line, _ in heard] == [3, 4, 5]
    assert [why.split(":")[0] for _, why in heard] == ["not JSON", "not UTF-8", "half a character (a lone surrogate)"]
    with pytest.raises(ValueError, match="line 3: not JSON"):
        list(console.read_records(file))
    file.write_bytes(b'[{"n": 1},\n{"n": 2}')
    with pytest.raises(ValueError, match="a JSON array that cannot be read"):
        list(console.read_records(file))


@pytest.mark.parametrize("encoding, errors", [("cp1252", "strict"), ("ascii", "surrogateescape"), ("utf-8", "strict")])
def test_a_character_that_the_output_lacks_is_replaced(encoding, errors, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    @command()
    def main(args):
        print("a \U0001f600 \udce9 b")
        raise ValueError("no file \U0001f600.txt")
    assert main(None) == 2
    for stream, text in ((out, "a \U0001f600 \udce9 b"), (err, "error: no file \U0001f600.txt")):
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding) == text.encode(encoding, "replace").decode(encoding) + "\n"


def test_a_file_that_a_full_disk_cuts_short_is_named_and_leaves_nothing(tmp_path):
    file = tmp_path / "report.json"
    file.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="report.json could not be written: File too large"):
            console.write_atomically(file, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("ranks, n_line", [({}, 1), ({"RANK": "1"}, 1), ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, 1),
                                           ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 0)], ids=str)
def test_a_wrong_option_is_said_once(ranks, n_line, monkeypatch, capsys):
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        console.Parser().parse_args(["--nonsense"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == n_line and ("--nonsense" in err) == bool(n_line)


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path, is_folder in (("new", False), ("file", False), ("new", True), ("new/deeper", True), (".", True)):
        console.check_writable("--out", tmp_path / path, is_folder)
    monkeypatch.chdir(tmp_path)
    console.check_writable("--out", Path("new"))
    for path, is_folder in ((".", False), ("missing/new", False), ("file/new", False)):
        with pytest.raises(ValueError, match="--out .*: not a file in an existing folder"):
            console.check_writable("--out", tmp_path / path, is_folder)
    for path in ("file", "file/new"):
        with pytest.raises(ValueError, match="--out .*: .*file is no folder that can be written to"):
            console.check_writable("--out", tmp_path / path, is_folder=True)
    monkeypatch.setattr(console.os, "access", lambda *args: False)     # as for a user without the right to
    for is_folder in (False, True):
        with pytest.raises(ValueError, match="--out new: .* is no folder that can be written to"):
            console.check_writable("--out", Path("new"), is_folder)
