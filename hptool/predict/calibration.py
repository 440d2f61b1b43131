"""Calibration: a handful of named factors, learned from measurements against priors that keep them physical.

Each factor stretches what one thing takes: GEMMs, attention, memory, links, the host, the trainer. None belongs to a
layout, so what is learned on some layouts holds for all of them. Pure NumPy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hptool.predict.memory import Memory
from hptool.predict.parts import Column, add_up
from hptool.predict.step_time import StepTime

#: For each factor of the step time: the parts that it stretches, and the relative deviation that is usual between
#: one cluster and the next (clocks, drivers and libraries for what a GPU does; cables and neighbours for links).
STEP_TIME_FACTORS: Mapping[str, tuple[tuple[str, ...], float]] = {
    "gemm": (("gemm_s", "logits_s", "recompute_s"), 0.10),
    "attention": (("attention_s",), 0.20),
    "memory": (("memory_bound_s", "optimizer_s"), 0.20),
    "links_inside": (("tp_communication_s", "cp_communication_s", "ep_communication_s"), 0.30),
    "links_across": (("pp_communication_s", "dp_communication_s"), 0.50),
    "host": (("launch_s",), 0.40),
    "trainer": (("overhead_s",), 0.80),
}

#: The same of memory. States are counted, not estimated.
MEMORY_FACTORS: Mapping[str, tuple[tuple[str, ...], float]] = {
    "states": (("weights_gib", "gradients_gib", "optimizer_gib"), 0.02),
    "activations": (("activations_gib", "logits_gib", "buffers_gib"), 0.15),
    "fixed": (("framework_gib", "slack_gib", "reserved_gib"), 0.40),
}

#: These deviations are for stacks that nobody has fitted. The less is wrong with a prediction, the smaller the part of
#: it that factors explain: over published grids, with three runs of each learned, this predicts the others best.
_USUAL_ERROR = 0.1
_SYSTEMATIC = 0.4

#: What no factor explains on a stack that was not fitted: the scatter of published runs within a grid.
USUAL_MISFIT = 0.08

#: How many measurements the prior of the misfit is worth, and what of the uncalibrated error is misfit: what no factor
#: explains. Over published grids the scatter within a grid is some eight tenths of the error before calibration.
MISFIT_WORTH = 6.0
MISFIT_SHARE = 0.8

#: Residuals of more than so many misfits count less (Huber's weights): a run may have been disturbed.
OUTLIER = 1.0

#: Threefold, as a logarithm: what no factor strays beyond, whatever a few odd runs say.
FARTHEST = 1.1

_ITERATIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """What is believed of some factors: the logarithm of each with its covariance, and a relative misfit on top.

    `doubt` are the deviations before any measurement.
    """

    names: tuple[str, ...]
    log_mean: Column
    log_covariance: Column
    misfit: float
    doubt: Column

    @classmethod
    def prior(
        cls, factors: Mapping[str, tuple[tuple[str, ...], float]], error: float, *, fitted: bool
    ) -> "Calibration":
        """Before any measurement; `error` is the relative error of what is not calibrated, on a stack that was fitted.

        What a fit has left is scatter for the most part, and moves no factor; where none was made, factors are free.
        """
        deviations = np.array([deviation for _, deviation in factors.values()])
        if fitted:
            deviations *= min(1.0, _SYSTEMATIC * (error / _USUAL_ERROR) ** 2)
        return cls(
            names=tuple(factors),
            log_mean=np.zeros(len(deviations)),
            log_covariance=np.diag(deviations**2),
            misfit=MISFIT_SHARE * error if fitted else USUAL_MISFIT,
            doubt=deviations,
        )

    @classmethod
    def split(
        cls,
        factors: Mapping[str, tuple[tuple[str, ...], float]],
        error: float,
        shares: Column,
        bounds: tuple[float, float],
    ) -> "Calibration":
        """Before any measurement of rows with these `shares`, each predicted with this relative `error`.

        The misfit has its part of the error, within `bounds`. The factors have the rest, in the proportions that are
        usual between clusters, and none of them more than is usual.
        """
        usual = np.array([deviation for _, deviation in factors.values()])
        slope = shares / shares.sum(axis=1)[:, None]
        of_rows = np.sqrt((slope**2) @ usual**2)
        deviations = usual * min(1.0, math.sqrt(1 - MISFIT_SHARE**2) * error / float(np.median(of_rows)))
        return cls(
            names=tuple(factors),
            log_mean=np.zeros(len(deviations)),
            log_covariance=np.diag(deviations**2),
            misfit=min(max(MISFIT_SHARE * error, bounds[0]), bounds[1]),
            doubt=deviations,
        )

    @property
    def factors(self) -> Mapping[str, float]:
        """By how much each is stretched."""
        return dict(zip(self.names, np.exp(self.log_mean).tolist(), strict=True))

    def widened(self, share: float) -> "Calibration":
        """The same belief for something alike: with this share of the prior's doubt put back."""
        return replace(self, log_covariance=self.log_covariance + share * np.diag(self.doubt**2))

    def updated(self, shares: Column, measured: Column) -> "Calibration":
        """After measurements: row i took `measured[i]`, of which factor k was expected to take `shares[i, k]`.

        Gauss-Newton on the logarithms, so that doubling and halving are as likely.
        """
        if not len(measured):
            return self
        precision = np.linalg.inv(self.log_covariance)
        mean, misfit, curvature = self.log_mean, self.misfit, precision
        for _ in range(_ITERATIONS):
            stretched = shares * np.exp(mean)
            total = stretched.sum(axis=1)
            slope = stretched / total[:, None]
            off = np.log(measured / total)
            weight = np.minimum(1.0, OUTLIER * misfit / np.maximum(np.abs(off), 1e-12)) / misfit**2
            curvature = precision + slope.T @ (slope * weight[:, None])
            step = np.linalg.solve(curvature, slope.T @ (weight * off) - precision @ (mean - self.log_mean))
            mean = np.clip(mean + step, -FARTHEST, FARTHEST)
            if np.max(np.abs(step)) < 1e-6:  # noqa: PLR2004 (a millionth of a factor)
                break
        off = np.log(measured / (shares * np.exp(mean)).sum(axis=1))
        worth = MISFIT_WORTH
        misfit = float(np.sqrt((worth * self.misfit**2 + np.sum(off**2)) / (worth + len(measured))))
        return replace(self, log_mean=mean, log_covariance=np.linalg.inv(curvature), misfit=misfit)

    def total(self, shares: Column) -> Column:
        """What rows take after stretching."""
        return np.asarray((shares * np.exp(self.log_mean)).sum(axis=1))

    def error(self, shares: Column) -> Column:
        """Relative standard deviation of `total`, row by row."""
        stretched = shares * np.exp(self.log_mean)
        slope = stretched / stretched.sum(axis=1)[:, None]
        return np.asarray(np.sqrt(np.einsum("ij,jk,ik->i", slope, self.log_covariance, slope) + self.misfit**2))


