"""The runs of a search while they are under way: order, launch, collect, until nothing is left to do."""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType

from hptool import launch
from hptool.agenda import Agenda, Task
from hptool.cost import Dispatch
from hptool.errors import BusyError, LaunchError
from hptool.facts import Cluster
from hptool.measurement import AnyOutcome, Failure, FailureKind, Measurement, ServingMeasurement
from hptool.results import OutcomeRecord, ResultsDirectory, Status, Submission
from hptool.secrets import redact
from hptool.strategy import Stop, Wait
from hptool.units import SECONDS_PER_HOUR, SECONDS_PER_MINUTE
from hptool.watch import INTERRUPTED, MEASURING, Screen, Snapshot, duration, snapshot

#: How long a job's files may take to appear after the scheduler says that it ended (shared file systems lag).
_SETTLE_S = 5.0

#: How often a wait says what it waits for.
_TELL_S = 30.0

#: How often those who watch from elsewhere are told, where nothing happens.
_STATUS_S = 5.0

#: Waits after a scheduler has refused a job for now: twice as long each time, within these.
_BACK_OFF_S = (5.0, 300.0)


def planned_run(results: ResultsDirectory, run: str, *, nodes: int, max_minutes: float, token: str = "") -> launch.Run:
    """What the launcher needs to know of a run."""
    return launch.Run(name=run, directory=results.run_directory(run), nodes=nodes, max_minutes=max_minutes, token=token)


@dataclass(slots=True, kw_only=True)
class _Flight:
    """A run under way: since when it runs and since when it has ended, as far as this process has seen."""

    submission: Submission
    task: Task | None = None  # None where an earlier process started it
    state: str = "submitting"
    running_since: float | None = None
    ended_since: float | None = None


def spent_gpu_hours(cluster: Cluster, results: ResultsDirectory, records: Collection[OutcomeRecord]) -> float:
    """What all jobs have held: those of one run, and allocations in which runs follow each other, idle or at work."""
    in_runs = sum(record.gpu_hours for record in records)
    own_jobs = sum(record.gpu_hours for record in records if "#" not in (record.job_id or ""))
    return max(in_runs, own_jobs + launch.allocated_gpu_hours(results.path / "jobs", cluster.gpus_per_node))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """How a campaign acts: the way its runs are submitted, who takes them, and who is told."""

    dispatch: Dispatch
    launcher: launch.Launcher
    screen: Screen


