"""Many runs in one job: it takes orders from a directory while it lives, and carries them out one after another.

So queueing, the preparation of the nodes and the imports are paid once. Each order is a run of `supervisor.run_node`,
in a child of its own that is forked after the imports. What `launch.packed` and the nodes of the job tell each other
are files of the lane's directory, each of them whole when it appears:

lane.json             `LanePlan`: what the job was asked for                                 by the launcher
job.json              `LaneJob`: the job                                                     by the launcher
orders/00003.json     `Order`                                                                by the launcher
orders/00003.cancel   it is not wanted any more                                              by the launcher
closed                nothing more will be ordered                                           by the launcher
end.json              how the job ended                                                      by the launcher
ready.json            `Ready`: orders are taken, and until when                              by the first node
notes/00003.json      `Note`: how far the order is                                           by the first node
held.json             `Held`: for how long the job has had its nodes                         by the first node
over                  no order is taken any more, and why                                    by the first node
life-0/00003.begin    in this life of the job (a requeue begins the next) it is its turn     by the first node
life-0/00003.end-1    `NodeEnd`: the second node has nothing of it left                      by each node
logs/00003-1.log      what the supervisor of the second node said of it                      by each node

Importing this module loads neither torch nor Megatron-core.
"""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final, TypeVar

from hptool import files
from hptool.errors import InputError
from hptool.measurement import FailureKind
from hptool.units import SECONDS_PER_MINUTE
from hptool.worker import outcome, processes
from hptool.worker.supervisor import NodeJob, RunFailedError, load_framework, run_node

_LOG = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER: Final = 36

#: Between two looks at the child, and at the files that others write: on a file system of many nodes, and on one's own.
_POLL_S = 0.02
_LOOK_S = 0.3
_LOCAL_LOOK_S = 0.05

#: What a run's own supervisor may take beyond the run's limit to say so and to end it; then it is ended from outside.
_OUTER_S = 60.0

#: How long killed processes may take to go. One that a driver holds takes longer than anybody can wait.
_END_S = 30.0

#: How long a node may be behind the first one in seeing a file or in ending an order.
_BEHIND_S = 120.0

#: How often an order is begun again because its job was interrupted: it may itself be what interrupts it.
_ATTEMPTS = 3


class OrderState(StrEnum):
    """How far an order is; it never goes back, but for a requeued job that begins it anew."""

    BEGUN = "begun"
    ENDED = "ended"
    WITHDRAWN = "withdrawn"  # never begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One run that the lane is to carry out. `token` is the launcher's mark, by which it finds the order again."""

    name: str
    job: NodeJob
    token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What became of an order. `detail` and `meaning` tell its end where the run left no outcome of its own."""

    state: OrderState
    detail: str = ""
    meaning: FailureKind = FailureKind.CRASH
    attempts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEnd:
    """How an order ended on one node. `exit_code` is that of the node's supervisor, as `subprocess` counts."""

    exit_code: int
    detail: str
    meaning: FailureKind = FailureKind.CRASH


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The lane takes orders until `ends_at`, in seconds of the epoch."""

    ends_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """For how long the job has had its nodes: in earlier lives, and in this one up to now."""

    earlier_s: float
    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePlan:
    """What a lane's job was asked for. It carries `token`, as a run's job does."""

    nodes: int
    minutes: float
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneJob:
    """The job that a lane is, and where its own output goes."""

    job_id: str
    log_path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackJob:
    """A lane's job, the same on all of its nodes.

    It has `minutes` from its start, and ends when nothing was to be done for `idle_s`. When the process `owner_pid`
    is gone, so is the lane. `environment` is set before anything is loaded, for an `accelerator` as in a config.
    """

    directory: str
    nodes: int
    accelerator: str
    minutes: float
    idle_s: float
    owner_pid: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The directory of a lane; nothing is kept in memory."""

    directory: Path

    @property
    def closed(self) -> Path:
        """Nothing more will be ordered, once it is there."""
        return self.directory / "closed"

    @property
    def over(self) -> Path:
        """No order is taken any more, once it is there."""
        return self.directory / "over"

    @property
    def end(self) -> Path:
        """How the job ended, once the launcher knows it."""
        return self.directory / "end.json"

    def cancel(self, number: int) -> Path:
        """The order is not wanted any more, once it is there."""
        return self.directory / "orders" / f"{number:05}.cancel"

    def log_path(self, number: int, node: int = 0) -> Path:
        """What a node's supervisor said of an order."""
        return self.directory / "logs" / f"{number:05}-{node}.log"

    def numbers(self) -> list[int]:
        """All orders, in the order in which they were given."""
        return sorted(int(path.stem) for path in (self.directory / "orders").glob("[0-9]*.json"))

    def order(self, number: int) -> Order | None:
        """The order of this number."""
        return _read(self._order(number), Order)

    def note(self, number: int) -> Note | None:
        """What became of it; None while it waits for its turn."""
        return _read(self._note(number), Note)

    def plan(self) -> LanePlan | None:
        """What the job was asked for."""
        return _read(self.directory / "lane.json", LanePlan)

    def job(self) -> LaneJob | None:
        """The job; None where nobody has noted it."""
        return _read(self.directory / "job.json", LaneJob)

    def ready(self) -> Ready | None:
        """None until the job takes orders for the first time."""
        return _read(self.directory / "ready.json", Ready)

    def held_s(self) -> float:
        """For how long its job has had its nodes, as it last said."""
        held = _read(self.directory / "held.json", Held)
        return held.earlier_s + held.now_s if held is not None else 0.0

    def write(self, value: Order | Note | Ready | Held | LanePlan | LaneJob, number: int = 0) -> None:
        """Puts a value into its place: orders and notes under their number."""
        places = {
            Order: self._order(number),
            Note: self._note(number),
            Ready: self.directory / "ready.json",
            Held: self.directory / "held.json",
            LanePlan: self.directory / "lane.json",
            LaneJob: self.directory / "job.json",
        }
        files.write_text(places[type(value)], files.json_text(value))

    def _order(self, number: int) -> Path:
        return self.directory / "orders" / f"{number:05}.json"

    def _note(self, number: int) -> Path:
        return self.directory / "notes" / f"{number:05}.json"


