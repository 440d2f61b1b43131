"""What a training is to do beside its config, and what it comes to: files of its directory. Knows no framework.

config.yaml          the config, with its overrides
orders.json          `Orders`
checkpoints/         step-N, each of them whole; see `checkpoints`
losses.csv           every step: loss, learning rate, gradient norm, time, tokens
evaluations.jsonl    validation losses, accuracies and samples of text
tensorboard/         the same as scalars, where TensorBoard is installed
progress.json        the newest step, for those who watch
result.json          `TrainingResult`, when the training has ended or was stopped in order
runs.csv             one row for each training that came to its end
logs/                what each rank said
"""

import csv
import fcntl
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hptool import files
from hptool.errors import InputError
from hptool.units import SECONDS_PER_MINUTE

CONFIG = "config.yaml"
ORDERS = "orders.json"
RESULT = "result.json"
CHECKPOINTS = "checkpoints"
LOSSES = "losses.csv"
EVALUATIONS = "evaluations.jsonl"
TENSORBOARD = "tensorboard"
RUNS = "runs.csv"

#: The columns of a table of runs, as `hptool recommend --runs` reads them.
RUN_COLUMNS = ("parameters", "tokens", "loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a training does and when. Numbers of steps; 0 is never, but for the end of the training.

    `validation_batches` counts global batches, or is the part of the validation samples that is read. A sample of
    text continues `prompt` by `sample_tokens` tokens: the likeliest ones, or at a `temperature` above 0 drawn ones.
    """

    validate_every: int
    validation_batches: int | float
    checkpoint_every: int
    keep_checkpoints: int
    log_every: int
    sample_every: int = 0
    prompt: str | None = None
    sample_tokens: int = 64
    temperature: float = 0.0
    hellaswag: str | None = None
    runs: str | None = None
    max_seconds: float | None = None


def minutes_of(max_time: str | None) -> float:
    """Of `trainer.max_time`, Lightning's DD:HH:MM:SS; without limit where there is none."""
    if max_time is None:
        return math.inf
    try:
        days, hours, minutes, seconds = (int(part) for part in max_time.split(":"))
    except ValueError as error:
        raise InputError(f"trainer.max_time: {max_time!r} given, allowed is DD:HH:MM:SS") from error
    return ((days * 24 + hours) * 60 + minutes) + seconds / SECONDS_PER_MINUTE


class Stop(StrEnum):
    """Why a training ended."""

    DONE = "done"  # all of trainer.max_steps
    TIME = "max_time"  # trainer.max_time would have been over
    SIGNAL = "signal"  # somebody wants it to end


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What a training has come to: after `step` of `max_steps`, `first_step` of them before this part of it.

    `loss` is of the last training batch and `validation_loss` of the validation samples, both means over tokens.
    `checkpoint` is where --resume goes on.
    """

    stopped: Stop
    first_step: int
    step: int
    max_steps: int
    parameters: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    hellaswag_accuracy: float | None
    checkpoint: str
    notes: Sequence[str] = ()


def check_runs(path: Path) -> None:
    """InputError where a row of runs could not be added to this file."""
    if not path.exists():
        return
    header = next(csv.reader(files.read_text(path).splitlines()), None)
    if header is not None and tuple(header) != RUN_COLUMNS:
        raise InputError(f"{path}: the columns {','.join(header)} given, allowed are {','.join(RUN_COLUMNS)}")


def add_run(path: Path, result: TrainingResult) -> None:
    """Adds a training's row to a table of runs: whole, and after the rows of others that end at the same time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END) == 0:
            writer.writerow(RUN_COLUMNS)
        writer.writerow([result.parameters, result.tokens, result.validation_loss])
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint of a training's directory; a checkpoint gets its name when it is whole."""
    found = sorted((directory / CHECKPOINTS).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    return found[-1] if found else None
