"""What is expected of every point of a serving search, given the points that were measured. Pure NumPy.

The engine's constants are fitted to what was measured; what they leave is a Gaussian process over layouts, lengths and
batches, and what must hold within a layout is kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hptool.candidates import IntColumn
from hptool.facts import Cluster, Engine, ModelShape
from hptool.predict.inference import ServingPredictions, predict_serving
from hptool.predict.inference_calibration import TPOT_MISFIT, TTFT_MISFIT, Served, calibrate_engine
from hptool.predict.parts import Column
from hptool.serving import Objective, ServingPoints, Targets
from hptool.strategy import Ending

#: Measured points from which on predictions are trusted to leave out a layout: eight fit an engine to 6 to 13 %, three
#: can be worse than none (FIELD, section 5).
TRUSTED_FROM = 5

#: What predictions are off by, part by part, as shares of the variance: in all (another engine), for a layout, for
#: lengths, along the batch for all layouts, and along the batch of one layout and its lengths.
_IN_ALL, _LAYOUT, _LENGTHS, _BATCH, _LOCAL = 0.15, 0.35, 0.15, 0.1, 0.25

#: What a repeated measurement differs by, relative.
_NOISE = 0.01

#: What predictions are off by at least where nothing near was measured, however well they fit what was: on published
#: grids the root mean square of the logarithm is 0.09 to 0.10 for a layout that a fit has not seen. The shares above
#: and this make the points that were left out of random fits likeliest.
_LEAST_PRIOR = 0.1

#: Doublings of a parallel size, of a length or of a batch over which what predictions are off by stays alike.
_ALIKE = 2.5

#: Of a time that may grow with any power of the batch: where requests begin to wait, tenfold in a doubling.
_STEEP = 10.0

#: How many times larger than they say errors may be; the likeliest is taken.
_SCALES = (1.0, 2.0)

#: Times below this are as good as none.
_LEAST_MS = 1e-9

#: Views that are kept: a strategy asks for the same ones several times.
_REMEMBERED = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTrial:
    """A point that was measured, failed or is under way; the times (at the targets' percentile) where measured."""

    row: int
    ending: Ending
    latency_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingView:
    """What is expected of every point, given what was measured; errors are relative standard deviations.

    `error` is that of the latency, and of the other times where nobody says otherwise.
    """

    latency_ms: Column
    ttft_ms: Column
    tpot_ms: Column
    error: Column
    p_fit: Column
    ttft_error: Column | None = None
    tpot_error: Column | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingLandscape:
    """All points that can start; `layout[i]` numbers the layout of row i. `view` learns from what is known."""

    points: ServingPoints
    layout: IntColumn
    view: Callable[[Sequence[ServedTrial]], ServingView]
    objective: Objective
    targets: Targets


def lengths_of(points: ServingPoints) -> IntColumn:
    """The lengths of each row, numbered."""
    return numbered(points.input_len, points.output_len)


def groups_of(points: ServingPoints, layout: IntColumn) -> IntColumn:
    """The layout with the lengths of each row, numbered: what batches are compared within."""
    return numbered(layout, lengths_of(points))


def numbered(*columns: Column) -> IntColumn:
    """Rows that are equal in all columns have the same number, in order of the columns."""
    rows = np.column_stack(columns).reshape(-1, len(columns))
    return np.asarray(np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1))


# ---------------------------------------------------------------- what measured points teach about others


def learned_view(
    points: ServingPoints, layout: IntColumn, expected: ServingView, trials: Sequence[ServedTrial]
) -> ServingView:
    """What is expected of every point after these trials: what was `expected` before, corrected by what was measured.

    The logarithms of measured over expected times are a Gaussian process over layouts, lengths and batches. Then what
    holds within a layout and its lengths is kept: the latency grows with the batch, and the throughput does not fall.
    """
    measured = [t for t in trials if t.ending is Ending.MEASURED]
    if not measured:
        return expected
    rows = np.array([t.row for t in measured], dtype=np.int64)
    kin = _kinship(points, layout, rows)
    group, log_batch = groups_of(points, layout), np.log(points.batch)

    def corrected(expected_ms: Column, error: Column | None, name: str) -> tuple[Column, Column]:
        times = np.array(
            [math.nan if getattr(t, name) is None else getattr(t, name) for t in measured], dtype=np.float64
        )
        prior = np.maximum(expected.error if error is None else error, _LEAST_PRIOR)
        told = np.isfinite(times) & (times > 0)
        if not told.any():
            return expected_ms, prior
        at, log_measured = rows[told], np.log(times[told])
        log_ms = np.log(np.maximum(expected_ms, _LEAST_MS))
        shift, deviation = _process(log_measured - log_ms[at], at, kin[:, told], prior)
        log_ms = log_ms + shift
        # The throughput does not fall with the batch, but of the first token nothing of the kind is known.
        steepest = _STEEP if name == "ttft_ms" else 1.0
        _keep_between(log_ms, deviation, log_measured, at, group=group, log_batch=log_batch, steepest=steepest)
        return np.exp(log_ms), deviation

    latency_ms, latency_error = corrected(expected.latency_ms, None, "latency_ms")
    ttft_ms, ttft_error = corrected(expected.ttft_ms, expected.ttft_error, "ttft_ms")
    tpot_ms, tpot_error = corrected(expected.tpot_ms, expected.tpot_error, "tpot_ms")
    return ServingView(
        latency_ms=latency_ms,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        error=latency_error,
        ttft_error=ttft_error,
        tpot_error=tpot_error,
        p_fit=expected.p_fit,
    )


