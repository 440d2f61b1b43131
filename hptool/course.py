"""The course of a search: short timings of what the strategy proposes, longer ones of the finalists, some at scale.

Pure: what was timed so far decides what to run next, so a search that is resumed goes on the same way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from hptool.candidates import BoolColumn, IntColumn
from hptool.strategy import Ending, Landscape, Outlook, Stop, Strategy, Trial, Wait, outlook

#: Steps of the timings before the longest one. Ten layouts staged as 5, 20 and 50 steps cost half the steps of 50 each
#: and find the same winner (replayed on published grids); eight leave four after a warm-up of half.
SHORT_TIMINGS = (8, 20)

#: A stage that takes more than this share of the longest one saves too little, and is left out.
_WORTH_A_STAGE = 0.6

#: Layouts beside the leader that are timed longer at once: those whose interval overlaps with the leader's, the
#: fastest first. More would cost a long timing each, for a difference that no user could see.
RIVALS = 3

#: How often a timing that ended through no fault of its layout is repeated.
_REPEATS = 2

#: A run that took so many times what it should have, by its own prediction and what the others took of theirs, may have
#: been disturbed: a slow node, a neighbour. It must also be so many deviations more than predictions are off by here.
_DISTURBED = 1.4
_SURPRISE = 3.0

#: Measured layouts that say what predictions are off by.
_WITNESSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One run of a row of the landscape, ended or under way; `steps` steps on `nodes` nodes.

    Where it was measured, `step_time_s` is the median within `low_s` and `high_s`, and `error` its relative standard
    deviation: more than the interval says where that is known to say too little.
    """

    row: int
    nodes: int
    steps: int
    ending: Ending
    step_time_s: float = 0.0
    low_s: float = 0.0
    high_s: float = 0.0
    error: float = 0.0
    memory_gib: float | None = None
    may_run_again: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A run to start: which row, how many steps, on how many nodes, and why."""

    row: int
    steps: int
    nodes: int
    why: str


def stages(max_steps: int) -> tuple[int, ...]:
    """Steps of the timings of a layout, the longest last."""
    return (*(s for s in SHORT_TIMINGS if s <= _WORTH_A_STAGE * max_steps), max_steps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Course:
    """What is known before the first run, and how far the search goes.

    Row i is timed on `nodes[i]` nodes. `layouts` rows are timed at most, in `stages` of so many steps; then the best
    `verify_top` of those that are `scalable` on `verify_nodes` nodes, where that is given.
    """

    landscape: Landscape
    nodes: IntColumn
    strategy: Strategy
    layouts: int
    stages: tuple[int, ...]
    verify_nodes: int | None
    verify_top: int
    scalable: BoolColumn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Standing:
    """What the timings come to: the longest of each measured row, those at scale, and the rows from the fastest.

    Rows are ranked by what is expected of them on all nodes, those that were measured at scale before the others, and
    those that failed there last. `equals` are the rows that the timings do not tell from the first. In `disagreeing`
    are those whose own timings contradict each other.
    """

    outlook: Outlook
    timings: Mapping[int, Timing]
    at_scale: Mapping[int, Timing]
    ranking: Sequence[int]
    equals: Sequence[int]
    disagreeing: Sequence[int]


def standing(course: Course, timings: Sequence[Timing]) -> Standing:
    """Where the search stands after these timings."""
    known = _trials(course, timings)
    view = outlook(course.landscape, known)
    measured = {t.row for t in known if t.ending is Ending.MEASURED}
    small = [t for t in timings if t.ending is Ending.MEASURED and t.row in measured and t.nodes == course.nodes[t.row]]
    longest = {t.row: t for t in sorted(small, key=_weight)}
    others: dict[int, list[Timing]] = {row: [] for row in longest}
    for timing in small:
        if _contradict(timing, longest[timing.row]):
            others[timing.row].append(timing)
    scaled = [t for t in timings if t.nodes == course.verify_nodes and t.steps == course.stages[-1]]
    at_scale = {t.row: t for t in scaled if t.ending is Ending.MEASURED and t.row in longest}
    failed = {t.row for t in scaled if t.ending in (Ending.OOM, Ending.FAILED) and not t.may_run_again}

    def place(row: int) -> int:
        return 0 if row in at_scale else 2 if row in failed else 1

    def step_time_s(row: int) -> float:
        return at_scale[row].step_time_s if row in at_scale else float(view.step_time_s[row])

    def interval_s(row: int) -> tuple[float, float]:
        # What comes on top of a timing on fewer nodes is predicted, and no longer timing would tell it better.
        timing = at_scale.get(row) or longest[row]
        more_s, doubt_s = step_time_s(row) - timing.step_time_s, timing.error * timing.step_time_s
        low_s, high_s = timing.step_time_s - doubt_s, timing.step_time_s + doubt_s
        # Between two runs something may have changed that neither of them could see.
        seen_s = [t.step_time_s for t in others[row]] if row not in at_scale else []
        return more_s + min(timing.low_s, low_s, *seen_s), more_s + max(timing.high_s, high_s, *seen_s)

    ranking = sorted(longest, key=lambda row: (place(row), step_time_s(row), row))
    equals = []
    if ranking:
        _, high_s = interval_s(ranking[0])
        rivals = [row for row in ranking[1:] if place(row) == place(ranking[0])]
        equals = [row for row in rivals if interval_s(row)[0] <= high_s]
    return Standing(
        outlook=view,
        timings=longest,
        at_scale=at_scale,
        ranking=ranking,
        equals=equals,
        disagreeing=[row for row in ranking if others[row]],
    )


def _weight(timing: Timing) -> tuple[int, float]:
    """Of two timings of a layout the longer one counts, and of equally long ones the faster: what disturbs slows."""
    return timing.steps, -timing.step_time_s


def _contradict(one: Timing, other: Timing) -> bool:
    """Their intervals do not overlap."""

    def interval_s(t: Timing) -> tuple[float, float]:
        doubt_s = t.error * t.step_time_s
        return min(t.low_s, t.step_time_s - doubt_s), max(t.high_s, t.step_time_s + doubt_s)

    (low, high), (other_low, other_high) = interval_s(one), interval_s(other)
    return high < other_low or other_high < low


def _trials(course: Course, timings: Sequence[Timing]) -> list[Trial]:
    """One trial a row: its longest timing, or what became of it. Timings on more nodes teach nothing."""
    found: dict[int, Timing] = {}
    for timing in timings:
        if timing.nodes != course.nodes[timing.row] or _is_void(timing, timings):
            continue
        # Failing when it is timed longer, a layout has failed; while that is under way, or after it was lost for good
        # through no fault of the layout, its short timing stands.
        says_more = timing.ending is not Ending.UNDER_WAY and not timing.may_run_again
        known = found.get(timing.row)
        if known is not None and known.ending is timing.ending is Ending.MEASURED:
            says_more = _weight(timing) > _weight(known)
        if known is None or says_more:
            found[timing.row] = timing
    return [
        Trial(
            row=t.row,
            ending=t.ending,
            step_time_s=t.step_time_s if t.ending is Ending.MEASURED else None,
            step_time_error=t.error,
            memory_gib=t.memory_gib,
        )
        for t in found.values()
    ]


def _is_void(timing: Timing, timings: Sequence[Timing]) -> bool:
    """The run says nothing about its layout, and is to be repeated."""
    if not timing.may_run_again:
        return False
    what = (timing.row, timing.nodes, timing.steps)
    return sum(t.may_run_again and (t.row, t.nodes, t.steps) == what for t in timings) <= _REPEATS


def next_order(course: Course, timings: Sequence[Timing]) -> Order | Wait | Stop:
    """What to run after these timings."""
    known = _trials(course, timings)
    if len(known) < course.layouts:
        proposal = course.strategy.next(known)
        if not isinstance(proposal, Stop):
            nodes = int(course.nodes[proposal.row])
            return Order(row=proposal.row, steps=course.stages[0], nodes=nodes, why=proposal.why)
        why = proposal.why
    else:
        why = f"{course.layouts} layouts were run, which is the limit"
    under_way = [t for t in timings if t.ending is Ending.UNDER_WAY]
    order = None
    # A first timing that is under way may still change who the finalists are, and a longer one who is the best.
    if not any(t.ending is Ending.UNDER_WAY for t in known):
        order = _disturbed(course, timings) or _longer(course, timings)
    if order is None and not any(t.nodes == course.nodes[t.row] for t in under_way):
        order = _at_scale(course, timings)
    if order is not None:
        return order
    return Wait() if under_way else Stop(why=why)


def _disturbed(course: Course, timings: Sequence[Timing]) -> Order | None:
    """A second timing of a layout that should have been the fastest, and was far slower than it should have been."""
    now = standing(replace(course, verify_nodes=None), timings)
    landscape, rows = course.landscape, list(now.timings)
    if len(rows) < _WITNESSES:
        return None
    stretch = {row: now.timings[row].step_time_s / float(landscape.run.step_time_s[row]) for row in rows}
    usual = median(stretch.values())
    limit = usual * max(_DISTURBED, math.exp(_SURPRISE * now.outlook.misfit))
    best_s = float(now.outlook.step_time_s[now.ranking[0]])
    for row in rows:
        tries = [t for t in timings if (t.row, t.nodes) == (row, course.nodes[row])]
        # Once: whatever became of a second timing, there is none after it.
        is_only = tries[-1].ending is Ending.MEASURED and sum(t.ending is Ending.MEASURED for t in tries) == 1
        should_s = usual * float(landscape.target.step_time_s[row])
        if is_only and stretch[row] > limit and should_s < best_s:
            why = f"{stretch[row] / usual:.1f} times slower than the others let expect, timed again"
            return Order(row=row, steps=tries[-1].steps, nodes=int(course.nodes[row]), why=why)
    return None


def _longer(course: Course, timings: Sequence[Timing]) -> Order | None:
    """A longer timing of a finalist: of those that the timings do not tell from the leader, and of the leader.

    The shortest timings go first, since they may tell a finalist apart before it takes a long one.
    """
    now = standing(replace(course, verify_nodes=None), timings)
    rivals = now.equals[:RIVALS]
    small = [t for t in timings if t.nodes == course.nodes[t.row]]
    lost = {t.row for t in small if t.may_run_again and not _is_void(t, timings)}
    steps = {row: now.timings[row].steps for row in [*now.ranking[:1], *rivals] if row not in lost}
    left = [row for row in steps if steps[row] < course.stages[-1]]
    fewest = min((steps[row] for row in left), default=0)
    under_way = {t.row for t in small if t.ending is Ending.UNDER_WAY}
    for row in left:
        if row in under_way or steps[row] > fewest:
            continue
        longer, nodes = [s for s in course.stages if s > steps[row]], int(course.nodes[row])
        if rivals:
            return Order(row=row, steps=longer[0], nodes=nodes, why="not told apart from others by its short timing")
        return Order(row=row, steps=longer[-1], nodes=nodes, why="the fastest so far, timed longer")
    if left:
        return None
    for row, longest in steps.items():
        tries = [t for t in small if (t.row, t.steps) == (row, longest)]
        if row in now.disagreeing and len(tries) == 1:
            nodes = int(course.nodes[row])
            return Order(row=row, steps=longest, nodes=nodes, why="its timings disagree, timed again")
    return None


def _at_scale(course: Course, timings: Sequence[Timing]) -> Order | None:
    """A run on `verify_nodes` of one of the best rows that has had none."""
    if course.verify_nodes is None:
        return None
    small = standing(replace(course, verify_nodes=None), timings)
    for row in [row for row in small.ranking if course.scalable[row]][: course.verify_top]:
        there = [t for t in timings if (t.row, t.nodes, t.steps) == (row, course.verify_nodes, course.stages[-1])]
        if all(_is_void(t, there) for t in there):
            why = f"among the best {course.verify_top}, at scale"
            return Order(row=row, steps=course.stages[-1], nodes=course.verify_nodes, why=why)
    return None
