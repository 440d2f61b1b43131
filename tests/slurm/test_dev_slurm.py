"""The scripts that start and stop the development Slurm."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.conftest import SCRIPTS, DevSlurm, connect, is_running, run_script

pytestmark = pytest.mark.slurm

# The ports of the instances that tests start, one after another; test processes side by side get different ones.
PORT = 20000 + os.getpid() % 100 * 100


@pytest.fixture
def settings() -> Iterator[dict[str, str]]:
    """Settings of an instance beside the shared one; whatever a test starts with them is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as parent:  # short: socket paths are
        instance = {
            "HPTOOL_SLURM_DIR": f"{Path(parent).resolve()}/state",
            "HPTOOL_SLURM_PORT": str(PORT),
            "HPTOOL_SLURM_NODES": "2",
            "HPTOOL_SLURM_ACCOUNTING": "none",
        }
        yield instance
        run_script("down", "--purge", settings=instance).check_returncode()


@pytest.fixture
def private(settings: dict[str, str]) -> DevSlurm:
    """A Slurm of two nodes beside the shared one, to be broken."""
    return up(settings)


def up(settings: dict[str, str]) -> DevSlurm:
    """Run `up`, which must succeed."""
    script = run_script("up", settings=settings)
    assert script.returncode == 0, script.stderr
    return connect(script)


def test_up_gives_four_nodes_with_eight_gpus_each(slurm: DevSlurm) -> None:
    assert len(slurm.nodes) == int(os.environ.get("HPTOOL_SLURM_NODES", "4"))
    lines = slurm.command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %G").splitlines()
    assert lines == [f"{node} gpu:h100:8" for node in slurm.nodes]


def test_a_second_up_prints_the_same_and_starts_nothing(slurm: DevSlurm) -> None:
    before = slurm.pids()
    again = run_script("up", settings={})
    assert (again.returncode, again.stdout) == (0, f"export SLURM_CONF={slurm.conf}\n")
    assert slurm.pids() == before


@pytest.mark.skipif(os.environ.get("HPTOOL_SLURM_ACCOUNTING") == "none", reason="this Slurm was asked to have no sacct")
def test_accounting_knows_how_a_job_ended(slurm: DevSlurm) -> None:
    job = slurm.command("sbatch", "--wait", "--parsable", "--output=/dev/null", "--wrap=true").strip()
    question = ("sacct", "--noheader", "--allocations", "--format=State", f"--jobs={job}")
    answer = slurm.command(*question).split()
    for _ in range(100):
        if answer == ["COMPLETED"]:
            break
        time.sleep(0.1)  # sacct lags by up to a second
        answer = slurm.command(*question).split()
    assert answer == ["COMPLETED"]


def test_a_private_instance_is_idle_and_listens_on_loopback_only(private: DevSlurm) -> None:
    assert private.node_states() == {"node1": "idle", "node2": "idle"}

    listening = set()
    for line in (line for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]):
        address, local_port = line.split()[1].split(":")
        if line.split()[3] == "0A" and PORT <= int(local_port, 16) < PORT + 100:
            listening.add((address, int(local_port, 16)))
    assert listening == {("0100007F", PORT), ("0100007F", PORT + 11), ("0100007F", PORT + 12)}


def test_a_job_sees_its_node_and_its_gpus(private: DevSlurm, tmp_path: Path) -> None:
    script = "srun sh -c 'echo $(hostname) $CUDA_VISIBLE_DEVICES'"
    output = tmp_path / "output"
    private.command("sbatch", "--wait", "--nodes=2", "--gpus-per-node=3", f"--output={output}", f"--wrap={script}")
    assert sorted(output.read_text().splitlines()) == ["node1 0,1,2", "node2 0,1,2"]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("daemon", ["munged", "slurmctld", "slurmd-node2"])
