"""Whole searches for the fastest way to serve, through a real Slurm."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.searches import outcome_lines, processes_of
from tests.slurm.conftest import DevSlurm
from tests.slurm.test_search_on_slurm import queue

pytestmark = pytest.mark.slurm

#: All points of two short kinds of request, each once.
WORDS = ("--model", "gpt3/tiny", "--workload", "16:4", "--strategy", "grid", "--max-minutes-per-run", "3", "--json")


@pytest.fixture
def results(tmp_path: Path, slurm: DevSlurm) -> Iterator[Path]:
    del slurm
    path = tmp_path / "run"
    yield path
    assert queue() == [], "a search left jobs behind"
    assert processes_of(path) == [], "a search left processes behind"


def search(results: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hptool", "search-inference", "--cluster", "dev-slurm", "--results", str(results)]
    return subprocess.run(
        [*command, *WORDS, *words], capture_output=True, text=True, cwd=ROOT, timeout=280, check=False
    )


def test_layouts_on_one_and_two_nodes_are_served_and_ranked(results: Path) -> None:
    done = search(results, "--nodes", "2", "--tp", "1,2", "--pp", "1,2", "--batch-sizes", "1,2")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    runs = {run["name"]: run for run in answer["runs"]}
    layouts = [f"tp{tp}-pp{pp}-fp32" for tp in (1, 2) for pp in (1, 2)]
    assert set(runs) == {f"{layout} 16:4/{batch}" for layout in layouts for batch in (1, 2)}
    assert all(run["outcome"] == "measured" for run in runs.values())
    assert {run["name"].split()[0]: run["gpus"] for run in runs.values()} == {
        "tp1-pp1-fp32": 1, "tp1-pp2-fp32": 2, "tp2-pp1-fp32": 2, "tp2-pp2-fp32": 4,
    }  # fmt: skip
    # One run for each layout, that of four ranks on two nodes.
    assert {line["name"]: line["nodes"] for line in outcome_lines(results)} == dict.fromkeys(layouts[:3], 1) | {
        "tp2-pp2-fp32": 2
    }
    rates = [run["tokens_per_s_per_gpu"] for run in answer["runs"]]
    assert rates == sorted(rates, reverse=True)
    best = yaml.safe_load((results / "best.yaml").read_text())["best"][0]
    assert f"{best['layout']} {best['workload']}/{best['batch']}" == answer["runs"][0]["name"]
    again = search(results, "--nodes", "2", "--tp", "1,2", "--pp", "1,2", "--batch-sizes", "1,2", "--resume")
    assert again.returncode == 0, again.stderr
    assert len(outcome_lines(results)) == 4  # nothing is run twice
    shown = subprocess.run(
        [sys.executable, "-m", "hptool", "status", str(results), "--json"], capture_output=True, text=True, check=True
    )
    assert [line["state"] for line in json.loads(shown.stdout)["lines"]] == ["done"] * 4


def test_a_layout_whose_job_fails_leaves_the_table_whole(results: Path) -> None:
    # A command of the user's that cannot run on two GPUs, on every other layout answers in 10 ms a request.
    script = results.parent / "answer.sh"
    script.write_text(
        'test "$1" -eq 1 || { echo no second GPU >&2; exit 3; }\nprintf \'{"latency_ms": %d}\\n\' $((10 * $2))\n'
    )
    command = f"sh {script} {{tp}} {{batch}}"
    done = search(
        results, "--nodes", "1", "--tp", "1,2", "--pp", "1", "--batch-sizes", "1,4",
        "--engine", "command", "--command", command,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    outcomes = {run["name"]: run["outcome"] for run in answer["runs"]}
    assert outcomes == {
        "tp1-pp1-fp32 16:4/1": "measured", "tp1-pp1-fp32 16:4/4": "measured",
        "tp2-pp1-fp32 16:4/1": "crash", "tp2-pp1-fp32 16:4/4": "crash",
    }  # fmt: skip
    messages = [run["message"] for run in answer["runs"] if run["outcome"] == "crash"]
    assert all("no second GPU" in message for message in messages)
    with (results / "results.csv").open(encoding="utf-8") as file:
        assert [row["outcome"] for row in csv.DictReader(file)] == ["measured", "measured", "crash", "crash"]
    with (results / "final_output.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # The predecessor's columns; its throughput counts requests.
    assert [(row["TP"], row["PP"], float(row["Throughput per GPU [samples/sec/gpu]"])) for row in rows] == [
        ("1", "1", 100.0), ("1", "1", 100.0),
    ]  # fmt: skip
