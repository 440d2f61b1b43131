"""From the records of a search to the rows of its report: ordered by what was measured, whatever came first."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from hptool.candidates import Recompute, SearchSpace
from hptool.cost import choose
from hptool.findings import Search, make_report
from hptool.measurement import Failure, Measurement
from hptool.plan import SearchRequest, make_plan, read_plan
from hptool.report import Report, answer_lines, table_rows
from hptool.results import OutcomeRecord, ResultsDirectory
from tests import samples

SPACE = SearchSpace(tp=(2, 4, 8), pp=(1, 2), vpp=(1,), mbs=(1, 2), recompute=((Recompute.NONE, None),))
FAST, SLOW, FULL = "tp4-pp1-vpp1-cp1-mbs2-none", "tp8-pp1-vpp1-cp1-mbs2-none", "tp2-pp1-vpp1-cp1-mbs2-none"


def search(tmp_path: Path, **asked: object) -> Search:
    """A search of GPT-3 5B on four DGX A100s."""
    request = SearchRequest(model="gpt3/5b", cluster="dgx-a100", nodes=4, space=SPACE, results=tmp_path / "run")
    plan = make_plan(replace(request, **asked))  # type: ignore[arg-type]  # a test's own words
    results = ResultsDirectory(plan.directory)
    results.begin(plan.document(), resume=True)
    ranking = plan.predictions.ranking()
    _, estimate = choose(plan.course, ranking, plan.cluster, submit=None, parallel=None, minutes=20)
    return Search(plan=plan, course=plan.course, estimate=estimate, results=results)


def record(
    name: str, outcome: Measurement | Failure, *, steps: int = 8, nodes: int = 1, run: str = ""
) -> OutcomeRecord:
    made = samples.record(name, outcome, run=run or name)
    return replace(made, steps=steps, nodes=nodes, gpus=8 * nodes)


def reported(found: Search, records: list[OutcomeRecord]) -> Report:
    for made in records:
        found.results.record_outcome(made)
    return make_report(found)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_in_which_runs_end_does_not_matter(order: tuple[int, ...], tmp_path: Path) -> None:
    # The tool before this one sorted by a wrong column, so its optimal config was the order of a directory.
    records = [
        record(FAST, samples.measurement(10.0)),
        record(SLOW, samples.measurement(14.0)),
        record(FULL, samples.failure()),
    ]
    made = reported(search(tmp_path), [records[i] for i in order])
    assert [row.layout.name for row in made.rows] == [FAST, SLOW, FULL]
    assert made.winner is not None
    assert made.winner.layout.name == FAST
    assert [row["rank"] for row in table_rows(made)] == [1, 2, None]


def test_the_longest_timing_of_a_layout_counts_and_all_its_runs_are_its_cost(tmp_path: Path) -> None:
    made = reported(
        search(tmp_path),
        [
            record(FAST, samples.measurement(9.0)),
            record(SLOW, samples.measurement(10.0)),
            record(FAST, samples.measurement(13.0), steps=50, run=f"{FAST}.2"),
        ],
    )
    assert [row.layout.name for row in made.rows] == [SLOW, FAST]
    second = made.rows[1]
    assert second.measurement is not None
    assert (second.measurement.step_time_s, second.runs) == (13.0, 2)
    assert second.gpu_hours == pytest.approx(2 * 8 / 60)
    assert made.spent.gpu_hours == pytest.approx(3 * 8 / 60)


def test_the_answer_is_for_all_nodes_and_adds_what_one_node_leaves_out(tmp_path: Path) -> None:
    found = search(tmp_path)
    made = reported(found, [record(FAST, samples.measurement(10.0))])
    (row,) = made.rows
    assert row.full is not None
    assert row.nodes == 1
    index = [layout.name for layout in found.plan.predictions.layouts.rows()].index(FAST)
    landscape = found.course.landscape
    added_s = float(landscape.target.step_time_s[index] - landscape.run.step_time_s[index])
    assert row.full.step_time_s != 10.0
    # Learnt factors stretch what is added, but it stays of that size and sign.
    assert (row.full.step_time_s - 10.0) * added_s > 0
    assert abs(row.full.step_time_s - 10.0) < 3 * abs(added_s)
    steps = found.plan.config.trainer.max_steps
    assert made.training.days == pytest.approx(steps * row.full.step_time_s / 86400)
    best = float(found.plan.predictions.step_time_s[found.plan.predictions.ranking()[0]])
    assert made.training.predicted_days == pytest.approx(steps * best / 86400)
    assert any("predicted before the search" in line for line in answer_lines(made))


def test_what_was_run_at_scale_ranks_before_what_was_not(tmp_path: Path) -> None:
    found = search(tmp_path, verify_nodes=4)
    made = reported(
        found,
        [
            record(FAST, samples.measurement(10.0)),
            record(SLOW, samples.measurement(10.5)),
            record(FULL, samples.measurement(9.9)),
            record(FAST, samples.measurement(13.0), steps=50, nodes=4, run=f"{FAST}.2"),
            record(SLOW, samples.measurement(12.0), steps=50, nodes=4, run=f"{SLOW}.2"),
        ],
    )
    assert [row.layout.name for row in made.rows] == [SLOW, FAST, FULL]
    best = made.rows[0]
    assert best.full is not None
    assert best.full.at_scale is not None
    assert (best.full.at_scale_nodes, best.full.at_scale.step_time_s) == (4, 12.0)
    assert any("measured 12 s on 4 nodes" in line for line in answer_lines(made))


def test_a_layout_that_fails_when_it_is_timed_longer_is_no_winner(tmp_path: Path) -> None:
    made = reported(
        search(tmp_path),
        [
            record(FAST, samples.measurement(9.0)),
            record(SLOW, samples.measurement(10.0)),
            record(FAST, samples.failure(), steps=50, run=f"{FAST}.2"),
        ],
    )
    assert [row.layout.name for row in made.rows] == [SLOW, FAST]
    assert made.rows[1].failure is not None


def test_layouts_that_are_not_told_apart_are_called_equal(tmp_path: Path) -> None:
    made = reported(
        search(tmp_path), [record(FAST, samples.measurement(10.0)), record(SLOW, samples.measurement(10.2))]
    )
    first, second = made.rows
    assert not first.is_equal_to_best
    assert second.is_equal_to_best
    assert any(second.layout.name in line and "equal" in line for line in answer_lines(made))


def test_a_plan_that_is_read_back_makes_the_same_search(tmp_path: Path) -> None:
    plan = search(tmp_path, verify_nodes=2, stages=(8, 30)).plan
    again = read_plan(plan.directory)
    assert again.document()["search"] == plan.document()["search"]
    assert again.course.stages == (8, 30)
    assert again.predictions.step_time_s.tolist() == plan.predictions.step_time_s.tolist()


def test_runs_of_the_winner_that_contradict_each_other_are_shown(tmp_path: Path) -> None:
    made = reported(
        search(tmp_path),
        [
            record(FAST, samples.measurement(9.0)),
            record(SLOW, samples.measurement(16.0)),
            record(FAST, samples.measurement(13.0), steps=50, run=f"{FAST}.2"),
        ],
    )
    assert made.rows[0].disagreeing_s == (9.0, 13.0)
    assert any("runs of the winner disagree, 9 to 13 s a step" in line for line in answer_lines(made))
