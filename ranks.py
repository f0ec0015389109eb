"""The processes of torchrun as one program: rank 0 speaks, and when one dies or hangs all end, with one line that names it.

    sys.exit(ranks.run(main, args) if ranks.launched() else main(args))

A thread of every rank writes a heartbeat into torchrun's key-value store and reads the others'. It needs nothing of the
main thread, which may be waiting in a collective for a rank that will never come.
"""
import argparse
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

POLL = 0.5              # seconds between heartbeats
SILENCE = 15.0          # seconds without one after which a rank counts as dead: longer than anything holds the interpreter
GRACE = 3.0             # seconds for a rank to end by itself, on Ctrl-C or when another reports an error
COLLECTIVE = 300.0      # seconds a collective may wait for a rank that lives: ranks compile at different speeds


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def run(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """main(args) in the process group of torchrun. Returns its exit status; ends the process when another rank fails."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    use_cuda = torch.cuda.is_available() and args.device in (None, "cuda")
    if use_cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    real_stderr = os.dup(2)
    silent = None if rank == 0 else Silence()
    with silent or contextlib.nullcontext():
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(seconds=COLLECTIVE))
        watchdog = Watchdog(rank, world, real_stderr)
        watchdog.start()
        try:
            status = main(args)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            watchdog.blame(error)   # a collective's peer has gone, or it waited too long
        if status == 0:
            dist.barrier()
        watchdog.leave(status, "" if silent is None else silent.last_line)
        dist.destroy_process_group() if status == 0 else os._exit(status)   # in an orderly end others would be waited for
    return status


class Silence:
    """Throws away what is printed; keeps the last line for an error that this rank alone has."""

    def __init__(self):
        self.last_line = ""

    def write(self, text: str) -> int:
        self.last_line = next((line for line in reversed(text.splitlines()) if line.strip()), self.last_line)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return 1

    def __enter__(self) -> "Silence":
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):       # warnings of C++ code
            os.dup2(nowhere, descriptor)
        self.before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self
        return self

    def __exit__(self, *error) -> None:
        sys.stdout, sys.stderr = self.before


class Watchdog(threading.Thread):
    """What each rank says of itself in the store, under tp/RANK: "alive HOST PID COUNT", "waiting HOST PID COUNT" once
    a collective has failed it, or "left STATUS LINE"."""

    def __init__(self, rank: int, world: int, stderr: int):
        super().__init__(daemon=True)
        self.rank, self.stderr = rank, stderr
        self.others = [r for r in range(world) if r != rank]
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                   timeout=timedelta(seconds=SILENCE), wait_for_workers=False)
        self.host, self.state, self.left, self.count = socket.gethostname(), "alive", threading.Event(), 0
        self.seen: dict[int, tuple[str, float]] = {}    # rank -> its last message, and when that was new
        self.woken, wake = socket.socketpair()
        wake.setblocking(False)
        self.wake = wake
        signal.signal(signal.SIGTERM, lambda *_: None)  # torchrun's, when another rank has ended; the thread sees it
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self.beat()

    def run(self) -> None:
        stop_at, stop_status = None, 0      # on a signal: when to end, whether or not anybody is found to blame
        while not self.left.is_set():
            try:
                self.beat()
                self.look()
            except RuntimeError:
                if not self.left.is_set():
                    self.end(1, "lost contact with the store that the ranks share: its process has died")
                return
            if stop_at is not None and time.monotonic() > stop_at:
                self.end(stop_status, "stopped by SIGTERM" if stop_status == 143 else "")
            ready, _, _ = select.select([self.woken], [], [], POLL)
            caught = self.woken.recv(64) if ready else b""
            if stop_at is None and caught:
                remote = any(message.split()[1] != self.host for message, _ in self.seen.values())
                interrupted = signal.SIGINT in caught
                stop_status = 130 if interrupted else 143
                stop_at = time.monotonic() + (SILENCE + 1 if remote and not interrupted else GRACE)

    def beat(self) -> None:
        self.count += 1
        self.store.set(f"tp/{self.rank}", f"{self.state} {self.host} {os.getpid()} {self.count}")

    def look(self) -> None:
        """Read the others' messages, and end if one of them has died or failed."""
        now = time.monotonic()
        for rank in self.others:
            if not self.store.check([f"tp/{rank}"]):
                continue        # still starting: torchrun would notice its death
            message = self.store.get(f"tp/{rank}").decode()
            if message != self.seen.get(rank, ("", 0))[0]:
                self.seen[rank] = message, now
        for rank, (message, since) in sorted(self.seen.items()):
            state, host, pid, *_ = message.split(" ", 3)
            if state == "left":
                status, line = host, message.split(" ", 2)[2]
                if status != "0" and line and now - since > GRACE:  # if all have this error, rank 0 has said so itself
                    self.end(int(status), f"rank {rank}: {line.removeprefix('error: ')}")
                continue
            local = host == self.host
            if local and not is_running(int(pid)):
                if self.store.get(f"tp/{rank}").startswith(b"left"):    # after the message was read, before the look at it
                    continue
                self.end(1, f"rank {rank} (process {pid} on {host}) has died")
            if now - since > SILENCE:
                if local:       # else torchrun waits another 30 s for it
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                self.end(1, f"rank {rank} (process {pid} on {host}) has not answered for {SILENCE:.0f} s")

    def blame(self, error: Exception) -> None:
        """Called in the main thread when a collective has failed: does not return."""
        self.state = "waiting"
        time.sleep(SILENCE + 2)     # the thread ends the process as soon as it sees a rank that is dead
        idle = [rank for rank, (message, _) in self.seen.items() if message.startswith("alive")]
        reason = " ".join(str(error).split())[:300]
        self.end(1, f"rank {idle[0]} did not join a collective: {reason}" if idle else reason)

    def end(self, status: int, line: str) -> None:
        """End this process. The first that has something to say says it."""
        first = True
        with contextlib.suppress(RuntimeError):
            first = bool(line) and self.store.add("tp/said", 1) == 1
        if first:
            os.write(self.stderr, f"error: {line}\n".encode())
        self.leave(status, "")
        os._exit(status)

    def leave(self, status: int, line: str) -> None:
        self.left.set()
        if threading.current_thread() is not self:
            # Or its next beat could hide that this rank has left; and a thread that comes back from the store while the
            # interpreter ends is cut off inside C++, which aborts the process.
            self.join(timeout=SILENCE)
        with contextlib.suppress(RuntimeError):
            self.store.set(f"tp/{self.rank}", f"left {status} {line}")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
