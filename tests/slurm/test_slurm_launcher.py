"""The Slurm launcher while things go wrong: a real scheduler, tiny functions in the place of trainings."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hptool import files
from hptool.errors import BusyError, LaunchError
from hptool.facts import Cluster
from hptool.launch import JobState, JobStatus, Run, SlurmLauncher, slurm_commands
from hptool.measurement import FailureKind
from tests.conftest import ROOT
from tests.searches import wait_for
from tests.slurm.conftest import DevSlurm, heal

pytestmark = pytest.mark.slurm

#: How old a job must be to outlive a killed controller, which saves its state every five seconds.
SAVED_S = 8


@pytest.fixture
def slurm(private_slurm: DevSlurm) -> DevSlurm:
    """The one that may be broken."""
    return private_slurm


@pytest.fixture
def site() -> Cluster:
    """The development profile, so small that a node holds several jobs."""
    return with_options(files.read_cluster("dev-slurm"), mem_gib_per_node=1)


def with_options(cluster: Cluster, **changes: object) -> Cluster:
    return replace(cluster, slurm=replace(cluster.slurm, **changes))  # type: ignore[arg-type]


@pytest.fixture
def launcher(slurm: DevSlurm, site: Cluster, tmp_path: Path) -> SlurmLauncher:
    del slurm
    return SlurmLauncher(site, tmp_path / "jobs", arrays=True)


def start(launcher: SlurmLauncher, command: str, mark: str = "t", nodes: int = 1) -> str:
    """A job that runs a shell command once a node."""
    return launcher.start(os.system, command, name="drill", nodes=nodes, max_minutes=10, token=mark)


def state_of(launcher: SlurmLauncher, job_id: str) -> JobState:
    return launcher.status([job_id])[job_id].state


def until(launcher: SlurmLauncher, job_id: str, state: JobState, timeout_s: float = 60) -> JobStatus:
    """The job's status when it is in this state."""
    wait_for(
        lambda: state_of(launcher, job_id) is state,
        timeout_s,
        otherwise=lambda: (
            f"{launcher.status([job_id])}\n{subprocess.run(['squeue'], capture_output=True, check=False)}"
        ),
    )
    return launcher.status([job_id])[job_id]


def kill(slurm: DevSlurm, daemon: str) -> None:
    os.kill(slurm.pids()[daemon], signal.SIGKILL)


def test_a_job_gets_what_the_profile_promises(site: Cluster, slurm: DevSlurm, tmp_path: Path) -> None:
    del slurm
    promised = replace(
        with_options(
            site,
            python=f"env MARK=python {sys.executable}",
            setup=("export MARK_SETUP=setup",),
            prolog=("MARK_PROLOG=$GREETING; export MARK_PROLOG",),
            epilog=(f"echo epilog >> {tmp_path}/epilog",),
            signal="TERM@60",
        ),
        environment={"GREETING": "it's $HOME", "WANDB_API_KEY": "hush-hush"},
    )
    launcher = SlurmLauncher(promised, tmp_path / "jobs", arrays=True)
    command = f'echo "$MARK $MARK_SETUP $MARK_PROLOG $WANDB_API_KEY" >> {tmp_path}/said.$SLURM_NODEID'
    job_id = start(launcher, command, nodes=2)
    until(launcher, job_id, JobState.ENDED)
    assert [(tmp_path / f"said.{i}").read_text() for i in range(2)] == ["python setup it's $HOME hush-hush\n"] * 2
    assert (tmp_path / "epilog").read_text() == "epilog\n"
    assert "Job completed successfully" in launcher.log_path(job_id).read_text()
    assert not [path for path in (tmp_path / "jobs").iterdir() if b"hush-hush" in path.read_bytes()]


#: srun as it is where pyxis is installed, as far as its command line goes: it notes what container it was asked for.
SRUN = """#!/bin/bash
for word; do [[ $word == --container-* ]] && echo "$word" >> "${0%/*}/asked" || words+=("$word"); done
PATH=${PATH#*:} exec srun "${words[@]}"
"""


