"""Whole serving searches on this machine: real jobs, the worker's own loop, commands of a user's, real signals."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner, Result

from hptool import files
from hptool.cli import main
from hptool.measurement import ServingMeasurement
from hptool.serving_orders import ServingOrders
from tests.conftest import ROOT
from tests.searches import finish, outcome_lines, processes_of, start_serving, wait_for


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run"
    yield path
    assert processes_of(path) == [], "a search left processes behind"


def hptool(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "100"})


def answering(script: str) -> tuple[str, ...]:
    """A user's engine: a line of Python that has `tp` and `batch`."""
    code = f"import json, sys, time; tp, batch = map(int, sys.argv[1:3]); {script}"
    return ("--engine", "command", "--command", shlex.join([sys.executable, "-c", code]) + " {tp} {batch}")


TIMES = 'print(json.dumps({"latency_ms": [100.0 * batch / tp] * 5, "ttft_ms": 10.0, "memory_gib": 0.5}))'


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One that has ended, and what it said."""

    path: Path
    answer: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """All batches of two layouts, measured by the worker's own loop."""
    path = tmp_path_factory.mktemp("served") / "run"
    process = start_serving(path, "--tp", "1,2", "--batch-sizes", "1,4", "--strategy", "grid", "--json")
    out, err = finish(process)
    assert process.returncode == 0, err
    assert processes_of(path) == []
    return Search(path=path, answer=json.loads(out), said=err)


def test_every_point_is_measured_once_and_the_best_comes_first(ended: Search) -> None:
    lines = outcome_lines(ended.path)
    assert [line["run"] for line in lines] == ["tp1-pp1-fp32", "tp2-pp1-fp32"]
    points = {(line["name"], p["batch"]): p for line in lines for p in line["serving"]["points"]}
    assert set(points) == {(name, batch) for name in ("tp1-pp1-fp32", "tp2-pp1-fp32") for batch in (1, 4)}
    assert all(p["repeats"] >= 5 and p["latency_ms"]["p50"] > p["ttft_ms"]["p50"] > 0 for p in points.values())
    (answer,) = ended.answer["answers"]
    best = max(points, key=lambda point: points[point]["tokens_per_s_per_gpu"])
    assert answer["lengths"] == "16:4"
    assert answer["best"] == f"{best[0]} 16:4/{best[1]}"
    # On two cores, exchanging every activation costs more than exchanging none.
    assert best == ("tp1-pp1-fp32", 4)
    assert ended.answer["spent"]["runs"] == 2
    assert ended.answer["engine"].startswith("megatron-core")
    assert "job " in ended.said
    assert "ended: every point was tried" in ended.said


def test_its_files_say_the_same(ended: Search) -> None:
    table = pd.read_csv(ended.path / "results.csv")
    assert list(table.name) == [run["name"] for run in ended.answer["runs"]]
    assert list(table.tokens_per_s_per_gpu) == sorted(table.tokens_per_s_per_gpu, reverse=True)
    assert list(pd.read_csv(ended.path / "pareto.csv").name) == ended.answer["answers"][0]["pareto"]
    predicted = pd.read_csv(ended.path / "predictions.csv")
    assert set(predicted.layout + " " + predicted.name) == set(table.name)
    theirs = pd.read_csv(ended.path / "final_output.csv")
    assert list(theirs.columns) == ["TP", "PP", "BS", "Latency [ms]", "Throughput per GPU [samples/sec/gpu]"]
    assert len(theirs) == 4
    best = yaml.safe_load((ended.path / "best.yaml").read_text())
    first = table.iloc[0]
    assert f"{best['best'][0]['layout']} 16:4/{best['best'][0]['batch']}" == first["name"]
    assert best["best"][0]["latency_ms"] == pytest.approx(first.latency_p50_ms, rel=1e-3)
    assert best["best"][0]["gpus"] == first.gpus
    page = (ended.path / "report.html").read_text()
    assert all(name.split()[0] in page for name in table.name)


