"""Runs as orders of long-lived jobs: one lane for each number of nodes, in which runs follow each other.

What queueing, the preparation of nodes and imports cost is paid once a lane; see `worker.pack`, which is the other
side of the files here. They are all that is known of a lane, so that a later process finds those that still live.
"""

import contextlib
import math
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from hptool import files
from hptool.errors import BusyError, LaunchError
from hptool.facts import Cluster
from hptool.launch.jobs import (
    IDLE_S,
    SCHEDULER_MARGIN_MINUTES,
    JobState,
    JobStatus,
    Run,
    Started,
    blocked,
    node_job,
    worker_environment,
)
from hptool.measurement import FailureKind
from hptool.units import SECONDS_PER_DAY, SECONDS_PER_HOUR, SECONDS_PER_MINUTE
from hptool.worker.pack import Lane, LaneJob, LanePlan, Order, OrderState, PackJob, run_pack, turn_s

#: A lane has time for so many runs at their limits; most end before it. When it is over another one is started.
_TURNS = 8

#: Local lanes have all the time that hptool has, and end with it.
_LOCAL_MINUTES = 7 * SECONDS_PER_DAY / SECONDS_PER_MINUTE

#: How long a lane may take to end one order, or itself, before its whole job is cancelled.
_OBEY_S = 20.0
_CANCEL_S = 50.0
_CLOSE_S = 10.0
_LEAVING_S = 3.0

_POLL_S = 0.5
_WAIT_S = 0.1

_ALIVE = (JobState.PENDING, JobState.RUNNING)


class Host(Protocol):
    """What lanes are started by: `LocalLauncher` or `SlurmLauncher`, as `Launcher` says, and jobs of any function."""

    slots: int | None
    poll_s: float

    def submit(self, runs: Sequence[Run], started: Started) -> None:
        """As `Launcher.submit`."""

    def start(
        self,
        function: Callable[[PackJob], None],
        argument: PackJob,
        *,
        name: str,
        nodes: int,
        max_minutes: float,
        token: str,
    ) -> str:
        """Starts a job that calls `function(argument)` once on each of its nodes; its id."""

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        """As `Launcher.find`."""

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """As `Launcher.status`."""

    def cancel(self, job_ids: Sequence[str]) -> None:
        """As `Launcher.cancel`."""

    def log_path(self, job_id: str) -> Path:
        """As `Launcher.log_path`."""

    def close(self) -> None:
        """As `Launcher.close`."""


def lane_minutes(max_minutes: float) -> float:
    """The limit that a lane's job on Slurm asks for where its first run has this one: time for eight such runs."""
    return _TURNS * turn_s(max_minutes) / SECONDS_PER_MINUTE + SCHEDULER_MARGIN_MINUTES


def allocated_gpu_hours(folder: Path, gpus_per_node: int) -> float:
    """What the lanes of a search have held so far, from the start of their jobs, idle or at work."""
    lanes = [Lane(directory=path) for path in folder.glob("packs/[0-9]*")]
    node_s = sum(plan.nodes * lane.held_s() for lane in lanes if (plan := lane.plan()) is not None)
    return node_s * gpus_per_node / SECONDS_PER_HOUR


