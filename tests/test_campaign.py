"""The runs under way, against a scheduler that does what a test tells it to."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hptool import files, launch
from hptool.campaign import Campaign
from hptool.candidates import Layout, SearchSpace
from hptool.launch import JobState, JobStatus, Run
from hptool.measurement import FailureKind
from hptool.plan import SearchRequest, make_plan
from hptool.results import ResultsDirectory, Submission
from tests import samples

LAYOUT = Layout()


@dataclass
class Scheduler:
    """A launcher whose one job is as `answer` says."""

    folder: Path
    slots: int | None = None
    poll_s: float = 0.0
    answer: JobStatus = field(default_factory=lambda: JobStatus(state=JobState.RUNNING))
    cancelled: list[str] = field(default_factory=list)

    def submit(self, runs: Sequence[Run], started: launch.Started) -> None:
        for run in runs:
            started(run, "7")

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        return dict.fromkeys(job_ids, self.answer)

    def cancel(self, job_ids: Sequence[str]) -> None:
        self.cancelled += job_ids

    def log_path(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.log"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def campaign(tmp_path: Path, said: list[str]) -> Campaign:
    space = SearchSpace(tp=(1,), pp=(1,), vpp=(1,), mbs=(1,))
    plan = make_plan(
        SearchRequest(model="gpt3/tiny", cluster="local", space=space, results=tmp_path / "run", max_minutes_per_run=1)
    )
    results = ResultsDirectory(plan.directory)
    results.begin(plan.document(), resume=False)
    found = Campaign(plan, results, said.append)
    found.launcher = Scheduler(tmp_path)
    found.submit([LAYOUT])
    return found


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
    failure = campaign.outcomes[LAYOUT.name].failure
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
    failure = campaign.outcomes[LAYOUT.name].failure
    assert failure is not None
    assert failure.kind is kind
    assert log in failure.message
    assert "irrelevant" not in failure.message


def test_a_measurement_that_arrives_late_counts(campaign: Campaign) -> None:
    scheduler(campaign).answer = JobStatus(state=JobState.ENDED)
    campaign.collect()
    path = campaign.results.run_directory(LAYOUT.name) / "measurement.json"
    files.write_text(path, files.json_text(samples.measurement()))
    campaign.collect()
    assert campaign.outcomes[LAYOUT.name].measurement == samples.measurement()


def test_a_wait_says_what_it_waits_for(campaign: Campaign, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler(campaign).answer = JobStatus(state=JobState.PENDING, detail="Resources")
    campaign.collect()
    later(monkeypatch, 40)
    campaign.collect()
    assert said[-1] == f"waiting for {LAYOUT.name} (pending, Resources)"


def test_a_job_of_an_earlier_process_is_waited_for_and_not_repeated(campaign: Campaign) -> None:
    campaign.results.record_submission(Submission(name=LAYOUT.name, job_id="7"))
    again = Campaign(campaign.plan, campaign.results, lambda _: None)
    again.launcher = campaign.launcher
    again.take_over()
    assert again.under_way == {LAYOUT.name: "7"}


def test_a_job_that_is_gone_without_an_outcome_is_free_to_be_run_again(campaign: Campaign) -> None:
    scheduler(campaign).answer = JobStatus(state=JobState.LOST)
    again = Campaign(campaign.plan, campaign.results, lambda _: None)
    again.launcher = campaign.launcher
    again.take_over()
    assert not again.under_way
    assert not again.outcomes


def test_an_adopted_job_that_is_lost_is_no_failure_but_free_again(
    campaign: Campaign, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Campaign(campaign.plan, campaign.results, said.append)
    again.launcher = campaign.launcher
    again.take_over()  # the scheduler is still asked whether it knows the job
    assert again.under_way
    scheduler(campaign).answer = JobStatus(state=JobState.LOST, meaning=FailureKind.LOST)
    again.collect()
    later(monkeypatch, 6)
    again.collect()
    assert not again.under_way
    assert not again.outcomes
    assert "will be run again" in said[-1]
