"""Replays: right where the answer is obvious, and the ranking against what others measured."""

import io
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hptool import replay as module
from hptool.errors import InputError
from hptool.replay import Choices, Replay, as_json, play, print_replay, quantile, replay
from hptool.strategy import Ending, InOrder, Proposal, Stop, Strategy, Trial
from hptool.tables import read_table

NAN = math.nan


def grid(rates: Sequence[float], grid_id: str = "a", **columns: Any) -> pd.DataFrame:
    """A grid of these throughputs, NaN for a failed run, that the strategy `grid` plays in the order given."""
    outcomes = ["oom" if math.isnan(rate) else "ok" for rate in rates]
    values = {"grid_id": grid_id, "dataset": "made up", "tp": range(1, len(rates) + 1), "outcome": outcomes}
    return pd.DataFrame(values | {"tps_gpu_norm": rates} | columns)


def only(made: Replay) -> module.GridResult:
    (result,) = made.grids
    return result


def printed(made: Replay, *, each_grid: bool = False) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    print_replay(made, console, each_grid=each_grid)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def refused(frame: pd.DataFrame, strategy: str = "grid", **options: Any) -> str:
    with pytest.raises(InputError) as raised:
        replay(frame, strategy, source="runs.csv", **options)
    (line,) = raised.value.problems
    assert "\n" not in line
    return line


# ---------------------------------------------------------------- one grid


def test_the_best_layout_as_the_last_one_takes_every_run() -> None:
    result = only(replay(grid([50, 60, 70, 100]), "grid"))
    assert result.runs_to_2pct == result.rows == 4
    assert result.regret == pytest.approx({1: 0.5, 3: 0.3, 5: 0.0, 10: 0.0})
    assert result.failed_runs == 0


def test_within_two_percent_is_good_enough() -> None:
    assert only(replay(grid([97.9, 98, 100]), "grid")).runs_to_2pct == 2


def test_failures_cost_runs_and_are_counted_until_a_good_layout() -> None:
    result = only(replay(grid([NAN, NAN, 80, NAN, 100, NAN]), "grid"))
    assert result.runs_to_2pct == 5
    assert result.failed_runs == 3
    assert result.regret == pytest.approx({1: 1.0, 3: 0.2, 5: 0.0, 10: 0.0})


def test_random_is_the_expectation_over_orders() -> None:
    # One good layout of nine: its place is uniform over 1..9, and the run before it fails or not as all do.
    result = only(replay(grid([100, *[50] * 4, *[NAN] * 4]), "random"))
    assert result.runs_to_2pct == pytest.approx(5, abs=1)
    assert result.regret[1] == pytest.approx((4 * 0.5 + 4 * 1) / 9, abs=0.06)
    assert result.failed_runs == pytest.approx(4 / 8 * 4, abs=0.3)


def test_random_is_repeatable_and_does_not_depend_on_other_grids() -> None:
    a, b = grid([100, 90, 80, 70, 60]), grid([10, 20, NAN, 5], "b")
    alone, together = replay(b, "random"), replay(pd.concat([a, b]), "random")
    assert only(alone) == together.grids[1]
    assert only(replay(b, "random", seed=1)) != only(alone)


def test_grid_is_a_nested_loop() -> None:
    axes = {"tp": (1, 2), "pp": (1, 2), "cp": (1, 2), "ep": (1, 2), "vpp": (1, 2), "mbs": (1, 2)}
    nested = [
        dict(zip([*axes, "recompute"], values, strict=True))
        for values in itertools.product(*axes.values(), ("none", "selective", "full", "unknown"))
    ]
    rates = np.arange(1.0, len(nested) + 1)
    frame = pd.DataFrame(nested).assign(grid_id="a", tps_gpu_norm=rates).sample(frac=1, random_state=0)
    assert only(replay(frame, "grid")).regret[1] == pytest.approx(1 - 1 / len(nested))
    assert order_of(frame, "grid") == rates.tolist()


