"""Ranks as forked processes: their limits, their log, their end, and the memory that shows they are alive."""

import contextlib
import ctypes
import faulthandler
import io
import mmap
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hptool.secrets import redact
from hptool.units import GIB

_PR_SET_PDEATHSIG: Final = 1

#: A rank answers this signal with the stacks of its threads, in its log.
SHOW_STACKS: Final = signal.SIGUSR1

#: The exit code of a rank that failed and could not write why.
CANNOT_WRITE: Final = os.EX_IOERR


class Heartbeats:
    """Counters in memory shared with forked ranks: beats (any progress) and finished steps of each.

    A file would do as well, but a hang must be told from a slow file system. One cell more is for the other way: it
    asks the ranks to stop. `started` is when the process that made them began, by time.monotonic.
    """

    def __init__(self, ranks: int) -> None:
        self.started = process_start()
        self.ranks = ranks
        self._cells = memoryview(mmap.mmap(-1, 8 * (2 * ranks + 1))).cast("q")

    def ask_to_stop(self) -> None:
        """The ranks should come to an end that they can go on from; those that only time themselves do not look."""
        self._cells[-1] = 1

    @property
    def is_asked_to_stop(self) -> bool:
        """Somebody has asked."""
        return bool(self._cells[-1])

    def beat(self, local_rank: int) -> None:
        """A microbatch went by."""
        self._cells[2 * local_rank] += 1

    def finish_step(self, local_rank: int) -> None:
        """A whole step is done."""
        self._cells[2 * local_rank + 1] += 1

    def steps(self, local_rank: int) -> int:
        """Steps that this rank has finished."""
        return self._cells[2 * local_rank + 1]

    def snapshot(self) -> tuple[int, ...]:
        """All counters; equal to an earlier snapshot where nothing has moved since."""
        return tuple(self._cells[:-1])


def fork_rank(run: Callable[[], int], *, log: Path) -> int:
    """Starts `run` in a child process, which ends with the exit code it returns; answers the child's id.

    The child dies with its parent, whatever ends that. OSError where its log cannot be opened.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(output)
        return child
    code = 1
    try:
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != parent:
            os._exit(code)
        _become_rank(output)
        code = run()
    except BaseException:  # noqa: BLE001 (nothing of the parent's may run in the child)
        print_traceback()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def print_traceback() -> None:
    """Of the exception that is being handled, on stderr, without secrets."""
    sys.stderr.write(redact(traceback.format_exc()))


def _become_rank(output: int) -> None:
    # The supervisor decides about ^C; submitit's handlers of TERM and USR2 were meant for it alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.stdout, sys.stderr = _Log(1), _Log(2)
    faulthandler.enable(file=2)
    faulthandler.register(SHOW_STACKS, file=2, all_threads=True)


def limit_memory(gib: float) -> None:
    """From now on this process cannot have more than about `gib` resident: allocations beyond fail, as on a GPU.

    RLIMIT_DATA counts what is reserved, not what is resident. The difference as it stands is mostly the untouched
    stacks of some fifty threads of gloo's, 8 MiB each: it is added, since only what comes on top will be touched.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    reserved, resident = (int(status[key].split()[0]) * 1024 for key in ("VmData", "VmRSS"))
    limit = int(gib * GIB) + max(0, reserved - resident)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def send(child: int, signum: int) -> None:
    """A signal to a child that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signum)


class _Log(io.TextIOWrapper):
    """A rank's output: without secrets, and never the reason for its end. A line that no disk takes is lost."""

    def __init__(self, descriptor: int) -> None:
        raw = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
        super().__init__(raw, encoding="utf-8", errors="replace", line_buffering=True)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(redact(text))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


class Process:
    """Somebody else's process, told from a later one with the same id by its start time."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._started = self._start_time()

    def is_gone(self) -> bool:
        """It has ended; a zombie counts as ended."""
        started = self._start_time()
        return started is None or started != self._started

    def _start_time(self) -> str | None:
        try:
            state, start_time = _state_and_start(self._pid)
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in "ZX" else start_time


def _state_and_start(pid: int) -> tuple[str, str]:
    """Of /proc/PID/stat, whose second field may hold blanks but ends with the last parenthesis; see proc(5)."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = stat.rpartition(")")[2].split()
    return fields[0], fields[19]


def process_start() -> float:
    """When this process began, as time.monotonic would have said; good to a hundredth of a second.

    The kernel counts it in ticks since the machine was started, time asleep included: so does CLOCK_BOOTTIME.
    """
    _, ticks = _state_and_start(os.getpid())
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s


def oom_kills() -> int:
    """How many processes the kernel of this machine has killed for memory so far; 0 where it does not say."""
    try:
        counters = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in counters.splitlines() if line.startswith("oom_kill ")), 0)
