"""What to run next, given predictions and everything measured so far, and when to stop. Pure."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from hptool.candidates import AXES, BoolColumn, IntColumn, Layouts
from hptool.errors import InputError
from hptool.predict import Predictions, expected_gain
from hptool.predict.belief import believed_fit, believed_step_time, kinship
from hptool.predict.calibration import Calibration, step_time_shares
from hptool.predict.parts import Column

#: A run is worth it that is expected to gain as much, as a share of the best throughput so far: less would be lost in
#: what a few runs of the same layout differ by.
WORTH_A_RUN = 0.01

#: What a run that fails costs: as much as a run has to be worth, for nothing.
FAILURE = WORTH_A_RUN

#: How many runs predictions learn from. The work grows with the cube of their number, and in so many the slowest say
#: nothing about what is faster than all.
TEACHERS = 300

#: How many layouts TPE is given by prediction before it suggests any (FIELD: with five it needs 3 runs, not 23).
SEEDS = 5

# ---------------------------------------------------------------- what is said and what is known


class Ending(StrEnum):
    """How a run stands."""

    UNDER_WAY = "under way"
    MEASURED = "measured"
    OOM = "oom"
    FAILED = "failed"


#: Runs that have a time, or that will have one.
_TIMED = (Ending.MEASURED, Ending.UNDER_WAY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A row of the landscape that was run, or is being run.

    `step_time_s` is that of the run as it was launched, only where it was measured; `step_time_error` the relative
    standard deviation of that figure (the timer's noise). `memory_gib` is what a rank was measured to take, comparable
    with `Predictions.memory_gib`; None where nobody knows.
    """

    row: int
    ending: Ending
    step_time_s: float | None = None
    step_time_error: float = 0.0
    memory_gib: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What to run next; `expected_gain` is of this one run, relative to the best so far, and infinite for the first."""

    row: int
    expected_gain: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing to start before a run under way has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Nothing is worth another run."""

    why: str


