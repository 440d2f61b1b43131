"""How a run ends on disk: `measurement.json`, or the one failure that came first. Knows neither torch nor megatron."""

import contextlib
import errno
import logging
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from hptool import files
from hptool.errors import InputError
from hptool.measurement import Failure, FailureKind, Measurement, ServingMeasurement
from hptool.secrets import redact
from hptool.worker.orders import RESULT

_LOG = logging.getLogger(__name__)

MEASUREMENT = "measurement.json"
PROGRESS = "progress.json"

#: Which failure was first. A hard link to it can be made once only, also over NFS and Lustre.
_FIRST = ".first-failure"

#: How allocators say that there is no more: CUDA's, cuBLAS', the C++ library's, torch's on a CPU, the kernel's.
_OUT_OF_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "bad_alloc",
    "can't allocate memory",
    "Cannot allocate memory",
)

#: What a rank says when another one went away: never the cause.
_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "failed to recv, got 0 bytes",
    "ncclRemoteError",
    "remote process exit",
)

#: What a disk says that is full or gone. It says nothing about the layout.
_DISK_FAILED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE})

#: Of a failure's message, in characters.
MESSAGE_LIMIT = 500

#: How long a full disk may take to have room for a measurement again, and how long between two looks at it.
_PATIENCE_S = 60.0
_RETRY_S = 1.0


class NotWrittenError(RuntimeError):
    """The numbers of a run are there, and could not be written."""


def log_path(directory: Path, rank: int) -> Path:
    """Where a rank's stdout and stderr go."""
    return directory / "logs" / f"rank-{rank}.log"


def clear(directory: Path) -> None:
    """Forgets an earlier attempt in this directory, so that a requeued job cannot be judged by it."""
    clear_failure(directory)
    for name in (MEASUREMENT, RESULT, PROGRESS):
        (directory / name).unlink(missing_ok=True)


def clear_failure(directory: Path) -> None:
    """Forgets which failure was first."""
    for path in (*directory.glob("failure-rank*.json"), directory / _FIRST):
        path.unlink(missing_ok=True)


def is_measured(directory: Path) -> bool:
    """The run has its numbers, or a training its result; whatever goes wrong afterwards does not matter."""
    return (directory / MEASUREMENT).exists() or (directory / RESULT).exists()


def write_measurement(directory: Path, measurement: Measurement | ServingMeasurement) -> None:
    """The numbers of the run; written by one rank only, whole or not at all.

    They have cost all of the run: where they cannot be written, it is tried again for a minute. NotWrittenError then.
    """
    path, text = directory / MEASUREMENT, files.json_text(measurement)
    deadline = time.monotonic() + _PATIENCE_S
    is_told = False
    while True:
        try:
            files.write_text(path, text)
        except OSError as error:
            if time.monotonic() > deadline:
                raise NotWrittenError(f"{path}: cannot be written: {error.strerror}") from error
            if not is_told:
                _LOG.warning("waiting up to %g s for %s to be writable: %s", _PATIENCE_S, path, error.strerror)
                is_told = True
            time.sleep(_RETRY_S)
        else:
            return


def record_failure(directory: Path, failure: Failure) -> Failure:
    """Writes `failure-rankN.json`, unless a failure was first; answers the one that was.

    Ranks and supervisors of all nodes may call this at once. What the loser brought follows from what the winner
    saw, and is in its log. OSError where nothing can be written, InputError where what is there cannot be read.
    """
    failure = replace(failure, message=redact(failure.message))
    directory.mkdir(parents=True, exist_ok=True)
    first = directory / _FIRST
    handle, aside = tempfile.mkstemp(dir=directory, prefix=".failure.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(files.json_text(failure))
            file.flush()
            os.fsync(file.fileno())
        Path(aside).chmod(0o644)
        with contextlib.suppress(FileExistsError):
            os.link(aside, first)
    finally:
        Path(aside).unlink(missing_ok=True)
    # The winner may have died between link and this line: so everyone publishes the first, not their own.
    text = files.read_text(first)
    winner: Failure = files.parse_json(text, Failure, str(first))
    with contextlib.suppress(FileExistsError):
        os.link(first, directory / f"failure-rank{winner.rank or 0}.json")  # whole at once, also on a full disk
    return winner


def has_failed(directory: Path) -> bool:
    """Some rank or supervisor has recorded a failure."""
    return (directory / _FIRST).exists()


def speaks_of_memory(text: str) -> bool:
    """An allocator's complaint is in the text."""
    return any(words.lower() in text.lower() for words in _OUT_OF_MEMORY)


def is_memory_error(error: BaseException) -> bool:
    """An allocator has raised it, of whatever device."""
    # By name, because torch.OutOfMemoryError cannot be imported here.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or speaks_of_memory(str(error))


def is_lost_peer(error: BaseException) -> bool:
    """The error only says that another rank is gone."""
    return any(words in str(error) for words in _PEER_LOST)


def failure_of(error: BaseException, rank: int, log: Path | None) -> Failure:
    """What an exception of a rank means for the run."""
    text = redact(str(error))
    disk_failed = isinstance(error, OSError) and error.errno in _DISK_FAILED
    if is_memory_error(error):
        kind = FailureKind.OOM
    elif isinstance(error, InputError | FloatingPointError):
        kind = FailureKind.INVALID
    elif isinstance(error, NotWrittenError) or disk_failed:
        kind = FailureKind.LOST
    else:
        kind = FailureKind.CRASH
    message = text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
    return Failure(kind=kind, message=message[:MESSAGE_LIMIT], rank=rank, log_path=str(log) if log else None)