def test_a_container_is_asked_of_srun(site: Cluster, slurm: DevSlurm, tmp_path: Path) -> None:
    del slurm
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    contained = with_options(
        site,
        container_image="nvcr.io#nvidia/nemo:25",
        container_mounts=("/a b:/a", "/c:/c:ro"),
        container_workdir="/a",
        setup=(f"export PATH={srun.parent}:$PATH",),
    )
    launcher = SlurmLauncher(contained, tmp_path / "jobs", arrays=True)
    until(launcher, start(launcher, f"touch {tmp_path}/ran"), JobState.ENDED)
    assert (tmp_path / "ran").exists()
    assert (tmp_path / "bin" / "asked").read_text().splitlines() == [
        "--container-image=nvcr.io#nvidia/nemo:25",
        "--container-mounts=/a b:/a,/c:/c:ro",
        "--container-workdir=/a",
    ]


def test_a_controller_that_is_killed_changes_no_state_and_loses_no_job(
    launcher: SlurmLauncher, slurm: DevSlurm, private_settings: dict[str, str], tmp_path: Path
) -> None:
    job_id = start(launcher, f"while ! [ -e {tmp_path}/end ]; do sleep 0.2; done")
    until(launcher, job_id, JobState.RUNNING)
    time.sleep(SAVED_S)
    kill(slurm, "slurmctld")
    with pytest.raises(BusyError, match="Unable to contact slurm controller"):
        start(launcher, f"touch {tmp_path}/second", mark="second")
    away = launcher.status([job_id])[job_id]
    assert away.state is JobState.RUNNING
    assert "Unable to contact slurm controller" in away.detail
    (tmp_path / "end").touch()  # what ends meanwhile is not told, but not lost either
    heal(private_settings)
    found = until(launcher, job_id, JobState.ENDED)
    assert "COMPLETED" in found.detail
    second = start(launcher, f"touch {tmp_path}/second", mark="second")
    until(launcher, second, JobState.ENDED)
    assert (tmp_path / "second").exists()


def test_a_node_that_fails_takes_its_job_but_not_always_the_process(
    launcher: SlurmLauncher, slurm: DevSlurm, tmp_path: Path
) -> None:
    job_id = start(launcher, f"touch {tmp_path}/begun; sleep 8; touch {tmp_path}/written")
    until(launcher, job_id, JobState.RUNNING)
    wait_for((tmp_path / "begun").exists)  # for the controller it runs before the node has started anything
    node = slurm.command("squeue", "-h", "-j", job_id, "-o", "%N").strip()
    kill(slurm, f"slurmd-{node}")
    # As the controller does itself when the node has been silent for SlurmdTimeout.
    slurm.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=drill")
    found = until(launcher, job_id, JobState.ENDED)
    assert "NODE_FAIL" in found.detail
    assert (found.meaning, found.may_run_again) == (FailureKind.LOST, True)
    wait_for((tmp_path / "written").exists)  # after its end, as far as Slurm knows


def test_a_drained_cluster_ends_nothing_and_starts_nothing(
    launcher: SlurmLauncher, slurm: DevSlurm, private_settings: dict[str, str], tmp_path: Path
) -> None:
    running = start(launcher, f"while ! [ -e {tmp_path}/end ]; do sleep 0.2; done", mark="running")
    until(launcher, running, JobState.RUNNING)
    slurm.command("scontrol", "update", f"NodeName={','.join(slurm.nodes)}", "State=DRAIN", "Reason=drill")
    waiting = start(launcher, "true", mark="waiting")
    wait_for(lambda: "DRAINED" in launcher.status([waiting])[waiting].detail)
    assert state_of(launcher, waiting) is JobState.PENDING
    assert state_of(launcher, running) is JobState.RUNNING
    (tmp_path / "end").touch()
    until(launcher, running, JobState.ENDED)
    heal(private_settings)
    until(launcher, waiting, JobState.ENDED)


def test_a_job_that_someone_else_cancels(launcher: SlurmLauncher, slurm: DevSlurm) -> None:
    job_id = start(launcher, "sleep 600")
    until(launcher, job_id, JobState.RUNNING)
    slurm.command("scancel", job_id)
    found = until(launcher, job_id, JobState.ENDED)
    assert found.detail.startswith(f"someone cancelled job {job_id}: CANCELLED")
    assert (found.meaning, found.may_run_again) == (FailureKind.LOST, False)


