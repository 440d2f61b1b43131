"""What runs teach about layouts that were not run: factors and a misfit as one normal distribution. Pure NumPy.

The logarithm of a measured step time is that of the predicted one, plus what the factors of `calibration` stretch, plus
a misfit: a part that alike layouts share, and a part of its own. All are normal and independent of one another, so what
is believed of any layout after some runs follows from the covariances of those runs (a Gaussian process).
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from hptool.candidates import BoolColumn, IntColumn, Layouts
from hptool.predict import Predictions, normal_cdf
from hptool.predict.calibration import (
    FARTHEST,
    MEMORY_FACTORS,
    MISFIT_WORTH,
    STEP_TIME_FACTORS,
    USUAL_MISFIT,
    Calibration,
    memory_shares,
    step_time_shares,
)
from hptool.predict.parts import Column

#: Doublings of a parallel size or of the micro batch over which what physics misses stays alike (a correlation of 0.6
#: is left): what is wrong with a size is mostly wrong with half of it too, and little of it with an eighth.
LENGTH = 2.0

#: What of the misfit alike layouts share. Nothing is known of either part beforehand, so both are as likely; the more
#: is shared, the more the noise of one run is taken for news of its neighbours.
SHARED = 0.5

#: What of the other part, a layout's own, the same cut has with another recomputation, which repeats what the cut does
#: anyway: of 24 published pairs half differ by less than 3 %, a tenth by more than 10 %.
TWINS = 0.5

#: The least and the most misfit that is believed before a run. The least is what published runs scatter within a grid,
#: because runs that a fit has seen lie closer to it than those to come. The most is what the fast runs of the grids
#: with the largest errors scatter: the rest of such an error comes from runs that something disturbed.
MISFIT_BOUNDS = (USUAL_MISFIT, 0.15)

#: By how much runs of the same cut differ at least, as a relative deviation, however good their timers.
REPEATED = 0.02

#: A run further than so many deviations from what the others lead to expect may have been disturbed, and teaches less;
#: undisturbed, one in twenty is.
ODD = 2.0

#: Steps of Gauss and Newton, the factors being stretches of sums: what the last one moves is far below the misfit.
_ITERATIONS = 4

#: How far into the tail of a normal distribution a surprise is taken at its word.
_MOST_DEVIATIONS = 8.0

#: The relative error of a rank's memory where the probabilities of fitting do not tell it, all being this certain.
_USUAL_MEMORY_ERROR = 0.06
_CERTAIN = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Belief:
    """Logarithms of step times in seconds, one a row, as normal distributions, and the factors behind them."""

    log_mean: Column
    log_error: Column
    factors: Calibration


def features(layouts: Layouts) -> Column:
    """Where layouts lie, rows by sizes: those at a distance of 1 have a correlation of 0.6 left."""
    return np.column_stack(
        [np.log2(getattr(layouts, size)) / LENGTH for size in ("tp", "pp", "vpp", "cp", "ep", "mbs")]
    )


def kinship(p: Predictions, rows: IntColumn) -> Column:
    """Correlations of the misfits of all rows with those of some, rows by `rows`.

    Rows of one layout that are predicted to differ are no twins: their table tells more than a layout.
    """
    at, t = features(p.layouts), p.layouts
    squares = (at**2).sum(axis=1)
    distance = np.maximum(0.0, squares[:, None] + squares[rows] - 2 * at @ at[rows].T)
    kin = SHARED * np.exp(-distance / 2)
    one, column = np.nonzero(distance < 1e-9)  # noqa: PLR2004 (nothing but rounding)
    other = rows[column]
    same_mode = (t.recompute[one] == t.recompute[other]) & (
        t.recompute_num_layers[one] == t.recompute_num_layers[other]
    )
    same = ~same_mode | np.isclose(p.step_time_s[one], p.step_time_s[other], rtol=1e-9, atol=0.0)
    kin[one, column] += (1 - SHARED) * np.where(same_mode, 1.0, TWINS) * same
    return np.asarray(kin)


def believed_step_time(
    run: Predictions, target: Predictions, rows: IntColumn, measured_s: Column, noise: Column
) -> Belief:
    """Step times of every row of `target`, after row `rows[i]` of `run` took `measured_s[i]`.

    `noise` are relative standard deviations of the measured figures. A NaN stands for a run under way: it takes away
    doubt as if it had taken what was expected, and moves nothing.
    """
    of_runs, of_all = step_time_shares(run.step_time)[rows], step_time_shares(target.step_time)
    prior = Calibration.split(STEP_TIME_FACTORS, float(np.median(target.step_time_error)), of_all, MISFIT_BOUNDS)
    across = prior.misfit**2 * kinship(target, rows)
    among = across[rows]
    spread = np.maximum(noise, REPEATED) ** 2
    known = np.flatnonzero(np.isfinite(measured_s))
    # The factors, from what was measured.
    log_factors, odd = prior.log_mean, np.zeros(len(known))
    pull = surprise = odd
    for _ in range(_ITERATIONS):
        slope, base = _tangent(of_runs[known], log_factors)
        to_factors = prior.log_covariance @ slope.T
        inverse = np.linalg.inv(slope @ to_factors + among[np.ix_(known, known)] + np.diag(spread[known] + odd))
        pull = inverse @ (np.log(measured_s[known]) - base)
        log_factors = np.clip(to_factors @ pull, -FARTHEST, FARTHEST)
        # How far a run is from what the others lead to expect of it, in deviations (leave one out).
        alone = 1 / np.diag(inverse)
        surprise = np.abs(pull) * alone / np.sqrt(alone - odd)
        odd = prior.misfit**2 * np.maximum(0.0, surprise / ODD - 1)
    # From there to every row; runs under way count for the doubt that is left.
    spread[known] += odd
    slope, _ = _tangent(of_runs, log_factors)
    slopes, bases = _tangent(of_all, log_factors)
    to_factors = prior.log_covariance @ slope.T
    inverse = np.linalg.inv(slope @ to_factors + among + np.diag(spread))
    across += slopes @ to_factors
    variance = ((slopes @ prior.log_covariance) * slopes).sum(axis=1) + prior.misfit**2
    variance -= ((across @ inverse) * across).sum(axis=1)
    # All doubt grows and shrinks with how far runs were off: predictions are better of some models than of others.
    doubt = (MISFIT_WORTH + float(np.sum(np.minimum(surprise, ODD) ** 2))) / (MISFIT_WORTH + len(known))
    return Belief(
        log_mean=bases + across[:, known] @ pull,
        log_error=np.sqrt(doubt * np.maximum(0.0, variance)),
        factors=replace(
            prior,
            log_mean=log_factors,
            log_covariance=doubt * (prior.log_covariance - to_factors @ inverse @ to_factors.T),
            misfit=math.sqrt(doubt) * prior.misfit,
        ),
    )


def _tangent(shares: Column, log_factors: Column) -> tuple[Column, Column]:
    """The logarithm of a total is about `base` plus `slope` times the factors' logarithms."""
    stretched = shares * np.exp(log_factors)
    total = stretched.sum(axis=1)
    slope = stretched / total[:, None]
    return slope, np.log(total) - slope @ log_factors