class Campaign:
    """The runs under way: what was submitted, and how an end is turned into an outcome."""

    def __init__(self, agenda: Agenda, results: ResultsDirectory, work: Work) -> None:
        self.agenda = agenda
        self.dispatch, self.launcher, self.screen = work.dispatch, work.launcher, work.screen
        self.results = results
        self.outcomes = results.outcomes()
        self.under_way: dict[str, _Flight] = {}  # by run
        self._submissions = results.submissions()
        # What was lost before this process does not count: whoever resumes knows that the trouble is over.
        self._lost_before = {
            run for run, x in self.outcomes.items() if x.failure and x.failure.kind is FailureKind.LOST
        }
        self._started = time.monotonic()
        before = results.read_status()
        self._earlier_s = before.elapsed_s if before is not None else 0.0
        self._told_at = self._status_at = self._started
        self._retry_at, self._back_off_s = self._started, 0.0
        self._decided: tuple[tuple[int, frozenset[str]], str | None] | None = None
        self._has_taken_over = False
        self._doing = MEASURING

    # ------------------------------------------------------------ what is known

    def known(self) -> list[OutcomeRecord]:
        """The runs that ended, as far as they say something to this process."""
        return [record for run, record in self.outcomes.items() if run not in self._lost_before]

    def _expected_s(self, run: Task | Submission) -> float:
        most_s = self.agenda.limits.max_minutes_per_run * SECONDS_PER_MINUTE
        return self.dispatch.overhead_s + min(self.agenda.expected_s(run), most_s)

    def snapshot(self) -> Snapshot:
        """How things stand, for those who watch."""
        return snapshot(self.results, self._submissions, self.outcomes, self._status(), at_work=True)

    def _status(self) -> Status:
        states = {run: flight.state for run, flight in self.under_way.items()}
        elapsed_s = self._earlier_s + time.monotonic() - self._started
        return Status(doing=self._doing, elapsed_s=elapsed_s, gpu_hours=self._spent_gpu_hours(), states=states)

    def _spent_gpu_hours(self) -> float:
        return spent_gpu_hours(self.agenda.cluster, self.results, self.outcomes.values())

    # ------------------------------------------------------------ starting

    def take_over(self) -> None:
        """Collect what an earlier process submitted: outcomes that it did not record, jobs that still live.

        Once only. BusyError where the scheduler cannot be asked now: without its word a run might be made twice.
        """
        if self._has_taken_over:
            return
        open_runs = {
            run: s for run, s in self._submissions.items() if run not in self.outcomes and self.agenda.knows(s.name)
        }
        # It may have died between the scheduler's answer and its note of it.
        unnoted = [s.token for s in open_runs.values() if s.job_id is None]
        found = self.launcher.find(unnoted) if unnoted else {}
        for submission in open_runs.values():
            if submission.job_id is None and submission.token in found:
                self._note(replace(submission, job_id=found[submission.token]))
        job_ids = {run: job_id for run in open_runs if (job_id := self._submissions[run].job_id) is not None}
        states = self.launcher.status(list(job_ids.values())) if job_ids else {}
        for run in open_runs:
            job_id = job_ids.get(run)
            alive = job_id is not None and states[job_id].state in (launch.JobState.PENDING, launch.JobState.RUNNING)
            flight = _Flight(submission=self._submissions[run])
            outcome = self.results.read_outcome(run)
            if alive:
                self.screen.say(f"job {job_id} of an earlier process still runs {run}; waiting for it")
                self.under_way[run] = flight
            elif outcome is not None:
                self._settle(flight, outcome)
        self._has_taken_over = True

    def _note(self, submission: Submission) -> None:
        self._submissions[submission.run] = submission
        self.results.record_submission(submission)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Start these runs; BusyError where the scheduler does not take them all now, and some are left for later."""
        runs = []
        for task in tasks:
            submission = Submission(
                name=task.name,
                run=self.results.prepare_run(task.name, self.agenda.texts(task), self.under_way),
                token=uuid.uuid4().hex[:12],
                nodes=task.nodes,
                gpus=task.gpus,
                steps=task.steps,
                parts=task.parts,
                predicted_step_time_s=task.predicted_step_time_s,
            )
            self._note(submission)  # before the job is there: a job that nobody knows of would be run twice
            self.under_way[submission.run] = _Flight(submission=submission, task=task)
            runs.append(
                planned_run(
                    self.results,
                    submission.run,
                    nodes=task.nodes,
                    max_minutes=self.agenda.limits.max_minutes_per_run,
                    token=submission.token,
                )
            )
        try:
            self.launcher.submit(runs, self._was_started)
        finally:
            for run in runs:
                if self.under_way[run.name].submission.job_id is None:
                    del self.under_way[run.name]

    def _was_started(self, run: launch.Run, job_id: str) -> None:
        flight = self.under_way[run.name]
        flight.submission = replace(flight.submission, job_id=job_id)
        self._note(flight.submission)
        nodes = f"{run.nodes} node{'s' if run.nodes > 1 else ''}"
        if flight.task is not None:
            self.screen.say(f"job {job_id}: {run.name}: {flight.task.what} on {nodes}, {flight.task.why}")

    # ------------------------------------------------------------ looking

    def collect(self) -> None:
        """Look at every job under way once, and record those that ended."""
        job_ids = {run: f.submission.job_id for run, f in self.under_way.items() if f.submission.job_id is not None}
        states = self.launcher.status(list(job_ids.values())) if job_ids else {}
        for run, job_id in job_ids.items():
            self._look(self.under_way[run], job_id, states[job_id], time.monotonic())
        now = time.monotonic()
        if self.under_way and now - self._told_at > _TELL_S:
            self._told_at = now
            self.screen.say(f"waiting for {', '.join(map(self._progress, self.under_way.values()))}")

    def _look(self, flight: _Flight, job_id: str, status: launch.JobStatus, now: float) -> None:
        run = flight.submission.run
        state = f"{status.state.value}{f', {status.detail}' if status.detail else ''}"
        if flight.state != state:
            flight.state = state
            self._status_at = 0.0
            if status.state in (launch.JobState.PENDING, launch.JobState.RUNNING):  # an end is told with its outcome
                self.screen.say(f"{run}: {state}")
        if status.state is launch.JobState.PENDING:
            flight.running_since = None  # queued again by the scheduler
        elif status.state is launch.JobState.RUNNING:
            flight.running_since = flight.running_since or now
            limit_s = self.agenda.limits.max_minutes_per_run * SECONDS_PER_MINUTE + launch.OVERDUE_S
            if now - flight.running_since > limit_s:
                self.launcher.cancel([job_id])
                message = f"still running {limit_s:.0f} s after its start; cancelled"
                outcome = self.results.read_outcome(run)
                self._settle(flight, outcome or Failure(kind=FailureKind.TIMEOUT, message=message))
        else:
            # The measurement may still be on its way through a shared file system.
            flight.ended_since = flight.ended_since or now
            outcome = self.results.read_outcome(run)
            if outcome is not None or now - flight.ended_since >= _SETTLE_S:
                self._end(flight, job_id, status, outcome)

    def _end(self, flight: _Flight, job_id: str, status: launch.JobStatus, outcome: AnyOutcome | None) -> None:
        if outcome is not None:
            self._settle(
                flight, outcome, may_run_again=isinstance(outcome, Failure) and outcome.kind is FailureKind.LOST
            )
        elif flight.task is None and status.state is launch.JobState.LOST:
            # Cancelled with its search, and forgotten since: no failure of the layout.
            del self.under_way[flight.submission.run]
            self.screen.say(f"{flight.submission.run}: {status.detail}; its layout will be run again")
        else:
            self._settle(flight, self._without_files(job_id, status), may_run_again=status.may_run_again)

    def _progress(self, flight: _Flight) -> str:
        """A run under way and how far it is, as far as its job has said so."""
        run = flight.submission.run
        told = self.results.read_progress(run)
        return f"{run} (step {told.step} of {told.of})" if told else f"{run} ({flight.state})"

    def _without_files(self, job_id: str, status: launch.JobStatus) -> Failure:
        log = self.launcher.log_path(job_id)
        text = log.read_text(errors="replace")[-10_000:] if log.is_file() else ""
        kind = status.meaning
        if "oom-kill" in text or "memory limit" in text or "Out Of Memory" in text:
            kind = FailureKind.OOM
        own = [line for line in text.strip().splitlines() if not line.startswith("submitit ")]
        last = redact((own or [""])[-1], {**os.environ, **self.agenda.cluster.environment})
        return Failure(kind=kind, message=f"{status.detail}{f'; last line: {last}' if last else ''}", log_path=str(log))

    def _settle(self, flight: _Flight, outcome: AnyOutcome, *, may_run_again: bool = False) -> None:
        submission = flight.submission
        self.under_way.pop(submission.run, None)
        record = OutcomeRecord(
            name=submission.name,
            run=submission.run,
            job_id=submission.job_id,
            nodes=submission.nodes,
            gpus=submission.gpus,
            steps=submission.steps,
            parts=submission.parts,
            ran_s=0.0,
            measurement=outcome if isinstance(outcome, Measurement) else None,
            serving=outcome if isinstance(outcome, ServingMeasurement) else None,
            failure=outcome if isinstance(outcome, Failure) else None,
            may_run_again=may_run_again,
        )
        record = replace(record, ran_s=self._ran_s(flight, record))
        failure = record.failure
        self.results.record_outcome(record)
        self.outcomes[submission.run] = record
        self._status_at = 0.0
        if failure is None:
            self.screen.say(f"[{len(self.outcomes)}] {submission.run}: {self.agenda.said(record, submission)}")
        else:
            again = "; none of the layout's doing, to be run again" if may_run_again else ""
            self.screen.say(f"[{len(self.outcomes)}] {submission.run}: {failure.kind.value}: {failure.message}{again}")

    def _ran_s(self, flight: _Flight, record: OutcomeRecord) -> float:
        """How long the run held its GPUs: as far as it was seen, or else as its own clock says."""
        seen_s = time.monotonic() - flight.running_since if flight.running_since is not None else 0.0
        return max(self.agenda.own_s(record), seen_s)

    # ------------------------------------------------------------ deciding

    def next_tasks(self) -> tuple[list[Task], str | None]:
        """What to start now, as many as may run at once; or why nothing is left to start, when all has ended."""
        known = self.known()
        flying: list[Task | Submission] = [flight.submission for flight in self.under_way.values()]
        tasks: list[Task] = []
        slots = self.launcher.slots if self.dispatch.parallel is None else self.dispatch.parallel
        while slots is None or len(flying) < slots:
            task = self.agenda.next(known, flying)
            if isinstance(task, Wait):
                return tasks, None
            if isinstance(task, Stop):
                return tasks, task.why
            if (why := self._too_much(task, flying)) is not None:
                return tasks, why
            tasks.append(task)
            flying.append(task)
        return tasks, None

    def _too_much(self, task: Task, flying: Sequence[Task | Submission]) -> str | None:
        """Why a run is more than the search may cost; None where it is not."""
        limits, per_node = self.agenda.limits, self.agenda.cluster.gpus_per_node
        run_s = self._expected_s(task)
        if limits.max_hours is not None and time.monotonic() + run_s > self._deadline(limits.max_hours):
            return f"--max-hours {limits.max_hours:g} leaves no time for another run"
        if limits.budget_gpu_hours is None:
            return None
        gpu_s = sum(self._expected_s(run) * run.nodes * per_node for run in (*flying, task))
        spent = self._spent_gpu_hours() + gpu_s / SECONDS_PER_HOUR
        if spent > limits.budget_gpu_hours:
            return (
                f"another run would exceed --budget-gpu-hours {limits.budget_gpu_hours:g}: "
                f"with it the search is expected to have cost {spent:.3g}"
            )
        return None

    def _deadline(self, max_hours: float) -> float:
        return self._started + max_hours * SECONDS_PER_HOUR

    def run(self) -> str:
        """Start and collect until nothing is left to do; why the search ended."""
        max_hours = self.agenda.limits.max_hours
        while True:
            self.collect()
            why = self._go_on() if time.monotonic() >= self._retry_at else None
            if why is not None and not self.under_way:
                self._attempt(self.launcher.close)
                self.finish(f"done: {why}")
                return why
            if max_hours is not None and time.monotonic() > self._deadline(max_hours):
                self.cancel()
                why = f"--max-hours {max_hours:g} are over; --resume goes on"
                self.finish(why)
                return why
            self._tell()
            time.sleep(self.launcher.poll_s)

    def _go_on(self) -> str | None:
        """Start what there is to start; why nothing is left, where that is so. A busy scheduler is left alone first."""
        try:
            self.take_over()
            known = len(self.outcomes), frozenset(self.under_way)
            if self._decided is not None and self._decided[0] == known:
                return self._decided[1]  # nothing has happened since
            tasks, why = self.next_tasks()
            if tasks:
                self.submit(tasks)
        except BusyError as error:
            low_s, high_s = _BACK_OFF_S
            self._back_off_s = min(high_s, max(low_s, 2 * self._back_off_s))
            self._retry_at = time.monotonic() + self._back_off_s
            self.screen.say(f"{error}; trying again in {duration(self._back_off_s)}")
            return None
        self._back_off_s = 0.0
        self._decided = (len(self.outcomes), frozenset(self.under_way)), why
        return why

    def _tell(self) -> None:
        self.screen.show(self.snapshot)
        if time.monotonic() - self._status_at > _STATUS_S:
            self._status_at = time.monotonic()
            self._write_status()

    def finish(self, doing: str) -> None:
        """What those who watch are told at the end."""
        self._doing = doing
        self._write_status()

    def _write_status(self) -> None:
        with contextlib.suppress(OSError):  # a full disk ends a search where something would be lost by it
            self.results.write_status(self._status())

    def cancel(self) -> None:
        """End every job under way, or say which may still run; what ended is recorded, the rest left for --resume."""
        job_ids = [f.submission.job_id for f in self.under_way.values() if f.submission.job_id is not None]
        if job_ids:
            self.screen.say(f"cancelling {', '.join(job_ids)}")
            self._attempt(lambda: self.launcher.cancel(job_ids))
        self._attempt(self.launcher.close)
        for run, flight in list(self.under_way.items()):
            outcome = self.results.read_outcome(run)
            if isinstance(outcome, (Measurement, ServingMeasurement)):
                self._settle(flight, outcome)
        if self.under_way:
            self.screen.say(f"left for --resume: {', '.join(self.under_way)}")

    def _attempt(self, act: Callable[[], None]) -> None:
        """What is said where it fails, but keeps nothing from being done that comes after it."""
        try:
            act()
        except LaunchError as error:
            self.screen.say(str(error))


def measure(agenda: Agenda, results: ResultsDirectory, work: Work) -> str:
    """Start and collect until the agenda is done, and say why it ended; an interruption leaves no job behind."""
    campaign = Campaign(agenda, results, work)
    if campaign.outcomes:
        work.screen.say(f"{len(campaign.outcomes)} runs ended before, and are not repeated")
    with _interrupted_once() as be_deaf:
        try:
            return campaign.run()
        except BaseException:
            be_deaf()
            campaign.cancel()
            campaign.finish(INTERRUPTED)
            raise


@contextlib.contextmanager
def _interrupted_once() -> Iterator[Callable[[], None]]:
    """Within, Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt with their number, but only the first one is heard.

    Whoever is impatient, or sends two of them at once, must not get half of the clearing up. What this gives makes
    the process deaf to them before there was any.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def be_deaf() -> None:
        for number in numbers:
            signal.signal(number, lambda *_: None)  # of SIG_IGN Python complains where one has just come

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        be_deaf()
        raise KeyboardInterrupt(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)
    try:
        yield be_deaf
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
