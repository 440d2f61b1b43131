"""Measured runs of hptool's worker, one after the other: torch and Megatron-core are loaded once, every run forks.

So a packed search runs them too (`hptool.worker.pack`); here it is without the search around it.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hptool import files
from hptool.base_config import BaseConfig
from hptool.candidates import Layout
from hptool.errors import InputError
from hptool.measurement import Failure, FailureKind, Measurement, Outcome, ServingMeasurement
from hptool.plan import Plan
from hptool.results import ResultsDirectory
from hptool.serving_orders import SERVING, ServingOrders
from hptool.timed_runs import timed_run
from hptool.worker import processes, served, supervisor
from tests.gpu.models import MAX_MINUTES, node_job

_POLL_S = 0.05

#: What a killed run's message ends with, of its log.
_LAST_LINES = 3


def load(accelerator: str) -> None:
    """Loads what runs need. To be called once, before anything else that imports torch; opens no device."""
    supervisor.load_framework(accelerator)


def run(plan: Plan, layout: Layout, *, steps: int, directory: Path, limit_s: float) -> Outcome:
    """What became of a timed run of the layout, which is given `limit_s` in all. It leaves no process behind.

    Its files are in a new directory under `directory`.
    """
    config = timed_run(plan.config, layout, nodes=1, steps=steps, max_minutes=MAX_MINUTES)
    results = ResultsDirectory(directory)
    name = results.prepare_run(layout.name, {"config.yaml": files.yaml_text(config.document())})
    place = results.run_directory(name)
    job = node_job(str(place / "config.yaml"), str(place), os.getpid())
    log = place / "supervisor.log"
    code = in_child(partial(_supervise, job), log=log, limit_s=limit_s)
    outcome = results.read_outcome(name)
    if isinstance(outcome, (Measurement, Failure)):
        return outcome
    if code is None:
        return Failure(kind=FailureKind.TIMEOUT, message=f"not over after {limit_s:.0f} s", log_path=str(log))
    return Failure(kind=FailureKind.CRASH, message=f"exit code {code}: {last_lines(log)}", log_path=str(log))


def serve(config: BaseConfig, orders: ServingOrders, *, place: Path, limit_s: float) -> ServingMeasurement | Failure:
    """What became of a serving run in the new directory `place`, which is given `limit_s` in all, as `run`."""
    files.write_text(place / "config.yaml", files.yaml_text(config.document()))
    files.write_text(place / SERVING, files.json_text(orders))
    job = node_job(str(place / "config.yaml"), str(place), os.getpid())
    log = place / "supervisor.log"
    code = in_child(partial(_supervise, job), log=log, limit_s=limit_s)
    try:
        if (measured := served.read(place)) is not None:
            return measured
        for path in place.glob("failure-rank*.json"):
            failure: Failure = files.parse_json(files.read_text(path), Failure, str(path))
            return failure
    except InputError as error:
        return Failure(kind=FailureKind.CRASH, message=str(error), log_path=str(log))
    kind, what = (
        (FailureKind.TIMEOUT, f"not over after {limit_s:.0f} s")
        if code is None
        else (FailureKind.CRASH, f"exit code {code}: {last_lines(log)}")
    )
    return Failure(kind=kind, message=what, log_path=str(log))


def _supervise(job: supervisor.NodeJob) -> int:
    os.setsid()
    try:
        supervisor.run_node(job)
    except (supervisor.RunFailedError, InputError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def in_child(function: Callable[[], int], *, log: Path, limit_s: float) -> int | None:
    """The exit code of a fork that runs the function with its output in `log`; None where it had to be killed."""
    child = processes.fork_rank(function, log=log)
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_S)
    processes.send(child, signal.SIGKILL)
    os.waitpid(child, 0)  # its own children die with it
    return None


def answer_of(function: Callable[[], Any], *, log: Path, limit_s: float) -> Any:
    """What the function answers in a fork, as JSON; RuntimeError with the log's last lines where it does not."""
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)

    def work() -> int:
        files.write_text(answer, files.json_text(function()))
        return 0

    code = in_child(work, log=log, limit_s=limit_s)
    if code is None:
        msg = f"not over after {limit_s:.0f} s; {last_lines(log)}"
        raise RuntimeError(msg)
    if code != 0 or not answer.is_file():
        msg = f"exit code {code}: {last_lines(log)}"
        raise RuntimeError(msg)
    return json.loads(answer.read_text(encoding="utf-8"))


def last_lines(log: Path, count: int = _LAST_LINES) -> str:
    """The end of a log in one line."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "no log"
    return " | ".join(line.strip() for line in lines[-count:])
