"""What all commands share."""
import contextlib

import pytest
import torch
from safetensors import SafetensorError

from console import command


@pytest.mark.parametrize("outcome, status, line", [
    (None, 0, ""), (1, 1, ""), (ValueError("two\nlines"), 2, "error: two lines\n"), (FileNotFoundError("gone"), 2, "error: gone\n"),
    (SafetensorError("no space left"), 2, "error: no space left\n"), (torch.OutOfMemoryError("CUDA"), 2, "error: CUDA\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
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