def test_naive_takes_the_least_model_parallelism_and_then_the_biggest_micro_batch() -> None:
    frame = grid([1, 2, 3, 4, 5], tp=[2, 1, 1, 1, 1], pp=[1, 4, 1, 1, 1], ep=[1, 1, 1, 1, 3], mbs=[8, 8, 1, 4, 8])
    assert order_of(frame, "naive") == [4, 3, 1, 5, 2]


def order_of(frame: pd.DataFrame, name: str) -> list[float]:
    """Throughputs in the order in which a strategy takes them."""
    choices = Choices(rows=frame, landscape=None, predicted=np.arange(len(frame)))
    (strategy,) = module.STRATEGIES[name].make(choices, np.random.default_rng(0))
    rates = frame["tps_gpu_norm"].to_numpy(float)
    return [float(rates[row]) for row in play(strategy, endings(rates))[0]]


def endings(rates: Sequence[float] | np.ndarray[Any, Any]) -> list[Trial]:
    """Runs that take one step of one token each, or go out of memory."""
    return [
        Trial(row=row, ending=Ending.OOM)
        if math.isnan(rate)
        else Trial(row=row, ending=Ending.MEASURED, step_time_s=1 / rate)
        for row, rate in enumerate(rates)
    ]


RATES = st.lists(st.one_of(st.floats(1, 1e5), st.just(NAN)), min_size=2, max_size=30).filter(
    lambda rates: len({r for r in rates if not math.isnan(r)}) > 1
)


@settings(deadline=None, max_examples=50)
@given(rates=RATES, strategy=st.sampled_from(["random", "grid", "naive"]))
def test_numbers_keep_their_bounds(rates: list[float], strategy: str) -> None:
    result = only(replay(grid(rates), strategy))
    assert result.runs_to_2pct is not None
    assert 1 <= result.runs_to_2pct <= len(rates) == result.rows
    assert 0 <= result.failed_runs <= sum(map(math.isnan, rates))
    regrets = [1.0, *result.regret.values(), 0.0]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(regrets))


@settings(deadline=None)
@given(rates=RATES, data=st.data())
def test_every_order_finds_the_best_in_the_end(rates: list[float], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rates))))
    assert play(InOrder(order=order, why="drawn"), endings(rates)) == (order, False)


# ---------------------------------------------------------------- strategies that look at what they found


class UntilASuccess:
    """Runs rows in order and stops after the first that did not fail."""

    def next(self, trials: Sequence[Trial]) -> Proposal | Stop:
        if any(t.ending is Ending.MEASURED for t in trials):
            return Stop(why="it works")
        return Proposal(row=len(trials), expected_gain=math.inf, why="the next")


class Again:
    """Runs the same row for ever."""

    def next(self, trials: Sequence[Trial]) -> Proposal | Stop:
        return Proposal(row=0 * len(trials), expected_gain=math.inf, why="again")


def test_a_strategy_may_stop_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(choices: Choices, generator: np.random.Generator) -> Sequence[Strategy]:
        assert set(choices.rows) == {"grid_id", "dataset", "tp"}  # and no result
        assert generator.random() >= 0
        return [UntilASuccess()]

    monkeypatch.setattr(module, "STRATEGIES", {"mine": module._Kind(make=make, stops=True)})
    made = replay(pd.concat([grid([NAN, 80, 100]), grid([100, 80, NAN], "b")]), "mine")
    bad, good = made.grids
    assert (bad.runs_to_2pct, bad.runs_to_stop, bad.failed_runs, bad.failed_to_stop) == (None, 2, 1, 1)
    assert bad.final_regret == pytest.approx(0.2)
    assert bad.regret == pytest.approx({1: 1.0, 3: 0.2, 5: 0.2, 10: 0.2})
    assert (good.runs_to_2pct, good.runs_to_stop, good.final_regret) == (1, 1, 0.0)
    (summary,) = made.summary
    assert summary.runs_to_2pct_median is None  # one of two never got there
    assert summary.failed_share == pytest.approx(1 / 3)
    assert summary.stopped is not None
    assert [summary.stopped.runs_median, summary.stopped.runs_p90] == pytest.approx([1.5, 1.9])
    assert [summary.stopped.failed_share, summary.stopped.good_share] == pytest.approx([1 / 3, 0.5])
    assert "@stop" in printed(made, each_grid=True)
    assert "Where mine stopped" in printed(made)
    as_written = as_json(made)["summary"]["datasets"][0]["stopped"]
    assert as_written == {
        "runs": {"median": 1.5, "p90": pytest.approx(1.9)},
        "failed_share": pytest.approx(1 / 3),
        "within_1pct_share": 0.5,
    }


