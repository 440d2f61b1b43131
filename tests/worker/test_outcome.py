"""One run has one outcome, however many processes have something to say."""

import errno
import os
from pathlib import Path

import pytest

from hptool.errors import InputError
from hptool.measurement import Failure, FailureKind
from hptool.worker import outcome


def failure(rank: int) -> Failure:
    """A crash of this rank."""
    return Failure(kind=FailureKind.CRASH, message=f"words of rank {rank}", rank=rank)


def test_first_failure_stays(tmp_path: Path) -> None:
    assert outcome.record_failure(tmp_path, failure(3)).rank == 3
    assert outcome.record_failure(tmp_path, failure(0)).rank == 3
    assert [path.name for path in tmp_path.glob("failure-*")] == ["failure-rank3.json"]
    assert "words of rank 3" in (tmp_path / "failure-rank3.json").read_text()


def test_many_at_once_leave_one(tmp_path: Path) -> None:
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        children = []
        for rank in range(8):
            child = os.fork()
            if not child:
                outcome.record_failure(directory, failure(rank))
                os._exit(0)
            children.append(child)
        assert {os.waitpid(child, 0)[1] for child in children} == {0}
        (found,) = directory.glob("failure-rank*.json")
        assert f"words of {found.stem.removeprefix('failure-').replace('rank', 'rank ')}" in found.read_text()
        assert len(list(directory.iterdir())) == 2  # that, and the mark of who was first


def test_winner_that_dies_before_it_publishes_is_published_by_the_next(tmp_path: Path) -> None:
    outcome.record_failure(tmp_path, failure(3))
    (tmp_path / "failure-rank3.json").unlink()
    outcome.record_failure(tmp_path, failure(0))
    assert [path.name for path in tmp_path.glob("failure-*")] == ["failure-rank3.json"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), FailureKind.OOM),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB"), FailureKind.OOM),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), FailureKind.OOM),
        (RuntimeError("std::bad_alloc"), FailureKind.OOM),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), FailureKind.OOM),
        (InputError("model.x: 1 given, allowed is 2"), FailureKind.INVALID),
        (FloatingPointError("the loss of step 2 is nan"), FailureKind.INVALID),
        (outcome.NotWrittenError("measurement.json: cannot be written: No space left on device"), FailureKind.LOST),
        (OSError(errno.ENOSPC, "No space left on device"), FailureKind.LOST),
        (OSError(errno.ENOENT, "No such file or directory"), FailureKind.CRASH),
        (ValueError("no"), FailureKind.CRASH),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), FailureKind.CRASH),
    ],
)
def test_exception_tells_its_kind(error: Exception, kind: FailureKind) -> None:
    assert outcome.failure_of(error, 0, None).kind is kind


def test_long_message_is_cut(tmp_path: Path) -> None:
    found = outcome.failure_of(RuntimeError("x" * 10_000), 1, tmp_path / "log")
    assert len(found.message) == 500
    assert found.log_path == str(tmp_path / "log")


def test_secret_at_the_cut_leaves_no_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    for before in range(460, 500):
        found = outcome.failure_of(RuntimeError("x" * before + " hf_0123456789"), 1, None)
        assert "hf_0" not in found.message


def test_recorded_failure_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    said = Failure(kind=FailureKind.CRASH, message="401 for hf_0123456789", rank=0)
    assert outcome.record_failure(tmp_path, said).message == "401 for <masked: HF_TOKEN>"
    assert "hf_0" not in (tmp_path / "failure-rank0.json").read_text()


def test_garbage_in_the_place_of_the_first_failure_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / ".first-failure").write_bytes(b"\xff{")
    with pytest.raises(InputError, match="cannot be read"):
        outcome.record_failure(tmp_path, failure(0))


def test_directory_that_takes_nothing_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        outcome.record_failure(tmp_path / "file" / "run", failure(0))
