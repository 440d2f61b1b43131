"""A serving run whose points a command of the user's measures: any engine, through what it prints.

It runs once for each point, on the first node, and without torch. What it must print is in docs/worker.md.
"""

import ctypes
import json
import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Final

import numpy as np

import hptool
from hptool import files, timing
from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.measurement import FailureKind, Percentiles, PointFailure, ServedPoint, ServingMeasurement
from hptool.secrets import redact
from hptool.serving_orders import PointOrder, ServingOrders
from hptool.units import SECONDS_PER_MINUTE
from hptool.worker import outcome, processes, served

if TYPE_CHECKING:
    from hptool.worker.supervisor import NodeJob

_PR_SET_PDEATHSIG: Final = 1

_POLL_S = 0.05

#: How long a command that is to end may take to end what it has started.
_TERM_S = 5.0

#: Of what a command prints the end is read: engines are talkative, and the answer comes last.
_READ_BYTES = 4 * 2**20

#: What is asked for, as a message says it.
_EXPECTED = 'a JSON object at the end of stdout, such as {"latency_ms": [812.5, 815.1], "ttft_ms": [40.2, 40.9]}'

_MS_PER_S = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandAnswer:
    """What a command prints of a point: a time, or one for each pass or request. It may be silent of all but the first.

    `latency_ms` is of whole answers, `ttft_ms` of first tokens, `tpot_ms` of each token after them. `tokens_per_s` is
    of all requests together, tokens that were made alone, and `memory_gib` of the fullest GPU.
    """

    latency_ms: float | tuple[float, ...]
    ttft_ms: float | tuple[float, ...] | None = None
    tpot_ms: float | tuple[float, ...] | None = None
    tokens_per_s: float | None = None
    memory_gib: float | None = None
    engine: str | None = None
    device: str | None = None
    cuda_graphs: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        for name in ("latency_ms", "ttft_ms", "tpot_ms", "tokens_per_s", "memory_gib"):
            given = getattr(self, name)
            lowest_is_allowed = name != "latency_ms"  # an answer takes time
            numbers = () if given is None else given if isinstance(given, tuple) else (given,)
            bad = [x for x in numbers if not (0 < x < math.inf or (x == 0 and lowest_is_allowed))]
            if bad or (isinstance(given, tuple) and not given):
                least = "0 or more" if lowest_is_allowed else "more than 0"
                problems.append(f"{name}: {bad[0] if bad else 'no number'} given, allowed are numbers of {least}")
        if problems:
            raise ValueError("\n".join(problems))


