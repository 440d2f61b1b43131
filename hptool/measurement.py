"""What a run leaves behind: a measurement, or a failure with its reason."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import TypeAlias

from hptool import timing
from hptool.serving import Targets


class FailureKind(StrEnum):
    """Why a run gave no measurement."""

    OOM = "oom"  # out of device memory, or over the rank's memory limit
    TIMEOUT = "timeout"  # over its minutes
    HANG = "hang"  # no step finished for too long although the job had time left
    CRASH = "crash"  # an error in the worker, or a rank that died
    INVALID = "invalid"  # the worker refused the config, or its numbers are not finite
    LOST = "lost"  # not the layout's fault: cancelled, node failure, vanished, or its files could not be written
    REJECTED = "rejected"  # the scheduler never took it


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One run that went wrong. `rank` is the first that said so; None where the scheduler did."""

    kind: FailureKind
    message: str
    rank: int | None = None
    log_path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One timed run.

    `step_times_s` are the steps after `warmup_steps`, slowest rank, device synchronised; `step_time_s` is their
    median, and from `step_time_low_s` to `step_time_high_s` reaches the interval of it that `timing.median_interval`
    finds. Where not `is_steady`, the steps had not settled when the run ended, and its median says less than its
    interval does. `startup_s` passed from the start of the run's supervisor, imports included, to the start of the
    first step. `losses` are the mean loss of every step from the first. `peak_memory_gib` is of the fullest rank, and
    `memory_kind` says what was read: "max allocated" by the device's allocator, or "max resident" of the process.
    Of a device there are two more figures, of the fullest rank each: the most that its allocator had reserved, and
    what was taken of the device in all when the steps were done (the allocator's reserve, the device context, the
    communication library, and whatever else ran there), with all that the device has. `kernels` says what computed
    what: layers, attention, norms, loss, optimizer.
    """

    step_times_s: tuple[float, ...]
    step_time_s: float
    step_time_low_s: float
    step_time_high_s: float
    is_steady: bool
    warmup_steps: int
    startup_s: float
    losses: tuple[float, ...]
    peak_memory_gib: float
    memory_kind: str
    max_reserved_gib: float | None = None
    device_used_gib: float | None = None
    device_memory_gib: float | None = None
    gpus: int
    gbs: int
    seq_length: int
    model_flops_per_step: float
    model_flops_convention: str
    model_tflops_per_gpu: float
    tokens_per_s_per_gpu: float
    num_parameters: int
    device: str
    precision: str
    kernels: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.step_times_s:
            msg = "step_times_s: no step given, allowed is one or more"
            raise ValueError(msg)
        if not math.isclose(self.step_time_s, median(self.step_times_s)):
            msg = f"step_time_s: {self.step_time_s} given, allowed is the median of step_times_s"
            raise ValueError(msg)
        if not self.step_time_low_s <= self.step_time_s <= self.step_time_high_s:
            msg = (
                f"step_time_low_s, step_time_high_s: {self.step_time_low_s} and {self.step_time_high_s} given, "
                f"allowed is an interval around step_time_s ({self.step_time_s})"
            )
            raise ValueError(msg)
        if not 0 <= self.startup_s < math.inf:
            msg = f"startup_s: {self.startup_s} given, allowed is 0 or more seconds"
            raise ValueError(msg)

    @property
    def relative_error(self) -> float:
        """The standard deviation of `step_time_s` as a fraction of it, to weigh this measurement by."""
        coverage = timing.coverage(len(self.step_times_s))
        return timing.relative_error(self.step_time_low_s, self.step_time_high_s, self.step_time_s, coverage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of one figure over the timed repeats and all their requests: the median and the tail."""

    p50: float
    p95: float
    p99: float

    def __post_init__(self) -> None:
        if not 0 <= self.p50 <= self.p95 <= self.p99 < math.inf:
            msg = f"p50, p95, p99: {self.p50}, {self.p95}, {self.p99} given, allowed are rising numbers from 0 on"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPoint:
    """What one point of a layout gave: `batch` requests of so many tokens each, answered `repeats` times over.

    `ttft_ms` is the time to the first token (the prompt is read), `tpot_ms` that of each token after it (0 where there
    is one token), `latency_ms` that of a whole answer. From `latency_low_ms` to `latency_high_ms` reaches the interval
    of the median latency that `timing.median_interval` finds. Rates are those of the median: tokens that were made,
    prompts not counted. `warmups` passes of the same shape came before the timed ones.
    """

    batch: int
    input_len: int
    output_len: int
    repeats: int
    warmups: int
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    latency_ms: Percentiles
    latency_low_ms: float
    latency_high_ms: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    tokens_per_s_per_user: float
    peak_memory_gib: float
    is_steady: bool = True

    @property
    def name(self) -> str:
        """Within its layout: `60:20/8`."""
        return f"{self.input_len}:{self.output_len}/{self.batch}"

    def keeps(self, targets: Targets) -> bool:
        """The point is within the limits, each of them held against its percentile."""
        percentile = f"p{targets.percentile}"
        limits = (
            (targets.max_latency_ms, self.latency_ms),
            (targets.max_ttft_ms, self.ttft_ms),
            (targets.max_tpot_ms, self.tpot_ms),
        )
        return all(limit is None or getattr(found, percentile) <= limit for limit, found in limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class PointFailure:
    """A point that gave nothing, though its run went on or had measured others before: `name` as `ServedPoint.name`."""

    name: str
    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMeasurement:
    """One run of one serving layout: the points it was asked for, in their order, and those that failed.

    `engine` is the engine that really ran, `cuda_graphs` whether it launched graphs. `kernels`, `versions` and
    `memory_kind` are as in `Measurement`; `skipped` are points that were not tried, because a smaller batch had left
    the limits already or was out of memory. What was ordered and is in none of the three was not reached: the run's
    time was over before, or a rank had died.
    """

    points: tuple[ServedPoint, ...]
    failures: tuple[PointFailure, ...] = ()
    skipped: tuple[str, ...] = ()
    engine: str
    cuda_graphs: bool
    gpus: int
    startup_s: float
    memory_kind: str
    max_reserved_gib: float | None = None
    device_used_gib: float | None = None
    device_memory_gib: float | None = None
    num_parameters: int
    device: str
    precision: str
    kernels: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.points and not self.failures:
            msg = "points, failures: none given, allowed is one or more of either"
            raise ValueError(msg)


Outcome: TypeAlias = Measurement | Failure
#: Of a run of either kind of search.
AnyOutcome: TypeAlias = Outcome | ServingMeasurement
