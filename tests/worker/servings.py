"""Serving runs on the CPU, started as `runs` starts timed ones."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hptool import files
from hptool.measurement import ServingMeasurement
from hptool.serving_orders import SERVING, PointOrder, ServingOrders
from hptool.worker import supervisor
from tests.worker.runs import Run, exit_code_of, fork, tiny_document

TP2: dict[str, Any] = {"trainer__devices": 2, "model__tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"trainer__devices": 2, "model__pipeline_model_parallel_size": 2}


def points(*names: str) -> tuple[PointOrder, ...]:
    """By their names: `6:4/2` are batches of 2 of 6 tokens, continued by 4."""
    found = []
    for name in names:
        lengths, batch = name.split("/")
        read, written = lengths.split(":")
        found.append(PointOrder(batch=int(batch), input_len=int(read), output_len=int(written)))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A serving run in a child process."""

    run: Run

    @property
    def directory(self) -> Path:
        """Where it writes."""
        return self.run.directory

    @property
    def measured(self) -> ServingMeasurement:
        """What it wrote, which is what it reads as."""
        path = self.directory / "measurement.json"
        text = path.read_text()
        found: ServingMeasurement = files.parse_json(text, ServingMeasurement, str(path))
        assert files.parse_json(files.json_text(found), ServingMeasurement, "again") == found
        return found

    @property
    def names(self) -> list[str]:
        """Of the points that were measured."""
        return [point.name for point in self.measured.points]

    @property
    def failed(self) -> dict[str, str]:
        """The kinds of the points that were not."""
        return {failure.name: failure.kind.value for failure in self.measured.failures}

    def wait(self) -> int:
        """The exit code, as `Run.wait`."""
        return self.run.wait()

    @property
    def logs(self) -> str:
        """What everyone said, shortened."""
        return "\n".join(log.read_text()[-3000:] for log in self.directory.rglob("*.log"))


def start(directory: Path, orders: ServingOrders, *, limits: dict[str, Any] | None = None, **changes: Any) -> Serving:
    """Serves the tiny config with these changes."""
    for module in ("hptool.worker.serving", "hptool.worker.weights"):
        importlib.import_module(module)  # here, or each run would take seconds for it
    directory.mkdir(exist_ok=True)
    config = directory / "config.yaml"
    config.write_text(files.yaml_text(tiny_document(**changes)))
    (directory / SERVING).write_text(files.json_text(orders))
    job = supervisor.NodeJob(
        **{"config_path": str(config), "run_directory": str(directory), "max_minutes": 1.0, **(limits or {})}
    )
    pid = fork(lambda: exit_code_of(job), directory / "supervisor.log")
    return Serving(run=Run(directory=directory, pid=pid))


def serve(directory: Path, named: Sequence[str], *, limits: dict[str, Any] | None = None, **changes: Any) -> Serving:
    """As `start`, to the end, which must be a good one: points by their names, `orders__` before the orders' fields."""
    given = {key.removeprefix("orders__"): changes.pop(key) for key in list(changes) if key.startswith("orders__")}
    serving = start(directory, ServingOrders(points=points(*named), **given), limits=limits, **changes)
    assert serving.wait() == 0, serving.logs
    return serving