def test_a_strategy_may_not_run_a_row_twice() -> None:
    with pytest.raises(ValueError, match="row 0"):
        play(Again(), endings([1.0, 2.0]))


# ---------------------------------------------------------------- which rows count


def test_every_outcome_but_ok_is_a_failure_even_with_a_throughput() -> None:
    frame = grid([200, 100, 50], outcome=["failed_with_metrics", "ok", "ok"])
    result = only(replay(frame, "grid"))
    assert (result.runs_to_2pct, result.failed_runs) == (2, 1)


def test_a_run_that_went_well_without_a_figure_is_left_out() -> None:
    assert only(replay(grid([NAN, 100, 50], outcome="ok"), "grid")).rows == 2


def test_without_outcomes_a_throughput_says_that_a_run_went_well() -> None:
    result = only(replay(grid([NAN, 50, 100]).drop(columns="outcome"), "grid"))
    assert (result.rows, result.runs_to_2pct, result.failed_runs) == (3, 3, 1)


@pytest.mark.parametrize(
    "columns",
    [
        {"tokens_per_s_per_gpu": [50.0, 100.0, NAN]},
        {"iter_s": [2.0, 1.0, NAN], "gbs": 8, "seq": 100, "gpus": 8},
        {"tokens_per_s_per_gpu": [50.0, NAN, NAN], "iter_s": [NAN, 1.0, NAN], "gbs": 8, "seq": 100, "gpus": 8},
    ],
)
def test_throughputs_from_other_columns(columns: dict[str, Any]) -> None:
    frame = grid([50, 100, NAN], **columns)
    assert replay(frame.drop(columns="tps_gpu_norm"), "grid") == replay(frame, "grid")


def test_rows_of_no_grid_and_grids_that_tell_nothing_do_not_count() -> None:
    frames = [grid([100, NAN], "few"), grid([100, 100], "flat"), grid([1, 2, 3], ""), grid([1, 2], "good")]
    made = replay(pd.concat([*frames, grid([5, 6]).assign(grid_id=None)]), "grid")
    assert only(made).grid_id == "good"
    assert (made.skipped_too_few_measured, made.skipped_no_variation) == (1, 1)
    assert "2 grids skipped: 1 with fewer than 2 measured runs, 1 without variation." in printed(made)


def test_limits_filter_rows_before_grids_are_formed() -> None:
    frame = grid([50, 100, 75, 20], tp=[1, 16, 8, NAN], nodes=[1, 1, 16, 1])
    result = only(replay(frame, "grid", max_tp=8))
    assert (result.rows, result.runs_to_2pct) == (3, 3)  # tp=1 and an unknown tp come before tp=8
    assert only(replay(frame, "grid", max_tp=8, max_nodes=8)).rows == 2


def test_one_grid_or_the_primary_ones() -> None:
    frame = pd.concat([grid([1, 2]), grid([2, 1], "b", grid_use="primary")])
    assert [g.grid_id for g in replay(frame, "grid").grids] == ["a", "b"]
    assert only(replay(frame, "grid", grid_id="a")).grid_id == "a"
    assert only(replay(frame, "grid", primary_only=True)).grid_id == "b"


