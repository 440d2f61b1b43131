"""What measured points teach about an engine: its constants, and how far to trust it after that. Pure NumPy.

The logarithm of a measured time is that of the predicted one plus a misfit. The engine's constants are believed to lie
around what its file says, log-normal with the deviations of `CONSTANTS`, so that few points move them little and only
where they tell something; a misfit has longer tails than a normal distribution, so that a disturbed point moves them
less. What is found is the most probable of all (maximum a posteriori), by Gauss and Newton.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hptool.facts import Cluster, Engine, ModelShape
from hptool.predict.inference_case import CEILINGS, CONSTANTS, WIDE, Case, case, constants_of, join_cases
from hptool.predict.inference_memory import predict_memory
from hptool.predict.inference_time import serving_times
from hptool.predict.parts import Column
from hptool.serving import ServingPoints

#: How much farther than a fitted engine's the constants of one may lie that nobody measured.
_UNFITTED = 2.0

#: What a formula of this kind misses, as a relative deviation, and how many points it takes to believe otherwise.
USUAL_MISFIT = 0.08
MISFIT_WORTH = 4.0

#: The least misfit that is believed while fitting: what repeated runs differ.
_LEAST_MISFIT = 0.02

#: Of Student's distribution, whose tails a misfit has.
_FREEDOM = 4.0

#: Of the constants' own: most are what the file says, and few of another benchmark or version are far from it.
_PRIOR_FREEDOM = 2.0

#: How much less the parts of a latency tell than the whole: their misfit over its own. In flight, the first token of a
#: busy service waits for others in ways that differ between benchmarks; static, both are as good.
TTFT_MISFIT, TPOT_MISFIT = 4.0, 2.0

#: Steps of Gauss and Newton, of which each is shortened until it is one forward; the last moves less than tolerated.
_STEPS = 16
_LENGTHS = (1.0, 0.5, 0.2, 0.05)
_LONGEST = 1.0
_TOLERANCE = 1e-4

#: Of a difference quotient, in logarithms.
_DIFFERENCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """Measured points of one model on one cluster: milliseconds, NaN where unknown."""

    points: ServingPoints
    shape: ModelShape
    cluster: Cluster
    latency_ms: Column
    ttft_ms: Column
    tpot_ms: Column

    def __post_init__(self) -> None:
        for name in ("latency_ms", "ttft_ms", "tpot_ms"):
            if len(getattr(self, name)) != len(self.points):
                msg = f"{name}: {len(getattr(self, name))} entries given, allowed are {len(self.points)}, one a point"
                raise ValueError(msg)


def calibrate_engine(engine: Engine, served: Sequence[Served], *, doubt: float = 1.0) -> Engine:
    """The engine with the constants that these points speak for, and an error of its own; unchanged without any.

    `doubt` is over how far its constants usually lie off: less than 1 for an engine that was calibrated before.
    """
    known = [one for one in served if len(one.points)]
    if not known or not len(_Targets.of(engine, known).log_measured):
        return engine
    engines = [engine]
    if not engine.fitted and any(set(one.points.precision.tolist()) & set(WIDE) for one in known):
        # Of an engine that nobody knows, whether it keeps keys in 8 bits too, is what explains the points better.
        engines.append(replace(engine, kv_bytes=1 if engine.kv_bytes > 1 else 2))
    return min((_fitted(one, known, doubt) for one in engines), key=lambda found: found[1])[0]


def _fitted(engine: Engine, known: Sequence["Served"], doubt: float) -> tuple[Engine, float]:
    """The engine after the fit, and how improbable it is with these points."""
    targets, prior = _Targets.of(engine, known), constants_of(engine)
    names = [name for name in CONSTANTS if prior[name] > 0]
    start = np.log([prior[name] for name in names])
    deviation = np.array([CONSTANTS[name] for name in names]) * doubt * (1.0 if engine.fitted else _UNFITTED)
    highest = np.maximum(0.0, np.log([CEILINGS.get(name, np.inf) for name in names]) - start)
    fit = _Fit(targets=targets, names=names, start=start, deviation=deviation, highest=highest)
    shift, misfit, loss = fit.solve()
    figures: dict[str, Any] = dict(zip(names, np.exp(start + shift).tolist(), strict=True))
    # A share of 1 is its most, whatever rounding makes of it.
    figures = {name: min(figure, max(prior[name], CEILINGS.get(name, np.inf))) for name, figure in figures.items()}
    return replace(engine, **figures, latency_error=misfit, fitted=True), loss


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Targets:
    """What was measured, one entry a figure: logarithms, the row of the case and which of the three times it is."""

    case: Case
    running: Column
    log_measured: Column
    row: Column
    kind: Column

    @classmethod
    def of(cls, engine: Engine, served: Sequence[Served]) -> "_Targets":
        joined = join_cases([case(one.points, one.shape, one.cluster, engine) for one in served])
        _, running, _ = predict_memory(joined)
        columns = [
            np.concatenate([getattr(one, name) for one in served]) for name in ("latency_ms", "ttft_ms", "tpot_ms")
        ]
        measured = np.array(columns, dtype=np.float64)
        # An answer of one token is its first token.
        measured[1] = np.where((joined.output_len == 1) & np.isfinite(measured[0]), np.nan, measured[1])
        kind, row = np.nonzero(np.isfinite(measured) & (measured > 0))
        return cls(case=joined, running=running, log_measured=np.log(measured[kind, row]), row=row, kind=kind)

    def log_predicted(self, names: Sequence[str], logs: Column) -> Column:
        """Logarithms of the predicted figures, one row a set of constants."""
        constants: dict[str, Column | float] = dict.fromkeys(CONSTANTS, 0.0)
        constants |= {name: np.exp(logs[:, i : i + 1]) for i, name in enumerate(names)}
        times = serving_times(self.case, constants, self.running)
        size = (len(logs), len(self.case))
        table = np.stack([np.broadcast_to(t, size) for t in (times.latency_ms, times.ttft_ms, times.tpot_ms)])
        return np.asarray(np.log(table[self.kind, :, self.row].T))

    @property
    def scale(self) -> Column:
        """The misfit of each figure over that of a latency."""
        in_flight = np.array([1.0, TTFT_MISFIT, TPOT_MISFIT])[self.kind]
        return np.where(self.case.in_flight[self.row] > 0, in_flight, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Fit:
    """A fit of logarithms of constants: `start` and how far they may lie from it, `highest` above it."""

    targets: _Targets
    names: Sequence[str]
    start: Column
    deviation: Column
    highest: Column

    def solve(self) -> tuple[Column, float, float]:
        """By how much each logarithm moves; the relative error that is left for a point that was not measured.

        And how improbable the points are, as minus the logarithm of a density.
        """
        scale, shift = self.targets.scale, np.zeros(len(self.start))
        off, slope = self._tangent(shift)
        misfit = self._misfit(off / scale, np.ones(len(off)), 0.0)
        for _ in range(_STEPS):
            weight = _weights(off / scale / misfit) / (misfit * scale) ** 2
            held = self._held(shift)
            curvature = (slope.T * weight) @ slope + np.diag(held)
            step = np.linalg.solve(curvature, slope.T @ (weight * off) - held * shift)
            step *= min(1.0, _LONGEST / max(1e-12, float(np.max(np.abs(step)))))
            tried = np.minimum(shift + np.outer(_LENGTHS, step), self.highest)
            losses = self._losses(np.vstack([shift, tried]), misfit)
            best = int(np.argmin(losses[1:]))
            moved = float(np.max(np.abs(tried[best] - shift)))
            if losses[1 + best] >= losses[0] or moved < _TOLERANCE:
                break
            shift = tried[best]
            off, slope = self._tangent(shift)
            learned = float(np.trace(np.linalg.solve(curvature, (slope.T * weight) @ slope)))
            misfit = self._misfit(off / scale, _weights(off / scale / misfit), learned)
        loss = float(self._losses(shift[None], misfit)[0]) + len(off) * float(np.log(misfit))
        return shift, self._error(off / scale, slope / scale[:, None], misfit, self._held(shift)), loss

    def _held(self, shift: Column) -> Column:
        """How strongly each constant is held to where it started, less so where it is far from there already."""
        return np.asarray(_weights(shift / self.deviation, _PRIOR_FREEDOM) / self.deviation**2)

    def _tangent(self, shift: Column) -> tuple[Column, Column]:
        """What was measured over what is predicted, in logarithms, and the slopes of the latter by the constants."""
        count = len(shift)
        tried = self.start + shift + np.vstack([np.zeros(count), -_DIFFERENCE * np.eye(count)])
        predicted = self.targets.log_predicted(self.names, tried)
        return self.targets.log_measured - predicted[0], (predicted[0] - predicted[1:]).T / _DIFFERENCE

    def _losses(self, tried: Column, misfit: float) -> Column:
        """How improbable each of these shifts is: minus logarithms of the densities."""
        predicted = self.targets.log_predicted(self.names, self.start + tried)
        off = (self.targets.log_measured - predicted) / (misfit * self.targets.scale)
        moved = tried / self.deviation
        losses = _losses(off, _FREEDOM) + _losses(moved, _PRIOR_FREEDOM)
        return np.asarray(losses)

    @staticmethod
    def _misfit(off: Column, weight: Column, learned: float) -> float:
        squares = float(np.sum(weight * off**2))
        left = max(1.0, len(off) - learned)
        return max(_LEAST_MISFIT, float(np.sqrt((MISFIT_WORTH * USUAL_MISFIT**2 + squares) / (MISFIT_WORTH + left))))

    def _error(self, off: Column, slope: Column, misfit: float, held: Column) -> float:
        """The relative error of a point that was left out of the fit."""
        weight = _weights(off / misfit) / misfit**2
        curvature = (slope.T * weight) @ slope + np.diag(held)
        leverage = weight * np.sum((slope @ np.linalg.inv(curvature)) * slope, axis=1)
        alone = off / np.maximum(1 - leverage, 0.1)
        squares = float(np.sum(_weights(alone / misfit) * alone**2))
        return float(np.sqrt((MISFIT_WORTH * USUAL_MISFIT**2 + squares) / (MISFIT_WORTH + len(off))))


def _weights(off: Column, freedom: float = _FREEDOM) -> Column:
    """How much so many deviations count in Student's distribution: one at the middle, little far from it."""
    return np.asarray(1 / (1 + off**2 / freedom))


def _losses(off: Column, freedom: float) -> Column:
    """Minus the logarithms of Student's densities of these deviations, added up along each row."""
    return np.asarray((freedom / 2) * np.log1p(off**2 / freedom).sum(axis=1))