class Strategy(Protocol):
    """What to run next in one landscape."""

    def next(self, trials: Sequence[Trial]) -> Proposal | Stop:
        """The next run after these, of a row that none of them has. The same trials give the same answer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Landscape:
    """What is known before the first run.

    Row i of `target` is layout i on the whole cluster, which is what has to be fast; row i of `run` is the same layout
    as the smaller run that times it. They may be the same object. `memory_gib` is what a rank may take.
    """

    target: Predictions
    run: Predictions
    memory_gib: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outlook:
    """What is believed of every row of the target, where `step_time_error` is a relative standard deviation.

    `misfit` is how far off predictions are beyond what was learned of all layouts, relative.
    """

    step_time_s: Column
    step_time_error: Column
    tokens_per_s_per_gpu: Column
    p_fit: Column
    misfit: float


def outlook(landscape: Landscape, trials: Sequence[Trial]) -> Outlook:
    """What is believed of the target after these trials.

    A measured row takes what was measured and what the target is expected to take more than the run. A row under way
    is hardly in doubt any more, as if it had taken what was expected.
    """
    run, target = landscape.run, landscape.target
    timed = [t for t in trials if t.ending in _TIMED]
    rows = _rows(timed)
    measured_s = np.array([np.nan if t.step_time_s is None else t.step_time_s for t in timed], dtype=np.float64)
    noise = np.array([t.step_time_error for t in timed], dtype=np.float64)
    teachers = _teachers(target, rows, measured_s / run.step_time_s[rows])
    belief = believed_step_time(run, target, rows[teachers], measured_s[teachers], noise[teachers])
    step_time_s, error = np.exp(belief.log_mean), belief.log_error
    known = np.isfinite(measured_s)
    step_time_s[rows[known]], error[rows[known]] = _transferred(
        landscape, belief.factors, rows[known], measured_s[known], noise[known]
    )
    return Outlook(
        step_time_s=step_time_s,
        step_time_error=error,
        tokens_per_s_per_gpu=target.tokens_per_s_per_gpu * target.step_time_s / step_time_s,
        p_fit=_p_fit(landscape, trials),
        misfit=belief.factors.misfit,
    )


def _teachers(target: Predictions, rows: IntColumn, stretch: Column) -> IntColumn:
    """Which of the runs to learn from: all, or the fastest where there are very many, and those under way."""
    if len(rows) <= TEACHERS:
        return np.arange(len(rows))
    rate = target.tokens_per_s_per_gpu[rows] / np.where(np.isfinite(stretch), stretch, 0.5)
    return np.sort(np.argsort(-rate)[:TEACHERS])


def _rows(trials: Sequence[Trial]) -> IntColumn:
    return np.array([t.row for t in trials], dtype=np.int64)


def _transferred(
    landscape: Landscape, factors: Calibration, rows: IntColumn, measured_s: Column, noise: Column
) -> tuple[Column, Column]:
    """Step times of rows of the target whose runs were measured, and their relative errors."""
    target, run = (
        step_time_shares(p.step_time)[rows] * np.exp(factors.log_mean) for p in (landscape.target, landscape.run)
    )
    target_s, run_s, more = target.sum(axis=1), run.sum(axis=1), target - run
    # What a larger cluster adds is added; where it saves, subtracting could leave nothing.
    more_s = np.where(target_s >= run_s, target_s - run_s, measured_s * (target_s / run_s - 1))
    variance = (noise * measured_s) ** 2 + ((more @ factors.log_covariance) * more).sum(axis=1)
    variance += (factors.misfit * more_s) ** 2
    return measured_s + more_s, np.sqrt(variance) / (measured_s + more_s)


def _p_fit(landscape: Landscape, trials: Sequence[Trial]) -> Column:
    """The probability that a row of the target fits: 1 and 0 where a run told."""
    told = [t for t in trials if t.ending in (Ending.MEASURED, Ending.OOM)]
    rows, fits = _rows(told), np.array([t.ending is Ending.MEASURED for t in told], dtype=np.bool_)
    measured_gib = np.array([np.nan if t.memory_gib is None else t.memory_gib for t in told], dtype=np.float64)
    p_fit = believed_fit(
        landscape.run, landscape.target, landscape.memory_gib, rows, fits=fits, measured_gib=measured_gib
    )
    p_fit[rows] = fits
    return p_fit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Promise:
    """What another run of each row is worth: the probability that it ends well, and what it is believed to gain.

    `gain` is relative to the best so far and has what failures cost taken off; it is None before there is a best.
    """

    outlook: Outlook
    works: Column
    gain: Column | None


def _promise(landscape: Landscape, trials: Sequence[Trial]) -> _Promise:
    now = outlook(landscape, trials)
    works = now.p_fit * _ends_well(landscape, trials)
    timed = _rows([t for t in trials if t.ending in _TIMED])
    if not len(timed):
        return _Promise(outlook=now, works=works, gain=None)
    best = float(now.tokens_per_s_per_gpu[timed].max())
    error = np.maximum(now.step_time_error, 1e-9)  # a measured row may have none
    gain = expected_gain(now.tokens_per_s_per_gpu, error, best) / best
    return _Promise(outlook=now, works=works, gain=works * gain - (1 - works) * FAILURE)


def _ends_well(landscape: Landscape, trials: Sequence[Trial]) -> Column:
    """The probability that a row that fits does not fail for another reason, from how its kin ended.

    A share of failures to which each run counts as much as it is kin, beside one that is imagined to have ended well.
    """
    ended = [t for t in trials if t.ending in (Ending.MEASURED, Ending.FAILED)]
    kin = kinship(landscape.target, _rows(ended))
    failed = np.array([t.ending is Ending.FAILED for t in ended], dtype=np.float64)
    return np.asarray(1 - kin @ failed / (1 + kin.sum(axis=1)))


# ---------------------------------------------------------------- strategies


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """Runs what is expected to gain most over the best so far, and stops once that is too little.

    First what is believed of each layout says what a run is expected to gain. Once that is too little everywhere,
    experience has a say, because a model that is wrong about a layout does not know it: after k runs in a row without
    a gain, the next one gains with a probability of 1 in k + 2 (Laplace's rule of succession), about as much as
    predictions are off by.
    """

    landscape: Landscape
    worth_a_run: float = WORTH_A_RUN

    def next(self, trials: Sequence[Trial]) -> Proposal | Stop:
        """As `Strategy.next`."""
        target = self.landscape.target
        left = np.ones(len(target), dtype=np.bool_)
        left[_rows(trials)] = False
        if not left.any():
            return Stop(why="every layout was run")
        left &= ~target.recomputes_in_vain()
        if not left.any():
            return Stop(why="every layout was run but those that recompute and gain nothing by it")
        promise = _promise(self.landscape, trials)
        if promise.gain is None:
            expected = promise.works * promise.outlook.tokens_per_s_per_gpu
            row = int(np.argmax(np.where(left, expected, -np.inf)))
            return Proposal(row=row, expected_gain=math.inf, why="the fastest that should fit, by prediction")
        row = int(np.argmax(np.where(left, promise.gain, -np.inf)))
        if (gain := float(promise.gain[row])) >= self.worth_a_run:
            return Proposal(row=row, expected_gain=gain, why=f"may gain much: {_figures(promise.outlook, row)}")
        k = _runs_without_gain(promise.outlook, trials)
        by_experience = promise.gain + promise.works * promise.outlook.misfit / (k + 2)
        row = int(np.argmax(np.where(left, by_experience, -np.inf)))
        if (gain := float(by_experience[row])) >= self.worth_a_run:
            why = f"only {k} runs without a gain so far, and predictions are {promise.outlook.misfit:.0%} off"
            return Proposal(row=row, expected_gain=gain, why=why)
        return Stop(why=f"another run is expected to gain {max(0.0, gain):.2%}, less than {self.worth_a_run:.0%}")


def _figures(now: Outlook, row: int) -> str:
    return f"{now.tokens_per_s_per_gpu[row]:.4g} tokens/s/GPU ± {now.step_time_error[row]:.0%} expected"


def _runs_without_gain(now: Outlook, trials: Sequence[Trial]) -> int:
    """Runs since the last one that was better than all before by what is worth a run.

    Those under way had no gain yet. Those that failed do not count: nobody knows what they would have gained.
    """
    best, count = 0.0, 0
    for trial in trials:
        if trial.ending in _TIMED:
            rate = float(now.tokens_per_s_per_gpu[trial.row]) if trial.ending is Ending.MEASURED else 0.0
            gained = rate > best * (1 + WORTH_A_RUN)
            best, count = (rate, 0) if gained else (best, count + 1)
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class InOrder:
    """The strategy that runs rows in an order that was fixed before the first of them.

    Without a landscape it cannot say what a run is expected to gain, and says NaN.
    """

    order: Sequence[int]
    why: str
    landscape: Landscape | None = None

    def next(self, trials: Sequence[Trial]) -> Proposal | Stop:
        """As `Strategy.next`."""
        tried = {t.row for t in trials}
        row = next((row for row in self.order if row not in tried), None)
        if row is None:
            return Stop(why="every layout was run")
        return Proposal(row=row, expected_gain=believed_gain(self.landscape, trials, row), why=self.why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tpe:
    """The best predicted layouts first, then what Optuna's TPE suggests, to which a failure has no throughput."""

    landscape: Landscape
    seed: int
    suggest: Callable[[Layouts, Mapping[int, float], BoolColumn, int], int]

    def next(self, trials: Sequence[Trial]) -> Proposal | Stop:
        """As `Strategy.next`."""
        target = self.landscape.target
        left = np.ones(len(target), dtype=np.bool_)
        left[_rows(trials)] = False
        if not left.any():
            return Stop(why="every layout was run")
        if len(trials) < SEEDS:
            row, why = next(int(i) for i in target.ranking() if left[i]), "the next best by prediction"
        else:
            now = outlook(self.landscape, trials)
            fitted = [t.row for t in trials if t.ending in _TIMED]
            values = {t.row: 0.0 for t in trials} | {i: float(now.tokens_per_s_per_gpu[i]) for i in fitted}
            row, why = self.suggest(target.layouts, values, left, self.seed), "suggested by TPE"
        return Proposal(row=row, expected_gain=believed_gain(self.landscape, trials, row), why=why)


def believed_gain(landscape: Landscape | None, trials: Sequence[Trial], row: int) -> float:
    """What a run of this row is believed to gain: infinite before there is anything to compare with, NaN unknown."""
    if not any(t.ending in _TIMED for t in trials):
        return math.inf
    if landscape is None:
        return math.nan
    gain = _promise(landscape, trials).gain
    assert gain is not None  # noqa: S101 (there is a best)
    return float(gain[row])


def _adaptive(landscape: Landscape, seed: int) -> Strategy:
    del seed
    return Adaptive(landscape=landscape)


def _ranked(landscape: Landscape, seed: int) -> Strategy:
    del seed
    return InOrder(order=landscape.target.ranking().tolist(), why="the next best by prediction", landscape=landscape)


def _grid(landscape: Landscape, seed: int) -> Strategy:
    del seed
    order = np.lexsort([getattr(landscape.target.layouts, axis) for axis in reversed(AXES)])
    return InOrder(order=order.tolist(), why="the next of all, size by size", landscape=landscape)


def _random(landscape: Landscape, seed: int) -> Strategy:
    order = np.random.default_rng(seed).permutation(len(landscape.target))
    return InOrder(order=order.tolist(), why="by chance", landscape=landscape)


def _optuna(landscape: Landscape, seed: int) -> Strategy:
    # An extra, which takes a second to import.
    from hptool.optuna_strategy import suggest  # noqa: PLC0415

    return Tpe(landscape=landscape, seed=seed, suggest=suggest)


#: Strategies by the name that users give.
STRATEGIES: Mapping[str, Callable[[Landscape, int], Strategy]] = {
    "adaptive": _adaptive,
    "ranked": _ranked,
    "grid": _grid,
    "random": _random,
    "optuna": _optuna,
}


def make(name: str, landscape: Landscape, *, seed: int = 0) -> Strategy:
    """The strategy of this name; InputError where there is none, or where what it needs is not installed."""
    if name not in STRATEGIES:
        raise InputError(f"unknown strategy {name!r}; allowed are {', '.join(STRATEGIES)}")
    return STRATEGIES[name](landscape, seed)