def test_grids_may_be_called_by_numbers() -> None:
    frame = read(b"grid_id,tps_gpu_norm\n7,1\n7,2\n,3\n")
    assert only(replay(frame, "grid", grid_id="7")).dataset == ""


def read(content: bytes) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(content), low_memory=False)


# ---------------------------------------------------------------- what is wrong is said in one line


def test_what_is_wrong_is_said_in_one_line() -> None:
    good = grid([1, 2], "vtrain-64g")
    assert refused(good.drop(columns="grid_id")) == "runs.csv: grid_id: the column is missing"
    assert refused(good.iloc[:0]) == "runs.csv: no rows"
    assert refused(good.assign(grid_id="")) == "runs.csv: grid_id: empty in every row"
    wrong = good.assign(tps_gpu_norm=["5", "fast"])
    assert refused(wrong) == "runs.csv: tps_gpu_norm: 'fast' given in row 2, allowed is a number"
    assert "'two' given in row 1" in refused(good.assign(tp=["two", 1]))
    assert refused(good, grid_id="vtrain64") == (
        "runs.csv: grid_id: unknown grid 'vtrain64'; the nearest of 1 is 'vtrain-64g'"
    )
    assert "has 1 measured runs, needed are 2" in refused(grid([1, NAN]), grid_id="a")
    assert refused(good, max_tp=0) == "runs.csv: no row has tp 0 or less, as --max-tp demands"
    assert "nodes: the column is missing" in refused(good, max_nodes=1)
    assert "did you mean ranked?" in refused(good, "rankde")


def test_ranked_says_which_columns_it_needs() -> None:
    with pytest.raises(InputError) as raised:
        replay(grid([1, 2]), "ranked", source="runs.csv")
    assert "runs.csv: hidden: the column is missing" in raised.value.problems


# ---------------------------------------------------------------- output


def test_the_summary_separates_datasets_and_primary_grids() -> None:
    frames = [
        grid([100, 50], "a", grid_use="primary"),
        grid([50, NAN, 100], "b", grid_use="primary"),
        grid([50, 100], "c", grid_use="small"),
        grid([NAN, NAN, 1, 2], "d", grid_use="primary", dataset="another"),
    ]
    made = replay(pd.concat(frames), "grid")
    assert [(s.dataset, s.primary, s.grids, s.rows) for s in made.summary] == [
        ("another", True, 1, 4),
        ("made up", True, 2, 5),
        ("made up", False, 1, 2),
    ]
    both = made.summary[1]
    assert both.runs_to_2pct_median == 2
    assert both.runs_to_2pct_p90 == pytest.approx(2.8)
    assert both.regret == pytest.approx({1: 0.25, 3: 0.0})
    assert both.failed_share == pytest.approx(1 / 4)


@given(st.lists(st.integers(1, 50), min_size=1), st.lists(st.just(math.inf), max_size=5), st.floats(0, 1))
def test_a_quantile_knows_never(finite: list[int], never: list[float], share: float) -> None:
    found = quantile([*finite, *never], share)
    if not never:
        assert found == pytest.approx(np.quantile(finite, share))
    elif found is not None:  # what stands for never does not matter below it
        assert found == pytest.approx(np.quantile([*finite, *[51] * len(never)], share))
    else:
        assert share * (len(finite) + len(never) - 1) > len(finite) - 1


