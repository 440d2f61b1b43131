"""Whatever goes wrong, a run ends soon, leaves one failure with the cause, and no process."""

import errno
import itertools
import logging
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hptool.errors import InputError
from hptool.measurement import Failure, FailureKind
from hptool.units import MIB
from hptool.worker import outcome, processes, supervisor
from hptool.worker.nodes import Place
from tests.worker.runs import Launcher, Run, write_set

#: Steps for longer than any test takes.
ENDLESS: dict[str, Any] = {"trainer__max_steps": 1_000_000}


def only_failure(run: Run) -> Failure:
    """The run's failure, which must be the only one, and in the file named after its rank."""
    (failure,) = run.failures
    assert (run.directory / f"failure-rank{failure.rank}.json").exists()
    assert not (run.directory / "measurement.json").exists()
    return failure


def assert_gone(processes: list[int], timeout_s: float = 5.0) -> None:
    """None of these processes is running any more."""
    deadline = time.monotonic() + timeout_s
    while any(Path(f"/proc/{pid}/cmdline").exists() and not is_zombie(pid) for pid in processes):
        assert time.monotonic() < deadline, f"some of {processes} still run"
        time.sleep(0.02)


def is_zombie(pid: int) -> bool:
    """Ended, but nobody has asked for its exit code; true also where it is gone by now."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("devices", [1, 2])
def test_memory_limit_is_an_oom(launcher: Launcher, devices: int) -> None:
    run = launcher.start(
        limits={"memory_gib_per_rank": 1.0}, trainer__devices=devices, model__max_position_embeddings=5_000_000
    )
    assert run.wait() == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.OOM
    assert "can't allocate memory" in failure.message
    assert failure.log_path is not None
    assert "Traceback" in Path(failure.log_path).read_text()


def test_memory_limit_is_of_what_is_resident(launcher: Launcher) -> None:
    resident = launcher.run(trainer__devices=2).peak_memory_gib
    assert 0.2 < resident < 0.6
    run = launcher.start(limits={"memory_gib_per_rank": resident + 0.05}, trainer__devices=2)
    assert run.wait() == 0
    assert run.measurement.peak_memory_gib < resident + 0.05


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_run(launcher: Launcher, victim: int) -> None:
    run = launcher.start(trainer__devices=2, **ENDLESS)
    run.until_step(2)
    ranks = run.ranks(2)
    os.kill(ranks[victim], signal.SIGKILL)
    assert run.wait(timeout_s=5.0) == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.CRASH
    assert failure.rank == victim
    assert "SIGKILL" in failure.message
    assert_gone(ranks)


def test_rank_killed_near_its_memory_limit_is_an_oom(launcher: Launcher) -> None:
    limit = launcher.run().peak_memory_gib / 0.95
    run = launcher.start(limits={"memory_gib_per_rank": limit}, **ENDLESS)
    run.until_step(5)
    os.kill(run.ranks(1)[0], signal.SIGKILL)
    assert run.wait(timeout_s=5.0) == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.OOM
    assert "SIGKILL" in failure.message
    assert "GiB resident" in failure.message


def test_library_that_aborts_for_lack_of_memory_is_an_oom(launcher: Launcher) -> None:
    run = launcher.start(**ENDLESS)
    run.until_step(2)
    with (run.directory / "logs" / "rank-0.log").open("a") as log:
        log.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.kill(run.ranks(1)[0], signal.SIGABRT)
    assert run.wait(timeout_s=5.0) == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.OOM
    assert "SIGABRT" in failure.message


def test_earlier_attempt_in_the_log_does_not_explain_a_death(launcher: Launcher) -> None:
    run = launcher.start(limits={"memory_gib_per_rank": 1.0}, model__max_position_embeddings=5_000_000)
    assert run.wait() == 1
    assert only_failure(run).kind is FailureKind.OOM
    again = launcher.start_again(run, **ENDLESS)
    again.until_step(2)
    os.kill(again.ranks(1)[0], signal.SIGABRT)
    assert again.wait(timeout_s=5.0) == 1
    assert only_failure(again).kind is FailureKind.CRASH


def test_rank_that_leaves_alone_is_a_crash(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LEAVING_S", 0.5)
    let_ranks(monkeypatch, lambda place: 0 if place.rank else wait_forever())
    run = launcher.start(trainer__devices=2)
    assert run.wait(timeout_s=5.0) == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.CRASH
    assert "while ranks [0] still ran" in failure.message


def test_ranks_that_leave_without_a_measurement_are_a_crash(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_ranks(monkeypatch, lambda _: 0)
    run = launcher.start(trainer__devices=2)
    assert run.wait(timeout_s=5.0) == 1
    assert "ranks left without a measurement" in only_failure(run).message


def test_measured_run_that_cannot_leave_counts(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_and_hang(place: Place) -> int:
        (place.directory / "measurement.json").write_text("{}")
        return wait_forever()

    let_ranks(monkeypatch, measure_and_hang)
    run = launcher.start(limits={"max_minutes": 0.01})
    assert run.wait(timeout_s=5.0) == 0
    assert run.failures == []


def let_ranks(monkeypatch: pytest.MonkeyPatch, work: Callable[[Place], int]) -> None:
    """Makes the ranks of the runs that start from now on do this instead of training."""
    monkeypatch.setattr(supervisor, "load_framework", lambda *_: lambda _config, place, _heartbeats: work(place))


def wait_forever() -> int:
    """Until the supervisor ends it."""
    return forever(lambda: time.sleep(1.0))


def forever(work: Callable[[], Any]) -> NoReturn:
    """Again and again, until it raises."""
    while True:
        work()


def test_error_on_one_rank_is_told_by_that_rank(launcher: Launcher, tmp_path: Path) -> None:
    # The second replica reads the only token that is not in the vocabulary; the first one only loses its peer.
    prefix = write_set(tmp_path / "set", [[1] * 33 * 7, [499] * 33])
    run = launcher.start(trainer__devices=2, model__data__data_prefix=str(prefix), model__override_vocab_size=499)
    assert run.wait() == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.INVALID
    assert "holds the token 499" in failure.message


def test_rank_that_hangs_before_a_collective_is_the_one_to_blame(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, 2, 1, wait_forever)
    run = launcher.start(limits={"hang_s": 1.0}, trainer__devices=2, **ENDLESS)
    ranks = run.ranks(2)
    assert run.wait(timeout_s=120.0) == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.HANG
    assert failure.rank == 1
    assert "wait_forever" in (run.directory / "logs" / "rank-1.log").read_text()  # its stack
    assert_gone(ranks)


def test_rank_that_leaves_its_peer_in_a_collective_is_a_crash(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_LEAVING_S", 1.0)
    before_step(monkeypatch, 2, 1, lambda: os._exit(0))
    run = launcher.start(trainer__devices=2, **ENDLESS)
    ranks = run.ranks(2)
    assert run.wait(timeout_s=120.0) == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.CRASH
    assert "left without a measurement while ranks [0] still ran" in failure.message
    assert_gone(ranks)


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, rank: int, work: Callable[[], Any]) -> None:
    """Makes this rank do so before it joins the others in this step (counted from 0), in all runs from now on."""
    import torch  # noqa: PLC0415 (heavy)

    from hptool.worker.training import Training  # noqa: PLC0415 (imports torch and megatron)

    train = Training.train

    def work_and_train(self: Training, batch: Any, at: int, *rest: Any) -> Any:
        if at == step and torch.distributed.get_rank() == rank:
            work()
        return train(self, batch, at, *rest)

    monkeypatch.setattr(Training, "train", work_and_train)


def test_kernel_that_kills_for_memory_is_an_oom(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, memory_group: Path
) -> None:
    def join_and_allocate() -> None:
        (memory_group / "cgroup.procs").write_text(str(os.getpid()))
        forever(lambda: b"x" * (64 * MIB))

    before_step(monkeypatch, 2, 1, join_and_allocate)
    run = launcher.start(trainer__devices=2, **ENDLESS)
    ranks = run.ranks(2)
    assert run.wait(timeout_s=120.0) == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.OOM
    assert failure.rank == 1
    assert "SIGKILL" in failure.message
    assert_gone(ranks)


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of the kernel's with 16 MiB of memory and no swap, or no test: that needs root."""
    roots = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    root = next((root for root in roots if (root / "cgroup.procs").exists()), None)
    if root is None:
        pytest.skip("there are no control groups")
    group = root / f"hptool-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        limits = {
            "memory.max": 16 * MIB,
            "memory.swap.max": 0,
            "memory.limit_in_bytes": 16 * MIB,
            "memory.memsw.limit_in_bytes": 16 * MIB,
        }
        found = {group / name: limit for name, limit in limits.items() if (group / name).exists()}
        if not found:
            pytest.skip("control groups here do not limit memory")
        for path, limit in found.items():
            path.write_text(str(limit))
        yield group
    finally:
        deadline = time.monotonic() + 10.0
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:  # the killed are still leaving
            time.sleep(0.05)
        group.rmdir()