def _kinship(points: ServingPoints, layout: IntColumn, rows: IntColumn) -> Column:
    """Correlations of what predictions are off by, all rows by some."""

    def near(*sizes: Column) -> Column:
        places = np.column_stack([np.log2(size) for size in sizes]) / _ALIKE
        return np.asarray(np.exp(-np.abs(places[:, None, :] - places[rows][None, :, :]).sum(axis=2)))

    kind = numbered(np.unique(points.precision, return_inverse=True)[1], points.cuda_graphs)
    layouts = near(points.tp, points.pp) * (kind[:, None] == kind[rows][None, :])
    lengths, batches = near(points.input_len, points.output_len), near(points.batch)
    local = (layout[:, None] == layout[rows][None, :]) * lengths * batches
    return np.asarray(_IN_ALL + _LAYOUT * layouts + _LENGTHS * lengths + _BATCH * batches + _LOCAL * local)


def _process(off: Column, at: IntColumn, kin: Column, prior: Column) -> tuple[Column, Column]:
    """What all rows are off by given what some are, and the deviation that is left of each."""
    found = []
    for scale in _SCALES:
        deviation = scale * prior
        covariance = kin * deviation[:, None] * deviation[at][None, :]
        root = np.linalg.cholesky(covariance[at] + _NOISE**2 * np.eye(len(at)))
        white, weights = np.linalg.solve(root, off), np.linalg.solve(root, covariance.T)
        likelihood = -0.5 * float(white @ white) - float(np.log(np.diag(root)).sum())
        left = np.sqrt(np.maximum(deviation**2 - (weights**2).sum(axis=0), _NOISE**2))
        found.append((likelihood, white @ weights, left))
    _, shift, left = max(found, key=lambda one: one[0])
    return shift, left


def _keep_between(
    log_ms: Column,
    error: Column,
    measured: Column,
    at: IntColumn,
    *,
    group: IntColumn,
    log_batch: Column,
    steepest: float,
) -> None:
    """Keeps rows between what was measured of smaller and of larger batches, and measured rows at what was measured.

    A time grows with the batch, with a power of at most `steepest`. Where measured points contradict that (4 in 1,075
    published pairs do) nothing is kept.
    """
    for number in np.unique(group[at]):
        here = np.flatnonzero(group == number)
        told = group[at] == number
        x, y = log_batch[at[told]], measured[told]
        step = log_batch[here][:, None] - x[None, :]
        least = (y + np.minimum(0.0, steepest * step)).max(axis=1)
        most = (y + np.maximum(0.0, steepest * step)).min(axis=1)
        kept = least <= most
        log_ms[here[kept]] = np.clip(log_ms[here[kept]], least[kept], most[kept])
        error[here[kept]] = np.minimum(error[here[kept]], np.maximum(most - least, _NOISE)[kept])
    log_ms[at], error[at] = measured, _NOISE


# ---------------------------------------------------------------- the landscape of a model on a cluster


def landscape_of(  # noqa: PLR0917 (a model, where it is served, and what for)
    points: ServingPoints,
    shape: ModelShape,
    cluster: Cluster,
    engine: Engine,
    objective: Objective,
    targets: Targets,
) -> ServingLandscape:
    """The landscape of these points, whose view fits the engine to what was measured and corrects what is left."""
    layout = numbered(points.tp, points.pp, np.unique(points.precision, return_inverse=True)[1], points.cuda_graphs)
    seen: dict[tuple[ServedTrial, ...], ServingView] = {}

    def view(trials: Sequence[ServedTrial]) -> ServingView:
        measured = tuple(t for t in trials if t.ending is Ending.MEASURED)
        if measured not in seen:
            if len(seen) > _REMEMBERED:
                seen.clear()
            fitted = engine
            if len(measured) >= TRUSTED_FROM:
                fitted = calibrate_engine(engine, [_served(points, shape, cluster, measured)])
            expected = _expected(predict_serving(points, shape, cluster, fitted))
            seen[measured] = learned_view(points, layout, expected, measured)
        return seen[measured]

    return ServingLandscape(points=points, layout=layout, view=view, objective=objective, targets=targets)


def _served(points: ServingPoints, shape: ModelShape, cluster: Cluster, measured: Sequence[ServedTrial]) -> Served:
    def column(name: str) -> Column:
        times = [getattr(t, name) for t in measured]
        return np.array([math.nan if time is None else time for time in times], dtype=np.float64)

    return Served(
        points=points.select(np.array([t.row for t in measured], dtype=np.int64)),
        shape=shape,
        cluster=cluster,
        latency_ms=column("latency_ms"),
        ttft_ms=column("ttft_ms"),
        tpot_ms=column("tpot_ms"),
    )


def _expected(predictions: ServingPredictions) -> ServingView:
    return ServingView(
        latency_ms=predictions.latency_ms,
        ttft_ms=predictions.ttft_ms,
        tpot_ms=predictions.tpot_ms,
        error=predictions.latency_error,
        ttft_error=TTFT_MISFIT * predictions.latency_error,
        tpot_error=TPOT_MISFIT * predictions.latency_error,
        p_fit=predictions.p_fit,
    )