def test_json_has_these_keys() -> None:
    frame = pd.concat([grid([NAN, 50, 100]), grid([1, 2], "b", grid_use="primary")])
    made = json.loads(json.dumps(as_json(replay(frame, "grid"))))
    assert set(made) == {"grids", "summary"}
    assert made["grids"][0] == {
        "grid_id": "a",
        "dataset": "made up",
        "strategy": "grid",
        "rows": 3,
        "runs_to_2pct": 3,
        "regret": {"1": 1.0, "3": 0.0, "5": 0.0, "10": 0.0},
        "failed_runs": 1,
        "runs_to_stop": None,
        "failed_to_stop": None,
        "final_regret": None,
    }
    summary = made["summary"]
    assert set(summary) == {"strategy", "grids", "unpredicted_rows", "skipped", "datasets"}
    assert summary["skipped"] == {"too_few_measured": 0, "no_variation": 0}
    assert summary["datasets"][0] == {
        "dataset": "made up",
        "primary": True,
        "grids": 1,
        "rows": 2,
        "runs_to_2pct": {"median": 2, "p90": 2},
        "regret": {"1": 0.5, "3": 0.0},
        "failed_share": 0.0,
        "stopped": None,
    }


def test_tables_fit_80_columns_and_names_are_no_markup() -> None:
    name = "aleph-llama13b-a100-128g-seq8192-gbs512|flash_attention2+RMSkernel|[bold]spsheet"
    made = replay(grid([NAN, 50, 100], name, dataset="[red]bigscience_v100"), "random")
    text = printed(made, each_grid=True)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "[red]bigscience" in text
    assert "[bold]" in text.replace("\n", "")
    assert "No grid was played." in printed(replay(grid([1, 1]), "grid"))


def test_a_long_replay_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    frame = pd.concat([grid([1, 2]), grid([1, 2], "b")])
    monkeypatch.setattr(module, "SAY_EVERY_S", 1e9)
    replay(frame, "grid", say=said.append)
    assert said == []
    monkeypatch.setattr(module, "SAY_EVERY_S", -1.0)
    replay(frame, "grid", say=said.append)
    assert said == ["1 of 2 grids played", "2 of 2 grids played"]


# ---------------------------------------------------------------- the ranking


def ranked(published: Path, dataset: str, **options: Any) -> Replay:
    """The ranking in the primary grids of a dataset of the whole published table."""
    frame = read_table(published, ("grid_id", "dataset"))
    if dataset not in set(frame["dataset"]):
        pytest.skip("the whole published table is not at hand")
    return replay(frame[frame["dataset"] == dataset], primary_only=True, **options)


def test_ranked_takes_what_cannot_be_predicted_last(published: Path) -> None:
    frame = read_table(published, ("grid_id",)).query("dataset == 'korthikanti'").reset_index(drop=True)
    known = replay(frame)
    assert known.unpredicted_rows == 0
    best = frame.groupby("grid_id")["tps_gpu_norm"].transform("max") == frame["tps_gpu_norm"]
    made = replay(frame.assign(gpu=frame["gpu"].mask(best, "an abacus")))
    assert made.unpredicted_rows == len(made.grids)
    assert all(g.runs_to_2pct == g.rows for g in made.grids)
    assert "could not be predicted and came last" in printed(made)


def test_ranked_does_not_look_at_results(published: Path) -> None:
    frame = read_table(published, ("grid_id",)).query("dataset == 'korthikanti'").reset_index(drop=True)
    swapped = frame.assign(tps_gpu_norm=1e6 / frame["tps_gpu_norm"], iter_s=1 / frame["iter_s"])
    for one, other in zip(replay(frame).grids, replay(swapped).grids, strict=True):
        assert {one.runs_to_2pct, other.runs_to_2pct} == {1, 2}  # of two rows, the same first


def test_ranked_finds_a_good_layout_of_aleph_in_few_runs(published: Path) -> None:
    (summary,) = ranked(published, "aleph").summary
    assert summary.grids == 13
    assert summary.runs_to_2pct_median is not None
    assert summary.runs_to_2pct_p90 is not None
    assert summary.runs_to_2pct_median <= 2
    assert summary.runs_to_2pct_p90 <= 5


