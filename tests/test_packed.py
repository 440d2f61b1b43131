"""Many runs in one job: orders, their ends, and what a lane survives. Most with a stand-in for the run itself."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hptool import files, launch
from hptool.errors import InputError, LaunchError
from hptool.facts import Cluster
from hptool.launch import JobState, JobStatus, LocalLauncher, PackedLauncher, Run
from hptool.measurement import FailureKind
from hptool.worker import pack
from hptool.worker.pack import Lane, PackJob, run_pack
from hptool.worker.supervisor import NodeJob
from tests.searches import processes_of, wait_for
from tests.worker.runs import tiny_document

ALIVE = (JobState.PENDING, JobState.RUNNING)


def stand_in(job: NodeJob) -> None:
    """Instead of a run: does what its config says, after it has noted its process."""
    directory = Path(job.run_directory)
    with (directory / "processes").open("a") as noted:
        noted.write(f"{os.getpid()} {os.getppid()} {os.environ.get('SLURM_STEP_ID')}\n")
    word = Path(job.config_path).read_text()
    node = os.environ.get("SLURM_NODEID", "0")
    if word in ("crash", f"crash on {node}"):
        sys.exit(3)
    if word == "kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "deaf":
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        if os.fork() == 0:  # a rank, and what it has started, in a session of its own
            os.setsid()
            os.fork()
        with (directory / "processes").open("a") as noted:
            noted.write(f"{os.getpid()} {os.getppid()}\n")
    while word != "measure" and not (directory / "go").exists():
        time.sleep(0.01)
    (directory / f"measurement-{node}.json").write_text("{}")


class ForkHost:
    """Jobs as forked processes of this one, each node a process: they have what a test has put in place of things."""

    slots: int | None = 4
    poll_s = 0.05

    def __init__(self, folder: Path) -> None:
        self.submitted: list[str] = []
        self.jobs: dict[str, list[int]] = {}
        self.calls: dict[str, tuple[Callable[[PackJob], None], PackJob, int]] = {}
        self.ended: dict[int, int] = {}
        self.tokens: dict[str, str] = {}
        self.minutes: list[float] = []
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def submit(self, runs: Sequence[Run], started: launch.Started) -> None:
        for run in runs:
            self.submitted.append(run.name)
            started(run, f"job-of-{run.name}")

    def start(
        self,
        function: Callable[[PackJob], None],
        argument: PackJob,
        *,
        name: str,
        nodes: int,
        max_minutes: float,
        token: str,
    ) -> str:
        assert name.startswith("hptool-")
        job_id = str(7000 + len(self.jobs))
        self.tokens[token] = job_id
        self.minutes.append(max_minutes)
        self.calls[job_id] = (function, argument, nodes)
        self.begin(job_id, life=0)
        return job_id

    def begin(self, job_id: str, life: int) -> None:
        function, argument, nodes = self.calls[job_id]
        self.jobs[job_id] = [self._fork(job_id, function, argument, node, life) for node in range(nodes)]

    def _fork(self, job_id: str, function: Callable[[PackJob], None], argument: PackJob, node: int, life: int) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            output = os.open(self.log_path(job_id), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            os.environ.update(SLURM_NODEID=str(node), SLURM_RESTART_COUNT=str(life), SLURM_STEP_ID="0")
            function(argument)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 (nothing of pytest's may run in the child)
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        return {job_id: self._status(job_id) for job_id in job_ids}

    def _status(self, job_id: str) -> JobStatus:
        processes = self.jobs[job_id]
        for process in processes:
            if process not in self.ended:
                pid, status = os.waitpid(process, os.WNOHANG)
                if pid:
                    self.ended[process] = os.waitstatus_to_exitcode(status)
        codes = [self.ended[process] for process in processes if process in self.ended]
        if any(codes):  # as srun's --kill-on-bad-exit
            self.kill(job_id, signal.SIGKILL)
        if len(codes) < len(processes):
            return JobStatus(state=JobState.RUNNING)
        meaning = FailureKind.CRASH if any(codes) else FailureKind.LOST
        return JobStatus(state=JobState.ENDED, detail=f"job {job_id} ended with {codes}", meaning=meaning)

    def kill(self, job_id: str, signum: signal.Signals) -> None:
        for process in self.jobs[job_id]:
            if process not in self.ended:
                os.kill(process, signum)

    def requeue(self, job_id: str) -> None:
        """What Slurm does to a job that a more urgent one displaces."""
        self.kill(job_id, signal.SIGTERM)
        wait_for(lambda: self._status(job_id).state is JobState.ENDED)
        self.begin(job_id, life=1)

    def cancel(self, job_ids: Sequence[str]) -> None:
        for job_id in job_ids:
            self.kill(job_id, signal.SIGTERM)
            wait_for(lambda job_id=job_id: self._status(job_id).state is JobState.ENDED)  # type: ignore[misc]

    def find(self, tokens: Sequence[str]) -> dict[str, str]:
        return {token: self.tokens[token] for token in tokens if token in self.tokens}

    def log_path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.out"

    def close(self) -> None:
        pass


class Lanes:
    """A packed launcher over forked processes, and the runs it was given."""

    def __init__(self, tmp_path: Path, cluster: Cluster) -> None:
        self.results = tmp_path / "results" / "demo"
        self.cluster = cluster
        self.host = ForkHost(tmp_path)
        self.launcher = self.another()
        self.ids: dict[str, str] = {}

    def another(self, idle_s: float = 60) -> PackedLauncher:
        """As a later process has it: of the same files."""
        return PackedLauncher(self.cluster, self.results / "jobs", self.host, idle_s=idle_s)

    def order(self, name: str, do: str = "measure", *, nodes: int = 1, max_minutes: float = 1.0) -> Path:
        """Submits a run; its directory."""
        directory = self.results / "runs" / name
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(do)
        run = Run(name=name, directory=directory, nodes=nodes, max_minutes=max_minutes, token=f"token-{name}")
        self.launcher.submit([run], lambda run, job_id: self.ids.update({run.name: job_id}))
        return directory

    def status(self, name: str) -> JobStatus:
        return self.launcher.status([self.ids[name]])[self.ids[name]]

    def end(self, *names: str) -> list[JobStatus]:
        """The last states of these runs."""
        wait_for(lambda: all(self.status(name).state not in ALIVE for name in names), otherwise=self.said)
        return [self.status(name) for name in names]

    def running(self, directory: Path, count: int = 1) -> list[int]:
        """The processes of a stand-in, once there are so many."""
        noted = directory / "processes"
        wait_for(lambda: noted.exists() and len(noted.read_text().splitlines()) >= count, otherwise=self.said)
        return [int(line.split()[0]) for line in noted.read_text().splitlines()]

    def said(self) -> str:
        logs = [*self.results.rglob("*.log"), *self.results.parents[1].glob("*.out")]
        return "\n".join(f"{path}: {path.read_text()}" for path in logs)


@pytest.fixture
def lanes(tmp_path: Path, local: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lanes]:
    monkeypatch.setattr(pack, "run_node", stand_in)
    monkeypatch.setattr(pack, "load_framework", lambda *_: None)
    monkeypatch.setattr(pack, "_OUTER_S", 0.2)
    found = Lanes(tmp_path, local)
    yield found
    found.launcher.close()
    assert all(found.host.status([job_id])[job_id].state is JobState.ENDED for job_id in found.host.jobs), found.said()


def is_gone(process: int) -> bool:
    """It has ended, whether or not somebody has asked for its exit code."""
    try:
        return ") Z " in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_orders_are_carried_out_one_after_another_in_one_job(lanes: Lanes) -> None:
    first = lanes.order("a", "wait")
    directories = [first, lanes.order("b"), lanes.order("c")]
    assert lanes.ids == {"a": "7000#1", "b": "7000#2", "c": "7000#3"}
    (process,) = lanes.running(first)
    assert [lanes.status(name).state for name in "abc"] == [JobState.RUNNING, JobState.PENDING, JobState.PENDING]
    assert "waits for its turn in job 7000" in lanes.status("b").detail
    assert os.getsid(process) == process
    (first / "go").touch()
    assert {status.state for status in lanes.end(*"abc")} == {JobState.ENDED}
    parents = {(directory / "processes").read_text().split()[1] for directory in directories}
    ports = {(directory / "processes").read_text().split()[2] for directory in directories}
    assert len(parents) == 1
    assert len(ports) == 3  # nodes.this_node chooses the port by it


def test_an_order_that_comes_late_is_carried_out(lanes: Lanes) -> None:
    lanes.order("a")
    lanes.end("a")
    lanes.order("b")
    lanes.end("b")
    assert lanes.ids["b"] == "7000#2"
    lanes.launcher.close()
    assert (lanes.results / "jobs" / "packs" / "001" / "over").read_text() == "closed, and every order carried out\n"


def test_a_search_that_goes_on_another_way_still_knows_its_orders(lanes: Lanes) -> None:
    directory = lanes.order("a", "wait")
    lanes.running(directory)
    other = PackedLauncher(lanes.cluster, lanes.results / "jobs", lanes.host, takes_orders=False)
    assert other.slots == 4
    assert other.status([lanes.ids["a"]])[lanes.ids["a"]].state is JobState.RUNNING
    found: dict[str, str] = {}
    run = Run(name="b", directory=lanes.results / "runs" / "b", nodes=1, max_minutes=1.0, token="token-b")  # noqa: S106
    other.submit([run], lambda run, job_id: found.update({run.name: job_id}))
    assert found == {"b": "job-of-b"}
    assert lanes.host.submitted == ["b"]
    (directory / "go").touch()
    lanes.end("a")
    assert len(list((lanes.results / "jobs" / "packs").glob("*/orders/*.json"))) == 1


def test_a_lane_counts_for_as_long_as_it_has_its_nodes(lanes: Lanes) -> None:
    folder = lanes.results / "jobs"
    assert launch.allocated_gpu_hours(folder, 8) == 0.0
    lanes.order("a", nodes=2)
    lanes.end("a")
    lanes.launcher.close()
    hours = launch.allocated_gpu_hours(folder, 8)
    held_s = Lane(directory=folder / "packs" / "001").held_s()
    # The stand-in for a job is a fork of this process, which is older than the job.
    assert hours == pytest.approx(2 * 8 * held_s / 3600)
    assert held_s > 0
    lanes.order("b")
    lanes.end("b")
    lanes.launcher.close()
    assert launch.allocated_gpu_hours(folder, 8) > hours


@pytest.mark.parametrize(
    ("do", "said", "meaning"),
    [
        ("crash", "exit code 3", FailureKind.CRASH),
        ("kill", "killed by SIGSEGV", FailureKind.CRASH),
        ("deaf", "not ended 0.2 s after its 0.005 minutes; killed", FailureKind.TIMEOUT),
    ],
)
def test_an_order_that_fails_does_no_harm_to_the_next(lanes: Lanes, do: str, said: str, meaning: FailureKind) -> None:
    bad = lanes.order("bad", do, max_minutes=0.005 if do == "deaf" else 1.0)
    good = lanes.order("good")
    failed, _ = lanes.end("bad", "good")
    assert (failed.state, failed.meaning) == (JobState.ENDED, meaning)
    assert said in failed.detail
    assert all(is_gone(process) for process in lanes.running(bad))
    assert (good / "measurement-0.json").exists()
    assert lanes.ids["good"] == "7000#2"


def test_what_an_order_leaves_behind_is_gone_before_the_next(lanes: Lanes) -> None:
    bad = lanes.order("bad", "deaf")
    good = lanes.order("good", "wait")
    left = lanes.running(bad, count=4)
    assert len(set(left)) == 3  # a supervisor, a rank, and what that has started
    os.kill(left[0], signal.SIGKILL)
    lanes.running(good)
    assert all(is_gone(process) for process in left)
    (good / "go").touch()
    lanes.end("bad", "good")


def test_a_running_order_is_cancelled_alone(lanes: Lanes) -> None:
    directories = [lanes.order(name, "deaf" if name == "a" else "wait") for name in "abc"]
    processes = lanes.running(directories[0], count=4)
    lanes.launcher.cancel([lanes.ids["a"], lanes.ids["b"]])
    assert all(is_gone(process) for process in processes)
    a, b = lanes.end("a", "b")
    assert (a.state, a.meaning, a.detail) == (JobState.ENDED, FailureKind.LOST, "cancelled")
    assert (b.state, b.may_run_again) == (JobState.LOST, True)
    (directories[2] / "go").touch()
    lanes.end("c")
    assert not (directories[1] / "processes").exists()


def test_cancelling_before_the_lane_is_up_needs_no_wait(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "load_framework", lambda *_: time.sleep(1.0))
    directory = lanes.order("a")
    assert lanes.status("a") == JobStatus(state=JobState.PENDING, detail="job 7000 prepares")
    lanes.launcher.cancel([lanes.ids["a"]])
    assert lanes.status("a").state is JobState.LOST
    lanes.launcher.close()
    assert not (directory / "processes").exists()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_a_lane_loses_what_ran_and_gives_back_what_did_not(lanes: Lanes, signum: signal.Signals) -> None:
    directory = lanes.order("a", "deaf")
    lanes.order("b")
    processes = lanes.running(directory, count=4)
    lanes.host.kill("7000", signum)
    a, b = lanes.end("a", "b")
    assert (a.state, a.detail) == (JobState.ENDED, f"job 7000 ended with [{-9 if signum == signal.SIGKILL else 143}]")
    assert (b.state, b.may_run_again) == (JobState.LOST, True)
    assert is_gone(processes[0])
    if signum == signal.SIGTERM:
        assert all(is_gone(process) for process in processes)
    else:  # here nobody is left who could; a scheduler ends them
        for process in processes[1:]:
            os.kill(process, signal.SIGKILL)
    # The same runs go into a new lane.
    again = lanes.order("b again")
    lanes.end("b again")
    assert lanes.ids["b again"] == "7001#3"
    assert (again / "measurement-0.json").exists()


def test_a_lane_that_cannot_start_is_no_reason_to_try_again(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_adopt_orphans", lambda: sys.exit(9))
    lanes.order("a")
    (status,) = lanes.end("a")
    assert status == JobStatus(state=JobState.ENDED, detail="job 7000 ended with [9]", meaning=FailureKind.CRASH)
    assert lanes.launcher.log_path(lanes.ids["a"]) == lanes.host.log_path("7000")


def test_a_later_process_adopts_living_lanes(lanes: Lanes) -> None:
    directory = lanes.order("a", "wait")
    lanes.order("b")
    lanes.running(directory)
    before, lanes.launcher = lanes.launcher, lanes.another()
    assert lanes.launcher.find(["token-a", "token-x"]) == {"token-a": "7000#1"}
    assert lanes.status("a").state is JobState.RUNNING
    lanes.order("c")
    assert lanes.ids["c"] == "7000#3"
    (directory / "go").touch()
    lanes.end("a", "b", "c")
    assert before.status([lanes.ids["c"]])[lanes.ids["c"]].state is JobState.ENDED
    assert lanes.launcher.log_path(lanes.ids["a"]).parent.name == "logs"


def test_a_lane_whose_launcher_died_before_it_noted_the_job_is_found(lanes: Lanes) -> None:
    lanes.order("a")
    lanes.end("a")
    (lanes.results / "jobs" / "packs" / "001" / "job.json").unlink()
    lanes.launcher = lanes.another()
    lanes.order("b")
    assert lanes.ids["b"] == "7000#2"
    lanes.end("b")


def test_the_end_of_a_job_is_remembered(lanes: Lanes) -> None:
    directory = lanes.order("a", "wait")
    lanes.running(directory)
    lanes.host.kill("7000", signal.SIGTERM)
    (status,) = lanes.end("a")
    lanes.launcher = lanes.another()
    lanes.host.jobs.clear()  # as schedulers forget, and hand out process ids again
    assert lanes.status("a") == status


def test_an_idle_lane_ends(lanes: Lanes) -> None:
    lanes.launcher = lanes.another(idle_s=0.5)
    lanes.order("a")
    lanes.end("a")
    wait_for(lambda: lanes.host.status(["7000"])["7000"].state is JobState.ENDED)
    assert "nothing was ordered for 0.5 s" in (lanes.results / "jobs" / "packs" / "001" / "over").read_text()
    lanes.order("b")
    assert lanes.ids["b"] == "7001#2"
    lanes.end("b")


def test_a_lane_ends_with_its_owner(lanes: Lanes) -> None:
    with subprocess.Popen(["sleep", "60"]) as owner:
        lane = Lane(directory=lanes.results / "lane")
        directory = lanes.results / "run"
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text("deaf")
        job = NodeJob(config_path=str(directory / "config.yaml"), run_directory=str(directory), max_minutes=1)
        lane.write(pack.Order(name="a", job=job), 1)
        argument = PackJob(
            directory=str(lane.directory), nodes=1, accelerator="cpu", minutes=60, idle_s=60, owner_pid=owner.pid
        )
        job_id = lanes.host.start(run_pack, argument, name="hptool-x", nodes=1, max_minutes=60, token="x")  # noqa: S106
        processes = lanes.running(directory, count=4)
        owner.kill()  # not waited for yet: a zombie is gone, too
        wait_for(lambda: lanes.host.status([job_id])[job_id].state is JobState.ENDED)
    assert all(is_gone(process) for process in processes)


def test_a_lane_without_time_for_an_order_says_so(lanes: Lanes) -> None:
    lanes.cluster = replace(lanes.cluster, scheduler="slurm")  # for local lanes have all the time
    lanes.launcher = lanes.another()
    first = lanes.order("short", "wait", max_minutes=0.05)
    lanes.running(first)
    assert lanes.host.minutes == [launch.lane_minutes(0.05)]
    # Its launcher sees that, and starts another lane; a lane that is asked all the same refuses.
    long = lanes.order("long", max_minutes=500)
    assert lanes.ids["long"] == "7001#2"
    lane = Lane(directory=lanes.results / "jobs" / "packs" / "001")
    config = str(long / "config.yaml")
    job = NodeJob(config_path=config, run_directory=str(lanes.results / "runs" / "other"), max_minutes=500)
    lane.write(pack.Order(name="other", job=job), 3)
    lanes.ids["other"] = "7000#3"
    (first / "go").touch()
    other, _, _ = lanes.end("other", "short", "long")
    assert (other.state, other.may_run_again) == (JobState.LOST, True)
    assert other.detail == "its allocation has no 500 minutes left"


def test_nodes_begin_and_end_each_order_together(lanes: Lanes) -> None:
    first = lanes.order("a", "wait", nodes=2)
    second = lanes.order("b", nodes=2)
    lone = lanes.order("c", nodes=1)
    lanes.end("c")
    assert lanes.ids == {"a": "7000#1", "b": "7000#2", "c": "7001#3"}
    lanes.running(first, count=2)
    assert not (second / "processes").exists()
    (first / "go").touch()
    lanes.end("a", "b")
    assert all((directory / f"measurement-{node}.json").exists() for directory in (first, second) for node in (0, 1))
    assert not (lone / "measurement-1.json").exists()


@pytest.mark.parametrize("node", [0, 1])
def test_an_order_that_fails_on_one_node_ends_on_the_others(lanes: Lanes, node: int) -> None:
    bad = lanes.order("bad", f"crash on {node}", nodes=2)
    good = lanes.order("good", nodes=2)
    failed, _ = lanes.end("bad", "good")
    assert "exit code 3" in failed.detail
    assert all(is_gone(process) for process in lanes.running(bad, count=2))
    assert (good / "measurement-1.json").exists()


def test_a_cancelled_order_ends_on_all_nodes(lanes: Lanes) -> None:
    bad, good = lanes.order("bad", "wait", nodes=2), lanes.order("good", nodes=2)
    processes = lanes.running(bad, count=2)
    lanes.launcher.cancel([lanes.ids["bad"]])
    assert all(is_gone(process) for process in processes)
    lanes.end("good")
    assert (good / "measurement-1.json").exists()


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_requeued_lane_repeats_what_was_interrupted(lanes: Lanes, nodes: int) -> None:
    done = lanes.order("done", nodes=nodes)
    interrupted, waiting = lanes.order("interrupted", "wait", nodes=nodes), lanes.order("waiting", nodes=nodes)
    lanes.running(interrupted, count=nodes)
    lanes.host.requeue("7000")
    lanes.running(interrupted, count=2 * nodes)
    (interrupted / "go").touch()
    lanes.end("done", "interrupted", "waiting")
    ran = [len((directory / "processes").read_text().splitlines()) for directory in (done, interrupted, waiting)]
    assert ran == [nodes, 2 * nodes, nodes]


def test_what_was_measured_is_not_repeated(lanes: Lanes) -> None:
    directory = lanes.order("a", "wait")
    lanes.running(directory)
    (directory / "measurement.json").write_text("{}")
    lanes.host.requeue("7000")
    (status,) = lanes.end("a")
    assert status.detail == "measured, though its job was interrupted"
    assert len(lanes.running(directory)) == 1


def test_an_order_that_interrupts_its_job_again_and_again_is_given_up(lanes: Lanes) -> None:
    directory = lanes.order("a", "wait")
    after = lanes.order("b")
    for life in (1, 2, 3):
        lanes.running(directory, count=life)
        lanes.host.kill("7000", signal.SIGTERM)
        wait_for(lambda: lanes.host.status(["7000"])["7000"].state is JobState.ENDED)
        lanes.host.begin("7000", life=life)
    a, _ = lanes.end("a", "b")
    assert (a.detail, a.meaning) == ("its job was interrupted 3 times while it ran", FailureKind.LOST)
    assert (after / "measurement-0.json").exists()


def test_a_job_that_the_scheduler_has_replaced_ends_itself(lanes: Lanes) -> None:
    directory = lanes.order("a", "deaf")
    processes = lanes.running(directory, count=4)
    old = lanes.host.jobs["7000"]
    lanes.host.begin("7000", life=1)  # the first life is on a node that the scheduler has lost sight of
    wait_for(lambda: all(is_gone(process) for process in [*old, *processes]))
    lanes.host.jobs["old"] = old
    lanes.running(directory, count=8)
    lanes.launcher.cancel([lanes.ids["a"]])


def test_a_refused_lane_is_an_error_and_nothing_is_left(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise LaunchError("sbatch refused")

    with monkeypatch.context() as patch:
        patch.setattr(lanes.host, "start", refuse)
        with pytest.raises(LaunchError, match="refused"):
            lanes.order("a")
    assert lanes.ids == {}
    lanes.order("b")
    lanes.end("b")


def test_ids_of_jobs_of_their_own_are_the_hosts(lanes: Lanes) -> None:
    lanes.order("a")
    found = lanes.launcher.status(["7000", "7000#1", "7000#99"])
    assert found["7000"].state is JobState.RUNNING
    assert found["7000#99"].state is JobState.LOST
    assert lanes.launcher.log_path("7000") == lanes.host.log_path("7000")
    lanes.end("a")


# ---------------------------------------------------------------- real runs


@pytest.fixture
def packed(tmp_path: Path, local: Cluster) -> Iterator[PackedLauncher]:
    jobs = tmp_path / "results" / "demo" / "jobs"
    found = launch.launcher(local, jobs, "packed")
    assert isinstance(found, PackedLauncher)
    yield found
    found.close()


def real(tmp_path: Path, name: str, *, max_minutes: float = 2.0, **changes: Any) -> Run:
    directory = tmp_path / "results" / "demo" / "runs" / name
    files.write_text(directory / "config.yaml", files.yaml_text(tiny_document(**changes)))
    return Run(name=name, directory=directory, nodes=1, max_minutes=max_minutes)


def outcomes(run: Run) -> list[str]:
    """What the run has left: its measurement, or the kind of its failure."""
    found = [path.name for path in run.directory.glob("measurement.json")]
    return found + [json.loads(path.read_text())["kind"] for path in run.directory.glob("failure-rank*.json")]


def ends(launcher: launch.Launcher, ids: Sequence[str]) -> None:
    logs = [launcher.log_path(job_id) for job_id in ids]
    wait_for(
        lambda: all(status.state not in ALIVE for status in launcher.status(ids).values()),
        timeout_s=120,
        otherwise=lambda: "\n".join(log.read_text() for log in logs if log.exists()),
    )


def test_real_runs_follow_each_other_whatever_becomes_of_them(packed: PackedLauncher, tmp_path: Path) -> None:
    endless = {"trainer__max_steps": 1_000_000}
    runs = [
        real(tmp_path, "two ranks", trainer__devices=2),
        real(tmp_path, "slow", max_minutes=0.03, trainer__devices=2, **endless),
        real(tmp_path, "impossible", model__global_batch_size=7),
        real(tmp_path, "killed", **endless),
        real(tmp_path, "pipeline", trainer__devices=2, model__pipeline_model_parallel_size=2),
    ]
    ids: list[str] = []
    packed.submit(runs, lambda _, job_id: ids.append(job_id))
    wait_for((runs[3].directory / "progress.json").exists, timeout_s=120)
    packed.cancel([ids[3]])
    ends(packed, ids)
    assert [outcomes(run) for run in runs] == [["measurement.json"], ["timeout"], ["invalid"], [], ["measurement.json"]]
    assert len({job_id.partition("#")[0] for job_id in ids}) == 1
    assert "not done after 0.03 minutes" in packed.log_path(ids[1]).read_text()
    packed.close()


def test_a_killed_lane_leaves_no_process(packed: PackedLauncher, tmp_path: Path) -> None:
    runs = [real(tmp_path, "a", trainer__devices=2, trainer__max_steps=1_000_000), real(tmp_path, "b")]
    ids: list[str] = []
    packed.submit(runs, lambda _, job_id: ids.append(job_id))
    wait_for((runs[0].directory / "progress.json").exists, timeout_s=120)
    os.kill(int(ids[0].partition("#")[0]), signal.SIGKILL)
    ends(packed, ids)
    found = packed.status(ids)
    assert (found[ids[0]].state, found[ids[1]].state) == (JobState.ENDED, JobState.LOST)
    assert found[ids[1]].may_run_again
    wait_for(lambda: not processes_of(tmp_path))


def test_a_real_lane_ends_with_its_owner(tmp_path: Path) -> None:
    directory = real(tmp_path, "a", trainer__devices=2, trainer__max_steps=1_000_000).directory
    code = (
        "import sys, time; from pathlib import Path; from hptool import files, launch\n"
        "results = Path(sys.argv[1])\n"
        "at = launch.launcher(files.read_cluster('local'), results / 'jobs', 'packed')\n"
        "at.submit([launch.Run(name='a', directory=results / 'runs' / 'a', nodes=1, max_minutes=2)], lambda *_: None)\n"
        "time.sleep(600)\n"
    )
    results = tmp_path / "results" / "demo"
    with subprocess.Popen([sys.executable, "-c", code, str(results)], start_new_session=True) as owner:
        wait_for((directory / "progress.json").exists, timeout_s=120)
        assert processes_of(results)
        os.killpg(owner.pid, signal.SIGINT)  # a terminal's Ctrl-C, to which the lane itself is deaf
    wait_for(lambda: not processes_of(results), timeout_s=20)


def test_local_clusters_know_no_arrays(local: Cluster, dgx_a100: Cluster, tmp_path: Path) -> None:
    assert isinstance(launch.launcher(local, tmp_path, "separate"), LocalLauncher)
    with pytest.raises(InputError, match=r"array given, allowed for local .* is separate, packed"):
        launch.launcher(local, tmp_path, "array")
    assert isinstance(launch.launcher(dgx_a100, tmp_path, "packed"), PackedLauncher)
