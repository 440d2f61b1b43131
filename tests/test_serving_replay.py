"""Replays of serving: right where the answer is obvious, and how few points are measured of published tables."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console

from hptool import files, tables
from hptool import replay as training
from hptool.cli import main
from hptool.errors import InputError
from hptool.serving import Lengths, ServingLayout, ServingPoint, ServingPoints, Targets
from hptool.serving_replay import (
    LARGE,
    CaseResult,
    KindSummary,
    ServingReplay,
    as_json,
    grids_of,
    play,
    print_replay,
    replay,
)
from hptool.serving_strategy import ServedTrial, ServingLandscape, ServingView, Sitting
from hptool.strategy import Ending, Stop

SMALL = Path(__file__).parent / "data" / "serving.csv"
WHOLE = Path(__file__).parents[2] / "shared" / "truth" / "inference.csv"


def table(**columns: Any) -> pd.DataFrame:
    """A made-up grid of one GPU and of two with batches of 1 to 8."""
    rows = [(tp, batch) for tp in (1, 2) for batch in (1, 2, 4, 8)]
    tp, batch = (np.array([row[i] for row in rows]) for i in (0, 1))
    values = {
        "series": "made up",
        "model": "small",
        "hidden": 4096,
        "layers": 32,
        "heads": 32,
        "gpu": "A100-80GB",
        "gpus": tp,
        "tp": tp,
        "batch": batch,
        "input_len": 60,
        "output_len": 20,
        "precision": "fp16",
        "engine": "FasterTransformer",
        "latency_ms": 500 * batch**0.2 / tp**0.5,
    }
    return pd.DataFrame(values | columns)


def case(made: ServingReplay, objective: str = "throughput-per-gpu", limit: str = "none") -> CaseResult:
    (found,) = [c for c in made.cases if (c.objective, c.limit) == (objective, limit)]
    return found


def printed(made: ServingReplay, *, each_grid: bool = False) -> str:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    print_replay(made, console, each_grid=each_grid)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---------------------------------------------------------------- one grid


def test_grid_takes_every_point_and_finds_the_best_in_its_place() -> None:
    made = replay(table(), "grid")
    best = case(made)
    # The most tokens a GPU come from one GPU and the largest batch, the fourth point.
    assert (best.points, best.runs_to_best, best.runs, best.sittings, best.regret) == (8, 4, 8, 2, 0.0)
    assert case(made, "latency").runs_to_best == 5
    # Of the frontier are the small batches of two GPUs and the largest of one.
    assert case(made, "pareto").runs_to_best == 8
    assert best.kind == "static"
    assert {c.limit for c in made.cases} == {"none", "latency 10%", "latency 25%", "latency 50%", "latency 75%"}


def test_points_beyond_a_limit_are_counted_and_are_not_the_answer() -> None:
    best = case(replay(table(), "grid"), limit="latency 10%")
    # Only the first of two GPUs is within; the grid measures all others too.
    assert (best.runs_to_best, best.runs, best.regret) == (5, 8, 0.0)


def test_points_out_of_memory_are_counted_and_end_a_sitting() -> None:
    frame = table(notes=["", "", "OOM", "OOM", "", "", "", ""])
    frame.loc[[2, 3], "latency_ms"] = np.nan
    (grid,), _ = grids_of(frame, "x")
    assert [t.ending for t in grid.endings].count(Ending.OOM) == 2
    landscape = grid.landscape("throughput-per-gpu", Targets())

    class Once:
        def next(self, trials: Sequence[ServedTrial]) -> Sitting | Stop:
            if trials:
                return Stop(why="enough")
            return Sitting(layout=0, rows=(1, 2, 3), stops_early=True, why="to see")

    assert play(Once(), landscape, grid.endings) == ([1, 2], 1, "enough")


def test_a_limit_ends_only_the_points_of_its_lengths() -> None:
    layout = ServingLayout()
    asked = [Lengths(input_len=60, output_len=20), Lengths(input_len=200, output_len=200)]
    points = ServingPoints.of([ServingPoint(layout=layout, lengths=a, batch=b) for a in asked for b in (1, 2)])
    view = ServingView(**{c: np.ones(4) for c in ("latency_ms", "ttft_ms", "tpot_ms", "error", "p_fit")})
    landscape = ServingLandscape(
        points=points,
        layout=np.zeros(4, dtype=np.int64),
        view=lambda _: view,
        objective="latency",
        targets=Targets(max_latency_ms=10),
    )
    endings = [ServedTrial(row=i, ending=Ending.MEASURED, latency_ms=ms) for i, ms in enumerate((11, 12, 5, 6))]

    class Whole:
        def next(self, trials: Sequence[ServedTrial]) -> Sitting | Stop:
            return Stop(why="enough") if trials else Sitting(layout=0, rows=(0, 1, 2, 3), stops_early=True, why="all")

    assert play(Whole(), landscape, endings)[0] == [0, 2, 3]


def test_a_strategy_that_repeats_itself_is_a_bug() -> None:
    (grid,), _ = grids_of(table(), "x")

    class Again:
        def next(self, trials: Sequence[ServedTrial]) -> Sitting:
            del trials
            return Sitting(layout=0, rows=(0,), stops_early=True, why="again")

    with pytest.raises(ValueError, match="row 0: measured before"):
        play(Again(), grid.landscape("latency", Targets()), grid.endings)


def test_grids_are_told_apart_by_lengths_engine_and_kind() -> None:
    served = table(engine="vllm", tpot_ms=10.0, ttft_ms=100.0)
    frame = pd.concat([table(), table(input_len=200), served], ignore_index=True)
    grids, _ = grids_of(frame, "x")
    assert [grid.kind for grid in grids] == ["static", "static", "serving"]
    assert grids[0].name == "made up, small, A100-80GB, FasterTransformer, 60:20"
    limits = {limit for _, limit, _ in grids[2].cases()}
    assert {"tpot 25%", "ttft 50%"} <= limits


def test_rows_that_say_nothing_are_left_out_and_counted() -> None:
    frame = pd.concat([table(), table().iloc[:2], table(gpu="abacus").iloc[:3]], ignore_index=True)
    frame.loc[7, "latency_ms"] = np.nan
    made = replay(frame, "grid")
    assert (made.unpredicted_rows, made.repeated_rows, made.untimed_rows, made.skipped) == (3, 2, 1, 0)
    assert case(made).points == 7
    assert "3 cannot be predicted" in printed(made)


def test_a_grid_of_too_few_points_is_skipped() -> None:
    made = replay(table().iloc[:3], "grid")
    assert (made.skipped, len(made.cases)) == (1, 0)
    assert "No grid was played." in printed(made)


def test_precision_is_an_axis_of_a_grid() -> None:
    frame = pd.concat([table(), table(precision="bf16", latency_ms=100.0)], ignore_index=True)
    (grid,), _ = grids_of(frame, "x")
    assert len(grid.points) == 16
    assert len(set(grid.landscape("latency", Targets()).layout.tolist())) == 4


# ---------------------------------------------------------------- errors and output


def test_errors_are_one_line() -> None:
    none: dict[str, Any] = {}
    for frame, strategy, options, said in (
        (table(), "random", none, "--strategy: 'random' is not for tables of serving; allowed are guided"),
        (table().drop(columns="latency_ms"), "guided", none, "latency_ms: the column is missing"),
        (table().iloc[:0], "guided", none, "no rows"),
        (
            table(),
            "guided",
            none | {"grid_id": "made up"},
            "unknown grid 'made up'; the nearest of 1 is 'made up, small",
        ),
    ):
        with pytest.raises(InputError) as raised:
            replay(frame, strategy, source="x.csv", **options)
        (line,) = raised.value.problems
        assert said in line


def hptool(*words: str | Path) -> Any:
    return CliRunner().invoke(main, ["replay", *map(str, words)], env={"COLUMNS": "100"})


def test_the_command_tells_tables_apart_by_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "served.csv"
    table().to_csv(path, index=False)
    done = hptool(path)
    assert done.exit_code == 0
    assert "guided, 1 published serving grids" in done.output
    name = "made up, small, A100-80GB, FasterTransformer, 60:20"
    document = json.loads(hptool(path, "--json", "--strategy", "bisect", "--grid", name).output)
    assert document["summary"]["strategy"] == "bisect"
    assert document["summary"]["kinds"][0]["large"] is False
    assert {c["grid"] for c in document["cases"]} == {name}
    for words, said in (
        (["--strategy", "naive"], "'naive' is not for tables of serving"),
        (["--max-tp", "2"], "--max-tp: given, but"),
        (["--primary"], "--primary: given, but"),
    ):
        refused = hptool(path, *words)
        assert refused.exit_code == 2
        assert said in refused.output
    runs = tmp_path / "runs.csv"
    pd.DataFrame({"grid_id": ["a", "a"], "tps_gpu_norm": [1.0, 2.0]}).to_csv(runs, index=False)
    refused = hptool(runs, "--strategy", "bisect")
    assert refused.exit_code == 2
    assert "'bisect' is not for tables of training runs" in refused.output


def test_what_is_printed_and_what_programs_get_agree() -> None:
    made = replay(tables.read_table(SMALL, ("batch",)), "bisect")
    lines = printed(made, each_grid=True).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any(line.split()[:2] == ["static,", "few"] for line in lines)
    document = as_json(made)
    assert json.loads(json.dumps(document)) == document
    assert document["cases"] == training.as_json(made)["cases"]
    assert len(document["cases"]) == len(made.cases)
    assert not any(math.isinf(x) for kind in document["summary"]["kinds"] for x in kind["share_to_best"].values() if x)


# ---------------------------------------------------------------- how few points it takes


@pytest.fixture(scope="module", params=["as named", "unknown"])
def guided(request: pytest.FixtureRequest) -> ServingReplay:
    """Guided on published grids of enough points, with the engines of the table and with one that nobody fitted.

    The second is harder than a search has it, and says what to expect of tables that no engine was fitted to.
    """
    frame = tables.read_table(WHOLE if WHOLE.is_file() else SMALL, ("batch",))
    same = ["series", "model", "gpu", "engine", "input_len", "output_len"]
    frame = frame[frame.groupby(same)["latency_ms"].transform("size") >= LARGE]
    if request.param == "as named":
        return replay(frame, "guided")
    some = frame.groupby(same, sort=False).ngroup() % (3 if WHOLE.is_file() else 1) == 0
    return replay(frame[some], "guided", engine=files.read_engine("other"))


def kind(made: ServingReplay, name: str, objective: str) -> KindSummary:
    (found,) = [s for s in made.summary if (s.kind, s.large, s.objective) == (name, True, objective)]
    return found


def test_static_grids_need_a_fifth_of_their_points(guided: ServingReplay) -> None:
    for objective in ("throughput-per-gpu", "latency"):
        found = kind(guided, "static", objective)
        assert found.to_best_worst is not None
        assert found.to_best_worst <= 0.2
        assert found.stop_worst <= 0.25
        assert found.regret <= 0.01


def test_serving_grids_need_three_tenths_of_their_points(guided: ServingReplay) -> None:
    # What makes requests wait for their first token is known to no formula, so these limits are held apart.
    cases = [c for c in guided.cases if c.kind == "serving" and c.objective != "pareto" and c.points >= LARGE]
    hard = [c for c in cases if c.limit.startswith("ttft")]
    easy = [c for c in cases if c not in hard]
    assert max(c.share_to_best for c in easy) <= 0.3
    assert max(c.share for c in easy) <= 0.4
    assert max(c.regret for c in easy) <= 0.01
    assert np.median([c.share_to_best for c in hard]) <= 0.3
    assert max(c.share for c in hard) <= 0.45
    assert max(c.regret for c in hard) <= 0.05


def test_the_frontier_needs_half_of_the_points_at_the_median(guided: ServingReplay) -> None:
    cases = [c for c in guided.cases if c.objective == "pareto" and c.points >= LARGE]
    assert np.quantile([c.share_to_best for c in cases], 0.5, method="higher") <= 0.5
    # A frontier is a third of the points; where it is not all found, one of them is missing.
    assert max(c.share for c in cases) <= 0.65
    assert np.mean([c.regret for c in cases]) <= 0.05
    assert max(c.regret for c in cases) <= 0.25


def test_bisecting_needs_no_prediction_but_more_points() -> None:
    frame = tables.read_table(SMALL, ("batch",))
    made = replay(frame, "bisect")
    found = kind(made, "static", "throughput-per-gpu")
    assert found.regret <= 0.01
    assert 0.1 < found.stop_median < 0.6
    assert kind(made, "static", "latency").to_best_worst is not None
