"""The processes of torchrun as one program: rank 0 speaks, and when one dies or fails all end, with one line that names it.

    sys.exit(ranks.run(main, args) if ranks.launched() else main(args))

A thread of every rank writes a heartbeat into torchrun's key-value store and reads the others'. It needs nothing of the
main thread, which may be waiting in a collective for a rank that will never come. A rank that is dead, stopped or has
left is noticed within SILENCE. One that lives but whose main thread is stuck still has a heartbeat, and all ranks stand
at the same step: it is noticed when a collective has waited COLLECTIVE for it.
"""
import argparse
import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist

POLL = 0.5              # seconds between heartbeats
SILENCE = 15.0          # seconds without one after which a rank counts as dead: longer than anything holds the interpreter
GRACE = 3.0             # seconds for a rank to end by itself, on Ctrl-C or when another reports an error
COLLECTIVE = 300.0      # seconds a collective may wait for a rank that lives: ranks compile at different speeds
T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def writes() -> bool:
    """Whether this process writes files: rank 0, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def on_rank_0(job: Callable[[], object]) -> object:
    """What job() returns on rank 0, for all ranks; the other ranks do not call it."""
    if not launched():
        return job()
    values = [job() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def run(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """main(args) in the process group of torchrun.

    Returns 2 for what cannot be placed. Else it ends the process itself, with main's exit status or because another
    rank has failed.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    use_cuda = torch.cuda.is_available() and args.device in (None, "cuda")
    try:
        place(args, use_cuda)
    except ValueError as error:
        if int(os.environ["LOCAL_RANK"]) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    real_stderr = os.dup(2)
    silent = None if rank == 0 else Silence()
    signal.signal(signal.SIGINT, interrupt)
    watchdog = None
    try:
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(seconds=COLLECTIVE))
        watchdog = Watchdog(rank, world, real_stderr)
        watchdog.start()
        try:
            status = main(args)
            if status == 0:
                dist.barrier()
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            watchdog.blame(error)   # a collective's peer has gone, or it waited too long
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        watchdog.leave(status, "" if silent is None else silent.error)
        if status == 0:     # else others would be waited for
            dist.destroy_process_group()
    except BaseException as error:  # Ctrl-C where main does not expect it, or a mistake of ours
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        if status == 1 and (watchdog is None or watchdog.is_first()):
            text = (f"error: rank {rank}: {one_line(error)}" if isinstance(error, dist.DistError)    # the others never came
                    else f"rank {rank}:\n{traceback.format_exc().rstrip()}")
            os.write(real_stderr, f"{text}\n".encode())
        if watchdog is not None:
            watchdog.leave(status)
    end_process(status)


def in_turn(is_mine: bool, device: torch.device, work: Callable[[Callable[[], None]], T],
            patience: float | None = None) -> T | None:
    """work(alive) on the one rank whose turn it is, where it returns the result; the others wait for it.

    They may wait for hours, where a collective waits COLLECTIVE: as long as the work calls alive() every `patience`
    seconds (default: COLLECTIVE), a thread beside it joins one collective after the other. The work may do none itself.
    """
    over, patience = torch.zeros((), device=device), COLLECTIVE if patience is None else patience
    if not is_mine:
        while not over.item():
            dist.all_reduce(over)
        return None
    last, done = time.monotonic(), threading.Event()

    def alive() -> None:
        nonlocal last
        last = time.monotonic()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):     # the others have gone, which the last collective tells
            while not done.wait(POLL) and time.monotonic() - last < patience:
                dist.all_reduce(torch.zeros_like(over))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        result = work(alive)
    finally:
        done.set()
        thread.join()
    dist.all_reduce(over.fill_(1))
    return result


def end_process(status: int) -> NoReturn:
    """Not by way of the interpreter's end, which would cut off threads that wait in C++ code for its lock: that aborts."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has gone
            stream.flush()
    os._exit(status)


def place(args: argparse.Namespace, use_cuda: bool) -> None:
    """Give each process a GPU of its own. Raises ValueError where there is none for it."""
    if str(args.device).startswith("cuda:"):
        raise ValueError(f"--device {args.device}: under torchrun each process takes a GPU of its own; leave it out")
    if not use_cuda:
        return
    n_gpu, n_local = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if n_local > n_gpu:
        raise ValueError(f"{n_local} processes on a machine with {n_gpu} GPUs: --nproc-per-node {n_gpu}, or --device cpu")
    args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(args.device)


def interrupt(*_) -> None:
    """Ctrl-C, once: a second one would interrupt the end that the first asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def leave_to_thread(*_) -> None:
    """The Watchdog ends this process, unless main puts a handler of its own in this one's place and ends by itself."""


class Silence:
    """Takes the place of stdout and stderr: throws away what is printed, but for the last error, which this rank alone may have."""

    def __init__(self):
        self.error = ""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):       # warnings of C++ code
            os.dup2(nowhere, descriptor)
        sys.stdout = sys.stderr = self

    def write(self, text: str) -> int:
        self.error = next((line for line in reversed(text.splitlines()) if line.startswith("error: ")), self.error)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return 1