class PackedLauncher:
    """Runs as orders of lanes, each lane a job of `host`; their files lie in `folder`, the same in every process.

    A run's job id is JOB#NUMBER: the lane's job, and the number of the order, which no two of a search share. Other ids
    are the host's: of a search that was begun with a job for each run. A lane ends when nothing was ordered for
    `idle_s`; without it, local ones wait as long as this process lives. One that takes no orders submits runs as the
    host does, and only knows what became of earlier orders.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, host: Host, *, idle_s: float | None = None, takes_orders: bool = True
    ) -> None:
        # A lane carries out one order at a time; the next is best chosen when the one before is known.
        self.slots: int | None = 1 if takes_orders else host.slots
        self.poll_s = min(_POLL_S, host.poll_s)
        self._takes_orders = takes_orders
        self._cluster = cluster
        self._packs = folder / "packs"
        self._host = host
        self._is_local = cluster.scheduler == "local"
        self._idle_s = (math.inf if self._is_local else IDLE_S) if idle_s is None else idle_s
        self._lanes: dict[int, Lane] = {}  # by the numbers of their orders
        self._final: dict[int, JobStatus] = {}

    def submit(self, runs: Sequence[Run], started: Started) -> None:
        """As `Launcher.submit`."""
        if not self._takes_orders:
            self._host.submit(runs, started)
            return
        for run in runs:
            lane = self._lane_for(run)
            order = Order(name=run.name, job=node_job(run, self._cluster, None), token=run.token)
            # No interruption between an order and the note of its id, or it would be nobody's.
            with blocked(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                number = max((n for other in self._all_lanes() for n in other.numbers()), default=0) + 1
                lane.write(order, number)
                started(run, f"{_job_id(lane)}#{number}")

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        """As `Launcher.find`."""
        found = {}
        for lane in self._all_lanes():
            for number in lane.numbers():
                order = lane.order(number)
                if order is not None and order.token and order.token in tokens:
                    found[order.token] = f"{_job_id(lane)}#{number}"
        return self._host.find([token for token in tokens if token not in found]) | found

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """As `Launcher.status`."""
        others = [job_id for job_id in job_ids if not _number(job_id)]
        found = dict(self._host.status(others)) if others else {}
        numbers = {job_id: number for job_id in job_ids if (number := _number(job_id))}
        lanes = {number: self._lane_of(number) for number in numbers.values() if number not in self._final}
        states = self._job_states([lane for lane in lanes.values() if lane is not None])
        for job_id, number in numbers.items():
            lane = lanes.get(number)
            if lane is not None:
                # The note is read after the job's state: what an ended lane has not noted, it has not done.
                found[job_id] = self._order_status(lane, number, states[lane.directory])
            else:
                unknown = JobStatus(state=JobState.LOST, detail="there is no such order", meaning=FailureKind.LOST)
                found[job_id] = self._final.get(number, unknown)
        return found

    def cancel(self, job_ids: Sequence[str]) -> None:
        """As `Launcher.cancel`; a lane that does not obey is cancelled as a whole."""
        others = [job_id for job_id in job_ids if not _number(job_id)]
        if others:
            self._host.cancel(others)
        orders = [job_id for job_id in job_ids if _number(job_id)]
        for number in map(_number, orders):
            lane = self._lane_of(number)
            if lane is not None and number not in self._final:
                lane.cancel(number).touch()
        begun = time.monotonic()
        while left := [job_id for job_id, status in self.status(orders).items() if status.state in _ALIVE]:
            waited_s = time.monotonic() - begun
            if waited_s > _CANCEL_S:
                raise LaunchError(f"runs {', '.join(left)} may still run {_CANCEL_S:g} s after they were cancelled")
            if waited_s > _OBEY_S:
                self._host.cancel(sorted({job_id.rpartition("#")[0] for job_id in left}))
            time.sleep(_WAIT_S)

    def log_path(self, job_id: str) -> Path:
        """As `Launcher.log_path`: of the order, and of the lane where that has none or took it along with its end."""
        number = _number(job_id)
        lane = self._lane_of(number) if number else None
        if lane is None:
            return self._host.log_path(job_id)
        own, job, note = lane.log_path(number), lane.job(), lane.note(number)
        is_taken_along = lane.end.exists() and note is not None and note.state is OrderState.BEGUN
        return Path(job.log_path) if job is not None and (is_taken_along or not own.exists()) else own

    def close(self) -> None:
        """As `Launcher.close`: the lanes end, at once where they wait for orders or for their nodes."""
        lanes = [lane for lane in self._all_lanes() if not lane.end.exists()]
        for lane in lanes:
            lane.closed.touch()  # also one that nobody has noted, if it lives: it ends when it sees this
        try:
            lanes = [lane for lane in lanes if self._has_job(lane)]
        except BusyError:  # then those that nobody noted have to end by themselves
            lanes = [lane for lane in lanes if lane.job() is not None]
        until = time.monotonic() + _CLOSE_S
        while time.monotonic() < until and any(lane.ready() and not lane.over.exists() for lane in self._alive(lanes)):
            time.sleep(_WAIT_S)
        until = time.monotonic() + _LEAVING_S
        while time.monotonic() < until and any(lane.over.exists() for lane in self._alive(lanes)):
            time.sleep(_WAIT_S)
        left = self._alive(lanes)
        # One that has said so ends by itself, also where the scheduler does not answer.
        ending = [_job_id(lane) for lane in left if lane.over.exists()]
        stuck = [_job_id(lane) for lane in left if _job_id(lane) not in ending]
        if ending:
            with contextlib.suppress(LaunchError):
                self._host.cancel(ending)
        if stuck:
            self._host.cancel(stuck)
        self._host.close()

    def _lane_for(self, run: Run) -> Lane:
        """A living lane with the run's number of nodes and time for it; a new one where there is none."""
        for lane in reversed(self._all_lanes()):
            plan = lane.plan()
            is_over = lane.closed.exists() or lane.over.exists() or lane.end.exists()
            if plan is None or plan.nodes != run.nodes or is_over:
                continue
            if self._has_job(lane) and self._alive([lane]):
                if _left_s(lane, plan) > turn_s(run.max_minutes):
                    return lane
                lane.closed.touch()  # it ends when it has carried out what it has
        return self._open_lane(run)

    def _has_job(self, lane: Lane) -> bool:
        """Its launcher may have been ended before it could note the job: then the job's mark tells."""
        plan = lane.plan()
        if lane.job() is None and plan is not None:
            job_id = self._host.find([plan.token]).get(plan.token)
            if job_id is not None:
                lane.write(LaneJob(job_id=job_id, log_path=str(self._host.log_path(job_id))))
        return lane.job() is not None

    def _open_lane(self, run: Run) -> Lane:
        limit = _LOCAL_MINUTES if self._is_local else lane_minutes(run.max_minutes)
        minutes = limit - SCHEDULER_MARGIN_MINUTES  # what is left after the imports
        lane = Lane(directory=self._packs.absolute() / f"{len(self._all_lanes()) + 1:03}")
        plan = LanePlan(nodes=run.nodes, minutes=minutes, token=f"lane-{uuid.uuid4().hex[:12]}")
        pack = PackJob(
            directory=str(lane.directory),
            nodes=run.nodes,
            accelerator="cpu" if self._cluster.gpu.device == "cpu" else "gpu",
            minutes=minutes,
            idle_s=self._idle_s,
            owner_pid=os.getpid() if self._is_local else None,
            environment=worker_environment(self._cluster),
        )
        lane.write(plan)
        # No signal may be blocked here: a local job would never hear it. One that interrupts this leaves a lane
        # without `job.json`, which its token finds or `closed` ends.
        try:
            job_id = self._host.start(
                run_pack,
                pack,
                name=f"hptool-{run.directory.parent.parent.name}",
                nodes=run.nodes,
                max_minutes=limit,
                token=plan.token,
            )
        except LaunchError:
            lane.closed.touch()  # if it comes to life all the same, it ends at once
            raise
        lane.write(LaneJob(job_id=job_id, log_path=str(self._host.log_path(job_id))))
        return lane

    def _all_lanes(self) -> list[Lane]:
        return [Lane(directory=path) for path in sorted(self._packs.glob("[0-9]*"))]

    def _lane_of(self, number: int) -> Lane | None:
        if number not in self._lanes:
            self._lanes |= {n: lane for lane in self._all_lanes() for n in lane.numbers()}
        return self._lanes.get(number)

    def _alive(self, lanes: Sequence[Lane]) -> list[Lane]:
        states = self._job_states(lanes)
        return [lane for lane in lanes if states[lane.directory].state in _ALIVE]

    def _job_states(self, lanes: Iterable[Lane]) -> dict[Path, JobStatus]:
        """The state of each lane's job, by its directory."""
        ids = {lane.directory: _job_id(lane) for lane in lanes}
        ends = {path: Lane(directory=path).end for path in ids}
        found = {path: _read_end(end) for path, end in ends.items() if end.exists()}
        asked = [job_id for path, job_id in ids.items() if path not in found]
        answers = self._host.status(asked) if asked else {}
        for path in ids.keys() - found.keys():
            found[path] = answers[ids[path]]
            if found[path].state not in _ALIVE:  # for good, also when the scheduler has forgotten it
                files.write_text(ends[path], files.json_text(found[path]))
                self._put_to_rest(Lane(directory=path), found[path])
        return found

    def _put_to_rest(self, lane: Lane, end: JobStatus) -> None:
        """Takes back what the lane has left to do, for it is run elsewhere.

        A node that the scheduler has lost sight of may go on; what it notes from now on changes nothing.
        """
        lane.closed.touch()
        for number in lane.numbers():
            note = lane.note(number)
            if note is None or note.state is OrderState.BEGUN:
                self._final[number] = self._order_status(lane, number, end)
                lane.cancel(number).touch()

    def _order_status(self, lane: Lane, number: int, job: JobStatus) -> JobStatus:
        if number in self._final:
            return self._final[number]
        note = lane.note(number)
        if note is None:
            return _waiting_status(lane, number, job)
        if note.state is OrderState.BEGUN:
            return job
        is_withdrawn = note.state is OrderState.WITHDRAWN
        state = JobState.LOST if is_withdrawn else JobState.ENDED
        status = JobStatus(state=state, detail=note.detail, meaning=note.meaning, may_run_again=is_withdrawn)
        self._final[number] = status
        return status


