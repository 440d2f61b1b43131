"""What a run leaves behind: a measurement, or a failure with its reason."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import TypeAlias


class FailureKind(StrEnum):
    """Why a run gave no measurement."""

    OOM = "oom"  # out of device memory, or over the rank's memory limit
    TIMEOUT = "timeout"  # over its minutes
    HANG = "hang"  # no step finished for too long although the job had time left
    CRASH = "crash"  # an error in the worker, or a rank that died
    INVALID = "invalid"  # the worker refused the config, or its numbers are not finite
    LOST = "lost"  # the scheduler ended or forgot the job: cancelled, node failure, vanished
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
    median. `losses` are the mean loss of every step from the first. `peak_memory_gib` is of the fullest rank, and
    `memory_kind` says what was read: "max allocated" by the device's allocator, or "max resident" of the process.
    """

    step_times_s: tuple[float, ...]
    step_time_s: float
    warmup_steps: int
    losses: tuple[float, ...]
    peak_memory_gib: float
    memory_kind: str
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
    attention: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.step_times_s:
            msg = "step_times_s: no step given, allowed is one or more"
            raise ValueError(msg)
        if not math.isclose(self.step_time_s, median(self.step_times_s)):
            msg = f"step_time_s: {self.step_time_s} given, allowed is the median of step_times_s"
            raise ValueError(msg)


Outcome: TypeAlias = Measurement | Failure