class Message(NamedTuple):
    """What a rank says of itself in the store."""
    state: str          # "alive", "waiting" once a collective has failed it, or "left"
    host: str
    space: str          # where its process id means anything
    pid: int
    count: int          # of heartbeats
    status: int = 0     # of one that has left
    line: str = ""      # the error that it could not print

    @property
    def failed(self) -> bool:
        return self.state == "left" and self.status != 0


class Watchdog(threading.Thread):
    """Writes this rank's Message under its number, and reads those of the others."""

    def __init__(self, rank: int, world: int, stderr: int):
        super().__init__(daemon=True)
        self.rank, self.stderr = rank, stderr
        self.others = [r for r in range(world) if r != rank]
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=SILENCE), wait_for_workers=False)
        self.store = dist.PrefixStore(f"ranks/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.here, self.state, self.count = (socket.gethostname(), process_space()), "alive", 0
        self.left = threading.Event()
        self.seen: dict[int, tuple[Message, float]] = {}    # rank -> its last message, and when that was new
        self.woken, wake = socket.socketpair()
        wake.setblocking(False)
        self.wake = wake
        signal.signal(signal.SIGTERM, leave_to_thread)  # torchrun's, when another rank has ended
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self.beat()

    def run(self) -> None:
        stop_at, stop_status = None, 0      # on a signal: when to end, whether or not anybody is found to blame
        while not self.left.is_set():
            late = stop_at is not None and time.monotonic() > stop_at
            try:
                self.beat()
                self.look(0 if late else GRACE)
            except RuntimeError:
                if not self.left.is_set():
                    self.end(1, "lost contact with the store that the ranks share: its process has died")
                return
            if late:
                self.end(stop_status, "stopped by SIGTERM" if stop_status == 143 else "")
            ready, _, _ = select.select([self.woken], [], [], POLL)
            caught = self.woken.recv(64) if ready else b""
            if stop_at is None and caught and signal.getsignal(signal.SIGTERM) is leave_to_thread:
                interrupted = signal.SIGINT in caught
                remote = any(message.state != "left" and not self.is_local(message) for message, _ in self.seen.values())
                stop_status = 130 if interrupted else 143
                stop_at = time.monotonic() + (SILENCE + 1 if remote and not interrupted else GRACE)

    def beat(self) -> None:
        self.count += 1
        self.tell(self.state)

    def tell(self, state: str, status: int = 0, line: str = "") -> None:
        self.store.set(str(self.rank), json.dumps(Message(state, *self.here, os.getpid(), self.count, status, line)))

    def read(self, rank: int) -> Message:
        return Message(*json.loads(self.store.get(str(rank))))

    def is_local(self, message: Message) -> bool:
        return (message.host, message.space) == self.here

    def look(self, patience: float) -> None:
        """Read the others' messages, and end if one of them has died, or failed that many seconds ago."""
        now = time.monotonic()
        for rank in self.others:
            if not self.store.check([str(rank)]):
                continue        # still starting: torchrun would notice its death
            message = self.read(rank)
            if rank not in self.seen or message != self.seen[rank][0]:
                self.seen[rank] = message, now
        for rank, (message, since) in sorted(self.seen.items()):
            if message.failed and now - since >= patience:  # if all have this error, rank 0 has said so itself
                self.end(message.status, message.line and f"rank {rank}: {message.line.removeprefix('error: ')}")
            if message.state == "left":
                continue
            local = self.is_local(message)
            if local and not is_running(message.pid):
                if self.read(rank).state == "left":     # after the message was read, before the look at it
                    continue
                self.end(1, f"rank {rank} (process {message.pid} on {message.host}) has died")
            if now - since > SILENCE:
                if local:       # else torchrun waits another 30 s for it
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(message.pid, signal.SIGKILL)
                self.end(1, f"rank {rank} (process {message.pid} on {message.host}) has not answered for {SILENCE:.0f} s")

    def blame(self, error: Exception) -> None:
        """Called in the main thread when a collective has failed: does not return."""
        self.state = "waiting"
        time.sleep(SILENCE + 2)     # the thread ends the process as soon as it sees a rank that is dead
        idle = [rank for rank, (message, _) in self.seen.items() if message.state == "alive"]
        self.end(1, f"rank {idle[0]} did not join a collective: {one_line(error)}" if idle else one_line(error))

    def is_first(self) -> bool:
        """Whether no other rank has said what is wrong."""
        with contextlib.suppress(RuntimeError):
            return self.store.add("said", 1) == 1
        return True

    def end(self, status: int, line: str) -> None:
        """End this process. The first that has something to say says it."""
        if line and self.is_first():
            os.write(self.stderr, f"error: {line}\n".encode())
        self.leave(status)
        os._exit(status)

    def leave(self, status: int, line: str = "") -> None:
        self.left.set()
        if threading.current_thread() is not self:
            if self.is_alive():     # or its next beat could hide that this rank has left
                self.join(timeout=SILENCE)
            signal.set_wakeup_fd(-1)
        with contextlib.suppress(RuntimeError):
            self.tell("left", status, line)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def process_space() -> str:
    """Names the run of a machine and, in it, the namespace of process ids: two containers may have one host name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return ""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
