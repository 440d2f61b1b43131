"""Whole searches on this machine: real jobs, real Megatron-core, real signals."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml

from hptool import files
from hptool.base_config import BaseConfig
from tests.conftest import ROOT
from tests.searches import finish, outcome_lines, processes_of, start, wait_for


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run"
    yield path
    assert processes_of(path) == [], "a search left processes behind"


def test_the_demo_ends_with_the_winner_and_measures_nothing_twice(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "demo", f"DEMO_RESULTS={tmp_path / 'demo'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_csv(tmp_path / "demo" / "report.csv")
    assert (table.outcome == "measured").all()
    cuts = set(zip(table.tp, table.pp, table.dp, table.mbs, strict=True))
    assert cuts <= {(2, 1, 1, 1), (2, 1, 1, 2), (1, 2, 1, 1), (1, 2, 1, 2), (1, 1, 2, 1), (1, 1, 2, 2)}
    rates = list(table.model_tflops_per_gpu)
    assert rates == sorted(rates, reverse=True)
    # On two cores, exchanging every activation costs more than exchanging none.
    assert table.tp.iloc[0] == 1
    # The winner was timed for as long as the demo allows, after a short timing of everything.
    lines = outcome_lines(tmp_path / "demo")
    assert {line["steps"] for line in lines} == {8, 20}
    assert max(line["steps"] for line in lines if line["name"] == table.name.iloc[0]) == 20
    winner = re.search(r"winner: (\S+)", done.stdout)
    assert winner is not None
    assert winner[1] == table.name.iloc[0]
    optimal = files.read(tmp_path / "demo" / "optimal.yaml", BaseConfig)
    assert optimal.layout.name == winner[1]
    again = subprocess.run(
        ["make", "demo", f"DEMO_RESULTS={tmp_path / 'demo'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert again.returncode == 0
    assert "job " not in again.stderr  # nothing is measured twice
    assert outcome_lines(tmp_path / "demo") == lines


def test_the_winner_trains_with_the_command_that_the_report_names(results: Path, tmp_path: Path) -> None:
    out, err = finish(start(results, "--json", "--tp", "1", "--pp", "2", "--mbs", "2", "trainer.max_steps=3"))
    answer = json.loads(out)
    assert answer["winner"] == "tp1-pp2-vpp1-cp1-mbs2-none", err
    config = yaml.safe_load((results / "optimal.yaml").read_text())
    assert config["trainer"]["max_steps"] == 3  # the training's own, not the run's
    done = subprocess.run(
        ["bash", "-c", answer["train_command"]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trained = pd.read_csv(results / "training" / "losses.csv")
    measured = outcome_lines(results)[0]["measurement"]
    assert isinstance(measured, dict)
    assert list(trained.loss) == pytest.approx(measured["losses"][:3], rel=1e-5)
    assert json.loads((results / "training" / "result.json").read_text())["stopped"] == "done"


def test_a_run_that_needs_too_much_memory_is_one_row_among_others(results: Path, tmp_path: Path) -> None:
    profile = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    gpu = yaml.safe_load((ROOT / "cluster" / "gpus" / "cpu.yaml").read_text())
    profile["gpu"] = {**gpu, "memory_gib": 0.8}  # a real limit of each rank
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(profile))
    # Eight sequences at once hold eight times the attention scores of one.
    longer = [f"model.{key}=1024" for key in ("encoder_seq_length", "data.seq_length", "max_position_embeddings")]
    words = ("--tp", "1", "--pp", "2", "--mbs", "1,8", "model.num_layers=2", "model.use_flash_attention=false", *longer)
    out, err = finish(
        start(results, "--json", "--max-steps-per-run", "2", *words, cluster=str(tmp_path / "small.yaml"))
    )
    answer = json.loads(out)
    assert answer["winner"] == "tp1-pp2-vpp1-cp1-mbs1-none", err
    outcomes = {run["mbs"]: run for run in answer["runs"]}
    assert (outcomes[1]["outcome"], outcomes[8]["outcome"]) == ("measured", "oom")
    assert (Path(outcomes[8]["log_path"])).exists()
    assert outcomes[8]["predicted_memory_gib"] > outcomes[1]["predicted_memory_gib"]


def test_a_run_over_its_minutes_is_a_timeout_and_leaves_nothing(results: Path) -> None:
    out, err = finish(
        start(
            results, "--json", "--tp", "1", "--pp", "1", "--mbs", "1", "--max-minutes-per-run", "0.25",
            "--stages", "100000",
        )
    )  # fmt: skip
    answer = json.loads(out)
    assert answer["winner"] is None
    assert answer["runs"][0]["outcome"] == "timeout"
    assert "1 × timeout" in answer["reason"]
    assert (results / "report.html").is_file()
    assert "hptool: error" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_search_leaves_nothing_and_resumes(number: signal.Signals, results: Path) -> None:
    words = ("--tp", "1", "--pp", "1,2", "--mbs", "1", "--json")
    process = start(results, *words)
    wait_for(lambda: len(outcome_lines(results)) == 1 and len(list((results / "runs").iterdir())) == 2)
    time.sleep(1)  # the second run is at work
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does it: to all at once
    else:
        process.send_signal(number)
    _, err = finish(process, timeout_s=30)
    assert process.returncode == 128 + number
    assert "--resume goes on from here" in err
    assert processes_of(results) == []
    first = outcome_lines(results)[0]
    process = start(results, *words, "--resume")
    out, err = finish(process)
    assert process.returncode == 0, err
    assert len(json.loads(out)["runs"]) == 2
    lines = outcome_lines(results)
    assert lines[0] == first
    assert [line["name"] for line in lines[1:]] != [first["name"]]
    assert len(lines) == 2


def test_a_killed_search_takes_its_job_along_and_resumes(results: Path) -> None:
    words = ("--tp", "1", "--pp", "1,2", "--mbs", "2")
    process = start(results, *words)
    wait_for(lambda: len(outcome_lines(results)) == 1 and len(list((results / "runs").iterdir())) == 2)
    process.kill()
    finish(process)
    wait_for(lambda: processes_of(results) == [], timeout_s=30)
    process = start(results, *words, "--resume")
    _, err = finish(process)
    assert process.returncode == 0, err
    assert len({line["name"] for line in outcome_lines(results)}) == len(outcome_lines(results)) == 2


def test_a_killed_job_is_seen_within_seconds(results: Path) -> None:
    process = start(results, "--tp", "1", "--pp", "1", "--mbs", "1", "--stages", "100000", "--json")
    log = results / "runs" / "tp1-pp1-vpp1-cp1-mbs1-none" / "logs" / "rank-1.log"
    wait_for(log.exists)
    time.sleep(3)
    for words in processes_of(results):
        if "submitit.local._local" in words or "submitit.core._submit" in words:
            subprocess.run(["pkill", "-KILL", "-f", f"submitit.*{results}"], check=False)
            break
    out, _ = finish(process, timeout_s=60)
    assert json.loads(out)["runs"][0]["outcome"] in {"crash", "lost"}
