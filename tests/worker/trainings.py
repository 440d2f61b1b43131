"""Full trainings on the CPU, started as `runs` starts timed ones."""

import csv
import importlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hptool import files
from hptool.worker import full_training, orders, supervisor
from hptool.worker.orders import Orders, TrainingResult
from tests.conftest import ROOT
from tests.worker.runs import Run, exit_code_of, fork, tiny_document

#: A small real text; see tests/data/README.md.
TEXT = ROOT / "tests" / "data" / "gpl-3.txt"

#: What a training does here unless a test asks for more.
QUIET = Orders(validate_every=0, validation_batches=2, checkpoint_every=0, keep_checkpoints=2, log_every=1)


def start(directory: Path, given: Orders = QUIET, **changes: Any) -> Run:
    """Trains the tiny config with these changes, from where the directory's checkpoints end."""
    for module in ("torch.utils.tensorboard", "hptool.worker.trainer"):
        importlib.import_module(module)  # here, or each training would take seconds for it
    directory.mkdir(exist_ok=True)
    config = directory / orders.CONFIG
    config.write_text(files.yaml_text(tiny_document(**changes)))
    job = supervisor.NodeJob(config_path=str(config), run_directory=str(directory), max_minutes=2.0, orders=given)
    return Run(directory=directory, pid=fork(lambda: exit_code_of(job), directory / "supervisor.log"))


def train(directory: Path, given: Orders = QUIET, **changes: Any) -> TrainingResult:
    """As `start`, to the end, which must be a result."""
    code = start(directory, given, **changes).wait()
    if code != 0:
        logs = "\n".join(log.read_text()[-3000:] for log in directory.rglob("*.log"))
        pytest.fail(f"exit code {code}\n{logs}")
    return full_training.read_result(directory)


def every(steps: int, **changes: Any) -> Orders:
    """Orders with a checkpoint and a validation each so many steps."""
    return replace(QUIET, checkpoint_every=steps, validate_every=steps, **changes)


def curve(directory: Path) -> list[list[str]]:
    """Step, tokens, loss, learning rate and gradient norm of every step, as they were written."""
    with (directory / orders.LOSSES).open() as file:
        return [row[:5] for row in csv.reader(file)][1:]


def losses(directory: Path) -> list[float]:
    """The loss of every step."""
    return [float(row[2]) for row in curve(directory)]


def evaluations(directory: Path) -> list[dict[str, Any]]:
    """What the evaluations found, as it was written."""
    return [json.loads(line) for line in (directory / orders.EVALUATIONS).read_text().splitlines()]


def killed(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Makes the first rank kill itself, as `kill -9` does, before a call of `owner.name` for which `when` is true."""
    import torch  # noqa: PLC0415 (heavy)

    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs) and torch.distributed.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