def test_cancelled_jobs_are_gone_when_cancel_returns(launcher: SlurmLauncher, slurm: DevSlurm) -> None:
    jobs = [start(launcher, "sleep 600", mark=f"t{i}") for i in range(3)]
    until(launcher, jobs[0], JobState.RUNNING)
    launcher.cancel(jobs)
    assert not slurm.command("squeue", "-h").split()
    assert {status.state for status in launcher.status(jobs).values()} == {JobState.ENDED}


def test_a_job_for_which_a_more_urgent_one_is_started_may_run_again(
    site: Cluster, slurm: DevSlurm, tmp_path: Path
) -> None:
    low = SlurmLauncher(with_options(site, partition="low", exclusive=True), tmp_path / "low", arrays=True)
    job_id = start(low, "sleep 600", nodes=len(slurm.nodes))
    until(low, job_id, JobState.RUNNING)
    main = SlurmLauncher(with_options(site, exclusive=True), tmp_path / "main", arrays=True)
    urgent = start(main, "true", mark="urgent")
    found = until(low, job_id, JobState.ENDED)
    assert "PREEMPTED" in found.detail
    assert (found.meaning, found.may_run_again) == (FailureKind.LOST, True)
    until(main, urgent, JobState.ENDED)


def test_a_requeued_job_is_pending_again_and_runs_to_its_end(site: Cluster, slurm: DevSlurm, tmp_path: Path) -> None:
    launcher = SlurmLauncher(with_options(site, requeue=True), tmp_path / "jobs", arrays=True)
    job_id = start(launcher, f"echo >> {tmp_path}/begun; [ $(wc -l < {tmp_path}/begun) = 2 ] || sleep 600")
    until(launcher, job_id, JobState.RUNNING)
    wait_for((tmp_path / "begun").exists)
    slurm.command("scontrol", "requeue", job_id)
    until(launcher, job_id, JobState.PENDING)  # for the ten seconds of cred_expire
    found = until(launcher, job_id, JobState.ENDED)
    assert "COMPLETED" in found.detail


def test_a_requeueable_job_outlives_its_node(
    site: Cluster, slurm: DevSlurm, private_settings: dict[str, str], tmp_path: Path
) -> None:
    launcher = SlurmLauncher(with_options(site, requeue=True), tmp_path / "jobs", arrays=True)
    job_id = start(launcher, f"echo >> {tmp_path}/begun; [ $(wc -l < {tmp_path}/begun) = 2 ] || sleep 600")
    until(launcher, job_id, JobState.RUNNING)
    wait_for((tmp_path / "begun").exists)
    node = slurm.command("squeue", "-h", "-j", job_id, "-o", "%N").strip()
    slurm.command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=drill")
    seen: list[JobState] = []

    def has_ended() -> bool:
        seen.append(state_of(launcher, job_id))
        return seen[-1] is JobState.ENDED

    heal(private_settings)
    wait_for(has_ended)
    assert "COMPLETED" in launcher.status([job_id])[job_id].detail
    assert JobState.PENDING in seen


def test_a_full_queue_takes_the_job_later(
    launcher: SlurmLauncher, limit_jobs: Callable[[int], None], tmp_path: Path
) -> None:
    limit_jobs(1)
    first = start(launcher, f"while ! [ -e {tmp_path}/end ]; do sleep 0.2; done", mark="first")
    with pytest.raises(BusyError, match="AssocMaxSubmitJobLimit"):
        start(launcher, "true", mark="second")
    assert not list((tmp_path / "jobs").glob("second*"))
    (tmp_path / "end").touch()
    until(launcher, first, JobState.ENDED)
    second = start(launcher, "true", mark="second")
    until(launcher, second, JobState.ENDED)