def test_up_restarts_a_dead_daemon_and_no_other(
    private: DevSlurm, settings: dict[str, str], daemon: str, ending: signal.Signals
) -> None:
    before = private.pids()
    os.kill(before[daemon], ending)
    assert up(settings).node_states() == {"node1": "idle", "node2": "idle"}
    after = private.pids()
    assert {name for name in before if after[name] != before[name]} == {daemon}


def test_up_resumes_nodes_that_are_out_of_service(private: DevSlurm, settings: dict[str, str]) -> None:
    private.command("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=test")
    private.command("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    assert up(settings).node_states() == {"node1": "idle", "node2": "idle"}


def test_changed_settings_take_effect(private: DevSlurm, settings: dict[str, str]) -> None:
    before = private.pids()
    assert up(settings | {"HPTOOL_SLURM_NODES": "1"}).nodes == ("node1",)
    assert not is_running(before["slurmd-node2"])


def test_a_killed_up_is_mended_by_the_next(settings: dict[str, str]) -> None:
    pid_file = Path(settings["HPTOOL_SLURM_DIR"], "run", "munged.pid")
    with subprocess.Popen(
        [SCRIPTS / "up"], env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as script:
        while script.poll() is None and not pid_file.exists():
            time.sleep(0.001)
        script.kill()
    assert up(settings).node_states() == {"node1": "idle", "node2": "idle"}


def test_purge_removes_all_of_an_instance_and_nothing_else(
    slurm: DevSlurm, private: DevSlurm, settings: dict[str, str], tmp_path: Path
) -> None:
    job = tmp_path / "job"
    private.command("sbatch", "--nodelist=node1", "--output=/dev/null", f"--wrap=echo $$ >{job}; exec sleep 1000")
    while not (job.exists() and job.read_text()):
        time.sleep(0.05)
    others, own = slurm.pids(), private.pids()
    os.kill(own["slurmd-node1"], signal.SIGKILL)  # the job must end all the same

    assert run_script("down", "--purge", settings=settings).returncode == 0
    assert not private.state_dir.exists()
    assert not [name for name, pid in own.items() if is_running(pid)]
    assert not is_running(int(job.read_text()))
    assert str(private.state_dir) not in Path("/etc/hosts").read_text()

    assert slurm.pids() == others
    assert all(is_running(pid) for pid in others.values())
    assert set(slurm.node_states()) == set(slurm.nodes)


def test_a_taken_port_is_an_error_that_leaves_nothing_running(settings: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", PORT + 12)):
        script = run_script("up", settings=settings)
    assert (script.returncode, script.stdout) == (1, "")
    assert "which slurmd-node2 needs, is taken by" in script.stderr
    assert f"(process {os.getpid()})" in script.stderr
    assert not list(Path(settings["HPTOOL_SLURM_DIR"], "run").iterdir())
    assert settings["HPTOOL_SLURM_DIR"] not in Path("/etc/hosts").read_text()


def test_a_directory_of_somebody_else_is_neither_used_nor_purged(settings: dict[str, str]) -> None:
    theirs = Path(settings["HPTOOL_SLURM_DIR"], "thesis.tex")
    theirs.parent.mkdir()
    theirs.touch()
    assert run_script("up", settings=settings).returncode == 1
    assert run_script("down", "--purge", settings=settings).returncode == 0
    assert list(theirs.parent.iterdir()) == [theirs]


@pytest.mark.parametrize(
    "setting",
    [
        {"HPTOOL_SLURM_DIR": "/somewhere/with space"},
        {"HPTOOL_SLURM_NODES": "0"},
        {"HPTOOL_SLURM_PORT": "65534"},
        {"HPTOOL_SLURM_ACCOUNTING": "yes"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_bad_setting_is_named(settings: dict[str, str], setting: dict[str, str]) -> None:
    script = run_script("up", settings=settings | setting)
    assert (script.returncode, script.stdout) == (2, "")
    assert next("=".join(item) for item in setting.items()) in script.stderr
