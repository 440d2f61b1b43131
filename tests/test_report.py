"""Reports: ranked by what was measured, whatever the order of arrival; nothing lost, nothing unescaped."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from syrupy.assertion import SnapshotAssertion

from hptool import report
from hptool.candidates import Layout
from hptool.measurement import FailureKind
from tests import samples

TWO = [
    samples.row(Layout(tp=2), samples.measurement(0.9, 0.006)),
    samples.row(Layout(pp=2, mbs=2), samples.measurement(0.5, 0.011)),
    samples.row(Layout(mbs=2), samples.failure()),
]


def printed(made: report.Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    report.print_table(made, console, top=10)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_table_in_80_columns(snapshot: SnapshotAssertion) -> None:
    text = printed(samples.sample_report(TWO, notes=("Runs used fewer nodes.",)))
    assert text == snapshot
    table = text.split("failed:", maxsplit=1)[0]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80


def test_the_page(snapshot: SnapshotAssertion) -> None:
    assert report.html(samples.sample_report(TWO, notes=("Runs used fewer nodes.",))) == snapshot


def test_the_csv_holds_every_run_by_field_name(tmp_path: Path) -> None:
    report.write(samples.sample_report(TWO), tmp_path)
    table = pd.read_csv(tmp_path / "report.csv").set_index("name")
    assert len(table) == 3
    best = table.loc[Layout(pp=2, mbs=2).name]
    assert (best["rank"], best["tp"], best["pp"], best["mbs"], best["dp"]) == (1, 1, 2, 2, 1)
    assert (best["step_time_s"], best["predicted_step_time_s"]) == (0.5, 0.45)
    assert best["mfu"] == pytest.approx(0.011 / 0.095, rel=1e-4)
    failed = table.loc[Layout(mbs=2).name]
    assert (failed["outcome"], failed["message"]) == ("oom", "out of memory")
    assert pd.isna(failed["step_time_s"])


def test_what_a_device_held_is_shown_with_what_is_free_and_never_scored() -> None:
    figures: dict[str, Any] = {"max_reserved_gib": 64.0, "device_used_gib": 66.5, "device_memory_gib": 79.2}
    slow, fast = samples.measurement(0.9, 0.006), samples.measurement(0.5, 0.011)
    full = replace(slow, peak_memory_gib=61.25, memory_kind="max allocated", **figures)
    made = samples.sample_report([samples.row(Layout(tp=2), full), samples.row(Layout(pp=2), fast)])
    assert [run["name"] for run in report.table_rows(made)] == [Layout(pp=2).name, Layout(tp=2).name]
    best, second = report.table_rows(made)
    assert (second["peak_memory_gib"], second["max_reserved_gib"], second["device_used_gib"]) == (61.25, 64.0, 66.5)
    assert second["headroom_gib"] == pytest.approx(79.2 - 66.5)
    assert (best["max_reserved_gib"], best["headroom_gib"]) == (None, pytest.approx(4.0 - 0.4))
    text = " ".join(printed(samples.sample_report([samples.row(Layout(tp=2), full)])).split())
    said = "61.25 GiB max allocated, 64.00 reserved, 66.50 taken of the device; 12.70 of 79.2 GiB free, 84% used"
    assert said in text
    assert report.USUAL_BAND in text
    assert "max allocated or max resident" in report.html(made)


def test_json_says_the_same() -> None:
    made = report.as_json(samples.sample_report(TWO), Path("results/demo"))
    again = json.loads(json.dumps(made))
    assert again["winner"] == Layout(pp=2, mbs=2).name
    assert [run["rank"] for run in again["runs"]] == [1, 2, None]
    assert again["rejections"][0]["count"] == 2


def test_a_search_without_a_measurement_says_why() -> None:
    rows = [
        samples.row(Layout(mbs=m), samples.failure(kind)) for m, kind in ((1, FailureKind.OOM), (2, FailureKind.HANG))
    ]
    made = samples.sample_report(rows)
    assert report.why_nothing_ran(made) == "All 2 runs failed: 1 × hang, 1 × oom."
    assert "All 2 runs failed" in printed(made)
    assert "No winner" in report.html(made)
    assert "winner:" not in printed(made)


def test_a_search_without_a_run_shows_what_is_expected() -> None:
    made = samples.sample_report([])
    text = printed(made)
    assert "predicted" in text
    assert all(x.layout.name in text for x in made.expected)
    assert len(made.expected) == 4


def test_what_a_job_said_cannot_become_markup() -> None:
    nasty = "<script>alert(1)</script> & [bold]x[/bold]"
    made = samples.sample_report([samples.row(Layout(), samples.failure(FailureKind.CRASH, nasty))])
    assert "<script>" not in report.html(made)
    assert "&lt;script&gt;" in report.html(made)
    assert nasty in printed(made, width=200)


def test_the_prediction_error_has_the_sign_of_the_prediction() -> None:
    optimistic = samples.row(Layout(), samples.measurement(0.9))
    assert optimistic.error_pct == pytest.approx(-50)
    assert samples.row(Layout(), samples.failure()).error_pct is None
