"""What a search will cost: counted by hand, bounded by what searches do, and no less for what idles."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hptool import cost, strategy
from hptool.candidates import Recompute, SearchSpace
from hptool.cost import Estimate
from hptool.course import Course
from hptool.facts import Cluster
from hptool.plan import Plan, SearchRequest, make_plan
from hptool.strategy import InOrder
from tests.test_course import World, drive

SPACE = SearchSpace(vpp=(1,), recompute=((Recompute.NONE, None),))
PLAN = make_plan(SearchRequest(model="gpt3/5b", cluster="dgx-a100", nodes=16, space=SPACE))
COURSE = PLAN.course
RANKING = PLAN.predictions.ranking().tolist()
#: Rows that are timed on one node, the best first.
ON_ONE = [row for row in RANKING if COURSE.nodes[row] == 1]


def ordered(rows: Sequence[int], **changes: object) -> Course:
    return replace(COURSE, strategy=InOrder(order=rows, why="as given"), layouts=len(rows), **changes)  # type: ignore[arg-type]


def estimate(
    course: Course, rows: Sequence[int], *, packed: bool = False, parallel: int = 1, **more: float
) -> Estimate:
    given_ = {"overhead_s": 60.0, "minutes": 20.0} | more
    return cost.estimate(
        course,
        rows,
        gpus_per_node=8,
        overhead_s=given_["overhead_s"],
        minutes=given_["minutes"],
        parallel=parallel,
        packed=packed,
        idle_s=given_.get("idle_s", 120.0),
    )


def steps_s(row: int, steps: int) -> float:
    return steps * float(COURSE.landscape.run.step_time_s[row])


def test_an_estimate_by_hand() -> None:
    a, b = ON_ONE[:2]
    course = ordered([a, b], verify_nodes=16, verify_top=1)
    at_scale_s = 50 * float(COURSE.landscape.target.step_time_s[a])
    # Both are timed in 8, 20 and 50 steps, for they may not be told apart; then the first on all nodes.
    own_s = steps_s(a, 78) + steps_s(b, 78)
    made = estimate(course, [a, b])
    assert made.gpu_hours == pytest.approx(8 * (6 * 60 + own_s + 16 * (60 + at_scale_s)) / 3600)
    assert made.usual_gpu_hours == pytest.approx(made.gpu_hours)
    assert made.wall_s == pytest.approx(7 * 60 + own_s + at_scale_s)
    assert made.layouts == made.grid_layouts == 2
    assert [(x.jobs, x.nodes, x.gpus) for x in made.asked] == [(6, 1, 8), (1, 16, 128)]
    # One after the other in one allocation of a node: five of six starts are saved. It waits while all nodes run,
    # and is given up after two minutes.
    kept = estimate(course, [a, b], packed=True)
    waits_s = min(120.0, 60 + at_scale_s)
    assert kept.gpu_hours == pytest.approx(8 * (60 + 5 * 3 + own_s + waits_s + 16 * (60 + at_scale_s)) / 3600)
    assert kept.wall_s == pytest.approx(60 + 5 * 3 + own_s + 60 + at_scale_s)
    assert [(x.jobs, x.nodes) for x in kept.asked] == [(1, 1), (1, 16)]


def test_two_at_once_take_half_as_long_where_they_can_and_cost_as_much() -> None:
    rows = ON_ONE[:4]
    course = ordered(rows, stages=(8,))
    alone, two = (estimate(course, rows, parallel=n) for n in (1, 2))
    each_s = [60 + steps_s(row, 8) for row in rows]
    assert alone.wall_s == pytest.approx(sum(each_s))
    assert sum(each_s) / 2 <= two.wall_s <= sum(each_s) / 2 + max(each_s)
    assert two.gpu_hours == alone.gpu_hours
    # A phase waits for the one before it: no number of runs at once makes the three stages shorter than that.
    many = estimate(ordered(rows), rows, parallel=99)
    assert many.wall_s == pytest.approx(sum(max(60 + steps_s(row, n) for row in rows) for n in (8, 20, 50)))


def test_the_full_grid_times_every_layout_for_long() -> None:
    course = ordered(ON_ONE[:1])
    made = estimate(course, RANKING)
    run = COURSE.landscape.run
    seconds = (60 + np.minimum(50 * run.step_time_s, 20 * 60)) * COURSE.nodes
    assert made.grid_layouts == len(COURSE.landscape.target)
    assert made.grid_gpu_hours == pytest.approx(float(seconds.sum()) * 8 / 3600)
    assert made.gpu_hours < made.grid_gpu_hours / 10


def test_no_run_costs_more_than_its_minutes() -> None:
    rows = ON_ONE[:3]
    made = estimate(ordered(rows), rows, minutes=0.01)
    assert made.gpu_hours == pytest.approx(9 * 8 * (60 + 0.6) / 3600)
    assert made.grid_gpu_hours == pytest.approx(float(COURSE.nodes.sum()) * 8 * 60.6 / 3600)


@given(
    st.lists(st.sampled_from(RANKING), min_size=1, max_size=8, unique=True),
    st.floats(0, 300),
    st.sampled_from([None, 4, 16]),
    st.integers(1, 4),
)
def test_figures_that_bound_each_other(rows: list[int], overhead_s: float, nodes: int | None, parallel: int) -> None:
    course = replace(ordered(rows), verify_nodes=nodes, verify_top=2)
    one_by_one, kept = (
        estimate(course, rows, packed=packed, overhead_s=overhead_s, parallel=parallel, idle_s=0.0 if packed else 1.0)
        for packed in (False, True)
    )
    for made in (one_by_one, kept):
        assert 0 < made.usual_gpu_hours <= made.gpu_hours * (1 + 1e-9)
        assert sum(x.jobs for x in made.asked) >= 1
    # An allocation that is not kept for anything is a job a run.
    assert kept.gpu_hours == pytest.approx(one_by_one.gpu_hours)
    # Where all are of one size, none waits idle, and keeping it never costs more.
    alike = [row for row in rows if COURSE.nodes[row] == COURSE.nodes[rows[0]]]
    course = replace(ordered(alike), verify_nodes=None)
    one_by_one, kept = (
        estimate(course, alike, packed=packed, overhead_s=overhead_s, idle_s=math.inf) for packed in (False, True)
    )
    assert kept.gpu_hours <= one_by_one.gpu_hours * (1 + 1e-9)
    assert kept.usual_gpu_hours <= one_by_one.usual_gpu_hours * (1 + 1e-9)


def test_runs_at_scale_are_counted() -> None:
    rows = ON_ONE[:5]
    none, two, three = (
        estimate(ordered(rows, verify_nodes=nodes, verify_top=top), rows)
        for nodes, top in ((None, 2), (16, 2), (16, 3))
    )
    assert none.gpu_hours < two.gpu_hours < three.gpu_hours
    assert none.usual_gpu_hours < two.usual_gpu_hours
    assert [x.jobs for x in three.asked if x.nodes == 16] == [3]


@pytest.mark.parametrize("spread", [0.001, 0.2, 10.0])
@pytest.mark.parametrize("verify_nodes", [None, 16])
def test_a_search_where_predictions_hold_costs_no_more_than_was_said(spread: float, verify_nodes: int | None) -> None:
    # A layout is fastest, the others follow each other closely.
    rows = ON_ONE[:6]
    course = ordered(rows, verify_nodes=verify_nodes, verify_top=2)
    ended, _ = drive(World(course=course, speed={}, spread=spread))
    spent = sum(cost.run_s(course, t.row, t.steps, t.nodes, 60.0) * t.nodes * 8 / 3600 for t in ended)
    made = estimate(course, rows)
    assert spent <= made.gpu_hours * 1.05
    asked = {x.nodes: x.jobs for x in made.asked}
    assert all(count <= asked[nodes] for nodes, count in Counter(t.nodes for t in ended).items())


# ---------------------------------------------------------------- the way of submission


def choice(plan: Plan, course: Course, cluster: Cluster, **changes: object) -> tuple[cost.Dispatch, Estimate]:
    asked: dict[str, object] = {"submit": None, "parallel": None, "minutes": 20.0} | changes
    return cost.choose(course, plan.predictions.ranking(), cluster, **asked)  # type: ignore[arg-type]


def with_overhead(seconds: float) -> Cluster:
    return replace(PLAN.cluster, slurm=replace(PLAN.cluster.slurm, job_overhead_s=seconds))


def test_allocations_are_kept_where_starts_are_dear_and_not_where_they_are_cheap() -> None:
    course = ordered(ON_ONE[:10])
    dear, _ = choice(PLAN, course, with_overhead(300.0))
    cheap, _ = choice(PLAN, course, with_overhead(1.0))
    assert (dear.submit, cheap.submit) == ("packed", "array")


def test_allocations_are_not_kept_where_large_ones_would_wait_for_small_ones() -> None:
    sizes = [next(row for row in RANKING if COURSE.nodes[row] == nodes) for nodes in (1, 8)]
    several = [row for pair in zip(*(_alike(row) for row in sizes), strict=False) for row in pair][:10]
    assert {int(COURSE.nodes[row]) for row in several} == {1, 8}
    for rows, submit in ((several, "array"), (ON_ONE[:10], "packed")):
        dispatch, _ = choice(PLAN, ordered(rows, stages=(20,)), with_overhead(40.0))
        assert dispatch.submit == submit


def _alike(row: int) -> list[int]:
    return [other for other in RANKING if COURSE.nodes[other] == COURSE.nodes[row]]


def test_what_is_asked_for_is_what_is_done(local: Cluster) -> None:
    for submit in ("separate", "array", "packed"):
        dispatch, _ = choice(PLAN, COURSE, PLAN.cluster, submit=submit, parallel=5)
        assert (dispatch.submit, dispatch.parallel) == (submit, 5)
    tiny = make_plan(SearchRequest(model="gpt3/tiny", cluster="local"))
    dispatch, _ = choice(tiny, tiny.course, local, submit="separate")
    assert (dispatch.submit, dispatch.parallel, dispatch.overhead_s) == ("separate", None, cost.LOCAL_OVERHEAD_S)


def test_a_strategy_that_learns_has_few_runs_at_once_and_one_in_a_kept_allocation() -> None:
    def at_once(name: str, submit: str) -> int | None:
        course = replace(COURSE, strategy=strategy.make(name, COURSE.landscape))
        return choice(PLAN, course, PLAN.cluster, submit=submit)[0].parallel

    assert at_once("adaptive", "array") == 3
    # Elsewhere the launcher knows: a kept allocation takes one at a time, an array what Slurm takes.
    assert at_once("adaptive", "packed") is None
    assert at_once("ranked", "array") is None


def test_only_a_strategy_that_stops_by_itself_usually_costs_less() -> None:
    def made(name: str) -> Estimate:
        course = replace(COURSE, strategy=strategy.make(name, COURSE.landscape), stages=(8,))
        return choice(PLAN, course, PLAN.cluster, submit="separate")[1]

    assert made("adaptive").usual_gpu_hours < made("adaptive").gpu_hours
    assert made("ranked").usual_gpu_hours == pytest.approx(made("ranked").gpu_hours)


def test_layouts_are_counted_in_the_order_in_which_they_are_run() -> None:
    # By chance, or size by size, other layouts are run than the best.
    order = RANKING[::-1][:3]
    _, made = choice(PLAN, ordered(order, stages=(8,)), PLAN.cluster, submit="separate")
    seconds = sum((60 + min(20 * 60, steps_s(row, 8))) * int(COURSE.nodes[row]) for row in order)
    assert made.gpu_hours == pytest.approx(seconds * 8 / 3600)