def believed_fit(
    run: Predictions,
    target: Predictions,
    limit_gib: float,
    rows: IntColumn,
    *,
    fits: BoolColumn,
    measured_gib: Column,
) -> Column:
    """The probability that each row of `target` fits into `limit_gib`, after row `rows[i]` of `run` did or did not.

    `measured_gib` is NaN where nothing else is known: then the memory lies above the limit, or below it, and the belief
    becomes the normal distribution with the same mean and variance (assumed density filtering).
    """
    of_runs, of_all = memory_shares(run.memory, allocated=False)[rows], memory_shares(target.memory, allocated=False)
    prior = Calibration.split(MEMORY_FACTORS, _memory_error(target, limit_gib), of_all, (0.0, math.inf))
    mean, covariance = prior.log_mean, prior.log_covariance
    for i in range(len(rows)):
        slope, base = (part[0] for part in _tangent(of_runs[i : i + 1], mean))
        variance = float(slope @ covariance @ slope) + prior.misfit**2
        deviation = math.sqrt(variance)
        if np.isfinite(measured_gib[i]):
            moved, left = (math.log(measured_gib[i]) - base - slope @ mean) / deviation, 0.0
        else:
            moved, left = _beyond((math.log(limit_gib) - base - slope @ mean) / deviation, below=bool(fits[i]))
        gain = covariance @ slope
        mean = mean + gain * moved / deviation
        covariance = covariance - np.outer(gain, gain) * (1 - left) / variance
    after = replace(prior, log_mean=mean, log_covariance=covariance)
    return normal_cdf((limit_gib / after.total(of_all) - 1) / after.error(of_all))


def _beyond(limit: float, *, below: bool) -> tuple[float, float]:
    """Mean and variance of a standard normal figure of which it turned out that it lies below a limit, or above."""
    at = min(max(limit if below else -limit, -_MOST_DEVIATIONS), _MOST_DEVIATIONS)
    share = 0.5 * math.erfc(-at / math.sqrt(2))
    ratio = math.exp(-at * at / 2) / math.sqrt(2 * math.pi) / share
    return (-ratio if below else ratio), 1 - at * ratio - ratio * ratio


def _memory_error(p: Predictions, limit_gib: float) -> float:
    """The relative error that the probabilities of fitting were made with."""
    # Told best by one about a deviation from the limit: at the limit there is nothing to divide, far off only rounding.
    row = int(np.argmin(np.abs(np.abs(p.p_fit - 0.5) - 0.34)))
    p_fit = float(p.p_fit[row])
    if not (_CERTAIN < p_fit < 1 - _CERTAIN) or p_fit == 0.5:  # noqa: PLR2004 (even)
        return _USUAL_MEMORY_ERROR
    return abs((limit_gib / float(p.memory_gib[row]) - 1) / NormalDist().inv_cdf(p_fit))
