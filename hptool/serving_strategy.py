"""Which points of a serving search to measure next, and when to stop. Pure.

Within a layout the latency grows with the batch, so what a limit allows is bracketed; a run measures several batches of
a layout one after the other.

A point is worth measuring for its latency alone: below some critical latency it is the best so far, or, where all
points count that are not beaten, beaten by none. So every objective is one question: how far below its critical latency
a point is expected to end, and within the limits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hptool.candidates import BoolColumn, IntColumn
from hptool.errors import InputError
from hptool.predict import normal_cdf
from hptool.predict.parts import Column
from hptool.serving import Lengths, ServingPoints, Targets
from hptool.serving_view import (
    TRUSTED_FROM,
    ServedTrial,
    ServingLandscape,
    ServingView,
    groups_of,
    landscape_of,
    lengths_of,
)
from hptool.strategy import FAILURE, WORTH_A_RUN, Ending, Stop, Wait

__all__ = [
    "STRATEGIES",
    "Bisect",
    "Grid",
    "Guided",
    "Ranked",
    "ServedTrial",
    "ServingLandscape",
    "ServingStrategy",
    "ServingView",
    "Sitting",
    "Standing",
    "excess",
    "landscape_of",
    "make",
    "standing",
    "tokens_per_s_per_gpu",
    "undominated",
]

#: A layout that nobody measured is left out only where its best point is predicted below this share of the best so far:
#: one engine's predictions are off by 57 % for another before anything is fitted (FIELD, section 5).
SKIPPED_BELOW = 0.5

#: A point that keeps the limits, or fits, with less probability than this is not tried for a gain that nobody has seen.
_IMPROBABLE = 0.02

#: What times to the first token are off by at least where they were not measured: half of the published points that a
#: fit has not seen are off by 0.10 to 0.15 in the logarithm.
_LEAST_TTFT_ERROR = 0.15

#: How far into the tail of a distribution a surprise is taken at its word.
_MOST_DEVIATIONS = 8.0

#: Errors and times below these are as good as none, times above as good as infinite.
_LEAST_ERROR, _LEAST_MS, _LONGEST_MS = 1e-6, 1e-9, 1e15

#: A point that is on the frontier with this probability is measured. On published grids one in ten finds all of the
#: frontier but for one point in 150, with half the runs; one in five misses three, and saves a twentieth of them.
LIKELY_ENOUGH = 0.1

#: Most batches of the same lengths in one sitting. Each is decided without the ones before it, so more would guess.
MOST_BATCHES = 3

#: A layout of which so many more points crashed than ended well is given up.
_GIVEN_UP = 3


# ---------------------------------------------------------------- what is said and what is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Sitting:
    """A run to start: points of one layout, lengths by lengths, each with its batches in ascending order.

    With `stops_early` a point that leaves the limits or the memory ends the points of its lengths, since larger batches
    would leave them too.
    """

    layout: int
    rows: tuple[int, ...]
    stops_early: bool
    why: str


class ServingStrategy(Protocol):
    """What to measure next in one landscape."""

    def next(self, trials: Sequence[ServedTrial]) -> Sitting | Wait | Stop:
        """The next run after these, of rows that none of them has. The same trials give the same answer.

        Points that a sitting left out, since it ended early or was lost, are in no trial; they may be asked for again.
        """


# ---------------------------------------------------------------- a landscape and what was measured of it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Terrain:
    """What is known of a landscape before the first run.

    `lengths` and `group` number the lengths, and the layouts with lengths, in which batches are compared. `tokens` are
    those that a GPU answers in one batch; over the latency they are the throughput.
    """

    lengths: IntColumn
    group: IntColumn
    batch: IntColumn
    tokens: Column

    @classmethod
    def of(cls, landscape: ServingLandscape) -> "_Terrain":
        p = landscape.points
        return cls(
            lengths=lengths_of(p),
            group=groups_of(p, landscape.layout),
            batch=p.batch,
            tokens=p.batch * p.output_len / p.gpus,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Known:
    """Trials as columns, one row a point: the times, NaN where not measured, and how each ended."""

    latency_ms: Column
    excess: Column
    measured: BoolColumn
    under_way: BoolColumn
    oom: BoolColumn
    failed: BoolColumn

    @property
    def tried(self) -> BoolColumn:
        """Rows that are in a trial."""
        return self.measured | self.under_way | self.oom | self.failed

    @classmethod
    def of(cls, landscape: ServingLandscape, trials: Sequence[ServedTrial]) -> "_Known":
        n = len(landscape.points)
        latency_ms, worst = np.full(n, np.nan), np.full(n, np.nan)
        endings = {ending: np.zeros(n, dtype=np.bool_) for ending in Ending}
        for t in trials:
            endings[t.ending][t.row] = True
            if t.ending is Ending.MEASURED:
                latency_ms[t.row] = math.nan if t.latency_ms is None else t.latency_ms
                worst[t.row] = excess(landscape.targets, t)
        # Whatever else became of a point: once measured it can be, and a run under way will tell.
        measured = endings[Ending.MEASURED] & np.isfinite(latency_ms)
        under_way = endings[Ending.UNDER_WAY] & ~measured
        return cls(
            latency_ms=np.where(measured, latency_ms, np.nan),
            excess=np.where(measured, worst, np.nan),
            measured=measured,
            under_way=under_way,
            oom=endings[Ending.OOM] & ~measured & ~under_way,
            failed=(endings[Ending.FAILED] | endings[Ending.MEASURED]) & ~measured & ~under_way,
        )


def excess(targets: Targets, trial: ServedTrial) -> float:
    """How many times over the limit that it keeps worst a measured point is; 1 or less keeps them all, 0 has none.

    A time that has a limit and was not measured is infinitely over it.
    """
    limits = (
        (targets.max_latency_ms, trial.latency_ms),
        (targets.max_ttft_ms, trial.ttft_ms),
        (targets.max_tpot_ms, trial.tpot_ms),
    )
    ratios = [math.inf if time is None or math.isnan(time) else time / limit for limit, time in limits if limit]
    return max(ratios, default=0.0)


def undominated(latency: Column, throughput: Column) -> BoolColumn:
    """Which points no other one beats: lower latency and no less throughput, or more throughput at no more latency."""
    order = np.lexsort([-throughput, latency])
    best = np.concatenate([[-np.inf], np.maximum.accumulate(throughput[order])[:-1]]) if len(order) else throughput
    found = np.zeros(len(latency), dtype=np.bool_)
    found[order] = throughput[order] > best
    # Equals of one that is not beaten are not beaten either.
    if len(order):
        before = np.concatenate([[False], (np.diff(latency[order]) == 0) & (np.diff(throughput[order]) == 0)])
        for i in np.flatnonzero(before):
            found[order[i]] |= found[order[i - 1]]
    return found


# ---------------------------------------------------------------- what another point is worth


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Outlook:
    """What is believed of each row that was not tried.

    `merit` is what the objective wants much of, by what is expected; `critical_ms` the latency below which a row is the
    best so far of its lengths, infinite before anything is; `room` how far the nearest limit is, in deviations (minus
    infinity where a smaller batch is beyond it); `within` the probability that it keeps the limits, `works` that it
    fits and does not crash; `gain` what it is expected to gain, relative to the best so far; `chance` the probability
    that it gains by what is worth a run.
    """

    view: ServingView
    merit: Column
    critical_ms: Column
    room: Column
    within: Column
    works: Column
    gain: Column
    chance: Column


def _outlook(landscape: ServingLandscape, terrain: _Terrain, known: _Known, view: ServingView) -> _Outlook:
    error = np.maximum(view.error, _LEAST_ERROR)
    room, first = _room(landscape.targets, view)
    above, below = _bounds(terrain, known)
    # What a smaller batch has left, a larger one leaves too, unless an even larger one keeps it after all.
    out, kept = above & ~below, below & ~above
    room, first = (np.where(kept, np.inf, np.where(out, -np.inf, z)) for z in (room, first))
    starts = _long_tailed_cdf(first)
    within = starts * normal_cdf(_tail(room))
    works = _fits(landscape, known, view.p_fit) * _ends_well(landscape, known)
    merit = _merit(landscape, terrain, known, view, within * works)
    critical_ms = _critical_ms(landscape, terrain, known, view.latency_ms, within)
    gain = works * starts * _expected_gain(view.latency_ms, error, critical_ms, room) - (1 - works) * FAILURE
    ahead = np.log(np.minimum(critical_ms, _LONGEST_MS) / view.latency_ms / (1 + WORTH_A_RUN)) / error
    return _Outlook(
        view=view,
        merit=merit,
        critical_ms=critical_ms,
        room=np.minimum(room, first),
        within=np.where(out, 0.0, within),
        works=works,
        gain=gain,
        chance=works * starts * normal_cdf(_tail(np.minimum(ahead, room))),
    )


def _merit(landscape: ServingLandscape, terrain: _Terrain, known: _Known, view: ServingView, likely: Column) -> Column:
    """What the objective wants much of, by what is expected.

    Of the frontier that is how many times over the other points a point is expected to be, in latency or throughput.
    What is on it has to be measured in any case, so the surest first: they teach which others are on it too.
    """
    latency_ms = np.where(known.measured, known.latency_ms, view.latency_ms)
    if landscape.objective == "latency":
        return np.asarray(1 / latency_ms)
    if landscape.objective == "throughput-per-gpu":
        return np.asarray(terrain.tokens / latency_ms)
    counts = np.where(known.measured, known.excess <= 1, likely >= 0.5)  # noqa: PLR2004 (likely)
    merit = np.zeros(len(latency_ms))
    for lengths in np.unique(terrain.lengths):
        here = np.flatnonzero(terrain.lengths == lengths)
        best = np.flatnonzero(counts & (terrain.lengths == lengths))
        best = best[undominated(latency_ms[best], terrain.tokens[best] / latency_ms[best])]
        beaten_ms = _beaten_ms(terrain, latency_ms, here, best)
        beaten_ms[here[:, None] == best[None, :]] = np.inf
        merit[here] = np.minimum(beaten_ms.min(axis=1, initial=np.inf), _LONGEST_MS) / latency_ms[here]
    return merit


def _beaten_ms(terrain: _Terrain, latency_ms: Column, rows: IntColumn, front: IntColumn) -> Column:
    """The latency below which rows beat each point of a front, in latency or in throughput, whichever asks for less."""
    rate = terrain.tokens[front] / latency_ms[front]
    return np.maximum(latency_ms[front][None, :], terrain.tokens[rows][:, None] / rate[None, :])


def _room(targets: Targets, view: ServingView) -> tuple[Column, Column]:
    """How far the limits are, in deviations: of the latency and the time of a token, and of that to the first token.

    What makes each token slow makes the answer slow, so the first two are one chance; the first token is another, since
    mostly it waits for others.
    """

    def room(limit_ms: float | None, time_ms: Column, error: Column | None, least: float = _LEAST_ERROR) -> Column:
        if limit_ms is None:
            return np.full(len(time_ms), np.inf)
        deviation = np.maximum(view.error if error is None else error, least)
        return np.asarray(np.log(limit_ms / np.maximum(time_ms, _LEAST_MS)) / deviation)

    whole = room(targets.max_latency_ms, view.latency_ms, view.error)
    each = room(targets.max_tpot_ms, view.tpot_ms, view.tpot_error)
    return np.minimum(whole, each), room(targets.max_ttft_ms, view.ttft_ms, view.ttft_error, _LEAST_TTFT_ERROR)


def _bounds(terrain: _Terrain, known: _Known) -> tuple[BoolColumn, BoolColumn]:
    """Rows with a batch above a measured one that left the limits, and those below one that keeps them."""
    groups = int(terrain.group.max(initial=-1)) + 1
    lowest_bad, highest_good = np.full(groups, np.inf), np.full(groups, -np.inf)
    bad, good = known.measured & (known.excess > 1), known.measured & (known.excess <= 1)
    np.minimum.at(lowest_bad, terrain.group[bad], terrain.batch[bad])
    np.maximum.at(highest_good, terrain.group[good], terrain.batch[good])
    return terrain.batch > lowest_bad[terrain.group], terrain.batch < highest_good[terrain.group]


def _fits(landscape: ServingLandscape, known: _Known, p_fit: Column) -> Column:
    """The probability of fitting: none above a point of the layout that ran out of memory, and 1 below one that fitted.

    Larger are also longer lengths. A point that was measured outweighs one that ran out of memory.
    """
    p = landscape.points
    fits = np.clip(p_fit, 0.0, 1.0)

    def larger(than: int) -> BoolColumn:
        return np.asarray(
            (landscape.layout == landscape.layout[than])
            & (p.batch >= p.batch[than])
            & (p.input_len >= p.input_len[than])
            & (p.output_len >= p.output_len[than])
        )

    def smaller(than: int) -> BoolColumn:
        return np.asarray(
            (landscape.layout == landscape.layout[than])
            & (p.batch <= p.batch[than])
            & (p.input_len <= p.input_len[than])
            & (p.output_len <= p.output_len[than])
        )

    for row in np.flatnonzero(known.oom).tolist():
        fits[larger(row)] = 0.0
    for row in np.flatnonzero(known.measured).tolist():
        fits[smaller(row)] = 1.0
    return fits


def _ends_well(landscape: ServingLandscape, known: _Known) -> Column:
    """The probability that a point does not crash, by how others of its layout ended, beside one imagined to be well.

    A layout is given up after some crashes more than points that ended well, so that it ends for sure.
    """
    layouts = int(landscape.layout.max(initial=-1)) + 1
    well, crashed = (
        np.bincount(landscape.layout[which], minlength=layouts) for which in (known.measured | known.oom, known.failed)
    )
    share = np.where(crashed - well >= _GIVEN_UP, 0.0, (well + 1) / (well + crashed + 1))
    return np.asarray(share[landscape.layout])


def _critical_ms(
    landscape: ServingLandscape, terrain: _Terrain, known: _Known, expected_ms: Column, within: Column
) -> Column:
    """The latency below which each row is better than the best so far of its lengths; infinite where there is none.

    A row under way that should keep the limits counts as if it had ended as expected.
    """
    counts = (known.measured & (known.excess <= 1)) | (known.under_way & (within >= 0.5))  # noqa: PLR2004 (likely)
    latency_ms = np.where(known.measured, known.latency_ms, expected_ms)
    critical_ms = np.full(len(within), np.inf)
    for lengths in np.unique(terrain.lengths[counts]):
        here, best = terrain.lengths == lengths, np.flatnonzero(counts & (terrain.lengths == lengths))
        rate = terrain.tokens[best] / latency_ms[best]
        fastest = float(latency_ms[best].min())
        if landscape.objective == "latency":
            critical_ms[here] = fastest
        elif landscape.objective == "throughput-per-gpu":
            critical_ms[here] = terrain.tokens[here] / float(rate.max())
        else:
            critical_ms[here] = _beaten_ms(terrain, latency_ms, np.flatnonzero(here), best).min(axis=1)
    return critical_ms


def _expected_gain(latency_ms: Column, error: Column, critical_ms: Column, room: Column) -> Column:
    """How many times over the best a point is expected to end, less one, counted only where better and within limits.

    The logarithm of the latency is normal; the limits end `room` deviations above its mean. 0 where nothing is best.
    """
    ahead = np.where(np.isfinite(critical_ms), np.log(critical_ms / latency_ms), 0.0)
    upto = np.minimum(ahead / error, room)
    over = np.exp(np.minimum(ahead + 0.5 * error**2, 50.0))
    return np.asarray(np.maximum(0.0, over * normal_cdf(_tail(upto + error)) - normal_cdf(_tail(upto))))


def _long_tailed_cdf(z: Column) -> Column:
    """Of Student's distribution with two degrees of freedom.

    What the first token of a busy service waits for changes from one regime to another: of published points that a fit
    has not seen, half are off by less than 0.12 in the logarithm, while the root of the mean square is 0.48.
    """
    finite = np.clip(z, -_MOST_DEVIATIONS, _MOST_DEVIATIONS)
    return np.where(np.isinf(z), (z > 0) * 1.0, 0.5 + finite / (2 * np.sqrt(2 + finite**2)))


def _tail(z: Column) -> Column:
    """Far enough into the tail of a normal distribution, and finite."""
    return np.clip(z, -_MOST_DEVIATIONS, _MOST_DEVIATIONS)


# ---------------------------------------------------------------- strategies


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pick:
    """A point to measure, the first by `rank` and then by `gain`, and why."""

    row: int
    rank: int
    gain: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Guided:
    """Measures what is expected to gain most over the best so far, and stops once that is too little.

    A layout that was never measured is left out only where it is predicted to be far behind. Lengths that would go on
    with the same layout share a sitting, and larger batches come along that would be worth it after the smaller ones.
    """

    landscape: ServingLandscape

    def next(self, trials: Sequence[ServedTrial]) -> Sitting | Wait | Stop:
        """As `ServingStrategy.next`."""
        landscape, terrain = self.landscape, _Terrain.of(self.landscape)
        known = _Known.of(landscape, trials)
        if known.tried.all():
            return _over(known, "every point was tried")
        now = _outlook(landscape, terrain, known, landscape.view(trials))
        picks = [self._pick(terrain, known, now, lengths) for lengths in range(int(terrain.lengths.max()) + 1)]
        found = sorted((p for p in picks if p is not None), key=lambda p: (p.rank, -p.gain, p.row))
        if not found:
            return _over(known, self._why_stop(known, now))
        layout = int(landscape.layout[found[0].row])
        rows = [
            row
            for pick in sorted((p for p in found if landscape.layout[p.row] == layout), key=lambda p: p is not found[0])
            for row in self._with_larger(terrain, trials, pick.row)
        ]
        return Sitting(layout=layout, rows=tuple(rows), stops_early=True, why=found[0].why)

    def _pick(self, terrain: _Terrain, known: _Known, now: _Outlook, lengths: int) -> _Pick | None:
        """What to measure next of these lengths; None where nothing is worth it, or not before a run has ended."""
        busy = np.isin(terrain.group, terrain.group[known.under_way])
        possible = (terrain.lengths == lengths) & ~known.tried & ~busy & (now.works > 0) & (now.room > -np.inf)
        likely = now.within * now.works
        open_ = possible & (likely >= _IMPROBABLE)
        if np.isinf(now.critical_ms[terrain.lengths == lengths]).all():
            if open_.any():
                row = int(np.argmax(np.where(open_, likely * now.merit, -np.inf)))
                why = f"the best that should keep the limits: {_figures(now, row)}"
                return _Pick(row=row, rank=0, gain=math.inf, why=why)
            if possible.any() and known.measured.sum() < TRUSTED_FROM:
                row = int(
                    np.argmax(np.where(possible, now.room + np.log(np.maximum(now.works, _LEAST_ERROR)), -np.inf))
                )
                why = f"the nearest to the limits, of which too little is known: {_figures(now, row)}"
                return _Pick(row=row, rank=0, gain=math.inf, why=why)
            return None
        worth = open_ & self._worth(now)
        if worth.any():
            order = now.merit if self.landscape.objective == "pareto" else now.gain
            row = int(np.argmax(np.where(worth, order, -np.inf)))
            return _Pick(row=row, rank=1, gain=float(now.gain[row]), why=f"may gain much: {_figures(now, row)}")
        share = likely * np.minimum(now.critical_ms, _LONGEST_MS) / now.view.latency_ms
        new = open_ & ~np.isin(terrain.group, terrain.group[known.tried])
        if new.any():
            row = int(np.argmax(np.where(new, share, -np.inf)))
            if share[row] >= SKIPPED_BELOW or known.measured.sum() < TRUSTED_FROM:
                why = f"a layout that was not measured, predicted at {share[row]:.0%} of the best so far"
                return _Pick(row=row, rank=2, gain=float(share[row]), why=why)
        return None

    def _with_larger(self, terrain: _Terrain, trials: Sequence[ServedTrial], row: int) -> list[int]:
        """The row, and larger batches that would be worth it if those before them ended as expected."""
        landscape, rows = self.landscape, [row]
        supposed = list(trials)
        while len(rows) < MOST_BATCHES:
            view = landscape.view(supposed)
            last = rows[-1]
            supposed.append(
                ServedTrial(
                    row=last,
                    ending=Ending.MEASURED,
                    latency_ms=float(view.latency_ms[last]),
                    ttft_ms=float(view.ttft_ms[last]),
                    tpot_ms=float(view.tpot_ms[last]),
                )
            )
            if excess(landscape.targets, supposed[-1]) > 1:
                break
            known = _Known.of(landscape, supposed)
            now = _outlook(landscape, terrain, known, landscape.view(supposed))
            larger = (terrain.group == terrain.group[row]) & (terrain.batch > terrain.batch[last]) & ~known.tried
            larger &= self._worth(now)
            if landscape.objective == "pareto":
                larger &= now.merit >= 1
            if not larger.any():
                break
            rows.append(int(np.argmax(np.where(larger, now.gain, -np.inf))))
        return rows

    def _worth(self, now: _Outlook) -> BoolColumn:
        """What is worth a run: what may gain enough, or may well be on the frontier, of which every point is wanted."""
        if self.landscape.objective == "pareto":
            return np.asarray(now.chance >= LIKELY_ENOUGH)
        return np.asarray((now.gain >= WORTH_A_RUN) | (now.chance >= LIKELY_ENOUGH))

    def _why_stop(self, known: _Known, now: _Outlook) -> str:
        if not (known.measured & (known.excess <= 1)).any():
            return "no other point is expected to keep the limits"
        if self.landscape.objective == "pareto":
            chance = float(np.max(np.where(known.tried, 0.0, now.chance)))
            return f"another point is on the frontier with a probability of {chance:.0%}, less than {LIKELY_ENOUGH:.0%}"
        gain = float(np.max(np.where(known.tried, 0.0, now.gain), initial=0.0))
        return f"another point is expected to gain {gain:.2%}, less than {WORTH_A_RUN:.0%}"


def _over(known: _Known, why: str) -> Wait | Stop:
    return Wait() if known.under_way.any() else Stop(why=why)


def _figures(now: _Outlook, row: int) -> str:
    return f"{now.view.latency_ms[row]:.4g} ms ± {now.view.error[row]:.0%} expected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisect:
    """Looks at no prediction: halves the batches of each layout and lengths until what the limits allow is known.

    Takes it that the throughput grows with the batch. For the latency that is the smallest batch of each; for the
    frontier both ends, and the middle of what is between two measured ones while that could still be of it.
    """

    landscape: ServingLandscape

    def next(self, trials: Sequence[ServedTrial]) -> Sitting | Wait | Stop:
        """As `ServingStrategy.next`."""
        landscape, terrain = self.landscape, _Terrain.of(self.landscape)
        known = _Known.of(landscape, trials)
        possible = _fits(landscape, known, np.ones(len(landscape.points))) * _ends_well(landscape, known) > 0
        above, below = _bounds(terrain, known)
        open_ = ~known.tried & possible & ~(above & ~below)
        found: list[int] = []
        for group in np.unique(terrain.group[open_]):
            rows = np.flatnonzero(terrain.group == group)
            if known.under_way[rows].any() or (found and landscape.layout[rows[0]] != landscape.layout[found[0]]):
                continue
            rows = rows[np.argsort(terrain.batch[rows], kind="stable")]
            row = self._probe(terrain, known, rows, open_)
            if row is not None:
                found.append(row)
        if not found:
            return _over(known, "what the limits allow is known of every layout")
        layout = int(landscape.layout[found[0]])
        return Sitting(layout=layout, rows=tuple(found), stops_early=True, why="the middle of what is not known yet")

    def _probe(self, terrain: _Terrain, known: _Known, rows: IntColumn, open_: BoolColumn) -> int | None:
        """The next row of those of one layout and lengths, which are in ascending order of the batch."""
        left = rows[open_[rows]]
        good = known.measured[rows] & (known.excess[rows] <= 1)
        if self.landscape.objective == "latency":
            return None if good.any() or not len(left) else int(left[0])
        largest = float(terrain.batch[rows[good]].max(initial=0.0))
        beyond = left[terrain.batch[left] > largest]
        if len(beyond):
            unlimited = _is_unlimited(self.landscape.targets) and not known.oom[rows].any()
            return int(beyond[-1] if unlimited else beyond[len(beyond) // 2])
        return self._between(terrain, known, rows, left) if self.landscape.objective == "pareto" else None

    def _between(self, terrain: _Terrain, known: _Known, rows: IntColumn, left: IntColumn) -> int | None:
        """The middle of the most batches between two measured ones that could still be of the frontier."""
        measured = rows[known.measured[rows]]
        if not len(left):
            return None
        if not len(measured) or terrain.batch[left[0]] < terrain.batch[measured[0]]:
            return int(left[0])
        # At best a batch takes no longer than the next smaller one.
        latency_ms = np.full(len(terrain.batch), np.nan)
        for row in left:
            latency_ms[row] = known.latency_ms[measured[terrain.batch[measured] < terrain.batch[row]][-1]]
        critical_ms = _critical_ms(self.landscape, terrain, known, latency_ms, np.zeros(len(latency_ms)))
        could = left[critical_ms[left] / latency_ms[left] - 1 >= WORTH_A_RUN]
        if not len(could):
            return None
        gaps = np.searchsorted(terrain.batch[measured], terrain.batch[could])
        widest = could[gaps == np.bincount(gaps).argmax()]
        return int(widest[len(widest) // 2])


def _is_unlimited(targets: Targets) -> bool:
    return targets.max_latency_ms is targets.max_ttft_ms is targets.max_tpot_ms is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """Measures one point after the other in the order of what is expected before the first, until none is left.

    Of several lengths in turn. Only points that cannot fit, by one that ran out of memory, are left out.
    """

    landscape: ServingLandscape

    def next(self, trials: Sequence[ServedTrial]) -> Sitting | Wait | Stop:
        """As `ServingStrategy.next`."""
        landscape, terrain = self.landscape, _Terrain.of(self.landscape)
        nothing, known = _Known.of(landscape, ()), _Known.of(landscape, trials)
        now = _outlook(landscape, terrain, nothing, landscape.view(()))
        possible = ~known.tried & (_fits(landscape, known, np.ones(len(landscape.points))) > 0)
        place = _places(landscape, terrain, now)
        if not possible.any():
            return _over(known, "every point was tried that could fit")
        row = int(np.argmin(np.where(possible, place, np.iinfo(np.int64).max)))
        why = f"the next best by prediction: {_figures(now, row)}"
        return Sitting(layout=int(landscape.layout[row]), rows=(row,), stops_early=True, why=why)


def _places(landscape: ServingLandscape, terrain: _Terrain, now: _Outlook) -> IntColumn:
    """The place of each row among those of its lengths: by what is expected of the objective, or front by front."""
    expected = now.within * now.works * now.merit
    places = np.zeros(len(expected), dtype=np.int64)
    for lengths in range(int(terrain.lengths.max(initial=-1)) + 1):
        here = np.flatnonzero(terrain.lengths == lengths)
        front = np.zeros(len(here), dtype=np.int64)
        if landscape.objective == "pareto":
            latency_ms = now.view.latency_ms[here]
            left, number = np.ones(len(here), dtype=np.bool_), 0
            while left.any():
                at = np.flatnonzero(left)
                best = at[undominated(latency_ms[at], terrain.tokens[here[at]] / latency_ms[at])]
                front[best], left[best] = number, False
                number += 1
        places[here[np.lexsort([-expected[here], front])]] = np.arange(len(here))
    return places


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Measures every point: layout by layout and lengths by lengths, the smallest batch first."""

    landscape: ServingLandscape

    def next(self, trials: Sequence[ServedTrial]) -> Sitting | Wait | Stop:
        """As `ServingStrategy.next`."""
        landscape, terrain = self.landscape, _Terrain.of(self.landscape)
        known = _Known.of(landscape, trials)
        if known.tried.all():
            return _over(known, "every point was tried")
        order = np.lexsort([terrain.batch, terrain.group])
        group = terrain.group[order[~known.tried[order]][0]]
        rows = order[(terrain.group[order] == group) & ~known.tried[order]]
        layout = int(landscape.layout[rows[0]])
        return Sitting(layout=layout, rows=tuple(rows.tolist()), stops_early=False, why="the next of all")


