"""The course of a search, in worlds that answer as a cluster does: noise, failures, losses, several runs at once."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import strategy
from hptool.candidates import Recompute, SearchSpace
from hptool.course import RIVALS, Course, Order, Timing, next_order, stages, standing
from hptool.plan import SearchRequest, make_plan
from hptool.strategy import Ending, InOrder, Proposal, Stop, Strategy, Trial, Wait

SPACE = SearchSpace(tp=(1, 2), pp=(1, 2, 4), vpp=(1,), mbs=(1, 2), recompute=((Recompute.NONE, None),))
#: Layouts of a real model on 16 nodes, in an order that the tests know.
SIXTEEN = make_plan(SearchRequest(model="gpt3/5b", cluster="dgx-a100", nodes=16, space=SPACE)).course
ALL = 16  # nodes
ROWS = [int(i) for i in SIXTEEN.landscape.target.ranking() if SIXTEEN.nodes[i] < ALL]


def course(rows: Sequence[int] = ROWS, layouts: int = 10, verify_top: int | None = None) -> Course:
    """Rows in this order, as many as `layouts`, and so many of them at scale."""
    return replace(
        SIXTEEN,
        strategy=InOrder(order=rows, why="as given"),
        layouts=layouts,
        verify_nodes=ALL if verify_top else None,
        verify_top=verify_top or 0,
    )


#: How the run ends, by its row, nodes, steps and how often it was tried before; measured, as a rule.
Fate = Callable[[int, int, int, int], str]


def measured_always(row: int, nodes: int, steps: int, tries: int) -> str:
    del row, nodes, steps, tries
    return "measured"


@dataclass(kw_only=True)
class World:
    """What is true: row i takes `speed[i]` times what is predicted, each timing within `spread` of it after one step.

    The spread falls with the root of the steps.
    """

    course: Course
    speed: dict[int, float]
    spread: float = 0.01
    fate: Fate = measured_always

    def end(self, order: Order, before: Sequence[Timing]) -> Timing:
        """How the run ends."""
        what = (order.row, order.nodes, order.steps)
        tries = sum((t.row, t.nodes, t.steps) == what for t in before)
        fate = self.fate(*what, tries)
        timing = Timing(row=order.row, nodes=order.nodes, steps=order.steps, ending=Ending.FAILED)
        if fate == "lost":
            return replace(timing, may_run_again=True)
        if fate in ("oom", "failed"):
            return replace(timing, ending=Ending(fate))
        half, step_s = self.spread / order.steps**0.5, self.step_time_s(order.row, order.nodes)
        low_s, high_s = step_s * (1 - half), step_s * (1 + half)
        return replace(timing, ending=Ending.MEASURED, step_time_s=step_s, low_s=low_s, high_s=high_s, error=half / 2)

    def step_time_s(self, row: int, nodes: int) -> float:
        landscape = self.course.landscape
        predictions = landscape.run if nodes == self.course.nodes[row] else landscape.target
        return float(predictions.step_time_s[row]) * self.speed.get(row, 1.0)


def flying(order: Order) -> Timing:
    return Timing(row=order.row, nodes=order.nodes, steps=order.steps, ending=Ending.UNDER_WAY)


def drive(
    world: World, slots: int = 1, random: Random | None = None, begun: Sequence[Timing] = ()
) -> tuple[list[Timing], Stop]:
    """Every run that ended, in the order of the ends, and why there are no more. `random` says which ends next."""
    ended, under_way = list(begun), list[Order]()
    for _ in range(1000):
        step: Order | Wait | Stop = Wait()
        while len(under_way) < slots:
            step = next_order(world.course, [*ended, *map(flying, under_way)])
            if not isinstance(step, Order):
                break
            under_way.append(step)
        if isinstance(step, Stop):
            assert not under_way, "stopped while runs are under way"
            return ended, step
        assert under_way, "waits for nothing"
        order = under_way.pop(random.randrange(len(under_way)) if random else 0)
        ended.append(world.end(order, ended))
    raise AssertionError("never ends")


def runs(timings: Sequence[Timing]) -> list[tuple[int, int, int]]:
    return [(t.row, t.nodes, t.steps) for t in timings]


def small(world: World, timings: Sequence[Timing]) -> list[tuple[int, int]]:
    """Rows and steps of the runs that were not at scale."""
    return [(t.row, t.steps) for t in timings if t.nodes == world.course.nodes[t.row]]


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("most", "expected"),
    [(50, (8, 20, 50)), (100, (8, 20, 100)), (30, (8, 30)), (20, (8, 20)), (10, (10,)), (2, (2,))],
)
def test_stages_end_with_the_longest_and_leave_out_what_saves_little(most: int, expected: tuple[int, ...]) -> None:
    assert stages(most) == expected


@given(st.integers(2, 10_000))
def test_stages_rise(most: int) -> None:
    made = stages(most)
    assert made[-1] == most
    assert list(made) == sorted(set(made))


# ---------------------------------------------------------------- one world after the other


def test_many_are_timed_shortly_and_a_clear_winner_once_more_for_long() -> None:
    a, b, c = ROWS[:3]
    world = World(course=course([a, b, c]), speed={a: 1.5, b: 0.5, c: 1.5})
    ended, _ = drive(world)
    assert small(world, ended) == [(a, 8), (b, 8), (c, 8), (b, 50)]
    now = standing(world.course, ended)
    assert (now.ranking[0], now.equals) == (b, [])
    assert now.timings[b].steps == 50


def twins() -> tuple[int, int]:
    """Two rows timed on as many nodes."""
    a = ROWS[0]
    return a, next(row for row in ROWS[1:] if SIXTEEN.nodes[row] == SIXTEEN.nodes[a])


def equally_fast(rows: Sequence[int], more: float = 0.0) -> dict[int, float]:
    """Speeds with which rows take the same time, each `more` of it longer than the one before."""
    times = SIXTEEN.landscape.run.step_time_s
    return {row: float(times[rows[0]] / times[row]) * (1 + more * i) for i, row in enumerate(rows)}


def test_finalists_are_timed_longer_until_they_are_told_apart() -> None:
    a, b = twins()
    # What the target takes more is predicted of each, so that speeds on few nodes decide by far.
    near = World(course=course([a, b]), speed=equally_fast([a, b], 0.2), spread=0.35)
    ended, _ = drive(near)
    # Intervals of 12 % overlap, those of 8 % do not any more.
    assert small(near, ended) == [(a, 8), (b, 8), (a, 20), (b, 20), (a, 50)]
    assert standing(near.course, ended).ranking == [a, b]
    assert standing(near.course, ended).equals == []


def test_finalists_that_nothing_tells_apart_are_called_equal() -> None:
    a, b = twins()
    world = World(course=course([a, b]), speed=equally_fast([a, b]), spread=0.5)
    ended, _ = drive(world)
    assert Counter(small(world, ended)) == Counter((row, steps) for row in (a, b) for steps in (8, 20, 50))
    now = standing(world.course, ended)
    assert sorted([now.ranking[0], *now.equals]) == sorted([a, b])


def test_both_are_timed_a_little_longer_before_either_is_for_long() -> None:
    a, b = twins()
    world = World(course=course([a, b]), speed=equally_fast([a, b]), spread=0.5)
    for slots in (1, 2, 3):
        ended, _ = drive(world, slots)
        assert [steps for _, steps in small(world, ended)] == [8, 8, 20, 20, 50, 50]


def test_no_more_than_a_few_rivals_are_timed_longer() -> None:
    rows = ROWS[:8]
    world = World(course=course(rows), speed=equally_fast(rows), spread=10.0)
    ended, _ = drive(world)
    assert len({t.row for t in ended if t.steps > 8}) == 1 + RIVALS
    assert len(standing(world.course, ended).equals) == len(rows) - 1  # they are called equal all the same


def test_a_timing_that_is_known_to_say_little_tells_nothing_apart() -> None:
    a, b = twins()
    c = course([a, b])
    speed = equally_fast([a, b], 0.05)

    def timing(row: int, error: float) -> Timing:
        step_s = float(c.landscape.run.step_time_s[row]) * speed[row]
        # One step was timed: its interval has no width, and it says nothing about its spread.
        return Timing(
            row=row, nodes=int(c.nodes[row]), steps=8, ending=Ending.MEASURED, step_time_s=step_s, low_s=step_s,
            high_s=step_s, error=error,
        )  # fmt: skip

    assert standing(c, [timing(a, 0.001), timing(b, 0.001)]).equals == []
    assert len(standing(c, [timing(a, 0.1), timing(b, 0.1)]).equals) == 1


@pytest.mark.parametrize("fate", ["oom", "failed"])
def test_a_finalist_that_fails_when_it_is_timed_longer_is_no_winner(fate: str) -> None:
    a, b = ROWS[:2]
    world = World(
        course=course([a, b]),
        speed={a: 0.5, b: 1.0},
        fate=lambda row, _, steps, __: fate if (row, steps) == (a, 50) else "measured",
    )
    ended, _ = drive(world)
    assert small(world, ended) == [(a, 8), (b, 8), (a, 50), (b, 50)]
    assert standing(world.course, ended).ranking == [b]


def test_a_search_in_which_everything_fails_ends_without_a_ranking() -> None:
    world = World(course=course(ROWS[:3]), speed={}, fate=lambda *_: "failed")
    ended, stop = drive(world, slots=2)
    assert len(ended) == 3
    assert stop.why == "every layout was run"
    assert standing(world.course, ended).ranking == []


def test_a_lost_run_is_repeated_twice_and_then_its_layout_has_failed() -> None:
    a, b = ROWS[:2]
    world = World(course=course([a, b]), speed={}, fate=lambda row, *_: "lost" if row == a else "measured")
    ended, _ = drive(world)
    assert small(world, ended) == [(a, 8)] * 3 + [(b, 8), (b, 50)]
    assert standing(world.course, ended).ranking == [b]


def test_a_layout_whose_longer_timing_is_lost_for_good_stands_by_its_shorter_one() -> None:
    # Preemption says nothing about a layout.
    a, b = ROWS[:2]
    world = World(
        course=course([a, b]),
        speed={a: 0.5, b: 1.0},
        fate=lambda row, _, steps, __: "lost" if (row, steps) == (a, 50) else "measured",
    )
    ended, _ = drive(world)
    assert small(world, ended) == [(a, 8), (b, 8), (a, 50), (a, 50), (a, 50)]
    now = standing(world.course, ended)
    assert now.ranking == [a, b]
    assert now.timings[a].steps == 8


def test_losses_of_short_timings_do_not_count_against_long_ones() -> None:
    a = ROWS[0]
    world = World(course=course([a]), speed={}, fate=lambda *x: "lost" if x[3] < 2 else "measured")
    ended, _ = drive(world)
    assert small(world, ended) == [(a, 8)] * 3 + [(a, 50)] * 3
    assert standing(world.course, ended).timings[a].steps == 50


def test_no_more_layouts_are_timed_than_allowed() -> None:
    world = World(course=course(layouts=4), speed={})
    ended, stop = drive(world, slots=8)
    assert {t.row for t in ended} == set(ROWS[:4])
    assert "4 layouts were run, which is the limit" in stop.why


def test_longer_timings_wait_for_first_ones_that_may_change_the_finalists() -> None:
    a, b = ROWS[:2]
    c = course([a, b])
    world = World(course=c, speed={})
    first = next_order(c, [])
    assert isinstance(first, Order)
    second = next_order(c, [world.end(first, [])])
    assert isinstance(second, Order)
    assert isinstance(next_order(c, [world.end(first, []), flying(second)]), Wait)


def test_a_longer_timing_may_show_that_another_layout_is_worth_a_run() -> None:
    a, b = twins()

    @dataclass(frozen=True)
    class Demanding:
        """Wants another layout where the first takes longer than predicted."""

        def next(self, trials: Sequence[Trial]) -> Proposal | Stop:
            if not trials:
                return Proposal(row=a, expected_gain=1.0, why="first")
            slow = (trials[0].step_time_s or 0.0) > SIXTEEN.landscape.run.step_time_s[a] * 1.1
            if slow and len(trials) == 1:
                return Proposal(row=b, expected_gain=1.0, why="the first was slow")
            return Stop(why="fast enough")

    class Warming(World):
        """Gets slower with the steps."""

        def end(self, order: Order, before: Sequence[Timing]) -> Timing:
            self.speed = {a: 1.0 if order.steps < 50 else 1.5, b: 0.5}
            return super().end(order, before)

    asks: Strategy = Demanding()
    world = Warming(course=replace(course(), strategy=asks), speed={})
    ended, stop = drive(world)
    assert small(world, ended) == [(a, 8), (a, 50), (b, 8), (b, 50)]
    assert stop.why == "fast enough"
    assert standing(world.course, ended).ranking == [b, a]


# ---------------------------------------------------------------- at scale


def test_the_best_are_run_at_scale_and_ranked_by_that() -> None:
    a, b, c = ROWS[:3]

    class Congested(World):
        """A network on which the layout that is fastest on few nodes is slow on all of them."""

        def step_time_s(self, row: int, nodes: int) -> float:
            return super().step_time_s(row, nodes) * (3 if (row, nodes) == (a, ALL) else 1)

    world = Congested(course=course([a, b, c], verify_top=2), speed={a: 0.5, b: 0.8, c: 3.0})
    ended, _ = drive(world)
    assert runs(ended)[-2:] == [(a, ALL, 50), (b, ALL, 50)]
    now = standing(world.course, ended)
    assert now.ranking == [b, a, c]
    assert set(now.at_scale) == {a, b}
    assert now.at_scale[b].nodes == ALL


def test_runs_at_scale_do_not_wait_for_one_another() -> None:
    world = World(course=course(ROWS[:4], verify_top=3), speed={})
    begun = [t for t in drive(world)[0] if t.nodes != ALL]
    first = next_order(world.course, begun)
    assert isinstance(first, Order)
    second = next_order(world.course, [*begun, flying(first)])
    assert isinstance(second, Order)
    assert (first.nodes, second.nodes) == (ALL, ALL)
    assert first.row != second.row


def test_a_layout_that_fails_at_scale_ranks_behind_all_others() -> None:
    a, b, c = ROWS[:3]
    speed = {a: 0.5, b: 0.8, c: 1.1}
    one = World(
        course=course([a, b, c], verify_top=2),
        speed=speed,
        fate=lambda row, nodes, *_: "oom" if (row, nodes) == (a, ALL) else "measured",
    )
    assert standing(one.course, drive(one)[0]).ranking == [b, c, a]
    # Where none of them succeeds, the best that has not failed is still the answer.
    both = replace(one, fate=lambda _, nodes, *__: "oom" if nodes == ALL else "measured")
    now = standing(both.course, drive(both)[0])
    assert (now.ranking, list(now.at_scale)) == ([c, a, b], [])


def test_a_run_at_scale_that_is_lost_is_repeated_and_counts_against_nobody() -> None:
    a, b = ROWS[:2]
    world = World(
        course=course([a, b], verify_top=1),
        speed={a: 0.5},
        fate=lambda _, nodes, *__: "lost" if nodes == ALL else "measured",
    )
    ended, _ = drive(world)
    assert runs(ended)[-3:] == [(a, ALL, 50)] * 3
    assert standing(world.course, ended).ranking == [a, b]


def test_layouts_whose_replicas_do_not_divide_the_nodes_are_not_run_at_scale() -> None:
    a, b = ROWS[:2]
    scalable = np.ones(len(SIXTEEN.nodes), dtype=np.bool_)
    scalable[a] = False
    world = World(course=replace(course([a, b], verify_top=1), scalable=scalable), speed={a: 0.5})
    ended, _ = drive(world)
    assert [t.row for t in ended if t.nodes == ALL] == [b]


def test_a_layout_that_was_timed_on_as_many_nodes_is_not_run_there_again() -> None:
    a, b = twins()
    nodes = int(SIXTEEN.nodes[a])
    world = World(course=replace(course([a, b], verify_top=1), verify_nodes=nodes), speed={a: 0.5})
    ended, _ = drive(world)
    assert small(world, ended) == runs_of(ended) == [(a, 8), (b, 8), (a, 50)]
    assert list(standing(world.course, ended).at_scale) == [a]


def runs_of(timings: Sequence[Timing]) -> list[tuple[int, int]]:
    return [(t.row, t.steps) for t in timings]


# ---------------------------------------------------------------- any world


@st.composite
def worlds(draw: st.DrawFn) -> World:
    rows = draw(st.permutations(ROWS))[: draw(st.integers(1, 7))]
    made = course(rows, draw(st.integers(1, 8)), draw(st.sampled_from([None, 1, 2, 3])))
    most = draw(st.sampled_from([2, 8, 30, 50]))
    name = draw(st.sampled_from(["as given", "ranked", "adaptive"]))
    if name != "as given":
        made = replace(made, strategy=strategy.make(name, SIXTEEN.landscape))
    fates = draw(
        st.dictionaries(
            st.tuples(st.sampled_from(rows), st.sampled_from(stages(most)), st.booleans(), st.integers(0, 2)),
            st.sampled_from(["lost", "lost", "oom", "failed"]),
            max_size=12,
        )
    )
    return World(
        course=replace(made, stages=stages(most)),
        speed={row: draw(st.floats(0.6, 1.6)) for row in rows},
        spread=draw(st.sampled_from([0.0, 0.02, 0.3, 2.0])),
        fate=lambda row, nodes, steps, tries: fates.get((row, steps, nodes == ALL, tries), "measured"),
    )


def far_slower(world: World, row: int) -> bool:
    """It takes so much longer than others, by their predictions, that something may have disturbed it."""
    return world.speed.get(row, 1.0) > 1.4 * min([1.0, *world.speed.values()])


@settings(max_examples=60, deadline=None)
@given(worlds(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_search_ends_and_wastes_nothing_in_any_world(world: World, slots: int, random: Random) -> None:
    c = world.course
    ended, _ = drive(world, slots, random)
    # Nothing is run twice but what was lost, at most three times, and what may have been disturbed, once more.
    told = Counter(runs([t for t in ended if not t.may_run_again]))
    assert all(n <= 2 for n in told.values())
    assert all(far_slower(world, row) for (row, _, _), n in told.items() if n > 1)
    assert all(n <= 3 for n in Counter(runs([t for t in ended if t.may_run_again])).values())
    assert all(
        n == 1
        for n in Counter((t.row, t.steps) for t in ended if t.nodes == c.verify_nodes and not t.may_run_again).values()
    )
    tried = [t for t in ended if t.nodes == c.nodes[t.row]]
    assert len({t.row for t in tried}) <= c.layouts
    # Every layout rises through the stages, and not after it has failed.
    steps: dict[int, int] = {}
    failed = {t.row for t in tried if t.ending is not Ending.MEASURED and not t.may_run_again}
    for t in tried:
        assert t.steps >= steps.get(t.row, 0)
        steps[t.row] = t.steps
        assert t.steps == c.stages[0] or t.row in {x.row for x in tried if x.ending is Ending.MEASURED}
    now = standing(c, ended)
    assert not failed & set(now.ranking)
    assert len(now.ranking) == len(set(now.ranking))
    assert set(now.equals) <= set(now.ranking[1:])
    # Finalists were timed for long, unless that was lost for good.
    before = standing(replace(c, verify_nodes=None), ended)
    for row in [*before.ranking[:1], *before.equals[:RIVALS]]:
        longest = before.timings[row].steps
        lost = Counter(t.steps for t in tried if t.row == row and t.may_run_again)
        assert longest == c.stages[-1] or max(lost.values(), default=0) == 3
    # The best were run at scale, and nobody else.
    scaled = {t.row for t in ended if t.nodes == c.verify_nodes}
    assert scaled == (set(before.ranking[: c.verify_top]) if c.verify_nodes else set())
    if now.at_scale:
        assert now.ranking[0] == min(now.at_scale, key=lambda row: (now.at_scale[row].step_time_s, row))


@settings(max_examples=30, deadline=None)
@given(worlds())
def test_a_search_that_is_resumed_goes_on_as_if_nothing_had_happened(world: World) -> None:
    whole, why = drive(world)
    for length in range(len(whole)):
        assert drive(world, begun=whole[:length]) == (whole, why)


@settings(max_examples=30, deadline=None)
@given(worlds(), st.integers(2, 4), st.randoms(use_true_random=False), st.integers(0, 30))
def test_a_search_that_lost_sight_of_its_runs_still_repeats_none_that_ended(
    world: World, slots: int, random: Random, length: int
) -> None:
    whole, _ = drive(world, slots, random)
    resumed, _ = drive(world, slots, random, begun=whole[:length])
    assert resumed[:length] == whole[:length]
    told = Counter(runs([t for t in resumed if not t.may_run_again]))
    assert all(n == 1 for (row, _, _), n in told.items() if not far_slower(world, row))
    assert all(n <= 2 for n in told.values())


# ---------------------------------------------------------------- runs that something disturbed


@dataclass(kw_only=True)
class Disturbed(World):
    """A world in which the first try of a row at a stage takes so many times what it should."""

    slowed: dict[tuple[int, int], float]

    def end(self, order: Order, before: Sequence[Timing]) -> Timing:
        """As `World.end`."""
        timing = super().end(order, before)
        tried = any((t.row, t.steps) == (order.row, order.steps) for t in before)
        factor = 1.0 if tried else self.slowed.get((order.row, order.steps), 1.0)
        return replace(
            timing,
            step_time_s=factor * timing.step_time_s,
            low_s=factor * timing.low_s,
            high_s=factor * timing.high_s,
        )


def test_a_first_run_that_something_slowed_is_timed_again_and_wins() -> None:
    rows = ROWS[:5]
    world = Disturbed(course=course(rows, layouts=5), speed={}, slowed={(rows[0], 8): 2.0})
    ended, _ = drive(world)
    assert small(world, ended).count((rows[0], 8)) == 2
    assert standing(world.course, ended).ranking[0] == rows[0]


def test_a_second_timing_that_is_lost_for_ever_is_not_asked_for_for_ever() -> None:
    rows = ROWS[:5]

    def fate(row: int, nodes: int, steps: int, tries: int) -> str:
        del nodes
        return "lost" if (row, steps) == (rows[0], 8) and tries else "measured"

    world = Disturbed(course=course(rows, layouts=5), speed={}, slowed={(rows[0], 8): 2.0}, fate=fate)
    ended, _ = drive(world)
    assert small(world, ended).count((rows[0], 8)) == 2
    assert standing(world.course, ended).ranking[0] != rows[0]


def test_a_slow_layout_that_was_expected_to_be_slow_is_not_timed_again() -> None:
    slow = ROWS[-1]  # even as fast as predicted it would not win
    world = Disturbed(course=course([*ROWS[:4], slow], layouts=5), speed={}, slowed={(slow, 8): 2.0})
    ended, _ = drive(world)
    assert small(world, ended).count((slow, 8)) == 1


def test_timings_that_contradict_each_other_are_made_once_more_and_told() -> None:
    rows = ROWS[:4]
    fast = {rows[0]: 0.5}  # so that it wins whatever disturbs it
    world = Disturbed(course=course(rows, layouts=4), speed=fast, slowed={(rows[0], 50): 1.3})
    ended, _ = drive(world)
    assert small(world, ended).count((rows[0], 50)) == 2
    now = standing(world.course, ended)
    assert list(now.disagreeing) == [rows[0]]
    assert now.timings[rows[0]].step_time_s == pytest.approx(world.step_time_s(rows[0], now.timings[rows[0]].nodes))


def test_layouts_whose_own_runs_differ_more_than_they_do_are_equal() -> None:
    a, b = ROWS[:2]
    world = World(course=course([a, b], layouts=2), speed={}, spread=0.001)
    nodes_a, nodes_b = (int(world.course.nodes[row]) for row in (a, b))
    one, other = (world.end(Order(row=row, steps=50, nodes=n, why=""), []) for row, n in ((a, nodes_a), (b, nodes_b)))
    first, second = (a, b) if standing(world.course, [one, other]).ranking[0] == a else (b, a)
    assert not standing(world.course, [one, other]).equals
    best = one if first == a else other
    slow = replace(best, steps=8, step_time_s=3 * best.step_time_s, low_s=2.9 * best.low_s, high_s=3.1 * best.high_s)
    assert list(standing(world.course, [slow, one, other]).equals) == [second]
