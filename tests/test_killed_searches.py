"""A search that is killed again and again at any moment, beside a scheduler that lives on: nothing lost, nothing twice.

The scheduler is a directory: its jobs are processes of their own that nobody's death disturbs, as Slurm's are. They
train nothing, but leave a measurement as the worker does.
"""

import json
import math
import os
import random
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from hptool import course, files, launch
from hptool.campaign import Campaign, Work
from hptool.candidates import Recompute, SearchSpace
from hptool.cost import Dispatch
from hptool.launch import JobState, JobStatus, Run
from hptool.measurement import FailureKind
from hptool.plan import Plan, SearchRequest, make_plan
from hptool.results import ResultsDirectory
from hptool.training_agenda import TrainingAgenda
from tests import samples
from tests.searches import outcome_lines
from tests.test_campaign import Listener

KILLS = 50

#: How long a process may work before it is killed: from its first look at the directory to well into its jobs.
LONGEST_S = 0.6

JOB_S = 0.25


@dataclass
class Detached:
    """A scheduler whose jobs survive whoever submitted them; it dawdles, so that a kill finds it at every point."""

    folder: Path
    dawdle: random.Random
    slots: int | None = 2
    poll_s: float = 0.02

    def submit(self, runs: Sequence[Run], started: launch.Started) -> None:
        for run in runs:
            self._wait()
            job_id = str(1 + len(list(self.folder.glob("job-*"))))
            (self.folder / f"job-{job_id}").touch()
            (self.folder / f"mark-{run.token}").write_text(job_id)
            measured, place = self.folder / "measurement.json", run.directory / "measurement.json"
            words = {"pid": self.folder / f"pid-{job_id}", "ran": self.folder / "ran", "aside": f"{place}.aside"}
            quoted = {name: shlex.quote(str(word)) for name, word in words.items()}
            script = (
                f"echo $$ > {quoted['pid']}; sleep {JOB_S}; cp {shlex.quote(str(measured))} {quoted['aside']}; "
                f"echo {shlex.quote(run.name)} >> {quoted['ran']}; mv {quoted['aside']} {shlex.quote(str(place))}"
            )
            subprocess.Popen(["sh", "-c", script], start_new_session=True)
            self._wait()
            started(run, job_id)

    def _wait(self) -> None:
        time.sleep(self.dawdle.uniform(0, 0.03))

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        return {job_id: self._status(job_id) for job_id in job_ids}

    def _status(self, job_id: str) -> JobStatus:
        try:
            pid = int((self.folder / f"pid-{job_id}").read_text())
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return JobStatus(state=JobState.ENDED)
        except (FileNotFoundError, ValueError):
            born = (self.folder / f"job-{job_id}").stat().st_mtime
            if time.time() - born < 1:
                return JobStatus(state=JobState.PENDING)
            return JobStatus(state=JobState.LOST, meaning=FailureKind.LOST)  # killed before it began
        except ProcessLookupError:
            return JobStatus(state=JobState.ENDED)
        return JobStatus(state=JobState.RUNNING)

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        marks = {token: self.folder / f"mark-{token}" for token in tokens}
        return {token: mark.read_text() for token, mark in marks.items() if mark.exists() and mark.read_text()}

    def cancel(self, job_ids: Sequence[str]) -> None:
        raise AssertionError(job_ids)

    def log_path(self, job_id: str) -> Path:
        return self.folder / f"{job_id}.log"

    def close(self) -> None:
        pass


def go_on(plan: Plan, launcher: launch.Launcher) -> None:
    """What `--resume` does, from the claim of the directory to the end of the search."""
    results = ResultsDirectory(plan.directory)
    results.begin(plan.document(), resume=True)
    dispatch = Dispatch(submit="separate", parallel=None, overhead_s=1.0)
    agenda = TrainingAgenda(plan, plan.course)
    campaign = Campaign(agenda, results, Work(dispatch=dispatch, launcher=launcher, screen=Listener()))
    campaign.take_over()
    campaign.run()
    results.close()


def killed(plan: Plan, folder: Path, seed: int, after_s: float) -> bool:
    """Whether a process that goes on with the search was killed by us, and did not end by itself."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            go_on(plan, Detached(folder, random.Random(seed)))
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0, "the search broke"
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments_it_loses_nothing_and_runs_nothing_twice(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every layout takes as long here, whatever was expected of it: none shall be timed again for that.
    monkeypatch.setattr(course, "_DISTURBED", math.inf)
    chance = random.Random(seed)
    scheduler = tmp_path / "scheduler"
    scheduler.mkdir()
    files.write_text(scheduler / "measurement.json", files.json_text(samples.measurement()))
    space = SearchSpace(tp=(1, 2), pp=(1, 2), vpp=(1,), mbs=(1, 2, 4), recompute=((Recompute.NONE, None),))
    plan = make_plan(
        SearchRequest(
            model="gpt3/tiny",
            cluster="local",
            space=space,
            strategy="ranked",
            stages=(8, 20, 50),
            results=tmp_path / "run",
        )
    )
    kills = sum(killed(plan, scheduler, k, chance.uniform(0, LONGEST_S)) for k in range(KILLS // 5))
    go_on(plan, Detached(scheduler, random.Random(99)))
    done = [(line["name"], line["steps"]) for line in outcome_lines(plan.directory)]
    assert Counter(done).most_common(1)[0][1] == 1, "a layout was timed twice at one stage"
    assert {name for name, steps in done if steps == 8} == {x.name for x in plan.candidates.layouts.rows()}
    # Every layout is as fast, so the leader and three rivals are timed up to the longest stage.
    assert [sum(steps == stage for _, steps in done) for stage in (20, 50)] == [4, 4]
    assert all(line["measurement"] for line in outcome_lines(plan.directory))
    ran = (scheduler / "ran").read_text().split()
    assert Counter(ran) == Counter(line["run"] for line in outcome_lines(plan.directory)), "a run was lost or repeated"
    assert kills >= KILLS // 10, kills
    lines = (plan.directory / "submissions.jsonl").read_text().splitlines()
    assert len({json.loads(line)["job_id"] for line in lines if "job_id" in line} - {None}) >= len(ran)
