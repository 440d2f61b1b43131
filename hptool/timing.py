"""What the times of a run's steps say: how many were warm-up, whether the rest is steady, how sure its median is."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

#: As a fraction of a time. Less than this is no difference: clocks and machines do not repeat themselves better.
RESOLUTION = 1e-3

#: What `median_interval` covers where there are steps enough.
COVERAGE = 0.95
_ONE_IN = 20  # may miss it

#: The error, as a fraction, of a run of which one step was timed: it says nothing about its spread.
_LONE_STEP = 0.1

#: As a fraction of the median. A drift of less over all steps changes no ranking that noise would not change.
_DRIFT = 0.02

#: How unlikely a trend among steps in any order must be before it counts as one.
_TREND_LEVEL = 0.01

#: Into so many medians of neighbours the steps are taken together before they are looked at for a trend.
_TREND_POINTS = 20


def warmup_steps(step_times_s: Sequence[float]) -> int:
    """How many steps to leave out at the start: caches fill, kernels are chosen, communicators connect.

    The truncation of the marginal standard error rule (MSER; White, "An effective truncation heuristic for bias
    reduction in simulation output", Simulation 69(6), 1997): the one after which the standard error of the mean of
    what remains is least. At most half of the steps, beyond which the rule is known to be misled by its own noise, and
    at least one of two or more, since the first step is never like the others.

    A lone slow step later is no warm-up: the rule sees the running median of three, which takes it out. Deviations
    are counted in units of `RESOLUTION`, or it would follow the tail of a decay without end.
    """
    limit = _limit(len(step_times_s))
    if limit <= 1:
        return limit
    values = _without_lone_outliers(np.asarray(step_times_s[1:], dtype=np.float64))
    deviations = np.round((values / np.median(values) - 1) / RESOLUTION)
    left = np.arange(deviations.size, 0, -1)
    # Of whole numbers, so that sums from the end lose nothing; row i is of all but the first i.
    mean, mean_square = (np.cumsum(x[::-1])[::-1] / left for x in (deviations, deviations**2))
    return 1 + int(np.argmin(((mean_square - mean**2) / left)[:limit]))


def _limit(steps: int) -> int:
    return steps // 2


def _without_lone_outliers(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Running medians of three. The first value stays, since what is slow there is warm-up."""
    if values.size < 3:  # noqa: PLR2004 (of three)
        return values
    middle = np.median(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0)
    return np.concatenate([values[:1], middle, middle[-1:]])


def is_steady(step_times_s: Sequence[float]) -> bool:
    """The steps after the warm-up are of one speed, as far as so many steps can say; fewer than four say nothing.

    They are not where the truncation ran into its limit and the steps just before it were still slower or faster
    than what follows, or where what follows the truncation still has a trend. Both only count from 2 % of the median.
    """
    warmup = warmup_steps(step_times_s)
    kept = np.asarray(step_times_s[warmup:], dtype=np.float64)
    if kept.size <= 1:
        return True
    if warmup > 1 and warmup == _limit(len(step_times_s)):
        before = float(np.median(step_times_s[warmup // 2 : warmup]))
        low, high = median_interval(kept.tolist())
        margin = max(high - low, _DRIFT * float(np.median(kept)))  # of few steps the interval promises too much
        if not low - margin <= before <= high + margin:
            return False
    return not _drifts(kept)


def _drifts(times_s: npt.NDArray[np.float64]) -> bool:
    """A trend: by the test of Mann and Kendall, and of some size, by Theil and Sen's median of all slopes.

    The test compares orders only, so one slow step means little to it. With normal approximation, without ties; it
    cannot find anything in fewer than six steps. Of many it sees medians of neighbours, since neighbours are alike,
    which the test does not expect.
    """
    groups = np.array_split(times_s, min(times_s.size, _TREND_POINTS))
    points = np.array([np.median(group) for group in groups])
    n = points.size
    earlier, later = np.triu_indices(n, 1)
    rises = points[later] - points[earlier]
    # Kendall, Rank Correlation Methods, 1975: the variance of the number of rises minus falls in a random order.
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    score = (abs(float(np.sign(rises).sum())) - 1) / deviation
    drift = float(np.median(rises / (later - earlier))) * (n - 1)
    return bool(score > _z(1 - _TREND_LEVEL) and abs(drift) > _DRIFT * np.median(times_s))


def median_interval(times_s: Sequence[float]) -> tuple[float, float]:
    """From where to where the median of such times lies with at least 95 %, whatever their distribution.

    Two of the times themselves: the k-th from below and from above, with k from the binomial distribution of how many
    times are below the median (David and Nagaraja, Order Statistics, 2003, section 7.1). It takes steps as
    independent. Of fewer than six, least and greatest, which is less than 95 %: 1 step 0 %, 2 50 %, 3 75 %, 4 88 %,
    5 94 %; see `coverage`. ValueError where there is no time.
    """
    if not times_s:
        raise ValueError("times_s: no time given, allowed is one or more")
    ordered = sorted(times_s)
    k, _ = _tail(len(ordered))
    return ordered[k - 1], ordered[-k]


def coverage(steps: int) -> float:
    """The probability that `median_interval` of so many times holds the median."""
    _, outside = _tail(steps)
    return 1 - 2 * outside / (1 << steps)


def _tail(steps: int) -> tuple[int, int]:
    """The greatest k whose interval still covers `COVERAGE`, or 1, and in how many of 2**steps cases it is too high.

    In whole numbers, which stay exact.
    """
    k, outside, ways = 1, 1, steps
    while 2 * (outside + ways) * _ONE_IN <= 1 << steps:
        outside += ways
        ways = ways * (steps - k) // (k + 1)
        k += 1
    return k, outside


def relative_error(low: float, high: float, median: float, coverage: float = COVERAGE) -> float:
    """The standard deviation that stands behind such an interval, as a fraction of the median; at least `RESOLUTION`.

    It is that of a normal distribution with as wide an interval of this `coverage`.
    """
    if coverage <= 0:
        return _LONE_STEP
    return max(RESOLUTION, (high - low) / (2 * _z(coverage)) / median)


def _z(inside: float) -> float:
    """How many standard deviations to each side of a normal distribution's mean hold this part of it."""
    return float(NormalDist().inv_cdf((1 + inside) / 2))
