"""Runs side by side through a real HyperQueue, where the package is installed."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hptool import files, launch
from hptool.errors import InputError
from hptool.facts import Cluster
from hptool.launch import HyperQueueLauncher, JobState, Run
from tests.searches import processes_of, wait_for
from tests.worker.runs import tiny_document

ALIVE = (JobState.PENDING, JobState.RUNNING)

#: Steps for longer than any test takes.
ENDLESS: dict[str, Any] = {"trainer__max_steps": 1_000_000}


def run(tmp_path: Path, name: str, *, nodes: int = 1, **changes: Any) -> Run:
    directory = tmp_path / "runs" / name
    files.write_text(directory / "config.yaml", files.yaml_text(tiny_document(**changes)))
    return Run(name=name, directory=directory, nodes=nodes, max_minutes=2)


@pytest.fixture
def launcher(tmp_path: Path, local: Cluster) -> Iterator[HyperQueueLauncher]:
    pytest.importorskip("hyperqueue")
    found = HyperQueueLauncher(local, tmp_path / "jobs", cores=4)
    yield found
    found.close()
    wait_for(lambda: not processes_of(tmp_path))


def submit(launcher: launch.Launcher, *runs: Run) -> list[str]:
    ids: list[str] = []
    launcher.submit(runs, lambda _, job_id: ids.append(job_id))
    return ids


def states(launcher: launch.Launcher, ids: list[str]) -> list[JobState]:
    found = launcher.status(ids)
    return [found[job_id].state for job_id in ids]


def test_as_many_runs_at_once_as_have_cores(
    launcher: HyperQueueLauncher, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launcher.slots == 2  # of two ranks each
    ids = submit(launcher, *(run(tmp_path, name, **ENDLESS) for name in "abc"))
    running, pending, ended = JobState.RUNNING, JobState.PENDING, JobState.ENDED
    wait_for(lambda: states(launcher, ids) == [running, running, pending])
    launcher.cancel(ids[:1])
    wait_for(lambda: states(launcher, ids) == [ended, running, running])
    launcher.cancel(ids)
    assert states(launcher, ids) == [ended] * 3
    assert capfd.readouterr().out == ""  # HyperQueue's server introduces itself, but not to those who read results


def test_runs_are_measured_or_have_failed(launcher: HyperQueueLauncher, tmp_path: Path) -> None:
    runs = [run(tmp_path, "measured", trainer__devices=2), run(tmp_path, "bad", model__global_batch_size=7)]
    ids = submit(launcher, *runs)
    wait_for(lambda: states(launcher, ids) == [JobState.ENDED] * 2, timeout_s=120)
    assert (runs[0].directory / "measurement.json").exists()
    (failure,) = runs[1].directory.glob("failure-rank*.json")
    assert json.loads(failure.read_text())["kind"] == "invalid"
    assert "does not divide the global batch of 7" in launcher.log_path(ids[1]).read_text()


def test_a_killed_run_has_ended(launcher: HyperQueueLauncher, tmp_path: Path) -> None:
    ids = submit(launcher, run(tmp_path, "killed", **ENDLESS))
    begun = tmp_path / "jobs" / ids[0] / "begun"
    wait_for(lambda: begun.exists() and begun.read_text())
    os.kill(int(begun.read_text()), signal.SIGKILL)
    wait_for(lambda: states(launcher, ids) == [JobState.ENDED])
    assert "SIGKILL" in launcher.status(ids)[ids[0]].detail


def test_a_waiting_run_that_is_cancelled_never_begins(launcher: HyperQueueLauncher, tmp_path: Path) -> None:
    runs = [run(tmp_path, name, **ENDLESS) for name in "abc"]
    ids = submit(launcher, *runs)
    launcher.cancel(ids)
    assert not set(states(launcher, ids)) & {*ALIVE}
    launcher.close()
    wait_for(lambda: not processes_of(tmp_path))
    assert not any((x.directory / "logs").exists() for x in runs)


def test_jobs_of_another_process_are_lost(launcher: HyperQueueLauncher) -> None:
    assert states(launcher, ["hq-x-1"]) == [JobState.LOST]
    assert launcher.find(["token"]) == {}


def test_runs_end_with_their_owner(tmp_path: Path) -> None:
    pytest.importorskip("hyperqueue")
    directory = run(tmp_path, "a", **ENDLESS).directory
    code = (
        "import sys, time; from pathlib import Path; from hptool import files, launch\n"
        "at = launch.launcher(files.read_cluster('local'), Path(sys.argv[1]) / 'jobs', 'hyperqueue')\n"
        "run = launch.Run(name='a', directory=Path(sys.argv[1]) / 'runs' / 'a', nodes=1, max_minutes=2)\n"
        "at.submit([run], lambda *_: None)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as owner:
        wait_for((directory / "progress.json").exists, timeout_s=120)
        owner.kill()
    wait_for(lambda: not processes_of(tmp_path), timeout_s=20)


def test_runs_of_several_nodes_are_refused(launcher: HyperQueueLauncher, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wide needs 2 nodes, allowed is 1"):
        submit(launcher, run(tmp_path, "wide", nodes=2))


def test_it_is_for_ranks_on_the_cores_of_this_machine(
    local: Cluster, dgx_a100: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hyperqueue")
    with pytest.raises(InputError, match="dgx-a100 has GPUs"):
        launch.launcher(dgx_a100, tmp_path, "hyperqueue")
    elsewhere = replace(local, scheduler="slurm", nodes=4)
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    with pytest.raises(InputError, match="in an allocation of one node"):
        launch.launcher(elsewhere, tmp_path, "hyperqueue")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert isinstance(launch.launcher(elsewhere, tmp_path, "hyperqueue"), HyperQueueLauncher)


def test_a_missing_package_is_named(local: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *_: object) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'hptool\[hyperqueue\]'"):
        launch.launcher(local, tmp_path, "hyperqueue")