def test_ranked_beats_chance_where_layouts_differ_much(published: Path) -> None:
    # As published beside the table: tensor parallelism to 8 and 16 nodes are what is to be judged.
    limits = {"max_tp": 8, "max_nodes": 16}
    (mine,) = ranked(published, "ultrascale", **limits).summary
    (chance,) = ranked(published, "ultrascale", strategy="random", **limits).summary
    assert mine.runs_to_2pct_median is not None
    assert chance.runs_to_2pct_median is not None
    assert mine.runs_to_2pct_median < chance.runs_to_2pct_median / 4
    assert mine.failed_share < chance.failed_share


# ---------------------------------------------------------------- what a search gets to see


def test_a_search_sees_how_runs_end_and_nothing_that_was_not_run(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = read_table(published, ("grid_id",)).query("dataset == 'korthikanti'").reset_index(drop=True)
    seen: list[Sequence[Trial]] = []

    class Watching:
        def next(self, trials: Sequence[Trial]) -> Proposal | Stop:
            seen.append(list(trials))
            return Proposal(row=len(trials), expected_gain=math.inf, why="the next")

    monkeypatch.setattr("hptool.strategy.make", lambda *_, **__: Watching())
    replay(frame, "adaptive", grid_id=str(frame["grid_id"][0]))
    nothing, one = seen
    assert nothing == []
    (trial,) = one
    assert trial.ending is Ending.MEASURED
    assert trial.step_time_s == pytest.approx(frame["iter_s"][0], rel=0.02)
    assert trial.memory_gib is None


@pytest.mark.parametrize(
    ("outcome", "oom", "ending"),
    [("oom", NAN, Ending.OOM), ("crash", 1, Ending.OOM), ("crash_or_oom", NAN, Ending.FAILED)],
)
def test_only_what_is_proven_is_out_of_memory(outcome: str, oom: float, ending: Ending) -> None:
    frame = grid([NAN, 1, 2], outcome=[outcome, "ok", "ok"], oom=[oom, NAN, NAN])
    (found,) = module._grids(frame, "runs.csv")
    choices = Choices(rows=frame, landscape=None, predicted=np.arange(3))
    assert [t.ending for t in module._endings(found, choices)] == [ending, Ending.MEASURED, Ending.MEASURED]


@pytest.mark.parametrize("strategy", ["adaptive", "ranked", "optuna"])
def test_what_cannot_be_predicted_comes_last(published: Path, strategy: str) -> None:
    frame = read_table(published, ("grid_id",)).query("dataset == 'korthikanti'").reset_index(drop=True)
    made = replay(frame.assign(gpu="an abacus"), strategy)
    assert made.unpredicted_rows == len(frame)
    assert {g.runs_to_2pct for g in made.grids} <= {1, 2}


# ---------------------------------------------------------------- adaptive, on what others measured

#: Datasets of the published table with their limits: the 90th percentile of runs until one was within 2 %, and the
#: share of failures until the stop.
ADAPTIVE = {
    "aleph": ({}, 3, 0.05),
    "vtrain_single": ({}, 4, 0.0),
    "vtrain_multi": ({}, 4, 0.0),
    # A third of these runs crashed, for reasons that nobody published.
    "ultrascale": ({"max_tp": 8, "max_nodes": 16}, 5, 0.16),
}


@pytest.mark.parametrize("dataset", ADAPTIVE)
def test_adaptive_finds_the_best_layout_and_then_stops(dataset: str, published: Path) -> None:
    limits, p90, failed = ADAPTIVE[dataset]
    (summary,) = ranked(published, dataset, strategy="adaptive", **limits).summary
    assert summary.stopped is not None
    assert summary.runs_to_2pct_median is not None
    assert summary.runs_to_2pct_p90 is not None
    assert summary.runs_to_2pct_median <= 3
    assert summary.runs_to_2pct_p90 <= p90
    assert summary.failed_share <= 0.05
    assert summary.stopped.failed_share <= failed
    assert summary.stopped.good_share >= 0.95
    assert summary.stopped.runs_median <= 20
