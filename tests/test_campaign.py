"""The runs under way, against a scheduler that does what a test tells it to."""

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from hptool import files, launch
from hptool.agenda import Task
from hptool.campaign import Campaign, Work, measure
from hptool.candidates import Layout, Recompute, SearchSpace
from hptool.cost import Dispatch
from hptool.course import Order
from hptool.errors import BusyError, LaunchError
from hptool.facts import Cluster
from hptool.launch import JobState, JobStatus, Run
from hptool.launch.jobs import node_job
from hptool.measurement import FailureKind
from hptool.plan import Plan, SearchRequest, make_plan
from hptool.results import ResultsDirectory, Status
from hptool.training_agenda import TrainingAgenda
from hptool.watch import INTERRUPTED, Snapshot
from tests import samples
from tests.searches import processes_of, wait_for

LAYOUT = Layout()
RUN = LAYOUT.name
NONE = ((Recompute.NONE, None),)


@dataclass
class Scheduler:
    """A launcher whose jobs are as `answer` says; it takes none while it is `busy`, and knows those in `marked`."""

    folder: Path
    slots: int | None = None
    poll_s: float = 0.0
    answer: JobStatus = field(default_factory=lambda: JobStatus(state=JobState.RUNNING))
    cancelled: list[str] = field(default_factory=list)
    taken: list[Run] = field(default_factory=list)
    busy: bool = False
    marked: dict[str, str] = field(default_factory=dict)
    is_closed: bool = False
    refuses_to_cancel: bool = False

    def submit(self, runs: Sequence[Run], started: launch.Started) -> None:
        if self.busy:
            raise BusyError("sbatch refused: Job violates accounting/QOS policy (job submit limit)")
        for run in runs:
            self.taken.append(run)
            started(run, str(6 + len(self.taken)))

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        return dict.fromkeys(job_ids, self.answer)

    def cancel(self, job_ids: Sequence[str]) -> None:
        self.cancelled += job_ids
        if self.refuses_to_cancel:
            raise LaunchError(f"jobs {', '.join(job_ids)} may still run")

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        if self.busy:
            raise BusyError("Slurm does not answer: Unable to contact slurm controller")
        return {token: self.marked[token] for token in tokens if token in self.marked}

    def log_path(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.log"

    def close(self) -> None:
        self.is_closed = True


class Listener:
    """A screen that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.shown: list[Snapshot] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def show(self, now: Callable[[], Snapshot]) -> None:
        self.shown.append(now())

    def confirm(self, question: str) -> bool:
        raise AssertionError(question)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def said(listener: Listener) -> list[str]:
    return listener.said


def plan_of(results: Path, **asked: Any) -> Plan:
    given: dict[str, Any] = {
        "space": SearchSpace(tp=(1,), pp=(1,), vpp=(1,), mbs=(1,), recompute=NONE),
        "max_minutes_per_run": 1,
    }
    return make_plan(SearchRequest(model="gpt3/tiny", cluster="local", results=results, **given | asked))


def campaign_of(plan: Plan, results: ResultsDirectory, launcher: launch.Launcher, listener: Listener) -> Campaign:
    dispatch = Dispatch(submit="separate", parallel=None, overhead_s=8.0)
    return Campaign(
        TrainingAgenda(plan, plan.course), results, Work(dispatch=dispatch, launcher=launcher, screen=listener)
    )


@pytest.fixture
def campaign(tmp_path: Path, listener: Listener) -> Campaign:
    plan = plan_of(tmp_path / "run")
    results = ResultsDirectory(plan.directory)
    results.begin(plan.document(), resume=False)
    found = campaign_of(plan, results, Scheduler(tmp_path), listener)
    found.submit([agenda_of(found).task(ORDER)])
    return found


ORDER = Order(row=0, steps=8, nodes=1, why="tested")


def agenda_of(campaign: Campaign) -> TrainingAgenda:
    assert isinstance(campaign.agenda, TrainingAgenda)
    return campaign.agenda


def again(campaign: Campaign, listener: Listener) -> Campaign:
    """The next process that looks after the same search."""
    return campaign_of(agenda_of(campaign).plan, campaign.results, campaign.launcher, listener)


def scheduler(campaign: Campaign) -> Scheduler:
    assert isinstance(campaign.launcher, Scheduler)
    return campaign.launcher


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.monotonic() + seconds
    monkeypatch.setattr(time, "monotonic", lambda: now)


def test_a_job_that_neither_supervisor_nor_scheduler_ends_is_cancelled(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign.collect()
    later(monkeypatch, 60 + launch.OVERDUE_S - 5)
    campaign.collect()
    assert not scheduler(campaign).cancelled
    later(monkeypatch, 10)
    campaign.collect()
    assert scheduler(campaign).cancelled == ["7"]
    failure = campaign.outcomes[RUN].failure
    assert failure is not None
    assert failure.kind is FailureKind.TIMEOUT


@pytest.mark.parametrize(
    ("log", "meaning", "kind"),
    [
        ("", FailureKind.LOST, FailureKind.LOST),
        ("slurmstepd: error: Detected 1 oom-kill event(s)", FailureKind.CRASH, FailureKind.OOM),
        ("StepId=1.0 exceeded memory limit (2 > 1), being killed", FailureKind.CRASH, FailureKind.OOM),
        ("Segmentation fault", FailureKind.CRASH, FailureKind.CRASH),
    ],
)
def test_a_job_that_ended_without_a_word_is_judged_by_its_scheduler_and_log(
    log: str, meaning: FailureKind, kind: FailureKind, campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scheduler(campaign).folder / "7.log").write_text(f"{log}\nsubmitit INFO (2026): irrelevant\n")
    scheduler(campaign).answer = JobStatus(state=JobState.ENDED, detail="Slurm ended job 7: FAILED", meaning=meaning)
    campaign.collect()
    assert not campaign.outcomes  # its files may be on their way
    later(monkeypatch, 6)
    campaign.collect()
    failure = campaign.outcomes[RUN].failure
    assert failure is not None
    assert failure.kind is kind
    assert log in failure.message
    assert "irrelevant" not in failure.message


def test_a_measurement_that_arrives_late_counts(campaign: Campaign) -> None:
    scheduler(campaign).answer = JobStatus(state=JobState.ENDED)
    campaign.collect()
    path = campaign.results.run_directory(RUN) / "measurement.json"
    files.write_text(path, files.json_text(samples.measurement()))
    campaign.collect()
    assert campaign.outcomes[RUN].measurement == samples.measurement()


def test_a_wait_says_what_it_waits_for(campaign: Campaign, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(campaign).answer = JobStatus(state=JobState.PENDING, detail="Resources")
    campaign.collect()
    later(monkeypatch, 40)
    campaign.collect()
    assert said[-1] == f"waiting for {RUN} (pending, Resources)"


def test_a_job_of_an_earlier_process_is_waited_for_and_not_repeated(campaign: Campaign, listener: Listener) -> None:
    other = again(campaign, listener)
    other.take_over()
    assert [f.submission.job_id for f in other.under_way.values()] == ["7"]
    assert not other.known()


def test_a_job_whose_id_nobody_noted_is_found_by_its_mark(campaign: Campaign, listener: Listener) -> None:
    # As a process leaves it that dies between the scheduler's answer and its note of it.
    lines = (campaign.results.path / "submissions.jsonl").read_text().splitlines()
    (campaign.results.path / "submissions.jsonl").write_text(lines[0] + "\n")
    assert json.loads(lines[0])["job_id"] is None
    scheduler(campaign).marked = {json.loads(lines[0])["token"]: "7"}
    other = again(campaign, listener)
    other.take_over()
    assert [f.submission.job_id for f in other.under_way.values()] == ["7"]
    assert campaign.results.submissions()[RUN].job_id == "7"


def test_an_earlier_process_is_not_taken_over_before_the_scheduler_answers(
    campaign: Campaign, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (campaign.results.path / "submissions.jsonl").read_text().splitlines()
    (campaign.results.path / "submissions.jsonl").write_text(lines[0] + "\n")
    launcher = scheduler(campaign)
    launcher.marked, launcher.busy, launcher.poll_s = {json.loads(lines[0])["token"]: "7"}, True, 1.0
    launcher.answer = JobStatus(state=JobState.RUNNING)
    clock, slept = time.monotonic(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock + sum(slept))

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        launcher.busy = sum(slept) < 12
        if sum(slept) > 30:
            path = campaign.results.run_directory(RUN) / "measurement.json"
            files.write_text(path, files.json_text(samples.measurement()))
            launcher.answer = JobStatus(state=JobState.ENDED)

    monkeypatch.setattr(time, "sleep", sleep)
    other = again(campaign, listener)
    other.run()
    said = [line for line in listener.said if "Slurm does not answer" in line]
    assert [line.rpartition("trying again in ")[2] for line in said] == ["5 s", "10 s"]
    assert other.outcomes[RUN].job_id == "7"
    assert [run.name for run in launcher.taken].count(RUN) == 1


class Impatient:
    """A screen before which somebody presses Ctrl-C again and again, from the first job on."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.said: list[str] = []
        self._signals = signals

    def say(self, message: str) -> None:
        self.said.append(message)
        if "job 7" in message or "cancelling" in message:
            for signum in self._signals:
                signal.raise_signal(signum)

    def show(self, now: Callable[[], Snapshot]) -> None:
        now()

    def confirm(self, question: str) -> bool:
        raise AssertionError(question)


def test_who_is_impatient_gets_all_of_the_clearing_up(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run")
    results = ResultsDirectory(plan.directory)
    results.begin(plan.document(), resume=False)
    launcher, screen = Scheduler(tmp_path, refuses_to_cancel=True), Impatient(signal.SIGINT, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    dispatch = Dispatch(submit="separate", parallel=None, overhead_s=8.0)
    with pytest.raises(KeyboardInterrupt) as caught:
        measure(TrainingAgenda(plan, plan.course), results, Work(dispatch=dispatch, launcher=launcher, screen=screen))
    assert caught.value.args == (signal.SIGINT,)
    assert launcher.cancelled == ["7"]
    assert launcher.is_closed
    assert screen.said[-3:] == ["cancelling 7", "jobs 7 may still run", f"left for --resume: {RUN}"]
    status = results.read_status()
    assert status is not None
    assert status.doing == INTERRUPTED
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_secrets_reach_local_jobs_by_their_environment_and_no_file(tmp_path: Path, local: Cluster) -> None:
    site = replace(local, environment={"WANDB_API_KEY": "hush-hush", "NCCL_DEBUG": "INFO"})
    run = Run(name="r", directory=tmp_path / "runs" / "r", nodes=1, max_minutes=1)
    assert node_job(run, site, None).environment == {"NCCL_DEBUG": "INFO"}
    launcher = launch.LocalLauncher(site, tmp_path / "jobs")
    backwards = f'printf %s "$WANDB_API_KEY" | rev > {tmp_path}/had'
    job_id = launcher.start(os.system, backwards, name="j", nodes=1, max_minutes=1, token="")
    wait_for(lambda: launcher.status([job_id])[job_id].state is JobState.ENDED)
    assert (tmp_path / "had").read_text().strip() == "hsuh-hsuh"
    assert "WANDB_API_KEY" not in os.environ
    packed = launch.launcher(site, tmp_path / "packed", "packed")
    for each in (launcher, packed):
        each.submit([run], lambda *_: None)
    written = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    packed.close()
    wait_for(lambda: not processes_of(tmp_path))
    assert "00001.json" in written
    assert not [name for name, text in written.items() if b"hush-hush" in text]


def test_a_job_that_was_never_taken_costs_nothing(campaign: Campaign, listener: Listener) -> None:
    lines = (campaign.results.path / "submissions.jsonl").read_text().splitlines()
    (campaign.results.path / "submissions.jsonl").write_text(lines[0] + "\n")
    other = again(campaign, listener)
    other.take_over()
    assert not other.under_way
    assert not other.outcomes
    other.submit([agenda_of(other).task(ORDER)])
    assert list(other.under_way) == [RUN]  # its directory held a config and nothing else


def test_a_job_that_is_gone_without_an_outcome_is_free_to_be_run_again(campaign: Campaign, listener: Listener) -> None:
    (campaign.results.run_directory(RUN) / "logs").mkdir()
    scheduler(campaign).answer = JobStatus(state=JobState.LOST)
    other = again(campaign, listener)
    other.take_over()
    assert not other.under_way
    assert not other.outcomes
    other.submit([agenda_of(other).task(ORDER)])
    assert list(other.under_way) == [f"{RUN}.2"]


def test_an_outcome_that_nobody_recorded_is_recorded_and_not_repeated(campaign: Campaign, listener: Listener) -> None:
    path = campaign.results.run_directory(RUN) / "measurement.json"
    files.write_text(path, files.json_text(samples.measurement()))
    scheduler(campaign).answer = JobStatus(state=JobState.LOST)
    other = again(campaign, listener)
    other.take_over()
    assert other.outcomes[RUN].measurement == samples.measurement()
    assert again(campaign, listener).outcomes[RUN].measurement == samples.measurement()


def test_an_adopted_job_that_is_lost_is_no_failure_but_free_again(
    campaign: Campaign, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = again(campaign, listener)
    other.take_over()  # the scheduler is still asked whether it knows the job
    assert other.under_way
    scheduler(campaign).answer = JobStatus(state=JobState.LOST, meaning=FailureKind.LOST)
    other.collect()
    later(monkeypatch, 6)
    other.collect()
    assert not other.under_way
    assert not other.outcomes
    assert "will be run again" in listener.said[-1]


def test_what_the_scheduler_took_away_is_run_again_and_counts_as_cost(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign.collect()
    later(monkeypatch, 30)
    scheduler(campaign).answer = JobStatus(
        state=JobState.ENDED, detail="NODE_FAIL", meaning=FailureKind.LOST, may_run_again=True
    )
    campaign.collect()
    later(monkeypatch, 6)
    campaign.collect()
    record = campaign.outcomes[RUN]
    assert record.may_run_again
    assert record.gpu_hours == pytest.approx(2 * 36 / 3600, rel=0.1)
    tasks, _ = campaign.next_tasks()
    assert [task.name for task in tasks] == [RUN]


def test_what_somebody_cancelled_is_run_again_only_by_who_resumes(
    campaign: Campaign, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler(campaign).answer = JobStatus(state=JobState.ENDED, detail="CANCELLED by 7", meaning=FailureKind.LOST)
    campaign.collect()
    later(monkeypatch, 6)
    campaign.collect()
    assert campaign.next_tasks()[0] == []
    assert [task.name for task in again(campaign, listener).next_tasks()[0]] == [RUN]


def test_a_job_that_is_queued_again_starts_its_time_anew(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign.collect()
    later(monkeypatch, 50 + launch.OVERDUE_S)
    scheduler(campaign).answer = JobStatus(state=JobState.PENDING, detail="BeginTime")
    campaign.collect()
    scheduler(campaign).answer = JobStatus(state=JobState.RUNNING)
    campaign.collect()
    later(monkeypatch, 50)
    campaign.collect()
    assert not scheduler(campaign).cancelled


def test_a_busy_scheduler_is_asked_again_ever_later(
    campaign: Campaign, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del campaign.under_way[RUN]
    slept: list[float] = []
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock + sum(slept))
    monkeypatch.setattr(time, "sleep", slept.append)
    launcher = scheduler(campaign)
    launcher.poll_s, launcher.busy, launcher.answer = 1.0, True, JobStatus(state=JobState.ENDED)
    tries: list[float] = []
    submit = campaign.submit

    def counted(tasks: Sequence[Task]) -> None:
        tries.append(time.monotonic())
        launcher.busy = len(tries) <= 4
        submit(tasks)

    monkeypatch.setattr(campaign, "submit", counted)
    campaign.run()
    waits = [later_ - earlier for earlier, later_ in itertools.pairwise(tries[:5])]
    assert waits == pytest.approx([5, 10, 20, 40], abs=1.5)
    assert sum("job submit limit" in line and "trying again in" in line for line in said) == 4
    assert RUN in campaign.outcomes
    assert launcher.is_closed


def test_a_budget_ends_the_search_before_it_is_exceeded(tmp_path: Path, listener: Listener) -> None:
    space = SearchSpace(tp=(1, 2), pp=(1, 2), vpp=(1,), mbs=(1, 2), recompute=NONE)
    plan = plan_of(tmp_path / "run", space=space, budget_gpu_hours=0.012, strategy="ranked", max_steps_per_run=8)
    results = ResultsDirectory(plan.directory)
    results.begin(plan.document(), resume=False)
    campaign = campaign_of(plan, results, Scheduler(tmp_path), listener)
    tasks, why = campaign.next_tasks()
    # Some eight seconds of start and eight steps of 0.2 s on two ranks are 0.0053 GPU hours a run.
    assert len(tasks) == 2
    assert why is not None
    assert why.startswith("another run would exceed --budget-gpu-hours 0.012: with it the search is expected to have")
    campaign.submit(tasks)
    assert campaign.next_tasks() == ([], why)


def test_the_time_for_a_search_ends_it_and_leaves_the_rest_to_who_resumes(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    object.__setattr__(campaign.agenda.limits, "max_hours", 0.05)
    campaign.collect()
    later(monkeypatch, 181)
    why = campaign.run()
    assert why == "--max-hours 0.05 are over; --resume goes on"
    assert scheduler(campaign).cancelled == ["7"]
    assert not campaign.outcomes


def test_a_clock_that_jumps_changes_nothing(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.cycle([0.0, 4e9, 86400.0, 1.7e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    for _ in range(5):
        campaign.collect()
    assert not scheduler(campaign).cancelled
    scheduler(campaign).answer = JobStatus(state=JobState.ENDED)
    path = campaign.results.run_directory(RUN) / "measurement.json"
    files.write_text(path, files.json_text(samples.measurement()))
    campaign.collect()
    assert 0 <= campaign.outcomes[RUN].ran_s < 60


def test_those_who_watch_see_each_run(campaign: Campaign) -> None:
    (line,) = campaign.snapshot().lines
    assert (line.run, line.state.value, line.detail) == (RUN, "queued", "submitting")
    (campaign.results.run_directory(RUN) / "progress.json").write_text('{"step": 3, "of": 8, "tokens_per_s": 100.0}')
    (line,) = campaign.snapshot().lines
    assert (line.state.value, line.step, line.of, line.tokens_per_s) == ("running", 3, 8, 100.0)


def test_the_time_of_earlier_processes_counts_for_those_who_watch(campaign: Campaign, listener: Listener) -> None:
    campaign.results.write_status(Status(doing="measuring", elapsed_s=500.0))
    elapsed_s = again(campaign, listener).snapshot().elapsed_s
    assert elapsed_s is not None
    assert 500 <= elapsed_s < 560


def test_after_three_losses_only_who_resumes_tries_again(campaign: Campaign, listener: Listener) -> None:
    lost = samples.failure(FailureKind.LOST, "NODE_FAIL")
    for run in (RUN, f"{RUN}.2", f"{RUN}.3"):
        campaign.results.record_outcome(replace(samples.record(RUN, lost, run=run), may_run_again=True))
    tasks, _ = again(campaign, listener).next_tasks()
    assert [task.name for task in tasks] == [RUN]
    campaign.under_way.clear()
    campaign.outcomes.update(campaign.results.outcomes())  # as they came in while this process was there
    assert campaign.next_tasks()[0] == []