def test_kill_while_the_kernels_count_rises_is_an_oom(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    # As above, where no group can be made: a stand-in for the kernel's counter.
    killed = multiprocessing.get_context("fork").Value("i", 0)
    counted = processes.oom_kills
    monkeypatch.setattr(processes, "oom_kills", lambda: counted() + killed.value)

    def die(_: Place) -> int:
        killed.value += 1
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    let_ranks(monkeypatch, die)
    run = launcher.start()
    assert run.wait(timeout_s=5.0) == 1
    assert only_failure(run).kind is FailureKind.OOM


def test_run_over_its_minutes_times_out(launcher: Launcher) -> None:
    run = launcher.start(limits={"max_minutes": 0.03}, trainer__devices=2, **ENDLESS)
    ranks = run.ranks(2)
    assert run.wait(timeout_s=10.0) == 1
    assert only_failure(run).kind is FailureKind.TIMEOUT
    assert_gone(ranks)


def test_stopped_rank_is_a_hang_with_stacks(launcher: Launcher) -> None:
    run = launcher.start(limits={"hang_s": 1.0}, trainer__devices=2, **ENDLESS)
    run.until_step(2)
    ranks = run.ranks(2)
    os.kill(ranks[1], signal.SIGSTOP)
    assert run.wait(timeout_s=10.0) == 1
    assert only_failure(run).kind is FailureKind.HANG
    assert 'training.py", line' in (run.directory / "logs" / "rank-0.log").read_text()
    assert_gone(ranks)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__pipeline_model_parallel_size": 2}, "does not divide the 1 GPUs"),
        ({"model__global_batch_size": 7}, "does not divide the global batch of 7"),
        ({"model__tensr": 2}, "unknown key"),
        ({"trainer__max_steps": 1}, "trainer.max_steps: 1 given, allowed is 2 or more"),
        ({"model__optim__overlap_param_sync": True}, "overlap_param_sync: True given"),
        ({"model__data__data_prefix": "/nowhere/set"}, "there is no file /nowhere/set.idx"),
        ({"model__gradient_accumulation_fusion": True}, "gradient_accumulation_fusion: True given"),
        ({"model__optim__lr": 1e30}, "the loss of step"),
        ({"trainer__accelerator": "gpu"}, "CUDA devices"),
        ({"trainer__num_nodes": 2}, "srun"),
    ],
)
def test_what_cannot_run_is_invalid(launcher: Launcher, changes: dict[str, Any], said: str) -> None:
    run = launcher.start(**changes)
    assert run.wait() in (1, 2)
    failure = only_failure(run)
    assert failure.kind is FailureKind.INVALID
    assert said in failure.message


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_cancelled_run_leaves_nothing(launcher: Launcher, signum: int, code: int) -> None:
    run = launcher.start(trainer__devices=2, **ENDLESS)
    run.until_step(1)
    ranks = run.ranks(2)
    os.kill(run.pid, signum)
    assert run.wait(timeout_s=5.0) == code
    assert run.failures == []
    assert_gone(ranks)


