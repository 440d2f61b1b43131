"""Strategies of serving: what they measure, when they stop, and how they fare where the view is wrong."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import files
from hptool.errors import InputError
from hptool.facts import ModelShape
from hptool.predict.parts import Column
from hptool.serving import Lengths, Objective, ServingLayout, ServingPoint, ServingPoints, Targets
from hptool.serving_strategy import (
    STRATEGIES,
    ServedTrial,
    ServingLandscape,
    ServingView,
    Sitting,
    excess,
    landscape_of,
    make,
    standing,
    tokens_per_s_per_gpu,
    undominated,
)
from hptool.serving_view import learned_view
from hptool.strategy import Ending, Stop, Wait

NAN = math.nan
OBJECTIVES: tuple[Objective, ...] = ("throughput-per-gpu", "latency", "pareto")
SHORT, LONG = Lengths(input_len=60, output_len=20), Lengths(input_len=200, output_len=200)


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """A landscape, and how each of its points ends."""

    landscape: ServingLandscape
    endings: Sequence[ServedTrial]

    def best(self, rows: Sequence[int] | None = None) -> dict[Lengths, float]:
        """What the objective wants most of, by lengths, of these rows or of all that keep the limits."""
        found: dict[Lengths, float] = {}
        for row in range(len(self.endings)) if rows is None else rows:
            trial, lengths = self.endings[row], self.landscape.points.row(row).lengths
            if trial.latency_ms is not None and excess(self.landscape.targets, trial) <= 1:
                value = 1 / trial.latency_ms
                if self.landscape.objective != "latency":
                    value = float(tokens_per_s_per_gpu(self.landscape.points, np.array(trial.latency_ms))[row])
                found[lengths] = max(found.get(lengths, 0.0), value)
        return found


def points_of(
    layouts: Sequence[ServingLayout], lengths: Sequence[Lengths], batches: Sequence[int]
) -> tuple[ServingPoints, Any]:
    rows = [
        ServingPoint(layout=layout, lengths=asked, batch=batch)
        for layout in layouts
        for asked in lengths
        for batch in batches
    ]
    number = np.repeat(np.arange(len(layouts)), len(lengths) * len(batches))
    return ServingPoints.of(rows), number


def some_truth(
    seed: int,
    objective: Objective = "throughput-per-gpu",
    *,
    wrong: float = 0.0,
    limited: float | None = None,
    memory: float = 1.0,
    crashes: float = 0.0,
    few: bool = False,
) -> Truth:
    """A made-up engine: the latency grows with the batch, by no more than it does.

    Expected is another factor of all times, and per layout one that is off by `wrong`. `limited` is the quantile of the
    latencies that is the limit, `memory` the share of points that fit, `crashes` that of those that crash.
    """
    chance = np.random.default_rng(seed)
    layouts = [ServingLayout(tp=tp, pp=pp) for tp in (1, 2, 4, 8)[: 2 if few else 4] for pp in (1, 2)[: 1 + seed % 2]]
    lengths = [SHORT, LONG][: 1 + seed // 2 % 2]
    p, layout = points_of(layouts, lengths, [2**i for i in range(3 if few else int(chance.integers(4, 9)))])
    step = chance.uniform(1, 20) / p.tp ** chance.uniform(0.3, 1) + chance.uniform(0.01, 2) * p.batch / p.tp
    latency_ms = p.output_len * step + chance.uniform(0.001, 0.1) * p.batch * p.input_len / p.tp + 5 * p.pp
    latency_ms *= np.exp(chance.normal(0, 0.05, len(layouts)))[layout]
    need = p.batch * (p.input_len + p.output_len) / (p.tp * p.pp)
    fits = need <= np.quantile(need, memory)
    crashed = chance.random(len(p)) < crashes
    endings = [
        ServedTrial(row=i, ending=Ending.OOM)
        if not fits[i]
        else ServedTrial(row=i, ending=Ending.FAILED)
        if crashed[i]
        else ServedTrial(
            row=i, ending=Ending.MEASURED, latency_ms=float(ms), ttft_ms=float(ms) / 3, tpot_ms=float(ms) / 50
        )
        for i, ms in enumerate(latency_ms)
    ]
    expected_ms = latency_ms * math.exp(chance.normal(0, 0.5)) * np.exp(chance.normal(0, wrong, len(layouts)))[layout]
    expected = ServingView(
        latency_ms=expected_ms,
        ttft_ms=expected_ms / 3,
        tpot_ms=expected_ms / 50,
        error=np.full(len(p), 0.3),
        p_fit=np.where(need <= 1.3 * np.quantile(need, memory), 0.9, 0.1),
    )
    targets = Targets(max_latency_ms=None if limited is None else float(np.quantile(latency_ms, limited)))
    landscape = ServingLandscape(
        points=p,
        layout=layout,
        view=lambda trials: learned_view(p, layout, expected, trials),
        objective=objective,
        targets=targets,
    )
    return Truth(landscape=landscape, endings=endings)


def check(landscape: ServingLandscape, sitting: Sitting, tried: set[int]) -> None:
    """What every sitting keeps to."""
    p, rows = landscape.points, list(sitting.rows)
    assert rows
    assert sitting.why
    assert len(set(rows)) == len(rows)
    assert not tried & set(rows)
    assert {int(landscape.layout[row]) for row in rows} == {sitting.layout}
    asked = [p.row(row).lengths for row in rows]
    assert [key for key, _ in itertools.groupby(asked)] == list(dict.fromkeys(asked)), "lengths by lengths"
    for _, group in itertools.groupby(rows, key=lambda row: p.row(row).lengths):
        batches = [int(p.batch[row]) for row in group]
        assert batches == sorted(batches)


def run(truth: Truth, sitting: Sitting) -> list[ServedTrial]:
    """What a job makes of a sitting."""
    trials: list[ServedTrial] = []
    ended: set[Lengths] = set()
    for row in sitting.rows:
        lengths, trial = truth.landscape.points.row(row).lengths, truth.endings[row]
        if lengths in ended:
            continue
        trials.append(trial)
        leaves = trial.ending is Ending.MEASURED and excess(truth.landscape.targets, trial) > 1
        if sitting.stops_early and (leaves or trial.ending is Ending.OOM):
            ended.add(lengths)
    return trials


def search(truth: Truth, name: str) -> list[ServedTrial]:
    """All trials of a search with one run after the other."""
    strategy, trials = make(name, truth.landscape), list[ServedTrial]()
    while isinstance(answer := strategy.next(trials), Sitting):
        assert strategy.next(list(trials)) == answer, "the same trials give the same answer"
        check(truth.landscape, answer, {t.row for t in trials})
        if name != "grid":
            check_possible(truth.landscape, answer, trials)
        trials += run(truth, answer)
    assert isinstance(answer, Stop)
    assert answer.why
    return trials


def check_possible(landscape: ServingLandscape, sitting: Sitting, trials: Sequence[ServedTrial]) -> None:
    """Nothing in it is at least as large in everything as a point of the layout that did not fit."""
    p = landscape.points
    for oom in (t.row for t in trials if t.ending is Ending.OOM and landscape.layout[t.row] == sitting.layout):
        for row in sitting.rows:
            assert (
                p.batch[row] < p.batch[oom]
                or p.input_len[row] < p.input_len[oom]
                or p.output_len[row] < p.output_len[oom]
            )


# ---------------------------------------------------------------- what every strategy keeps to


TRUTHS = {
    "seed": st.integers(0, 10_000),
    "objective": st.sampled_from(OBJECTIVES),
    "limited": st.sampled_from([None, 0.05, 0.5]),
    "memory": st.sampled_from([1.0, 0.7, 0.0]),
    "crashes": st.sampled_from([0.0, 0.2, 1.0]),
}


@settings(deadline=None, max_examples=25)
@given(name=st.sampled_from(sorted(STRATEGIES)), wrong=st.sampled_from([0.0, 0.5]), **TRUTHS)
def test_every_strategy_ends_and_proposes_nothing_twice_and_nothing_impossible(name: str, **options: Any) -> None:
    truth = some_truth(few=True, **options)
    trials = search(truth, name)
    rows = [t.row for t in trials]
    assert len(set(rows)) == len(rows)
    if name == "grid":
        assert sorted(rows) == list(range(len(truth.endings)))


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(sorted(STRATEGIES)), data=st.data(), at_once=st.integers(2, 4), wrong=st.just(0.3), **TRUTHS
)
def test_runs_under_way_are_taken_into_account(name: str, data: st.DataObject, at_once: int, **options: Any) -> None:
    truth = some_truth(few=True, **options)
    strategy, trials, flying = make(name, truth.landscape), list[ServedTrial](), list[Sitting]()
    while True:
        under_way = [ServedTrial(row=row, ending=Ending.UNDER_WAY) for sitting in flying for row in sitting.rows]
        answer = strategy.next([*trials, *under_way])
        if isinstance(answer, Stop):
            assert not flying, "a run under way may still change everything"
            break
        if isinstance(answer, Sitting):
            check(truth.landscape, answer, {t.row for t in (*trials, *under_way)})
            flying.append(answer)
        else:
            assert isinstance(answer, Wait)
            assert flying
        if isinstance(answer, Wait) or len(flying) == at_once:
            trials += run(truth, flying.pop(data.draw(st.integers(0, len(flying) - 1))))
    if name == "grid":
        assert len(trials) == len(truth.endings)


def test_several_runs_are_under_way_in_different_layouts() -> None:
    truth = some_truth(1)
    strategy, under_way, layouts = make("guided", truth.landscape), list[ServedTrial](), list[int]()
    while isinstance(answer := strategy.next(under_way), Sitting) and len(layouts) < 3:
        layouts.append(answer.layout)
        under_way += [ServedTrial(row=row, ending=Ending.UNDER_WAY) for row in answer.rows]
    assert len(set(layouts)) == len(layouts) == 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_to_measure_is_a_stop(name: str) -> None:
    p, layout = points_of([ServingLayout()], [SHORT], [1])
    view = ServingView(**{c: np.ones(1) for c in ("latency_ms", "ttft_ms", "tpot_ms", "error", "p_fit")})
    landscape = ServingLandscape(points=p, layout=layout, view=lambda _: view, objective="latency", targets=Targets())
    failed = ServedTrial(row=0, ending=Ending.FAILED)
    assert isinstance(make(name, landscape).next([failed]), Stop)
    assert isinstance(make(name, landscape).next([replace(failed, ending=Ending.UNDER_WAY)]), Wait)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(InputError, match="unknown strategy 'best'; allowed are guided, bisect, ranked, grid"):
        make("best", some_truth(0).landscape)


# ---------------------------------------------------------------- guided


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000), objective=st.sampled_from(OBJECTIVES[:2]), limited=st.sampled_from([None, 0.1, 0.5])
)
def test_guided_finds_the_best_where_only_the_scale_is_unknown(
    seed: int, objective: Objective, limited: float | None
) -> None:
    truth = some_truth(seed, objective, limited=limited)
    best, found = truth.best(), truth.best([t.row for t in search(truth, "guided")])
    assert found.keys() == best.keys()
    assert all(found[lengths] >= 0.99 * best[lengths] for lengths in best)


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
def test_guided_finds_the_best_where_layouts_are_mistaken(objective: Objective) -> None:
    regrets, shares = [], []
    for seed in range(30):
        truth = some_truth(seed, objective, limited=(None, 0.2, 0.6)[seed % 3], wrong=0.15)
        trials = search(truth, "guided")
        best, found = truth.best(), truth.best([t.row for t in trials])
        regrets += [1 - found.get(lengths, 0.0) / best[lengths] for lengths in best]
        shares.append(len(trials) / len(truth.endings))
    assert np.mean(np.array(regrets) <= 0.01) >= 0.97
    assert max(regrets) < 0.1
    assert np.median(shares) < 0.3


def test_guided_finds_most_of_the_frontier() -> None:
    missing, shares = [], []
    for seed in range(10):
        truth = some_truth(seed, "pareto", wrong=0.1)
        trials = search(truth, "guided")
        whole = {row for one in standing(truth.landscape, truth.endings) for row in one.pareto}
        missing.append(len(whole - {t.row for t in trials}) / len(whole))
        shares.append(len(trials) / len(truth.endings))
    assert np.mean(missing) < 0.1
    assert np.median(shares) < 0.75


def test_beyond_a_limit_no_larger_batch_is_tried() -> None:
    truth = some_truth(4, limited=0.3, wrong=0.3)
    p, trials = truth.landscape.points, search(truth, "guided")
    for later, trial in enumerate(trials):
        for earlier in trials[:later]:
            same = truth.landscape.layout[trial.row] == truth.landscape.layout[earlier.row]
            if same and p.row(trial.row).lengths == p.row(earlier.row).lengths:
                assert excess(truth.landscape.targets, earlier) <= 1 or p.batch[trial.row] < p.batch[earlier.row]


def test_an_exception_of_a_smaller_batch_beyond_the_limit_does_not_hide_a_larger_one_within() -> None:
    truth = some_truth(1, limited=0.5)
    limit = truth.landscape.targets.max_latency_ms
    assert limit is not None
    rows = np.flatnonzero(truth.landscape.layout == 0)[:3].tolist()
    trials = [
        ServedTrial(row=row, ending=Ending.MEASURED, latency_ms=limit * times)
        for row, times in zip(rows, (0.5, 1.01, 0.99), strict=True)
    ]
    assert isinstance(make("guided", truth.landscape).next(trials), Sitting)
    view = truth.landscape.view(trials)
    assert np.isfinite(view.latency_ms).all()
    (one,) = standing(truth.landscape, trials)
    assert set(one.ranking[: one.within]) == {rows[0], rows[2]}


def test_a_layout_is_left_out_only_where_it_is_predicted_far_behind() -> None:
    p, layout = points_of([ServingLayout(tp=tp) for tp in (1, 2, 4)], [SHORT], [1, 2, 4, 8, 16, 32])
    ms = np.array([100.0, 70.0, 800.0])[layout] * p.batch**0.3
    view = ServingView(latency_ms=ms, ttft_ms=ms, tpot_ms=ms, error=np.full(len(p), 0.01), p_fit=np.ones(len(p)))
    landscape = ServingLandscape(
        points=p, layout=layout, view=lambda _: view, objective="throughput-per-gpu", targets=Targets()
    )
    endings = [ServedTrial(row=i, ending=Ending.MEASURED, latency_ms=float(t)) for i, t in enumerate(ms)]
    trials = search(Truth(landscape=landscape, endings=endings), "guided")
    # tp 2 has 0.71 of tp 1's throughput by prediction, tp 4 a thirtieth: but the first few points cannot say so.
    assert {int(layout[t.row]) for t in trials} == {0, 1, 2}
    known = [t for t in endings if t.row < 6]
    answer = make("guided", landscape).next(known)
    assert isinstance(answer, Sitting)
    assert answer.layout == 1
    assert isinstance(make("guided", landscape).next([*known, endings[answer.rows[0]]]), Stop)


def test_crashes_neither_block_a_layout_nor_are_repeated_for_ever() -> None:
    truth = some_truth(8)
    first = make("guided", truth.landscape).next([])
    assert isinstance(first, Sitting)
    crash = ServedTrial(row=first.rows[0], ending=Ending.FAILED)
    again = make("guided", truth.landscape).next([crash])
    assert isinstance(again, Sitting)
    assert first.rows[0] not in again.rows
    layout = first.layout
    broken = [
        replace(t, ending=Ending.FAILED, latency_ms=None) if truth.landscape.layout[t.row] == layout else t
        for t in truth.endings
    ]
    trials = search(replace(truth, endings=broken), "guided")
    assert 1 <= sum(truth.landscape.layout[t.row] == layout for t in trials) <= 5
    others = [t.row for t in broken if t.ending is Ending.MEASURED]
    best, found = truth.best(others), truth.best([t.row for t in trials if t.ending is Ending.MEASURED])
    assert all(found[lengths] >= 0.99 * best[lengths] for lengths in best)


def test_where_nothing_is_expected_to_keep_the_limits_the_nearest_is_tried_before_that_is_believed() -> None:
    truth = some_truth(5, limited=0.1)
    impossible = replace(truth.landscape, targets=Targets(max_latency_ms=1e-3))
    trials = search(replace(truth, landscape=impossible), "guided")
    assert 1 <= len(trials) <= 8
    for one in standing(impossible, trials):
        assert one.best is None
        assert one.closest == min(one.ranking, key=lambda row: (truth.endings[row].latency_ms, row))


def test_lengths_share_a_sitting() -> None:
    truth = some_truth(2)
    assert len(standing(truth.landscape, [])) == 2
    first = make("guided", truth.landscape).next([])
    assert isinstance(first, Sitting)
    assert {truth.landscape.points.row(row).lengths for row in first.rows} == {SHORT, LONG}


# ---------------------------------------------------------------- bisect


@pytest.mark.parametrize("limited", [None, 0.15, 0.5, 0.8])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bisect_finds_the_best_without_a_view(objective: Objective, limited: float | None) -> None:
    for seed in range(4):
        truth = some_truth(seed, objective, limited=limited, wrong=3.0)
        best, found = truth.best(), truth.best([t.row for t in search(truth, "bisect")])
        assert all(found[lengths] >= 0.99 * best[lengths] for lengths in best)


# ---------------------------------------------------------------- where a search stands


def measured(row: int, latency_ms: float, **times: float) -> ServedTrial:
    return ServedTrial(row=row, ending=Ending.MEASURED, latency_ms=latency_ms, **times)


def small_landscape(objective: Objective = "throughput-per-gpu", targets: Targets | None = None) -> ServingLandscape:
    p, layout = points_of([ServingLayout(tp=1), ServingLayout(tp=2)], [SHORT], [1, 2, 4])
    view = ServingView(**{c: np.ones(len(p)) for c in ("latency_ms", "ttft_ms", "tpot_ms", "error", "p_fit")})
    return ServingLandscape(
        points=p, layout=layout, view=lambda _: view, objective=objective, targets=targets or Targets()
    )


def test_standing_ranks_by_the_objective_within_the_limits_and_then_by_how_far_beyond() -> None:
    trials = [measured(0, 10), measured(1, 15), measured(2, 40), measured(3, 8), measured(4, 12), measured(5, 60)]
    (one,) = standing(small_landscape(targets=Targets(max_latency_ms=20)), trials)
    assert one.lengths == SHORT
    # 1/10, 2/15, then 2/12/2 and 1/8/2; beyond the limit 40 before 60.
    assert one.ranking == (1, 0, 4, 3, 2, 5)
    assert (one.within, one.best, one.closest) == (4, 1, None)
    assert one.pareto == (3, 0, 1)
    (one,) = standing(small_landscape("latency", Targets(max_latency_ms=20)), trials)
    assert one.ranking[:4] == (3, 0, 4, 1)


def test_standing_without_a_point_within_the_limits_has_the_closest_one() -> None:
    targets = Targets(max_latency_ms=10, max_ttft_ms=5)
    trials = [measured(0, 12, ttft_ms=20), measured(1, 15, ttft_ms=4), measured(2, 9)]
    (one,) = standing(small_landscape(targets=targets), trials)
    assert (one.within, one.best, one.closest, one.pareto) == (0, None, 1, ())
    assert one.ranking == (1, 0, 2), "a time that nobody measured keeps no limit"
    (one,) = standing(small_landscape(), [ServedTrial(row=0, ending=Ending.OOM)])
    assert (one.ranking, one.best, one.closest) == ((), None, None)


def test_ties_stay_in_the_order_of_the_landscape() -> None:
    (one,) = standing(small_landscape(), [measured(4, 20), measured(0, 20), measured(1, 40)])
    assert one.ranking == (0, 1, 4)
    assert one.pareto == (0, 4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12))
def test_a_point_is_beaten_by_one_that_is_no_worse_in_both_and_better_in_one(points: list[tuple[int, int]]) -> None:
    latency, rate = (np.array([p[i] for p in points], dtype=float) for i in (0, 1))
    for i, kept in enumerate(undominated(latency, rate)):
        beaten = (latency <= latency[i]) & (rate >= rate[i]) & ((latency < latency[i]) | (rate > rate[i]))
        assert kept == (not beaten.any())


# ---------------------------------------------------------------- what measured points teach


def expected_of(p: ServingPoints, ms: Column) -> ServingView:
    return ServingView(
        latency_ms=ms, ttft_ms=ms / 4, tpot_ms=ms / 20, error=np.full(len(p), 0.2), p_fit=np.ones(len(p))
    )


def test_without_measured_points_the_view_is_what_was_expected() -> None:
    p, layout = points_of([ServingLayout()], [SHORT], [1, 2, 4])
    expected = expected_of(p, np.array([1.0, 1.5, 2.5]))
    assert learned_view(p, layout, expected, [ServedTrial(row=0, ending=Ending.OOM)]) is expected


def test_measured_points_are_as_measured_and_correct_their_neighbours() -> None:
    p, layout = points_of([ServingLayout(tp=1), ServingLayout(tp=8)], [SHORT], [1, 2, 4, 8, 16])
    expected = expected_of(p, 10.0 + p.batch)
    trials = [measured(1, 24), measured(3, 36)]
    view = learned_view(p, layout, expected, trials)
    assert view.latency_ms[[1, 3]] == pytest.approx([24, 36])
    assert view.latency_ms[2] == pytest.approx(2 * expected.latency_ms[2], rel=0.05)
    assert view.error[2] < view.error[4] < view.error[7] < 0.45
    assert view.error[1] < 0.02
    # Another layout is believed to be slower than expected too, but less.
    assert expected.latency_ms[7] < view.latency_ms[7] < 2 * expected.latency_ms[7]
    assert (view.tpot_ms == expected.tpot_ms).all(), "nobody measured it"


def test_a_batch_takes_no_less_than_a_smaller_one_and_no_more_than_so_many_of_them() -> None:
    p, layout = points_of([ServingLayout()], [SHORT], [1, 2, 4, 8])
    falling = expected_of(p, np.array([40.0, 30.0, 20.0, 10.0]))
    view = learned_view(p, layout, falling, [measured(0, 40)])
    assert (view.latency_ms >= 40 - 1e-9).all()
    steep = expected_of(p, np.array([1.0, 10.0, 100.0, 1000.0]))
    view = learned_view(p, layout, steep, [measured(1, 10)])
    assert view.latency_ms[3] <= 40 + 1e-9
    assert view.latency_ms[0] >= 5 - 1e-9


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.1, 1e6), min_size=10, max_size=10), st.integers(1, 10))
def test_whatever_is_measured_the_view_stays_finite(times: list[float], count: int) -> None:
    p, layout = points_of([ServingLayout(tp=1), ServingLayout(tp=2)], [SHORT], [1, 2, 4, 8, 16])
    trials = [measured(i, times[i], tpot_ms=times[-1]) for i in range(count)]
    view = learned_view(p, layout, expected_of(p, 10.0 + p.batch), trials)
    for column in (view.latency_ms, view.ttft_ms, view.tpot_ms, view.error):
        assert (np.isfinite(column) & (column > 0)).all()


GPT_20B = ModelShape(
    num_layers=44,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=48,
    kv_channels=128,
    seq_length=2048,
    max_position_embeddings=2048,
    vocab_size=51200,
    tied_embeddings=True,
    has_bias=True,
)


def test_a_landscape_learns_the_engine() -> None:
    p, _ = points_of([ServingLayout(tp=tp, precision="fp16") for tp in (1, 2, 4, 8)], [SHORT, LONG], [1, 4, 16, 64])
    cluster, engine = files.read_cluster("dgx-a100"), files.read_engine("fastertransformer")
    landscape = landscape_of(p, GPT_20B, cluster, engine, "throughput-per-gpu", Targets(max_latency_ms=5000))
    before = landscape.view([])
    assert len(set(landscape.layout.tolist())) == 4
    assert (np.diff(before.latency_ms[:4]) > 0).all()
    trials = [measured(row, 3 * float(before.latency_ms[row])) for row in (0, 5, 10, 15, 20, 31)]
    after = landscape.view(trials)
    off = np.abs(np.log(after.latency_ms / before.latency_ms / 3))
    assert np.median(off) < 0.15
    assert after is landscape.view(list(trials)), "the same trials are not fitted twice"
    assert isinstance(make("guided", landscape).next(trials), Sitting)
