"""Reports of serving searches: the answer first, every point by field name, nothing lost, nothing unescaped."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from syrupy.assertion import SnapshotAssertion

from hptool import report as training
from hptool import serving_report
from hptool.candidates import Rejection
from hptool.measurement import Failure, FailureKind
from hptool.serving import ServingLayout, Targets
from hptool.serving_report import ServingReport
from tests import serving_samples as samples
from tests.serving_samples import GRAPHS, LONG, ONE, SHORT, TWO
from tests.test_parity import known_cases


def printed(made: ServingReport, width: int = 80, top: int = 10) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    serving_report.print_table(made, console, top)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def without_charts(page: str) -> str:
    """The page, its charts left out: their numbers are matplotlib's, and tests/test_charts.py is theirs."""
    return re.sub(r"<svg.*?</svg>", "<svg></svg>", page, flags=re.DOTALL)


def both() -> ServingReport:
    """Two kinds of requests, of which only the first has points within the limits."""
    rows = [*samples.rows(), samples.row(ONE, 4, 3000.0, LONG, meets_targets=False)]
    return samples.report(rows, [SHORT, LONG])


def test_the_terminal_table(snapshot: SnapshotAssertion) -> None:
    assert printed(both()) == snapshot


def test_tables_fit_into_80_columns() -> None:
    wide = ServingLayout(tp=16, pp=16, cuda_graphs=True)
    rows = [samples.row(wide, 1024, 123456.7, is_pareto=True), samples.row(wide, 512, 1.2345)]
    lines = printed(samples.report(rows)).splitlines()
    table = [line for line in lines if wide.name in line and "batch" not in line]
    assert len(table) >= 2
    assert all(len(line.rstrip()) <= 80 and "…" not in line for line in table)


def test_the_page(snapshot: SnapshotAssertion) -> None:
    page = serving_report.html(both())
    assert without_charts(page) == snapshot
    assert page.count("<svg") == 2
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page), "nothing is fetched from anywhere"


def test_the_table_has_every_point_by_field_name() -> None:
    rows = serving_report.table_rows(both())
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6, None, None, None, 1]
    best = rows[0]
    assert (best["name"], best["outcome"], best["tp"], best["pp"]) == ("tp1-pp1-bf16 60:20/8", "measured", 1, 1)
    assert (best["batch"], best["input_len"], best["output_len"]) == (8, 60, 20)
    assert (best["latency_p50_ms"], best["latency_p95_ms"], best["latency_p99_ms"]) == pytest.approx((240, 252, 264))
    assert (best["ttft_p50_ms"], best["tpot_p50_ms"]) == pytest.approx((24, 216 / 19))
    assert best["tokens_per_s"] == pytest.approx(8 * 20 / 0.24)
    assert best["requests_per_s_per_gpu"] == pytest.approx(8 / 0.24)
    assert best["tokens_per_s_per_user"] == pytest.approx(20 / 0.24)
    # At the percentile that is to be kept, p95.
    assert (best["error_pct"], best["learned_error_pct"]) == pytest.approx((100 * (288 / 252 - 1), 0))
    # 80 of the device, without the peak of the point and what the run held outside the allocator.
    assert best["headroom_gib"] == pytest.approx(80 - 1.625 - (4 - 3))
    assert (best["is_pareto"], best["meets_targets"], best["is_equal_to_best"]) == (True, True, False)
    assert (rows[1]["is_equal_to_best"], rows[5]["meets_targets"]) == (True, False)
    failed = rows[7]
    assert (failed["outcome"], failed["message"], failed["cuda_graphs"]) == ("crash", "no kernel", True)
    assert failed["log_path"] == "runs/tp2/logs/rank-1.log"
    assert failed["latency_p50_ms"] is None
    assert failed["predicted_latency_ms"] == 500
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same columns"


