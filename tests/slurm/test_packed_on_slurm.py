"""Lanes on a real Slurm: orders on one node and on two, a lane that is cancelled, one that is requeued."""

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hptool import files, launch
from hptool.launch import JobState, PackedLauncher, Run
from hptool.measurement import FailureKind
from tests.searches import processes_of, wait_for
from tests.slurm.conftest import DevSlurm
from tests.worker.runs import tiny_document

pytestmark = pytest.mark.slurm

ALIVE = (JobState.PENDING, JobState.RUNNING)

#: Steps for longer than any test takes.
ENDLESS: dict[str, Any] = {"trainer__max_steps": 1_000_000}


class Lanes:
    """A packed launcher on the development Slurm, and the runs that it was given."""

    def __init__(self, directory: Path) -> None:
        profile = files.read_cluster("dev-slurm")
        options = replace(profile.slurm, poll_s=0.5, requeue=True)
        self._directory = directory
        self.cluster = replace(profile, slurm=options)
        self.launcher = launch.launcher(self.cluster, directory / "jobs", "packed")
        self.ids: dict[str, str] = {}

    def order(self, name: str, *, nodes: int, **changes: Any) -> Path:
        """Submits a run of one rank on each of the nodes; its directory."""
        directory = self._directory / "runs" / name
        document = tiny_document(trainer__num_nodes=nodes, **changes)
        files.write_text(directory / "config.yaml", files.yaml_text(document))
        run = Run(name=name, directory=directory, nodes=nodes, max_minutes=2, token=f"{name}.1")
        self.launcher.submit([run], lambda run, job_id: self.ids.update({run.name: job_id}))
        return directory

    def status(self, *names: str) -> list[launch.JobStatus]:
        """Of these runs."""
        found = self.launcher.status([self.ids[name] for name in names])
        return [found[self.ids[name]] for name in names]

    def end(self, *names: str) -> list[launch.JobStatus]:
        """The last states of these runs."""
        self.wait(lambda: all(status.state not in ALIVE for status in self.status(*names)))
        return self.status(*names)

    def wait(self, condition: Any) -> None:
        """As `wait_for`, with all logs where it is in vain."""
        wait_for(condition, timeout_s=100, otherwise=self._logs)

    def _logs(self) -> str:
        logs = [path for path in self._directory.rglob("*") if path.suffix in (".log", ".out") and path.is_file()]
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in logs)

    def job(self, name: str) -> str:
        """Slurm's id of the lane that carries out a run."""
        return self.ids[name].partition("#")[0]


@pytest.fixture
def lanes(tmp_path: Path, slurm: DevSlurm) -> Iterator[Lanes]:
    del slurm
    found = Lanes(tmp_path / "demo")
    yield found
    found.launcher.close()
    jobs = {found.job(name) for name in found.ids}
    assert jobs.isdisjoint(queue()), "a lane is left"
    assert processes_of(tmp_path) == [], "a lane has left processes"


def queue() -> Sequence[str]:
    """Job ids that Slurm still means to run or runs."""
    done = subprocess.run(["squeue", "--me", "-h", "-o", "%i"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_cancelled_lane_gives_back_what_it_had_not_begun(lanes: Lanes) -> None:
    measured = lanes.order("measured", nodes=1, trainer__devices=2)
    endless, waiting = lanes.order("endless", nodes=1, **ENDLESS), lanes.order("waiting", nodes=1)
    assert len({lanes.job(name) for name in lanes.ids}) == 1
    lanes.wait((endless / "progress.json").exists)
    assert (measured / "measurement.json").exists()
    # A later process finds them, and the job by the marks of the runs.
    later = launch.launcher(lanes.cluster, measured.parents[1] / "jobs", "packed")
    assert isinstance(later, PackedLauncher)
    assert later.find(["endless.1"]) == {"endless.1": lanes.ids["endless"]}
    subprocess.run(["scancel", lanes.job("endless")], check=True)
    ran, waited = lanes.end("endless", "waiting")
    assert (ran.state, ran.meaning) == (JobState.ENDED, FailureKind.LOST)
    assert "CANCELLED" in ran.detail
    assert (waited.state, waited.may_run_again) == (JobState.LOST, True)
    assert not (waiting / "logs").exists()


def test_a_requeued_lane_of_two_nodes_goes_on(lanes: Lanes) -> None:
    measured = lanes.order("measured", nodes=2)
    endless = lanes.order("endless", nodes=2, **ENDLESS)
    lanes.wait((endless / "progress.json").exists)
    assert (measured / "measurement.json").exists()
    subprocess.run(["scontrol", "requeue", lanes.job("endless")], check=True)
    lane = measured.parents[1] / "jobs" / "packs" / "001"
    lanes.wait((lane / "life-1" / "00002.begin").exists)
    lanes.wait(lambda: (endless / "logs" / "rank-0.log").read_text().count("step 1 of") > 1)
    lanes.launcher.cancel([lanes.ids["endless"]])
    lanes.order("next", nodes=2, model__pipeline_model_parallel_size=2)
    cancelled, _ = lanes.end("endless", "next")
    assert (cancelled.state, cancelled.detail) == (JobState.ENDED, "cancelled")
    assert (endless.parent / "next" / "measurement.json").exists()
    assert lanes.job("next") == lanes.job("measured")
    assert len(list((lane / "logs").glob("00001-*"))) == 2