def test_signal_to_all_processes_is_a_cancellation(launcher: Launcher) -> None:
    run = launcher.start(trainer__devices=2, **ENDLESS)
    run.until_step(1)
    ranks = run.ranks(2)
    for pid in (*ranks, run.pid):  # the ranks first, as a scheduler may
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
    assert run.wait(timeout_s=5.0) == 143
    assert run.failures == []


def test_killed_supervisor_takes_its_ranks_along(launcher: Launcher) -> None:
    run = launcher.start(trainer__devices=2, **ENDLESS)
    run.until_step(1)
    ranks = run.ranks(2)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait(timeout_s=5.0) == -signal.SIGKILL
    assert_gone(ranks)


def test_run_ends_with_its_owner(launcher: Launcher) -> None:
    with subprocess.Popen(["sleep", "60"]) as owner:
        run = launcher.start(limits={"owner_pid": owner.pid}, trainer__devices=2, **ENDLESS)
        run.until_step(1)
        ranks = run.ranks(2)
        owner.kill()
        # Not waited for yet: an owner that is a zombie is gone, too.
        assert run.wait(timeout_s=5.0) == 143
    assert run.failures == []
    assert_gone(ranks)


def test_second_attempt_forgets_the_first(launcher: Launcher) -> None:
    run = launcher.start()
    assert run.wait() == 0
    again = launcher.start_again(run, trainer__max_steps=0)
    assert again.wait() == 2
    assert only_failure(again).kind is FailureKind.INVALID
    once_more = launcher.start_again(run)
    assert once_more.wait() == 0
    assert once_more.failures == []


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB for a run directory; logs go elsewhere, so that there is something to read."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=32", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted; the limit of a file's size stands in for a full disk")
    try:
        (tmp_path / "logs").mkdir()
        (disk / "logs").symlink_to(tmp_path / "logs")
        (disk / "supervisor.log").symlink_to(tmp_path / "supervisor.log")
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def told() -> Iterator[None]:
    """What is told by logging goes to stderr, as without pytest."""
    handler = logging.StreamHandler(os.fdopen(2, "w", buffering=1, closefd=False))
    logger = logging.getLogger("hptool")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def fill(disk: Path, *, but_pages: int = 0) -> None:
    """Leaves nothing on the disk but so many pages of 4 KiB, by a file `filler`."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left on device"):
            forever(lambda: file.write(b"x" * 4096))
        file.truncate(file.tell() // 4096 * 4096 - but_pages * 4096)


def start_in(launcher: Launcher, directory: Path, **changes: Any) -> Run:
    """A run in this directory, which is there."""
    return launcher.start_again(Run(directory=directory, pid=0), **changes)


def fill_before_the_end(monkeypatch: pytest.MonkeyPatch, disk: Path, *, but_pages: int = 0) -> None:
    """Makes runs find the disk full when they have their numbers."""
    write = outcome.write_measurement

    def fill_and_write(*arguments: Any) -> None:
        (disk / outcome.PROGRESS).unlink(missing_ok=True)
        fill(disk, but_pages=but_pages)
        write(*arguments)

    monkeypatch.setattr(outcome, "write_measurement", fill_and_write)


def names(directory: Path) -> set[str]:
    """What is in a run directory, apart from the mark of who failed first."""
    return {path.name for path in directory.iterdir()} - {".first-failure"}


WHAT_WAS_THERE = {"config.yaml", "logs", "supervisor.log", "filler"}


@pytest.mark.usefixtures("told")
def test_full_disk_is_waited_for(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, small_disk: Path) -> None:
    fill_before_the_end(monkeypatch, small_disk)
    run = start_in(launcher, small_disk, trainer__devices=2)
    log = small_disk / "logs" / "rank-0.log"
    deadline = time.monotonic() + 30.0
    while not (log.exists() and "waiting up to 60 s" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "measurement.json to be writable: No space left on device" in log.read_text()
    (small_disk / "filler").unlink()
    assert run.wait(timeout_s=120.0) == 0
    assert len(run.measurement.losses) == 5
    assert names(small_disk) == (WHAT_WAS_THERE | {"measurement.json"}) - {"filler"}


@pytest.mark.usefixtures("told")
def test_disk_that_stays_full_loses_the_run(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    monkeypatch.setattr(outcome, "_PATIENCE_S", 0.1)
    fill_before_the_end(monkeypatch, small_disk)
    run = start_in(launcher, small_disk, trainer__devices=2)
    ranks = run.ranks(2)
    assert run.wait(timeout_s=120.0) == 1
    assert names(small_disk) == WHAT_WAS_THERE  # and no half of a file
    said = (small_disk / "supervisor.log").read_text()
    assert "cannot write how this run ended, which was lost: rank 0 could not write how it ended" in said
    assert "Traceback" not in said
    assert "cannot write that this rank has failed" in (small_disk / "logs" / "rank-0.log").read_text()
    assert_gone(ranks)


def test_measurement_that_finds_no_room_is_lost_where_a_failure_does(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    monkeypatch.setattr(outcome, "_PATIENCE_S", 0.1)
    fill_before_the_end(monkeypatch, small_disk, but_pages=1)
    run = start_in(launcher, small_disk, trainer__max_steps=100)
    assert run.wait(timeout_s=120.0) == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.LOST
    assert "measurement.json: cannot be written: No space left on device" in failure.message
    assert names(small_disk) == {*WHAT_WAS_THERE, "failure-rank0.json"}


@pytest.mark.usefixtures("told")
def test_disk_that_is_full_from_the_start_ends_without_a_traceback(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    (small_disk / "logs").unlink()
    load = supervisor.load_framework

    def fill_and_load(*words: Any) -> supervisor.RunRank:
        with pytest.raises(OSError, match="No space left on device"):
            forever(lambda: tempfile.mkstemp(dir=small_disk))
        return load(*words)

    monkeypatch.setattr(supervisor, "load_framework", fill_and_load)
    run = start_in(launcher, small_disk)
    assert run.wait(timeout_s=120.0) == 1
    said = (small_disk / "supervisor.log").read_text()
    assert "cannot write how this run ended, which was lost: OSError: [Errno 28]" in said
    assert "Traceback" not in said


def test_limit_of_a_files_size_loses_the_run(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A real failure to write that needs no root: of all the run's files, the measurement is too large.
    monkeypatch.setattr(outcome, "_PATIENCE_S", 0.1)
    # So would be what is compiled: nothing may be, on a CPU.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    with soft_limit(resource.RLIMIT_FSIZE, 4096):
        run = launcher.start(trainer__max_steps=100)
    assert run.wait(timeout_s=120.0) == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.LOST
    assert "measurement.json: cannot be written: File too large" in failure.message
    assert not [name for name in names(run.directory) if name.startswith(".measurement")]


@contextmanager
def soft_limit(kind: int, value: int) -> Iterator[None]:
    """Within, this process and those that it forks have this limit."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.usefixtures("told")