def test_the_report_is_made_anew_from_the_records(ended: Search) -> None:
    names = ("report.html", "results.csv", "pareto.csv", "final_output.csv", "best.yaml")
    before = {name: (ended.path / name).read_text() for name in names}
    for name in names:
        (ended.path / name).unlink()
    done = hptool("report", ended.path, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert {key: answer[key] for key in ("answers", "runs", "trust")} == {
        key: ended.answer[key] for key in ("answers", "runs", "trust")
    }
    for name in names[1:]:
        assert (ended.path / name).read_text() == before[name]
    assert (ended.path / "report.html").is_file()
    shown = hptool("report", ended.path)
    assert "16:4: tp1-pp1-fp32, batch 4" in shown.stdout


def test_status_shows_its_runs(ended: Search) -> None:
    status = json.loads(hptool("status", ended.path, "--json").stdout)
    assert status["doing"] == "done: every point was tried"
    assert [(line["run"], line["state"], line["step"], line["of"]) for line in status["lines"]] == [
        ("tp1-pp1-fp32", "done", 2, 2), ("tp2-pp1-fp32", "done", 2, 2)
    ]  # fmt: skip
    (best,) = status["served"]
    assert (best["lengths"], best["layout"], best["point"]["batch"]) == ("16:4", "tp1-pp1-fp32", 4)
    shown = hptool("status", ended.path).stdout
    assert "tp2-pp1-fp32" in shown
    assert "best of 16:4: tp1-pp1-fp32 with batch 4" in " ".join(shown.split())


def test_the_command_of_the_best_times_it_again(ended: Search, tmp_path: Path) -> None:
    best = yaml.safe_load((ended.path / "best.yaml").read_text())
    assert best["command"] == ended.answer["serve_command"]
    orders = files.read(ended.path / "best" / "serving.json", ServingOrders)
    assert [point.name for point in orders.points] == ["16:4/4"]
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", best["command"]],
        cwd=tmp_path,
        env={**os.environ, "PATH": paths, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    again = files.read(ended.path / "best" / "again" / "measurement.json", ServingMeasurement)
    (point,) = again.points
    assert (point.name, again.gpus, again.precision) == ("16:4/4", 1, "fp32")


def test_a_search_that_is_done_measures_nothing_twice(ended: Search) -> None:
    lines = outcome_lines(ended.path)
    words = ("--tp", "1,2", "--batch-sizes", "1,4", "--strategy", "grid")
    refused = start_serving(ended.path, *words)
    _, err = finish(refused)
    assert refused.returncode == 2
    assert "holds this search already; go on with --resume" in err
    process = start_serving(ended.path, *words, "--resume")
    _, err = finish(process)
    assert process.returncode == 0, err
    assert "2 runs ended before, and are not repeated" in err
    assert "job " not in err
    assert outcome_lines(ended.path) == lines


def test_an_interrupted_search_leaves_nothing_and_resumes(results: Path) -> None:
    words = ("--tp", "1,2", "--batch-sizes", "1", "--strategy", "grid", "--json")
    process = start_serving(results, *words)
    wait_for(lambda: len(outcome_lines(results)) == 1 and len(list((results / "runs").iterdir())) == 2)
    time.sleep(0.5)  # the second run is at work
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all at once
    _, err = finish(process, timeout_s=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "--resume goes on from here" in err
    assert processes_of(results) == []
    before = outcome_lines(results)
    process = start_serving(results, *words, "--resume")
    out, err = finish(process)
    assert process.returncode == 0, err
    assert sorted(run["name"] for run in json.loads(out)["runs"]) == ["tp1-pp1-fp32 16:4/1", "tp2-pp1-fp32 16:4/1"]
    lines = outcome_lines(results)
    assert lines[: len(before)] == before
    assert len({line["name"] for line in lines}) == len(lines) == 2


def test_a_terminated_search_ends_the_users_command_too(results: Path) -> None:
    mark = results.parent / "begun"
    words = answering(f"open({str(mark)!r}, 'w'); time.sleep(600)")
    process = start_serving(results, "--tp", "1", "--batch-sizes", "1", *words)
    wait_for(mark.exists)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, timeout_s=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume goes on from here" in err
    wait_for(lambda: processes_of(mark) == [], timeout_s=10)


def test_where_nothing_keeps_the_limit_the_closest_is_reported(results: Path) -> None:
    words = ("--tp", "1,2", "--batch-sizes", "1,2,4", "--max-latency-ms", "10", "--json", *answering(TIMES))
    process = start_serving(results, *words)
    out, err = finish(process)
    assert process.returncode == 3, err
    assert "No point that was measured keeps the limits" in err
    status = hptool("status", results).stdout
    assert "best of 16:4: nothing measured keeps the limits" in " ".join(status.split())
    (answer,) = json.loads(out)["answers"]
    assert answer["best"] is None
    # The least that this engine can do is 50 ms.
    assert answer["closest"] == "tp2-pp1-fp32 16:4/1"
    assert [miss["over"] for miss in answer["misses"]] == [pytest.approx(5.0)]
    assert not (results / "best.yaml").exists()
    assert (results / "report.html").is_file()
    shown = hptool("report", results)
    assert shown.exit_code == 0
    assert "tp2-pp1-fp32" in shown.stdout


def test_a_layout_whose_runs_fail_leaves_the_table_intact(results: Path) -> None:
    words = answering(f"sys.exit('no kernel for two') if tp == 2 else {TIMES}")
    process = start_serving(results, "--tp", "1,2", "--batch-sizes", "1,2", "--strategy", "grid", "--json", *words)
    out, err = finish(process)
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert answer["answers"][0]["best"] is not None
    runs = {run["name"]: run for run in answer["runs"]}
    assert {name for name, run in runs.items() if run["outcome"] == "measured"} == {
        "tp1-pp1-fp32 16:4/1", "tp1-pp1-fp32 16:4/2"
    }  # fmt: skip
    failed = {name: run for name, run in runs.items() if run["tp"] == 2}
    assert set(failed) == {"tp2-pp1-fp32 16:4/1", "tp2-pp1-fp32 16:4/2"}
    assert {run["outcome"] for run in failed.values()} == {"crash"}
    assert all("no kernel for two" in run["message"] for run in failed.values())
    table = pd.read_csv(results / "results.csv")
    assert list(table.outcome) == ["measured", "measured", "crash", "crash"]


def test_where_nothing_runs_at_all_the_reason_is_said(results: Path) -> None:
    words = answering("sys.exit('no such engine')")
    process = start_serving(results, "--tp", "1", "--batch-sizes", "1,2", "--json", *words)
    out, err = finish(process)
    assert process.returncode == 4, err
    assert "No point that was tried gave anything" in err
    assert json.loads(out)["answers"][0]["best"] is None
    assert (results / "results.csv").is_file()


def test_a_dry_run_launches_nothing(results: Path) -> None:
    process = start_serving(results, "--dry-run", "--json")
    out, err = finish(process)
    assert process.returncode == 0, err
    assert json.loads(out)["spent"]["runs"] == 0
    assert {path.name for path in results.iterdir()} >= {"plan.json", "predictions.csv", "report.html"}
    assert not (results / "runs").exists()
    assert not (results / "submissions.jsonl").exists()
