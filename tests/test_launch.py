"""Launchers: the script that sbatch gets, what Slurm's answers mean, and a contract for every implementation."""

import os
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

from hptool import files, launch
from hptool.errors import LaunchError
from hptool.facts import Cluster, SlurmOptions
from hptool.launch import JobState, Run, SlurmLauncher
from hptool.measurement import FailureKind


def run(directory: Path, nodes: int = 2) -> Run:
    return Run(name="tp2", directory=directory, nodes=nodes, max_minutes=7.5)


def test_the_script_for_a_dgx(dgx_a100: Cluster, snapshot: SnapshotAssertion) -> None:
    parameters = launch.run_parameters(run(Path("results/demo/runs/tp2")), dgx_a100)
    assert launch.batch_script(parameters, Path("/shared/tp2.yaml"), Path("/shared/tp2"), "python") == snapshot


WISHES = SlurmOptions(
    partition="batch; touch pwned",
    account="lab",
    qos="high",
    constraint="ib&nvme",
    mem_gib_per_node=1000,
    setup=("module load nccl || true",),
    extra_options={"reservation": "maint $(touch pwned)", "comment": "`touch pwned`; touch pwned"},
)


def test_the_script_for_a_site_with_wishes(dgx_a100: Cluster, snapshot: SnapshotAssertion) -> None:
    site = replace(dgx_a100, slurm=WISHES, environment={"NCCL_DEBUG": "it's; $(x)"})
    parameters = launch.run_parameters(run(Path("it's here/runs/tp2")), site)
    assert launch.batch_script(parameters, Path("/a b.yaml"), Path("/a b"), "python") == snapshot


def test_nothing_that_a_user_gives_reaches_a_shell_unquoted(dgx_a100: Cluster, tmp_path: Path) -> None:
    site = replace(dgx_a100, slurm=WISHES, environment={"X": "$(touch pwned)"})
    parameters = launch.run_parameters(run(tmp_path / "$(touch pwned)" / "runs" / "tp2"), site)
    script = launch.batch_script(parameters, tmp_path / "$(touch pwned)", tmp_path / "`touch pwned`")
    harmless = script.replace("srun ", "true srun ")
    subprocess.run(["bash", "-c", harmless], cwd=tmp_path, check=True)
    assert not (tmp_path / "pwned").exists()


