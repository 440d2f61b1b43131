"""What a training writes down as it goes: every step, every evaluation, and both as TensorBoard's scalars."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hptool import files
from hptool.worker import orders

_COLUMNS = ("step", "tokens", "loss", "learning_rate", "grad_norm", "step_time_s", "tokens_per_s")

#: Where a missing TensorBoard is told, and what then is there instead.
NO_TENSORBOARD = (
    f"TensorBoard is not installed, so there are no scalars for it but {orders.LOSSES} and {orders.EVALUATIONS}: "
    "pip install 'hptool[tensorboard]'"
)


class Journal:
    """The files of one training, which end with `step` when they are opened: what came later is trained anew."""

    def __init__(self, directory: Path, step: int, log_every: int) -> None:
        self._log_every = log_every
        self._losses_path = directory / orders.LOSSES
        self._evaluations_path = directory / orders.EVALUATIONS
        _keep(self._losses_path, lambda line: _step_of_row(line) <= step, header=",".join(_COLUMNS))
        _keep(self._evaluations_path, lambda line: int(json.loads(line)["step"]) <= step)
        self._losses = self._losses_path.open("a", encoding="utf-8", newline="")
        self._scalars = _tensorboard(directory / orders.TENSORBOARD, step)
        self.has_tensorboard = self._scalars is not None

    def add_step(self, step: int, values: Mapping[str, float | None]) -> None:
        """A step, with a value for each of the columns of losses.csv behind the first."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([step, *(values[name] for name in _COLUMNS[1:])])
        self._losses.write(line.getvalue())  # at once, so that no half of a line is seen
        self._losses.flush()
        if step % self._log_every == 0:
            self._show(step, {f"train/{name}": value for name, value in values.items()})

    def add_evaluation(self, step: int, values: Mapping[str, float | str]) -> None:
        """What an evaluation after this step found."""
        files.append_line(self._evaluations_path, json.dumps({"step": step, **values}, ensure_ascii=False))
        self._show(step, {f"evaluation/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """All is written."""
        self._losses.close()
        if self._scalars is not None:
            self._scalars.close()

    def _show(self, step: int, values: Mapping[str, Any]) -> None:
        if self._scalars is None:
            return
        for name, value in values.items():
            if isinstance(value, str):
                self._scalars.add_text(name, value, step)
            elif value is not None:
                self._scalars.add_scalar(name, value, step)


def _keep(path: Path, wanted: Callable[[str], bool], header: str | None = None) -> None:
    """Only the lines that are wanted; one that a dying process left half-written is not."""

    def kept(lines: Iterable[str]) -> Iterable[str]:
        for line in lines:
            try:
                if wanted(line):
                    yield line
            except (ValueError, KeyError, TypeError):
                continue

    lines = files.read_text(path).splitlines() if path.exists() else []
    text = "".join(f"{line}\n" for line in kept(lines))
    files.write_text(path, f"{header}\n{text}" if header else text)


def _step_of_row(line: str) -> int:
    row = line.split(",")
    if len(row) != len(_COLUMNS):
        raise ValueError(line)
    return int(row[0])


def _tensorboard(directory: Path, step: int) -> Any:
    """TensorBoard's writer, which hides what was written after `step`; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (an optional extra)
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)
