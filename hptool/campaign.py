"""The runs of a search while they are under way: propose, launch, collect, until nothing is left to do."""

import signal
import time
from collections.abc import Callable, Sequence

from hptool import files, launch, strategy
from hptool.candidates import Layout
from hptool.measurement import Failure, FailureKind, Measurement, Outcome
from hptool.plan import Plan, run_config
from hptool.results import OutcomeRecord, ResultsDirectory, Submission

#: Takes a line for the user.
Say = Callable[[str], None]

#: How long a job's files may take to appear after the scheduler says that it ended (shared file systems lag).
_SETTLE_S = 5.0

#: How often a wait says what it waits for.
_TELL_S = 30.0


def planned_run(plan: Plan, results: ResultsDirectory, layout: Layout) -> launch.Run:
    """What the launcher needs to know of the timed run of a layout."""
    config = run_config(plan.config, layout, plan.request)
    return launch.Run(
        name=layout.name,
        directory=results.run_directory(layout.name),
        nodes=config.trainer.num_nodes,
        max_minutes=plan.request.max_minutes_per_run,
    )


class Campaign:
    """The runs under way: what was submitted, since when it runs, and how an end is turned into an outcome."""

    def __init__(self, plan: Plan, results: ResultsDirectory, say: Say) -> None:
        self.plan = plan
        self.results = results
        self.say = say
        self.launcher = launch.launcher(plan.cluster, results.path / "jobs")
        self.outcomes = results.outcomes()
        self.under_way: dict[str, str] = {}  # layout name -> job id
        self._adopted: set[str] = set()  # of an earlier process
        self._running_since: dict[str, float] = {}
        self._ended_since: dict[str, float] = {}
        self._states: dict[str, str] = {}
        self._told_at = time.monotonic()

    def take_over(self) -> None:
        """Collect what an earlier process submitted: outcomes that it did not record, jobs that still live."""
        open_jobs = {n: s.job_id for n, s in self.results.submissions().items() if n not in self.outcomes}
        states = self.launcher.status(list(open_jobs.values())) if open_jobs else {}
        for name, job_id in open_jobs.items():
            alive = states[job_id].state in (launch.JobState.PENDING, launch.JobState.RUNNING)
            outcome = self.results.read_outcome(name)
            if outcome is not None and not alive:
                self._settle(name, job_id, outcome)
            elif alive:
                self.say(f"job {job_id} of an earlier process still runs {name}; waiting for it")
                self.under_way[name] = job_id
                self._adopted.add(name)

    def submit(self, layouts: Sequence[Layout]) -> None:
        """Start runs of these layouts."""
        runs = []
        for layout in layouts:
            config = run_config(self.plan.config, layout, self.plan.request)
            self.results.prepare_run(layout.name, files.yaml_text(config.document()))
            runs.append(planned_run(self.plan, self.results, layout))
        self.launcher.submit(runs, self._started)

    def _started(self, run: launch.Run, job_id: str) -> None:
        self.under_way[run.name] = job_id
        self.results.record_submission(Submission(name=run.name, job_id=job_id))
        self.say(f"job {job_id}: {run.name} on {run.nodes} node{'s' if run.nodes > 1 else ''}")

    def collect(self) -> None:
        """Look at every job under way once, and record those that ended."""
        states = self.launcher.status(list(self.under_way.values()))
        now = time.monotonic()
        for name, job_id in list(self.under_way.items()):
            status = states[job_id]
            outcome = self.results.read_outcome(name)
            if status.state in (launch.JobState.ENDED, launch.JobState.LOST):
                # The measurement may still be on its way through a shared file system.
                since = self._ended_since.setdefault(name, now)
                if outcome is None and now - since < _SETTLE_S:
                    continue
                if outcome is None and name in self._adopted and status.state is launch.JobState.LOST:
                    # Cancelled with its search, and forgotten since: no failure of the layout.
                    self.say(f"{name}: job {job_id} of an earlier process is gone; it will be run again")
                    self._adopted.remove(name)
                    self._forget(name)
                    continue
                self._settle(name, job_id, outcome or self._without_files(job_id, status))
            elif status.state is launch.JobState.RUNNING:
                since = self._running_since.setdefault(name, now)
                limit_s = self.plan.request.max_minutes_per_run * 60 + launch.OVERDUE_S
                if now - since > limit_s:
                    self.launcher.cancel([job_id])
                    message = f"still running {limit_s:.0f} s after its start; cancelled"
                    self._settle(name, job_id, outcome or Failure(kind=FailureKind.TIMEOUT, message=message))
            self._tell(name, status)
        if self.under_way and now - self._told_at > _TELL_S:
            self._told_at = now
            self.say(f"waiting for {', '.join(self._progress(name) for name in self.under_way)}")

    def _progress(self, name: str) -> str:
        """A layout under way and how far it is, as far as its job has said so."""
        told = self.results.read_progress(name)
        return f"{name} (step {told.step} of {told.of})" if told else f"{name} ({self._states.get(name, 'ending')})"

    def _tell(self, name: str, status: launch.JobStatus) -> None:
        state = f"{status.state.value}{f', {status.detail}' if status.detail else ''}"
        if name in self.under_way and self._states.get(name) != state:
            self._states[name] = state
            self.say(f"{name}: {state}")

    def _without_files(self, job_id: str, status: launch.JobStatus) -> Failure:
        log = self.launcher.log_path(job_id)
        text = log.read_text(errors="replace")[-10_000:] if log.is_file() else ""
        kind = status.meaning
        if "oom-kill" in text or "memory limit" in text or "Out Of Memory" in text:
            kind = FailureKind.OOM
        own = [line for line in text.strip().splitlines() if not line.startswith("submitit ")]
        last = (own or [""])[-1]
        return Failure(kind=kind, message=f"{status.detail}{f'; last line: {last}' if last else ''}", log_path=str(log))

    def _forget(self, name: str) -> None:
        self.under_way.pop(name, None)
        for known in (self._running_since, self._ended_since, self._states):
            known.pop(name, None)

    def _settle(self, name: str, job_id: str, outcome: Outcome) -> None:
        self._forget(name)
        record = OutcomeRecord(
            name=name,
            job_id=job_id,
            measurement=outcome if isinstance(outcome, Measurement) else None,
            failure=outcome if isinstance(outcome, Failure) else None,
        )
        self.results.record_outcome(record)
        self.outcomes[name] = record
        done = f"{len(self.outcomes)}/{self.plan.planned_runs}"
        if isinstance(outcome, Measurement):
            rate = f"{outcome.model_tflops_per_gpu:.4g} TFLOPS/GPU, {outcome.step_time_s:.4g} s a step"
            self.say(f"[{done}] {name}: {rate}")
        else:
            self.say(f"[{done}] {name}: {outcome.kind.value}: {outcome.message}")

    def cancel(self) -> None:
        """End every job under way; what already ended is recorded first, the rest is left for --resume."""
        if not self.under_way:
            return
        self.say(f"cancelling {len(self.under_way)} jobs: {', '.join(self.under_way.values())}")
        with launch.blocked(signal.SIGINT):  # an impatient second Ctrl-C must not leave half of them
            self.launcher.cancel(list(self.under_way.values()))
        for name, job_id in list(self.under_way.items()):
            outcome = self.results.read_outcome(name)
            if isinstance(outcome, Measurement):
                self._settle(name, job_id, outcome)


def measure(plan: Plan, results: ResultsDirectory, say: Say) -> None:
    """Propose, launch and collect until the plan's runs are done; whatever interrupts leaves no job behind."""
    campaign = Campaign(plan, results, say)
    limit = plan.request.limit_search_runs
    known = len(campaign.outcomes)
    if known:
        say(f"{known} of {plan.planned_runs} layouts were run before, and are not run again")
    try:
        campaign.take_over()
        while True:
            tried = {*campaign.outcomes, *campaign.under_way}
            slots = campaign.launcher.slots
            rows = strategy.propose(plan.predictions, tried, limit)
            free = len(rows) if slots is None else max(0, slots - len(campaign.under_way))
            if rows[:free]:
                campaign.submit([plan.predictions.layouts.row(row) for row in rows[:free]])
            if not campaign.under_way:
                return
            time.sleep(campaign.launcher.poll_s)
            campaign.collect()
    except BaseException:
        campaign.cancel()
        raise