def turn_s(max_minutes: float) -> float:
    """What an order with this limit takes of its lane's time at most."""
    return max_minutes * SECONDS_PER_MINUTE + _OUTER_S + _END_S


def run_pack(job: PackJob) -> None:
    """One node's part of a lane: carries out the orders that come, until there is nothing more to do.

    SystemExit (143, 130) when it is told to end by SIGTERM or SIGINT, its owner is gone, or the scheduler has started
    the job anew. RuntimeError where an order has left something that cannot be ended, on this node or another. Nothing
    that it started outlives it.
    """
    os.environ.update(job.environment)
    with _ended_by_signals():
        member = _Member(job)
        try:
            _adopt_orphans()
            _preload(job.accelerator)
            member.own_children = frozenset(_children())  # libraries may start helpers, which no order has left behind
            if member.node == 0:
                member.lead()
            else:
                member.follow()
        finally:
            for signum in (signal.SIGTERM, signal.SIGINT):  # as _ended_by_signals puts back
                signal.signal(signum, signal.SIG_IGN)
            end_children()


class _Member:
    """One node of a lane, in one life of its job."""

    def __init__(self, job: PackJob) -> None:
        self.node = int(os.environ.get("SLURM_NODEID", "0")) if job.nodes > 1 else 0
        self._job = job
        self._lane = Lane(directory=Path(job.directory))
        self._life = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._step = int(os.environ.get("SLURM_STEP_ID", "0"))
        self._signs = self._lane.directory / f"life-{self._life}"
        self._signs.mkdir(parents=True, exist_ok=True)
        self._ends = time.monotonic() + job.minutes * SECONDS_PER_MINUTE
        self._owner = processes.Process(job.owner_pid) if job.owner_pid is not None else None
        self._parent = os.getppid()
        self._look_s = _LOOK_S if job.owner_pid is None else _LOCAL_LOOK_S
        self._settled: set[int] = set()
        self._held_before_s = self._lane.held_s()
        self.own_children: frozenset[int] = frozenset()

    def lead(self) -> None:
        """The first node's part: which order's turn it is, and when all nodes are done with it."""
        if self._lane.over.exists():  # its job was interrupted on its way out
            return
        self._lane.write(Ready(ends_at=time.time() + self._ends - time.monotonic()))
        try:
            reason = self._serve()
        finally:
            self._tell_held()
        _LOG.warning("the lane ends: %s", reason)
        files.write_text(self._lane.over, reason + "\n")

    def _tell_held(self) -> None:
        held_s = time.monotonic() - processes.process_start()
        self._lane.write(Held(earlier_s=self._held_before_s, now_s=held_s))

    def _serve(self) -> str:
        """Takes turns until there is a reason to end."""
        idle_since = time.monotonic()
        while True:
            self._look()
            closed = self._lane.closed.exists()  # before the orders, for none comes after it
            number = self._next()
            if number is not None:
                self._tell_held()
                if (reason := self._turn(number)) is not None:
                    return reason
                idle_since = time.monotonic()
            elif closed:
                return "closed, and every order carried out"
            elif time.monotonic() - idle_since > self._job.idle_s:
                return f"nothing was ordered for {self._job.idle_s:g} s"
            else:
                time.sleep(self._look_s)

    def follow(self) -> None:
        """The other nodes' part: the orders that the first one begins."""
        while not self._lane.over.exists():
            self._look()
            begun = {int(path.stem) for path in self._signs.glob("*.begin")} - self._settled
            for number in sorted(begun):
                self._settled.add(number)
                order = self._lane.order(number)
                if order is not None:
                    self._tell_end(number, self._carry_out(number, order))
            time.sleep(self._look_s)

    def _next(self) -> int | None:
        for number in self._lane.numbers():
            if number not in self._settled:
                note = self._lane.note(number)
                if note is None or note.state is OrderState.BEGUN:
                    return number
                self._settled.add(number)
        return None

    def _turn(self, number: int) -> str | None:
        """Brings an order to its end; a reason where the lane has come to its own."""
        order, before = self._lane.order(number), self._lane.note(number)
        self._settled.add(number)
        attempts = before.attempts if before is not None else 0
        if order is None or (attempts and self._is_settled(number, order, attempts)):
            return None
        if turn_s(order.job.max_minutes) > self._ends - time.monotonic():
            reason = f"its allocation has no {order.job.max_minutes:g} minutes left"
            self._withdraw(number, reason, attempts)
            return reason
        # First the note, then a look for a cancellation; who cancels does it the other way round: one sees the other.
        self._lane.write(Note(state=OrderState.BEGUN, attempts=attempts + 1), number)
        if self._lane.cancel(number).exists():
            self._withdraw(number, "cancelled before its turn", attempts)
            return None
        (self._signs / f"{number:05}.begin").touch()
        ends = [self._carry_out(number, order), *self._others(number)]
        # What came first is in the run's own outcome; here the first node's word goes before the others'.
        worst = next((end for end in ends if end.exit_code), ends[0])
        ended = Note(state=OrderState.ENDED, detail=worst.detail, meaning=worst.meaning, attempts=attempts + 1)
        self._lane.write(ended, number)
        return None

    def _is_settled(self, number: int, order: Order, attempts: int) -> bool:
        """The job was interrupted in the middle of this order, and it is not to be begun again."""
        if outcome.is_measured(Path(order.job.run_directory)):
            detail = "measured, though its job was interrupted"
        elif attempts >= _ATTEMPTS:
            detail = f"its job was interrupted {attempts} times while it ran"
        else:
            return False
        ended = Note(state=OrderState.ENDED, detail=detail, meaning=FailureKind.LOST, attempts=attempts)
        self._lane.write(ended, number)
        return True

    def _withdraw(self, number: int, reason: str, attempts: int) -> None:
        state = OrderState.ENDED if attempts else OrderState.WITHDRAWN
        self._lane.write(Note(state=state, detail=reason, meaning=FailureKind.LOST, attempts=attempts), number)

    def _others(self, number: int) -> list[NodeEnd]:
        """How the order ended on the other nodes, once nothing of it is left on any."""
        until = time.monotonic() + _BEHIND_S
        ends = []
        for node in range(1, self._job.nodes):
            while (end := self._end_of(number, node)) is None:
                self._look()
                if time.monotonic() > until:
                    raise RuntimeError(f"node {node} of the lane has not ended order {number} for {_BEHIND_S:g} s")
                time.sleep(_POLL_S)
            ends.append(end)
        return ends

    def _end_of(self, number: int, node: int) -> NodeEnd | None:
        return _read(self._signs / f"{number:05}.end-{node}", NodeEnd)

    def _tell_end(self, number: int, end: NodeEnd) -> None:
        files.write_text(self._signs / f"{number:05}.end-{self.node}", files.json_text(end))

    def _carry_out(self, number: int, order: Order) -> NodeEnd:
        """Runs the order to its end on this node; when this returns nothing of it is left here."""
        kills = processes.oom_kills()
        limit_s = order.job.max_minutes * SECONDS_PER_MINUTE + _OUTER_S
        started = looked = time.monotonic()
        # Its nodes meet at a port of its own: connections of an earlier one must not disturb.
        work = partial(_work, order.job, step=self._step + number)
        child = processes.fork_rank(work, log=self._lane.log_path(number, self.node))
        end = None
        while end is None:
            time.sleep(_POLL_S)
            now = time.monotonic()
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                end = _natural_end(os.waitstatus_to_exitcode(status), oom=processes.oom_kills() > kills)
            elif now - started > limit_s:
                detail = f"not ended {_OUTER_S:g} s after its {order.job.max_minutes:g} minutes; killed"
                end = NodeEnd(exit_code=-signal.SIGKILL, detail=detail, meaning=FailureKind.TIMEOUT)
            elif now - looked > self._look_s:
                looked = now
                self._look()
                end = self._outer_end(number)
        if self.node == 0 and end.exit_code:
            self._tell_end(number, end)  # at once, for the others wait for their lost peers
        if not end_children(spare=self.own_children):
            raise RuntimeError(f"order {number} has left a process that cannot be killed")
        return end

    def _outer_end(self, number: int) -> NodeEnd | None:
        """Why an order that runs has to end here."""
        if self._lane.cancel(number).exists():
            return NodeEnd(exit_code=-signal.SIGTERM, detail="cancelled", meaning=FailureKind.LOST)
        for node in range(self._job.nodes):
            end = self._end_of(number, node) if node != self.node else None
            if end is not None and end.exit_code:
                return NodeEnd(exit_code=-signal.SIGTERM, detail=f"node {node}: {end.detail}", meaning=end.meaning)
        return None

    def _look(self) -> None:
        """SystemExit where nobody wants this any more."""
        if self._owner is not None and (self._owner.is_gone() or os.getppid() != self._parent):
            _LOG.warning("the process that owns this lane is gone: ending it")
            raise SystemExit(128 + signal.SIGTERM)
        # A node that the scheduler has lost sight of goes on while it starts the job anew elsewhere.
        lives = [int(path.name.partition("-")[2]) for path in self._lane.directory.glob("life-*")]
        if max(lives, default=0) > self._life:
            _LOG.warning("the scheduler has started this job anew: ending this one")
            raise SystemExit(128 + signal.SIGTERM)