def test_as_much_of_an_array_as_the_limit_allows(
    site: Cluster, limit_jobs: Callable[[int], None], tmp_path: Path
) -> None:
    limit_jobs(2)
    waiting = with_options(site, extra_options={"begin": "now+1hour"})
    launcher = SlurmLauncher(waiting, tmp_path / "jobs", arrays=True)
    runs = [Run(name=f"r{i}", directory=tmp_path, nodes=1, max_minutes=1, token=f"array{i}") for i in range(5)]
    started: dict[str, str] = {}
    with pytest.raises(BusyError, match="AssocMaxSubmitJobLimit"):
        launcher.submit(runs, lambda run, job_id: started.update({run.token: job_id}))
    assert set(started) == {"array0", "array1"}
    assert launcher.find([run.token for run in runs]) == started


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partition": "nosuch"}, "Invalid partition name specified"),
        ({"mem_gib_per_node": 1000}, "Memory specification can not be satisfied"),
        ({"extra_options": {"gpus-per-node": 9}}, "Requested node configuration is not available"),
        ({"container_image": "x", "extra_options": {"container-image": "x"}}, "unrecognized option"),
    ],
)
def test_what_slurm_will_never_take(
    changes: dict[str, object], words: str, site: Cluster, slurm: DevSlurm, tmp_path: Path
) -> None:
    del slurm
    launcher = SlurmLauncher(with_options(site, **changes), tmp_path / "jobs", arrays=True)
    with pytest.raises(LaunchError, match=words) as caught:
        start(launcher, "true")
    assert not isinstance(caught.value, BusyError)
    assert not list((tmp_path / "jobs").iterdir())


def test_a_controller_that_is_slow_to_answer(
    launcher: SlurmLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = start(launcher, "sleep 600")
    until(launcher, job_id, JobState.RUNNING)
    slow = tmp_path / "bin" / "squeue"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nsleep 600\n")
    slow.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
        patch.setattr(slurm_commands, "TIME_LIMIT_S", 0.5)
        wait_for(lambda: "squeue gave no answer in 0.5 s" in launcher.status([job_id])[job_id].detail)
        assert state_of(launcher, job_id) is JobState.RUNNING
    wait_for(lambda: not launcher.status([job_id])[job_id].detail)


#: Submits two runs as an array and a job of its own, each killed between Slurm's answer and the note of it.
KILLED = """
import os, pathlib, signal, sys
from hptool import files
from hptool.launch import Run, SlurmLauncher, slurm
folder = pathlib.Path(sys.argv[1])
launcher = SlurmLauncher(files.read_cluster("dev-slurm"), folder / "jobs", arrays=True)
slurm.job_id_of = lambda _: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "array":
    runs = [Run(name=n, directory=folder / n, nodes=1, max_minutes=1, token=n) for n in ("a", "b")]
    launcher.submit(runs, lambda *_: None)
launcher.start(os.system, f"touch {folder}/ran", name="drill", nodes=1, max_minutes=1, token="c")
"""


def test_what_a_killed_hptool_could_not_note_is_found_again_and_runs(launcher: SlurmLauncher, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for what in ("array", "job"):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), what], cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
    found = launcher.find(["a", "b", "c", "d"])
    assert set(found) == {"a", "b", "c"}
    array = found["a"].partition("_")[0]
    assert (found["a"], found["b"]) == (f"{array}_0", f"{array}_1")
    for job_id in found.values():
        until(launcher, job_id, JobState.ENDED)
    assert (tmp_path / "ran").exists()
    for name in ("a", "b"):  # each element had its own run's config to look for, which was not there
        assert list((tmp_path / name).glob("failure-rank*.json"))
    assert launcher.find(["a", "b", "c", "d"]) == found


def test_jobs_that_the_queue_has_forgotten_are_found_in_the_accounting(
    launcher: SlurmLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.environ.get("HPTOOL_SLURM_ACCOUNTING") == "none":
        pytest.skip("this Slurm was asked to have no sacct")
    job_id = start(launcher, "true", mark="forgotten")
    until(launcher, job_id, JobState.ENDED)
    empty = tmp_path / "bin" / "squeue"
    empty.parent.mkdir()
    empty.write_text("#!/bin/sh\n")
    empty.chmod(0o755)
    monkeypatch.setenv("PATH", f"{empty.parent}:{os.environ['PATH']}")
    wait_for(lambda: launcher.find(["forgotten"]) == {"forgotten": job_id})  # it lags by a second