def test_csv_files_hold_what_was_found(tmp_path: Path) -> None:
    serving_report.write(both(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.csv", "pareto.csv", "report.html", "final_output.csv", "final_output_60_20.csv",
        "final_output_512_128.csv",
    }  # fmt: skip
    table = pd.read_csv(tmp_path / "results.csv")
    assert len(table) == 10
    assert table["outcome"].value_counts().to_dict() == {"measured": 7, "crash": 2, "oom": 1}
    frontier = pd.read_csv(tmp_path / "pareto.csv")
    assert list(frontier.columns) == list(table.columns)
    assert list(frontier["latency_p50_ms"]) == [100, 150, 240]
    assert (tmp_path / "final_output.csv").read_text() == (tmp_path / "final_output_60_20.csv").read_text()


def test_the_predecessor_s_file_has_its_columns_and_its_figures(tmp_path: Path) -> None:
    serving_report.write(samples.report(samples.rows()), tmp_path)
    assert not list(tmp_path.glob("final_output_*.csv")), "one kind of request needs one file"
    lines = (tmp_path / "final_output.csv").read_text().splitlines()
    assert lines == [
        "TP,PP,BS,Latency [ms],Throughput per GPU [samples/sec/gpu]",
        "1,1,16,400.0,40.0",
        "1,1,8,240.0,33.333",
        "2,1,16,241.0,33.195",
        "2,1,8,150.0,26.667",
        "2,1,1,100.0,5.0",
        "1,1,1,200.0,5.0",
    ]


def test_its_throughput_is_the_predecessor_s() -> None:
    cases = known_cases()["inference_throughput"]
    assert cases
    for case in cases:
        given = case.given
        row = serving_report.predecessor_row(
            tp=given["tp"], pp=given["pp"], batch=given["batch_size"], latency_ms=given["latency_ms"]
        )
        assert row["Throughput per GPU [samples/sec/gpu]"] == case.answer, case.name


def test_its_throughput_follows_from_the_latency_that_is_written(tmp_path: Path) -> None:
    odd = ServingLayout(tp=2, pp=3)
    serving_report.write(samples.report([samples.row(odd, 7, 1000 / 3), samples.row(odd, 3, 77.123456789)]), tmp_path)
    table = pd.read_csv(tmp_path / "final_output.csv")
    for _, row in table.iterrows():
        assert row.iloc[4] == round(row["BS"] * 1000 / row["Latency [ms]"] / row["TP"] / row["PP"], 3)


def test_json_says_the_same() -> None:
    made = json.loads(json.dumps(serving_report.as_json(both(), Path("results/demo")), allow_nan=False))
    assert set(made) == {
        "model", "cluster", "nodes", "gpus", "num_parameters", "engine", "objective", "targets", "answers",
        "best_config", "serve_command", "reason", "runs", "predicted", "layouts", "points", "rejections", "skipped",
        "notes", "trust", "spent", "results", "report",
    }  # fmt: skip
    short, long = made["answers"]
    assert short == {
        "lengths": "60:20",
        "best": "tp1-pp1-bf16 60:20/8",
        "closest": None,
        "misses": [],
        "equal_to_best": ["tp2-pp1-bf16 60:20/16"],
        "pareto": ["tp2-pp1-bf16 60:20/1", "tp2-pp1-bf16 60:20/8", "tp1-pp1-bf16 60:20/8"],
    }
    assert (long["best"], long["closest"]) == (None, "tp1-pp1-bf16 512:128/4")
    assert [(miss["name"], miss["limit_ms"]) for miss in long["misses"]] == [
        ("latency p95", 260),
        ("first token p95", 50),
    ]
    assert long["misses"][0]["over"] == pytest.approx(3150 / 260)
    assert len(made["runs"]) == 10
    assert made["reason"] is None


# ---------------------------------------------------------------- without an answer


def test_where_no_point_keeps_the_limits_the_closest_is_named_with_what_it_misses() -> None:
    made = samples.report([samples.row(ONE, 8, 400.0, meets_targets=False)])
    assert serving_report.why_nothing(made) == (
        "No point that was measured keeps the limits: latency ≤ 260 ms, first token ≤ 50 ms at p95."
    )
    text, page = printed(made), serving_report.html(made)
    for shown in (text, page):
        assert "no measured point keeps the limits; closest: tp1-pp1-bf16, batch 8" in shown
        assert "latency p95 420 ms is 1.62 × its limit of 260 ms" in shown
        assert "first token" not in shown.split("misses:", 1)[1].split("speed:")[0], "42 ms keep the limit of 50"
    assert "config:" not in text


@pytest.mark.parametrize("kinds", [(FailureKind.OOM,), (FailureKind.OOM, FailureKind.HANG, FailureKind.OOM)])
def test_where_all_failed_it_says_so(kinds: Sequence[FailureKind], tmp_path: Path) -> None:
    rows = [samples.failed(ONE, 2**i, Failure(kind=kind, message="no")) for i, kind in enumerate(kinds)]
    made = samples.report(rows)
    why = serving_report.why_nothing(made)
    assert why is not None
    assert why.startswith("No point that was tried gave anything: ")
    assert f"{kinds.count(FailureKind.OOM)} × oom" in why
    assert why in printed(made)
    page = serving_report.html(made)
    assert why in page
    assert "<svg" not in page
    serving_report.write(made, tmp_path)
    assert len(pd.read_csv(tmp_path / "results.csv")) == len(kinds)
    for name in ("pareto.csv", "final_output.csv"):
        assert pd.read_csv(tmp_path / name).empty


def test_where_nothing_was_tried_predictions_are_shown(tmp_path: Path) -> None:
    made = samples.report([])
    assert serving_report.why_nothing(made) == "No point was measured; what is shown is predicted."
    assert all(point.layout.name in printed(made) for point in made.expected)
    assert "Not measured yet" in serving_report.html(made)
    serving_report.write(made, tmp_path)
    table = pd.read_csv(tmp_path / "results.csv")
    assert table.empty
    assert list(table.columns) == list(serving_report.table_rows(both())[0])
    assert json.dumps(serving_report.as_json(made, tmp_path))


# ---------------------------------------------------------------- what the reader is told


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (Targets(), "no limits"),
        (Targets(max_tpot_ms=8.25, percentile=99), "each token ≤ 8.25 ms at p99"),
        (Targets(max_latency_ms=12000.0), "latency ≤ 12,000 ms at p50"),
    ],
)
def test_limits_are_told_in_words(targets: Targets, words: str) -> None:
    assert serving_report.targets_words(targets) == words