def end_children(spare: Collection[int] = ()) -> bool:
    """Kills what came of this process, but for those to `spare`, and waits for its end; False where it will not go."""
    until = time.monotonic() + _END_S
    while children := set(_children()).difference(spare):
        if time.monotonic() > until:
            return False
        for child in children:
            processes.send(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, os.WNOHANG)
        time.sleep(_POLL_S / 10)
    return True


def _children() -> list[int]:
    """Processes whose parent this one is: what they leave behind comes to it (see `_adopt_orphans`)."""
    own, found = os.getpid(), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]) == own:
                found.append(int(stat.parent.name))
    return found


def _work(job: NodeJob, step: int) -> int:
    """The child's part, in a session of its own; its exit code."""
    os.setsid()
    os.environ["SLURM_STEP_ID"] = str(step)
    try:
        run_node(job)
    except RunFailedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _natural_end(exit_code: int, *, oom: bool) -> NodeEnd:
    if exit_code >= 0:
        return NodeEnd(exit_code=exit_code, detail=f"its supervisor ended with exit code {exit_code}")
    killed_for_memory = oom and exit_code == -signal.SIGKILL
    meaning = FailureKind.OOM if killed_for_memory else FailureKind.CRASH
    detail = f"its supervisor was killed by {signal.Signals(-exit_code).name}"
    return NodeEnd(exit_code=exit_code, detail=detail, meaning=meaning)


def _adopt_orphans() -> None:
    """What a killed order leaves behind becomes a child of this process, and so is found and ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _preload(accelerator: str) -> None:
    """Imports what every run needs. What is wrong with it each run says for itself, in its own outcome."""
    try:
        load_framework(accelerator)
    except Exception:  # noqa: BLE001 (an import can fail in any way)
        _LOG.exception("the framework cannot be loaded")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGINT raise SystemExit with the shell's exit code for them."""

    def end(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    previous = {signum: signal.signal(signum, end) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _read(path: Path, kind: type[T]) -> T | None:
    """What the file holds; None where it is not there."""
    if not path.exists():
        return None
    value: T = files.parse_json(files.read_text(path), kind, str(path))
    return value