def step_time_shares(step_time: StepTime) -> Column:
    """Seconds that each factor stretches, rows by factors. The bubble belongs to all that a stage does."""
    stage_s = add_up(step_time) - step_time.bubble_s - step_time.dp_communication_s
    stage_s = stage_s - step_time.optimizer_s - step_time.overhead_s - step_time.logits_s
    filled = 1 + step_time.bubble_s / stage_s
    outside = ("dp_communication_s", "optimizer_s", "overhead_s", "logits_s")
    columns = []
    for parts, _ in STEP_TIME_FACTORS.values():
        columns.append(sum(getattr(step_time, part) * (1.0 if part in outside else filled) for part in parts))
    return np.column_stack(columns)


def memory_shares(memory: Memory, *, allocated: bool) -> Column:
    """GiB that each factor stretches, rows by factors; of tensors alone where `allocated`."""
    left_out = ("slack_gib", "reserved_gib") if allocated else ()
    groups: Sequence[tuple[str, ...]] = [parts for parts, _ in MEMORY_FACTORS.values()]
    return np.column_stack([sum(getattr(memory, part) for part in parts if part not in left_out) for parts in groups])


def stretched_step_time(step_time: StepTime, calibration: Calibration) -> StepTime:
    """The parts after calibration; they add up to its total."""
    factor = {part: calibration.factors[name] for name, (parts, _) in STEP_TIME_FACTORS.items() for part in parts}
    parts = {name: getattr(step_time, name) * factor[name] for name in factor}
    bubble_s = calibration.total(step_time_shares(step_time)) - sum(parts.values())
    return StepTime(**parts, bubble_s=np.maximum(0.0, bubble_s))


def stretched_memory(memory: Memory, calibration: Calibration) -> Memory:
    """The parts after calibration."""
    factor = {part: calibration.factors[name] for name, (parts, _) in MEMORY_FACTORS.items() for part in parts}
    return Memory(**{name: getattr(memory, name) * factor[name] for name in factor})