def test_directory_that_nothing_can_be_written_to_ends_without_a_traceback(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a full disk, without root: where the logs' directory belongs there is a file, and failures have no room.
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "logs").touch()

    def fail(*_: Any) -> Failure:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outcome, "record_failure", fail)
    run = start_in(launcher, directory)
    assert run.wait(timeout_s=120.0) == 1
    said = (directory / "supervisor.log").read_text()
    assert "cannot write how this run ended, which was crash: FileExistsError" in said
    assert "Traceback" not in said


def test_log_that_no_disk_takes_ends_no_run(launcher: Launcher, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    (directory / "logs").mkdir(parents=True)
    for rank in range(2):
        (directory / "logs" / f"rank-{rank}.log").symlink_to("/dev/full")
    run = start_in(launcher, directory, trainer__devices=2)
    assert run.wait(timeout_s=120.0) == 0
    assert len(run.measurement.losses) == 5


# ---------------------------------------------------------------- clocks and secrets


def test_wall_clock_that_jumps_changes_nothing(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.cycle([1e9, -1e9, 0.0, 3600.0])
    wall_clock, wall_clock_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: wall_clock() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: wall_clock_ns() + int(next(jumps)) * 10**9)
    run = launcher.start(limits={"max_minutes": 1.0, "hang_s": 20.0}, trainer__devices=2)
    assert run.wait() == 0
    assert all(0 < step_time_s < 60 for step_time_s in run.measurement.step_times_s)
    assert 0 < run.measurement.startup_s < 60


def test_worker_reads_no_wall_clock() -> None:
    # None of the modules that time a run or limit it.
    modules = ("rank", "training", "supervisor", "processes", "outcome", "full_training", "trainer")
    sources = [Path(supervisor.__file__).with_name(f"{name}.py") for name in modules]
    calls = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.(now|utcnow|today)\(|CLOCK_REALTIME")
    assert [path.name for path in sources if calls.search(path.read_text())] == []


def test_startup_is_from_the_supervisor_to_the_first_step(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    load, imports_s = supervisor.load_framework, 0.5

    def load_slowly(*words: Any) -> supervisor.RunRank:
        time.sleep(imports_s)
        return load(*words)

    monkeypatch.setattr(supervisor, "load_framework", load_slowly)
    begin = time.monotonic()
    found = launcher.run(trainer__devices=2)
    whole_s = time.monotonic() - begin
    tick_s = 0.02  # the kernel counts in hundredths
    assert imports_s < found.startup_s < whole_s - sum(found.step_times_s) + tick_s


def test_no_file_of_a_run_holds_a_secret(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_neverToBeWritten"  # noqa: S105 (nobody's)
    monkeypatch.setenv("HF_TOKEN", secret)

    def fail() -> None:
        print(f"asking with {secret}")  # noqa: T201 (the log)
        msg = f"{'x' * 470} 401 for {secret}"  # longer than a message may be
        raise RuntimeError(msg)

    before_step(monkeypatch, 1, 1, fail)
    run = launcher.start(trainer__devices=2)
    assert run.wait(timeout_s=120.0) == 1
    assert only_failure(run).kind is FailureKind.CRASH
    assert only_failure(run).rank == 1
    texts = {path.name: path.read_text() for path in run.directory.rglob("*") if path.is_file()}
    assert not [name for name, text in texts.items() if secret[:6] in text]
    assert "asking with <masked: HF_TOKEN>" in texts["rank-1.log"]
    assert "401 for <masked: HF_TOKEN>" in texts["rank-1.log"]


def test_refusal_holds_no_secret(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_neverToBeWritten"  # noqa: S105 (nobody's)
    monkeypatch.setenv("HF_TOKEN", secret)
    run = launcher.start_text(f"trainer: {{max_steps: {secret}}}")
    assert run.wait() == 2
    assert "'<masked: HF_TOKEN>' given" in only_failure(run).message


def test_refusal_that_a_scheduler_logs_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_neverToBeWritten"  # noqa: S105 (nobody's)
    monkeypatch.setenv("HF_TOKEN", secret)
    config = tmp_path / "config.yaml"
    config.write_text(f"trainer: {{max_steps: {secret}}}")
    job = supervisor.NodeJob(config_path=str(config), run_directory=str(tmp_path), max_minutes=1.0)
    with pytest.raises(InputError, match="'<masked: HF_TOKEN>' given") as caught:
        supervisor.run_node(job)
    assert secret not in "".join(traceback.format_exception(caught.value))