class _RefusedError(Exception):
    """A point gave nothing, for this reason."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def serve(orders: ServingOrders, config: BaseConfig, job: "NodeJob", tell: Callable[[], None]) -> None:
    """Runs the command for every point, and leaves a measurement.

    InputError where it cannot be started at all. Whatever ends this ends the command too.
    """
    _Run(orders, config, job, tell).all_points()


class _Run:
    def __init__(self, orders: ServingOrders, config: BaseConfig, job: "NodeJob", tell: Callable[[], None]) -> None:
        self._orders = orders
        self._config = config
        self._job = job
        self._tell = tell
        self._directory = Path(job.run_directory)
        self._owner = processes.Process(job.owner_pid) if job.owner_pid is not None else None
        self._started = time.monotonic()
        limits = (orders.max_seconds, job.max_minutes * SECONDS_PER_MINUTE)
        self._limit_s = min(limit for limit in limits if limit is not None)
        self._points: list[ServedPoint] = []
        self._failures: list[PointFailure] = []
        self._answer: CommandAnswer | None = None

    def all_points(self) -> None:
        """One after the other, while there is time."""
        while left := served.open_points(self._orders, self._points, self._failures):
            point = left[0]
            if self._left_s <= 0 and (self._points or self._failures):  # a run has to come to something
                break
            served.begin_point(self._directory, point)
            rate = 0.0
            try:
                self._answer, found = self._measure(point)
                self._points.append(found)
                rate = found.tokens_per_s
            except _RefusedError as refused:
                self._failures.append(served.failure_of(point, refused.kind, str(refused)))
            outcome.write_measurement(self._directory, self._measurement())
            served.end_point(self._directory)
            done = len(self._points) + len(self._failures)
            served.tell_progress(self._directory, done, len(self._orders.points), rate)
        served.end(self._directory)

    @property
    def _left_s(self) -> float:
        return self._limit_s - (time.monotonic() - self._started)

    def _measure(self, point: PointOrder) -> tuple[CommandAnswer, ServedPoint]:
        layout = self._config.layout
        config = str(Path(self._job.config_path).absolute())
        words = self._orders.words(point, tp=layout.tp, pp=layout.pp, precision=self._config.precision, config=config)
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            try:
                code = self._run(words, stdout, stderr)
                said, complaint = _end_of(stdout), _end_of(stderr)
            finally:
                self._keep(point, stdout, stderr)
        if code is None:
            raise _RefusedError(FailureKind.TIMEOUT, f"the command was ended after {self._limit_s:g} s of the run")
        if code != 0:
            lines = complaint.strip().splitlines() or said.strip().splitlines() or ["it said nothing"]
            kind = FailureKind.OOM if outcome.speaks_of_memory(complaint) else FailureKind.CRASH
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            raise _RefusedError(kind, f"the command ended with {how}: {lines[-1].strip()}")
        answer = _parsed(said)
        if self._orders.targets.max_ttft_ms is not None and answer.ttft_ms is None:
            raise _RefusedError(FailureKind.INVALID, "the command gave no ttft_ms, and max_ttft_ms is a target")
        return answer, _served(point, answer, self._config.gpus)

    def _run(self, words: Sequence[str], stdout: IO[bytes], stderr: IO[bytes]) -> int | None:
        """The command's exit code; None where its time was over."""
        libc = ctypes.CDLL(None)
        try:
            process = subprocess.Popen(  # noqa: S603 (the user's own words, and no shell)
                words,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=partial(libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509 (no thread is here)
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"serving.json: command: {words[0]!r} cannot be started: {reason}") from error
        with _ended(process):
            while process.poll() is None:
                time.sleep(_POLL_S)
                self._tell()
                if self._owner is not None and self._owner.is_gone():
                    raise SystemExit(128 + signal.SIGTERM)
                if self._left_s <= 0:
                    return None
        return process.returncode

    def _keep(self, point: PointOrder, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        """The command's own words as a log, without secrets."""
        number = self._orders.points.index(point)
        path = self._directory / "logs" / f"command-{number}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(redact(f"{point.name}\n{_end_of(stdout)}\n{_end_of(stderr)}"), encoding="utf-8")

    def _measurement(self) -> ServingMeasurement:
        answer, shape = self._answer, self._config.shape
        name = redact(answer.engine) if answer is not None and answer.engine else Path(self._orders.command[0]).name
        has_memory = answer is not None and answer.memory_gib is not None
        return ServingMeasurement(
            points=tuple(self._points),
            failures=tuple(self._failures),
            skipped=served.skipped(self._orders, self._points, self._failures),
            engine=f"command: {name}",
            cuda_graphs=answer is not None and answer.cuda_graphs,
            gpus=self._config.gpus,
            startup_s=self._started - processes.process_start(),
            memory_kind="as the command says" if has_memory else "not told by the command",
            num_parameters=shape.num_parameters,
            device=(answer.device if answer is not None else None) or "not told by the command",
            precision=self._config.precision,
            kernels={},
            versions={"hptool": hptool.__version__, **(answer.versions if answer is not None else {})},
        )


def _parsed(said: str) -> CommandAnswer:
    """The last JSON object of a text that begins a line of it."""
    lines = said.splitlines()
    decoder = json.JSONDecoder()
    for i in range(len(lines) - 1, -1, -1):
        if not lines[i].startswith("{"):
            continue
        try:
            document, _ = decoder.raw_decode("\n".join(lines[i:]))
            answer: CommandAnswer = files.parse(document, CommandAnswer, "the command's answer")
        except json.JSONDecodeError:
            continue
        except InputError as error:
            raise _RefusedError(FailureKind.INVALID, f"{'; '.join(error.problems)}; expected is {_EXPECTED}") from error
        return answer
    last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    raise _RefusedError(
        FailureKind.INVALID, f"the command printed no answer but {last[:80]!r}; expected is {_EXPECTED}"
    )


def _served(point: PointOrder, answer: CommandAnswer, gpus: int) -> ServedPoint:
    """The point as if it had been measured here; what the answer leaves out follows from the rest as far as it does."""
    latencies = _numbers(answer.latency_ms)
    latency, later = median(latencies), point.output_len - 1
    first, token = (
        median(_numbers(given)) if given is not None else None for given in (answer.ttft_ms, answer.tpot_ms)
    )
    if later == 0:
        first, token = latency if first is None else first, 0.0
    elif first is None and token is not None:
        first = max(0.0, latency - later * token)
    elif token is None and first is not None:
        token = max(0.0, (latency - first) / later)
    rate = answer.tokens_per_s or point.batch * point.output_len / latency * _MS_PER_S
    low, high = timing.median_interval(latencies)
    return ServedPoint(
        batch=point.batch,
        input_len=point.input_len,
        output_len=point.output_len,
        repeats=len(latencies),
        warmups=0,
        ttft_ms=_percentiles(_numbers(answer.ttft_ms) if answer.ttft_ms is not None else [first or 0.0]),
        tpot_ms=_percentiles(_numbers(answer.tpot_ms) if answer.tpot_ms is not None else [token or 0.0]),
        latency_ms=_percentiles(latencies),
        latency_low_ms=low,
        latency_high_ms=high,
        tokens_per_s=rate,
        tokens_per_s_per_gpu=rate / gpus,
        tokens_per_s_per_user=point.output_len / latency * _MS_PER_S,
        peak_memory_gib=answer.memory_gib or 0.0,
        is_steady=timing.is_steady(latencies),
    )


def _numbers(given: float | tuple[float, ...]) -> list[float]:
    return list(given) if isinstance(given, tuple) else [given]


def _percentiles(values: Sequence[float]) -> Percentiles:
    p50, p95, p99 = np.maximum.accumulate(np.percentile(values, (50, 95, 99))).tolist()
    return Percentiles(p50=p50, p95=p95, p99=p99)


def _end_of(stream: IO[bytes]) -> str:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _READ_BYTES))
    return stream.read().decode(errors="replace")


@contextmanager
def _ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Behind it nothing of the command's process group is left."""
    try:
        yield
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_TERM_S)
        with suppress(ProcessLookupError):  # also what the command has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