#: Strategies by the name that users give; the first is what a search has where nobody says.
STRATEGIES: Mapping[str, Callable[[ServingLandscape], ServingStrategy]] = {
    "guided": lambda landscape: Guided(landscape=landscape),
    "bisect": lambda landscape: Bisect(landscape=landscape),
    "ranked": lambda landscape: Ranked(landscape=landscape),
    "grid": lambda landscape: Grid(landscape=landscape),
}


def make(name: str, landscape: ServingLandscape) -> ServingStrategy:
    """The strategy of this name; InputError where there is none."""
    if name not in STRATEGIES:
        raise InputError(f"unknown strategy {name!r}; allowed are {', '.join(STRATEGIES)}")
    return STRATEGIES[name](landscape)


# ---------------------------------------------------------------- where a search stands


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the measured points of some lengths come to, as rows of the landscape.

    `ranking` has all of them: those within the limits first, best first by the objective (by throughput for the
    frontier), then the others, nearest to the limits first. `within` of them keep the limits. `closest` is the nearest
    to the limits where none keeps them. `pareto` are those within that no other beats, shortest latency first.
    """

    lengths: Lengths
    ranking: tuple[int, ...]
    within: int
    pareto: tuple[int, ...]

    @property
    def best(self) -> int | None:
        """The best row within the limits."""
        return self.ranking[0] if self.within else None

    @property
    def closest(self) -> int | None:
        """The row nearest to the limits, where none keeps them."""
        return self.ranking[0] if self.ranking and not self.within else None


def tokens_per_s_per_gpu(points: ServingPoints, latency_ms: Column) -> Column:
    """Tokens that a GPU answers in a second, where a batch of these points takes so long."""
    return np.asarray(1e3 * points.batch * points.output_len / latency_ms / points.gpus)


def standing(landscape: ServingLandscape, trials: Sequence[ServedTrial]) -> Sequence[Standing]:
    """Where the search stands after these trials, lengths by lengths; equals stay in the order of the landscape."""
    terrain, known = _Terrain.of(landscape), _Known.of(landscape, trials)
    throughput = tokens_per_s_per_gpu(landscape.points, known.latency_ms)
    found = []
    for number in range(int(terrain.lengths.max(initial=-1)) + 1):
        here = terrain.lengths == number
        rows = np.flatnonzero(here & known.measured)
        latency_ms, over = known.latency_ms[rows], np.maximum(known.excess[rows], 1.0)
        wanted = latency_ms if landscape.objective == "latency" else -throughput[rows]
        ranking = rows[np.lexsort([wanted, over])]
        within = rows[over <= 1]
        front = within[undominated(known.latency_ms[within], throughput[within])]
        front = front[np.argsort(known.latency_ms[front], kind="stable")]
        found.append(
            Standing(
                lengths=landscape.points.row(int(np.flatnonzero(here)[0])).lengths,
                ranking=tuple(ranking.tolist()),
                within=len(within),
                pareto=tuple(front.tolist()),
            )
        )
    return found
