"""A node's part of a full training: its ranks under their supervisor, how far they are, and what they come to.

Importing this module loads neither torch nor Megatron-core.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hptool import files
from hptool.base_config import BaseConfig
from hptool.errors import InputError, LaunchError
from hptool.measurement import Failure, FailureKind
from hptool.worker import orders, outcome, supervisor
from hptool.worker.nodes import this_node
from hptool.worker.orders import Orders, Stop, TrainingResult

#: How long no rank may finish a microbatch: writing and reading checkpoints of large models takes its time.
_HANG_S = 1800.0

#: How often a training says how far it is.
_TELL_S = 5.0

Say = Callable[[str], None]


def run(
    directory: Path, config: BaseConfig, given: Orders, say: Say, environment: Mapping[str, str] | None = None
) -> TrainingResult | None:
    """Trains in the directory, from its newest checkpoint; the result, on other nodes than the first None.

    InputError for what the ranks refuse, LaunchError where they fail, SystemExit where a signal ended it.
    """
    os.environ.update(environment or {})
    node = this_node(config.trainer.num_nodes)
    job = supervisor.NodeJob(
        config_path=str(directory / orders.CONFIG),
        run_directory=str(directory),
        max_minutes=math.inf,  # the ranks see to trainer.max_time, and save before
        hang_s=_HANG_S,
        orders=given,
    )
    first = node.index == 0
    if first:
        say(f"starting {config.trainer.devices} ranks on this node; their logs: {directory / 'logs'}")
    try:
        supervisor.run_ranks(config, job, node, _Teller(directory, say) if first else lambda: None)
    except supervisor.RunFailedError as error:
        raise _explained(error.failure, directory) from error
    except SystemExit as end:
        if first:
            say(f"ended by {signal.Signals(int(end.code or 0) - 128).name} {_where_it_goes_on(directory)}")
        raise
    if not first:
        return None
    result = read_result(directory)
    # A training that was over before has its row.
    whole = result.stopped is Stop.DONE and result.step > result.first_step
    if whole and given.runs is not None and result.validation_loss is not None:
        orders.add_run(Path(given.runs), result)
    return result


def read_result(directory: Path) -> TrainingResult:
    """What the training in the directory has come to."""
    path = directory / orders.RESULT
    result: TrainingResult = files.parse_json(files.read_text(path), TrainingResult, str(path))
    return result


def _where_it_goes_on(directory: Path) -> str:
    result = read_result(directory) if (directory / orders.RESULT).exists() else None
    checkpoint = orders.newest_checkpoint(directory)
    if result is not None:
        return f"after step {result.step} of {result.max_steps}; --resume goes on from there"
    if checkpoint is not None:
        return f"without a new checkpoint; --resume goes on from {checkpoint}"
    return "before the first checkpoint; --resume begins anew"


def _explained(failure: Failure, directory: Path) -> InputError | LaunchError:
    """The failure that the ranks left, as an error for the user."""
    if failure.kind is FailureKind.INVALID and not (directory / orders.LOSSES).exists():
        return InputError(failure.message)
    where = f"; rank {failure.rank}, log: {failure.log_path}" if failure.log_path else ""
    checkpoint = orders.newest_checkpoint(directory)
    goes_on = f"; --resume goes on from {checkpoint}" if checkpoint else ""
    return LaunchError(f"the training failed: {failure.kind}: {failure.message}{where}{goes_on}")


class _Teller:
    """Says every few seconds how far the training is, and what its evaluations find."""

    def __init__(self, directory: Path, say: Say) -> None:
        self._progress = directory / outcome.PROGRESS
        self._evaluations = directory / orders.EVALUATIONS
        self._say = say
        self._told_at, self._line = time.monotonic(), ""
        self._seen = self._evaluations.stat().st_size if self._evaluations.exists() else 0

    def __call__(self) -> None:
        self._tell_evaluations()
        if time.monotonic() - self._told_at < _TELL_S or not self._progress.exists():
            return
        progress = json.loads(files.read_text(self._progress))
        line = "step {step} of {of}: loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s".format(**progress)
        self._told_at = time.monotonic()
        if line != self._line:
            self._line = line
            self._say(line)

    def _tell_evaluations(self) -> None:
        size = self._evaluations.stat().st_size if self._evaluations.exists() else 0
        self._seen = min(self._seen, size)  # a resumed training begins with fewer
        if size == self._seen:
            return
        with self._evaluations.open("rb") as file:
            file.seek(self._seen)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._seen += len(line)
            found = json.loads(line)
            step = found.pop("step")
            said = [f"{name.replace('_', ' ')} {_short(value)}" for name, value in found.items()]
            self._say(f"after step {step}: {', '.join(said)}")


def _short(value: float | str) -> str:
    return repr(value) if isinstance(value, str) else f"{value:.4f}"