def _waiting_status(lane: Lane, number: int, job: JobStatus) -> JobStatus:
    """Of an order that has not begun."""
    is_ready = lane.ready() is not None
    if job.state not in _ALIVE:
        # A lane that never took an order, and not by somebody's hand, will not do better the next time.
        failed = not is_ready and job.meaning is not FailureKind.LOST
        return job if failed else _never_begun(f"its lane ended before its turn: {job.detail}")
    if not is_ready:
        if lane.cancel(number).exists():  # as the lane will see before it begins anything
            return _never_begun("cancelled before its turn")
        prepares = job.state is JobState.RUNNING
        return JobStatus(state=JobState.PENDING, detail=f"job {_job_id(lane)} prepares") if prepares else job
    if lane.over.exists():
        return _never_begun(f"its lane ended before its turn: {lane.over.read_text(encoding='utf-8').strip()}")
    return JobStatus(state=JobState.PENDING, detail=f"waits for its turn in job {_job_id(lane)}")


def _left_s(lane: Lane, plan: LanePlan) -> float:
    """The lane's time beyond its open orders at their limits."""
    ready = lane.ready()
    left_s = plan.minutes * SECONDS_PER_MINUTE if ready is None else ready.ends_at - time.time()
    for number in lane.numbers():
        note, order = lane.note(number), lane.order(number)
        if order is not None and (note is None or note.state is OrderState.BEGUN):
            left_s -= turn_s(order.job.max_minutes)
    return left_s


def _read_end(path: Path) -> JobStatus:
    status: JobStatus = files.parse_json(files.read_text(path), JobStatus, str(path))
    return status


def _never_begun(detail: str) -> JobStatus:
    return JobStatus(state=JobState.LOST, detail=detail, meaning=FailureKind.LOST, may_run_again=True)


def _number(job_id: str) -> int:
    """Of the order; 0, which none has, where the id is none of a lane's."""
    number = job_id.rpartition("#")[2]
    return int(number) if "#" in job_id and number.isdecimal() else 0


def _job_id(lane: Lane) -> str:
    job = lane.job()
    return job.job_id if job is not None else ""