class FakeSlurm:
    """squeue and sacct as two scripts that print what a test wrote for them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("squeue", "sacct", "scancel"):
            script = directory / name
            script.write_text(
                f'#!/bin/sh\necho "$0 $*" >> {directory}/calls\n'
                f"cat {directory}/{name}.err >&2 2>/dev/null; cat {directory}/{name}.out 2>/dev/null\n"
                f"test ! -e {directory}/{name}.err\n"
            )
            script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def says(self, name: str, *, out: str = "", err: str | None = None) -> None:
        (self.directory / f"{name}.out").write_text(out)
        (self.directory / f"{name}.err").unlink(missing_ok=True)
        if err is not None:
            (self.directory / f"{name}.err").write_text(err)

    def calls(self) -> list[str]:
        path = self.directory / "calls"
        return [Path(line).name for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return FakeSlurm(tmp_path)


@pytest.fixture
def launcher(dgx_a100: Cluster, tmp_path: Path) -> SlurmLauncher:
    return SlurmLauncher(dgx_a100, tmp_path / "jobs")


@pytest.mark.parametrize(
    ("line", "state", "meaning"),
    [
        ("PENDING|Resources", JobState.PENDING, FailureKind.CRASH),
        ("PENDING|PartitionTimeLimit", JobState.LOST, FailureKind.REJECTED),
        ("RUNNING|None", JobState.RUNNING, FailureKind.CRASH),
        ("SUSPENDED|None", JobState.RUNNING, FailureKind.CRASH),
        ("COMPLETING|None", JobState.RUNNING, FailureKind.CRASH),
        ("COMPLETED|None", JobState.ENDED, FailureKind.CRASH),
        ("FAILED|NonZeroExitCode", JobState.ENDED, FailureKind.CRASH),
        ("OUT_OF_MEMORY|OutOfMemory", JobState.ENDED, FailureKind.OOM),
        ("TIMEOUT|TimeLimit", JobState.ENDED, FailureKind.TIMEOUT),
        ("CANCELLED|None", JobState.ENDED, FailureKind.LOST),
        ("PREEMPTED|None", JobState.ENDED, FailureKind.LOST),  # submitted with --no-requeue, so it is over
        ("NODE_FAIL|NodeDown", JobState.ENDED, FailureKind.LOST),
    ],
)
def test_what_the_queue_says(
    line: str, state: JobState, meaning: FailureKind, slurm: FakeSlurm, launcher: SlurmLauncher
) -> None:
    slurm.says("squeue", out=f"12_0|{line}\n13|RUNNING|None\n")
    found = launcher.status(["12_0"])["12_0"]
    assert (found.state, found.meaning) == (state, meaning)


def test_a_job_that_the_queue_forgot_is_looked_up_in_the_accounting(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("sacct", out="12|CANCELLED by 1000\n")
    found = launcher.status(["12"])["12"]
    assert (found.state, found.meaning) == (JobState.ENDED, FailureKind.LOST)
    assert "CANCELLED by 1000" in found.detail


@pytest.mark.parametrize(
    "sacct", [{"err": "Slurm accounting storage is disabled"}, {"out": ""}, {"out": "12|RUNNING\n"}]
)
def test_a_job_that_nobody_knows_is_lost_within_seconds(
    sacct: dict[str, str], slurm: FakeSlurm, launcher: SlurmLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.says("sacct", **sacct)
    assert launcher.status(["12"])["12"].state is JobState.RUNNING  # it may only just have been submitted
    later = time.monotonic() + launch.slurm._UNKNOWN_PATIENCE_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    found = launcher.status(["12"])["12"]
    assert (found.state, found.meaning) == (JobState.LOST, FailureKind.LOST)


def test_disabled_accounting_is_asked_once(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("sacct", err="Slurm accounting storage is disabled")
    for _ in range(3):
        launcher.status(["12"])
    assert sum(call.startswith("sacct") for call in slurm.calls()) == 1


def test_a_controller_that_is_away_judges_nobody(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("squeue", err="slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    found = launcher.status(["12"])["12"]
    assert found.state is JobState.PENDING
    assert "Unable to contact slurm controller" in found.detail


def test_a_final_state_never_changes(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("squeue", out="12|COMPLETED|None\n")
    launcher.status(["12"])
    slurm.says("squeue", out="12|RUNNING|None\n")
    assert launcher.status(["12"])["12"].state is JobState.ENDED


def test_one_question_answers_for_all_jobs(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("squeue", out="".join(f"12_{i}|RUNNING|None\n" for i in range(500)))
    launcher.status([f"12_{i}" for i in range(500)])
    assert len(slurm.calls()) == 1


def test_a_pending_job_that_can_never_start_is_cancelled(slurm: FakeSlurm, launcher: SlurmLauncher) -> None:
    slurm.says("squeue", out="12|PENDING|PartitionNodeLimit\n")
    launcher.status(["12"])
    assert "scancel 12" in slurm.calls()


def test_without_slurm_there_is_one_clear_error(
    launcher: SlurmLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(LaunchError, match="sbatch: not found on this machine"):
        launcher.submit([run(tmp_path)], lambda *_: None)


def test_the_profile_decides_about_the_launcher(tmp_path: Path) -> None:
    assert isinstance(launch.launcher(files.read_cluster("dgx-h100"), tmp_path), SlurmLauncher)
    assert isinstance(launch.launcher(files.read_cluster("local"), tmp_path), launch.LocalLauncher)
