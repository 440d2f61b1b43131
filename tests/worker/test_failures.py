"""Whatever goes wrong, a run ends soon, leaves one failure with the cause, and no process."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hptool.measurement import Failure, FailureKind
from hptool.worker import supervisor
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
    while True:
        time.sleep(1.0)


def test_error_on_one_rank_is_told_by_that_rank(launcher: Launcher, tmp_path: Path) -> None:
    # The second replica reads the only token that is not in the vocabulary; the first one only loses its peer.
    prefix = write_set(tmp_path / "set", [[1] * 33 * 7, [499] * 33])
    run = launcher.start(trainer__devices=2, model__data__data_prefix=str(prefix), model__override_vocab_size=499)
    assert run.wait() == 1
    failure = only_failure(run)
    assert failure.kind is FailureKind.INVALID
    assert "holds the token 499" in failure.message


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
