"""The fixtures that give tests a real Slurm: that of cluster/dev-slurm, and one beside it that may be broken."""

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.searches import wait_for

SCRIPTS = Path(__file__).resolve().parents[2] / "cluster" / "dev-slurm"
DEFAULT_STATE_DIR = "/tmp/hptool-slurm"  # noqa: S108  # the scripts' default; they check whose it is


@dataclass(frozen=True, slots=True, kw_only=True)
class DevSlurm:
    """A Slurm that `up` has started: its slurm.conf, and the names of its nodes."""

    conf: Path
    nodes: tuple[str, ...]

    @property
    def state_dir(self) -> Path:
        """The directory that everything of this Slurm is in."""
        return self.conf.parent.parent

    def pids(self) -> dict[str, int]:
        """The processes of its daemons, by name: munged, slurmctld, slurmd-node1, ..."""
        return {file.stem: int(file.read_text()) for file in sorted(self.state_dir.glob("run/*.pid"))}

    def command(self, *words: str) -> str:
        """What a Slurm command prints when it is put to this Slurm."""
        environment = os.environ | {"SLURM_CONF": str(self.conf)}
        return subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout

    def node_states(self) -> dict[str, str]:
        """What Slurm says of each node: idle, mixed, down, ..."""
        lines = self.command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)


def run_script(script: str, *arguments: str, settings: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `up` or `down` to its end, whatever that is. `settings` are added to the environment."""
    command = [str(SCRIPTS / script), *arguments]
    return subprocess.run(command, env=os.environ | settings, check=False, capture_output=True, text=True)


def connect(up: subprocess.CompletedProcess[str]) -> DevSlurm:
    """The Slurm that a successful `up` has printed."""
    conf = Path(up.stdout.removeprefix("export SLURM_CONF=").rstrip("\n"))
    return DevSlurm(conf=conf, nodes=tuple(DevSlurm(conf=conf, nodes=()).node_states()))


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="session")
def slurm() -> Iterator[DevSlurm]:
    """The development Slurm, in SLURM_CONF. Started where it is not up, and then stopped after the last test."""
    state_dir = Path(os.environ.get("HPTOOL_SLURM_DIR") or DEFAULT_STATE_DIR).resolve()
    with state_dir.with_name(f"{state_dir.name}.tests").open("w") as users, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(users, fcntl.LOCK_SH)
        pid_file = state_dir / "run" / "slurmctld.pid"
        was_up = pid_file.exists() and is_running(int(pid_file.read_text()))

        up = run_script("up", settings={})
        if up.returncode != 0:
            pytest.fail(f"Slurm did not start:\n{up.stderr}", pytrace=False)
        running = connect(up)
        patch.setenv("SLURM_CONF", str(running.conf))
        yield running

        if not was_up:
            # Other test processes (of pytest-xdist, or of a second session) may still use it: this lock waits for them.
            fcntl.flock(users, fcntl.LOCK_EX)
            down = run_script("down", settings={})
            if down.returncode != 0:
                pytest.fail(f"Slurm did not stop:\n{down.stderr}", pytrace=False)


@pytest.fixture(scope="session")
def private_settings() -> Iterator[dict[str, str]]:
    """A Slurm of two nodes beside the shared one, for all drills: they must not disturb other tests."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as parent:  # short: socket paths are
        settings = {
            "HPTOOL_SLURM_DIR": f"{Path(parent).resolve()}/state",
            "HPTOOL_SLURM_PORT": str(30000 + os.getpid() % 100 * 100),  # beside those of test_dev_slurm.py
            "HPTOOL_SLURM_NODES": "2",
        }
        yield settings
        run_script("down", "--purge", settings=settings).check_returncode()


def heal(settings: Mapping[str, str]) -> DevSlurm:
    """Dead daemons are started again, and nodes out of service resumed."""
    script = run_script("up", settings=settings)
    assert script.returncode == 0, script.stderr
    return connect(script)


@pytest.fixture
def private_slurm(private_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[DevSlurm]:
    """That Slurm in SLURM_CONF, whole and idle before a test and after it."""
    running = heal(private_settings)
    monkeypatch.setenv("SLURM_CONF", str(running.conf))
    yield running
    heal(private_settings)
    running.command("scancel", "--user=root")
    wait_for(lambda: not running.command("squeue", "-h"))


@pytest.fixture
def limit_jobs(private_slurm: DevSlurm) -> Iterator[Callable[[int], None]]:
    """Sets how many jobs the user may have during a test."""
    if os.environ.get("HPTOOL_SLURM_ACCOUNTING") == "none":
        pytest.skip("limits are kept in the accounting, which this Slurm was asked not to have")

    def limit(jobs: int) -> None:
        private_slurm.command("sacctmgr", "-i", "modify", "user", "root", "set", f"MaxSubmitJobs={jobs}")

    yield limit
    limit(-1)  # none