def test_a_limit_that_is_met_is_kept() -> None:
    point = samples.served(ONE, 8, 240.0)
    assert not serving_report.misses(Targets(max_latency_ms=240.0), point)
    missed = serving_report.misses(Targets(max_latency_ms=200.0, max_ttft_ms=12.0), point)
    assert [miss.name for miss in missed] == ["first token p50", "latency p50"], "the worst first"


@pytest.mark.parametrize(
    ("objective", "others", "expected"),
    [
        ("throughput-per-gpu", {}, ["tp2-pp1-bf16 60:20/16"]),
        ("throughput-per-gpu", {"meets_targets": False}, []),
        ("latency", {}, ["tp2-pp1-bf16 60:20/16"]),
        ("pareto", {}, []),
    ],
)
def test_equals_are_those_whose_intervals_overlap(
    objective: Any, others: Mapping[str, Any], expected: Sequence[str]
) -> None:
    rows = [samples.row(ONE, 8, 240.0), samples.row(TWO, 16, 241.0, **others), samples.row(TWO, 8, 300.0)]
    made = samples.report(rows, objective=objective)
    assert [row.name for row in serving_report.equals(made, made.answers[0])] == expected


def test_a_run_that_crashed_is_told_once() -> None:
    text = printed(samples.report(samples.rows()))
    assert text.count("no kernel") == 1
    assert "tp2-pp1-bf16-graphs 60:20/1 and 1 more of its points: crash: no kernel" in text
    assert text.count("failed:") == 2


def test_only_the_best_of_many_are_printed_and_the_page_has_all() -> None:
    made = samples.report(samples.rows())
    assert len(re.findall(r"^ ?\d[=*!]* +tp", printed(made, top=2), flags=re.MULTILINE)) == 2
    assert serving_report.html(made).count('<td class="text">tp') >= len(samples.rows())


def test_the_frontier_is_told_where_it_is_what_is_wanted() -> None:
    text = printed(samples.report(samples.rows(), objective="pareto"))
    assert "range:  3 points on the frontier, from 105 ms with 100 tokens/s/GPU to 252 ms with 666.7" in text


def test_passes_that_had_not_settled_are_told() -> None:
    row = samples.row(ONE, 8, 240.0)
    assert row.served is not None
    made = samples.report([replace(row, served=replace(row.served, is_steady=False))])
    assert "beware: its passes had not settled" in printed(made)
    assert "not settled" in serving_report.html(made)


def test_figures_have_four_digits_and_no_exponent() -> None:
    shown = [training.figure(x) for x in (0.0, 0.0123456, 98.7654, 999.96, 12345.6, 1234567.0)]
    assert shown == ["0", "0.01235", "98.77", "1000", "12,346", "1,234,567"]


NASTY = "</td></table><script>alert(1)</script> & [bold]x[/bold]"


def test_nothing_that_a_user_or_a_job_said_becomes_markup() -> None:
    failure = Failure(kind=FailureKind.CRASH, message=NASTY, log_path=f"logs/{NASTY}")
    rows = [samples.row(ONE, 8, 240.0), samples.failed(GRAPHS, 8, failure)]
    made = samples.report(
        rows,
        model=NASTY,
        engine=NASTY,
        notes=[NASTY],
        best_path=NASTY,
        serve_command=NASTY,
        rejections=[Rejection(reason=NASTY, count=1, example=NASTY)],
        skipped={NASTY: 1},
    )
    page = serving_report.html(made)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 9
    assert page.count("<svg") == 1, "the chart itself stays markup"
    assert printed(made, width=300).count(NASTY) >= 8


def test_pages_of_both_kinds_have_one_skeleton() -> None:
    """What is shared is written once: `templates/base.html.j2`."""
    from tests import samples as of_training  # noqa: PLC0415 (only here)
    from tests.test_report import TWO as RUNS  # noqa: PLC0415 (as above)

    pages = serving_report.html(both()), training.html(of_training.sample_report(RUNS))
    rules = [re.findall(r"^  (?:body|\.answer|th, td|tr\.winner).*", page, flags=re.MULTILINE) for page in pages]
    assert set(rules[1]) <= set(rules[0])
    assert rules[1]
