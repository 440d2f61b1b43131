"""`make gpu` without a GPU: all of it on toy models, and its parts one by one."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from hptool import files, forecast, replay, serving_tables, tables
from hptool.measurement import Failure, FailureKind, Percentiles, PointFailure, ServedPoint, ServingMeasurement
from hptool.predict import Predictions
from hptool.results import OutcomeRecord
from tests import samples
from tests.benchmarks import gpu_gaps, gpu_serving, gpu_speed
from tests.conftest import ROOT
from tests.gpu import __main__ as suite
from tests.gpu import collect, device, landscapes, numerics, runs, score, stages, summary
from tests.gpu.__main__ import KEEP, LANDSCAPES, SUMMARY, Suite
from tests.gpu.command import Given
from tests.gpu.device import Device
from tests.gpu.models import LANDSCAPES as MODELS
from tests.gpu.models import Model, named, plan_of
from tests.gpu.record import RECORD, UNFINISHED, Clock, Record, read_record
from tests.gpu.score import Score
from tests.gpu.stages import STAGES, StageEnd, State

H100 = Device(kind="cuda", name="NVIDIA H100 80GB HBM3", gpu="h100-80gb", memory_gib=79.2, driver="575.57.08")

#: What is allowed to come back from such a machine.
MOST_FILES, MOST_BYTES = 8, 16 * 2**20


# ---------------------------------------------------------------- all of it


def call(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The suite in its small mode."""
    command = [sys.executable, "-m", "tests.gpu", "--output", str(output), "--device", "cpu", "--tiny", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_whole_suite_in_its_small_mode_and_again_elsewhere(tmp_path: Path) -> None:
    first = call(tmp_path / "one", "--minutes", "30")
    keep = tmp_path / "one" / KEEP
    assert first.returncode == 0, f"{first.stdout}\n{first.stderr}\n{(keep / 'logs.txt').read_text()}"
    assert len(list(keep.iterdir())) <= MOST_FILES
    assert all(path.stat().st_size < MOST_BYTES for path in keep.iterdir())
    document = json.loads((keep / SUMMARY).read_text())
    states = {stage["name"]: stage["state"] for stage in document["stages"]}
    assert {name for name, state in states.items() if state != State.DONE} <= {"calibrate"}
    figures = {verdict["what"]: verdict for verdict in document["verdicts"]}
    assert figures["checks passed"]["met"]
    assert figures["gpt-tiny: layouts measured"]["measured"] == "2 of 2"
    assert all(figures[what]["measured"] for what in ("gpt-tiny: tokens/s to plain PyTorch", "llama-tiny: of the peak"))
    assert figures["gpt-tiny: idle"]["measured"]
    assert figures["gpt-tiny: points measured"]["measured"] == "2 of 2"
    assert first.stdout.rstrip().endswith((keep / "summary.txt").read_text().rstrip())

    (table,) = keep.glob("measured-*.csv")
    frame = tables.read_table(table, required=("grid_id", *tables.REQUIRED))
    assert list(frame["outcome"]) == ["ok", "ok"]
    (points,) = keep.glob("serving-*.csv")
    assert list(tables.read_table(points, required=serving_tables.REQUIRED)["batch"]) == [1, 2]
    assert len(forecast.forecast(frame).row) == 2
    (grid,) = replay.replay(frame, "adaptive").grids
    assert grid.rows == 2

    # Another machine, which has to make sure of the landscapes: no run is made again.
    for stage in document["stages"]:
        stage["state"] = State.UNFINISHED if stage["name"] == "landscapes" else stage["state"]
    (keep / SUMMARY).write_text(json.dumps(document))
    second = call(tmp_path / "two", "--minutes", "30", "--previous", str(tmp_path / "one"))
    assert second.returncode == 0, second.stdout
    assert "numerics: done by an earlier call" in second.stdout
    assert "gpt-tiny: 2 of 2 layouts measured" in (tmp_path / "two" / "landscapes.log").read_text()
    assert (tmp_path / "two" / KEEP / LANDSCAPES).read_text() == (keep / LANDSCAPES).read_text()
    assert not list((tmp_path / "two").glob("landscapes/searches/*/runs"))


def test_a_machine_without_a_gpu_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert device.main(tmp_path / "device.json", "cuda") == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(suite, "detect", lambda *_: None)
    assert CliRunner().invoke(suite.main, ["--output", str(tmp_path)]).exit_code == 1


# ---------------------------------------------------------------- the time


def test_shares_add_up_to_what_is_left() -> None:
    names, left_s, taken = [stage.name for stage in STAGES], 600.0, 0.0
    for stage in STAGES:
        share = stages.share_s(stage, names, left_s - taken)
        assert 0 < share <= left_s
        taken += share
    assert taken == pytest.approx(left_s)


def test_a_stage_that_is_done_leaves_its_time_to_the_others() -> None:
    names = [stage.name for stage in STAGES]
    assert stages.share_s(STAGES[-1], [STAGES[-1].name], 500.0) == 500.0
    assert stages.share_s(STAGES[1], names[1:], 600.0) > stages.share_s(STAGES[1], names, 600.0 * 0.5)
    assert stages.share_s(STAGES[0], names, -3.0) == 0.0


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_over_its_time_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "GRACE_S", 0.2)
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(stages, "_TERM_S", 0.2)
    end = stages.run(python(code), log=tmp_path / "log", seconds=1.5, environment={})
    assert end.state is State.FAILED
    assert "its share is over" in end.detail
    assert end.seconds < 30
    child = int((tmp_path / "log").read_text())
    until = time.monotonic() + 10
    while time.monotonic() < until and Path(f"/proc/{child}/stat").exists():
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(("code", "state"), [(0, State.DONE), (UNFINISHED, State.UNFINISHED), (3, State.FAILED)])
def test_the_exit_code_says_how_a_stage_stands(tmp_path: Path, code: int, state: State) -> None:
    end = stages.run(python(f"print('last words'); exit({code})"), log=tmp_path / "log", seconds=60, environment={})
    assert end.state is state
    assert end.tail == ["last words"]
    assert ("last words" in end.detail) == (state is State.FAILED)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, int]], list[str]]:
    """Stages that end with these codes at once, others with 0; the names of those that were run."""

    def fake(codes: dict[str, int]) -> list[str]:
        ran: list[str] = []

        def command_of(stage: stages.Stage, *_: object, **__: object) -> list[str]:
            ran.append(stage.name)
            return python(f"print('{stage.name} speaks'); exit({codes.get(stage.name, 0)})")

        monkeypatch.setattr(stages, "command_of", command_of)
        return ran

    return fake


def made(output: Path, minutes: float = 10.0, before: dict[str, str] | None = None) -> Suite:
    clock = Clock(seconds=60 * minutes)
    return Suite(output=output, device=H100, tiny=False, clock=clock, before=before or {})


def test_a_failing_stage_is_reported_and_the_others_go_on(
    tmp_path: Path, faked: Callable[[dict[str, int]], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = faked({"speed": 3})
    called = made(tmp_path)
    called.run([stage.name for stage in STAGES])
    assert ran == [stage.name for stage in STAGES]
    states = {report.name: report.state for report in called.reports()}
    assert [name for name, state in states.items() if state is State.FAILED] == ["speed"]
    assert "  | speed speaks" in capsys.readouterr().out
    assert "speed: failed" in called.conclude()
    assert "speed speaks" in (tmp_path / KEEP / "logs.txt").read_text()


def test_what_is_done_is_not_done_again_and_what_failed_is(
    tmp_path: Path, faked: Callable[[dict[str, int]], list[str]]
) -> None:
    ran = faked({})
    before = {"numerics": "done", "speed": "failed", "gaps": "unfinished", "calibrate": "done"}
    made(tmp_path, before=before).run([stage.name for stage in STAGES])
    assert ran == ["speed", "gaps", "serving", "landscapes"]


def test_without_time_a_stage_is_not_begun_and_that_is_said(
    tmp_path: Path, faked: Callable[[dict[str, int]], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = faked({})
    made(tmp_path, minutes=0.7).run([stage.name for stage in STAGES])
    assert ran == []
    assert "landscapes: no time is left for it" in capsys.readouterr().out


def test_a_record_keeps_findings_and_forgets_problems(tmp_path: Path) -> None:
    record = Record(tmp_path)
    assert record.exit_code == 0
    record.find("a", {"b": 1})
    record.leave("much")
    assert record.exit_code == UNFINISHED
    record.complain("two\nlines")
    assert record.exit_code == 1
    assert read_record(tmp_path)["problems"] == ["two lines"]
    again = Record(tmp_path)
    assert (again.findings, again.problems, again.left) == ({"a": {"b": 1}}, [], [])


def test_what_was_kept_comes_back_on_the_same_device_only(tmp_path: Path) -> None:
    record = Record(tmp_path / "one" / "speed")
    record.find("a", 1)
    made(tmp_path / "one").conclude()
    assert suite.restore(tmp_path / "two", tmp_path / "one", H100, tiny=False, again=[])["speed"] == State.UNFINISHED
    assert read_record(tmp_path / "two" / "speed")["findings"] == {"a": 1}
    other_driver = replace(H100, memory_gib=79.1)
    assert suite.restore(tmp_path / "five", tmp_path / "one", other_driver, tiny=False, again=[])
    h200 = replace(H100, gpu="h200", memory_gib=139.8)
    assert suite.restore(tmp_path / "three", tmp_path / "one", h200, tiny=False, again=[]) == {}
    assert suite.restore(tmp_path / "three", tmp_path / "one", H100, tiny=True, again=[]) == {}
    assert not (tmp_path / "three").exists()
    states = suite.restore(tmp_path / "four", tmp_path / "one", H100, tiny=False, again=["speed"])
    assert "speed" not in states
    assert not (tmp_path / "four" / "speed" / RECORD).exists()


def test_a_check_that_takes_its_process_along_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _ in numerics.attention_checks(tiny=True)]
    deadly, lines, calls = names[3], tmp_path / "attention.jsonl", []

    def dying(work: Callable[[], None], **_: object) -> None:
        calls.append(work)
        begun = names[: names.index(deadly) + 1] if len(calls) == 1 else names[names.index(deadly) + 1 :]
        for name in begun:
            files.append_line(lines, json.dumps([name, None]))
            if name != deadly:
                files.append_line(lines, json.dumps([name, {"ok": True, "found": "0"}]))
        if deadly in begun:
            raise RuntimeError("exit code -6")

    monkeypatch.setattr(runs, "answer_of", dying)
    record = Record(tmp_path)
    given = Given(output=tmp_path, device=H100, clock=Clock(seconds=100), tiny=True)
    numerics._attend(given, record)
    assert len(calls) == 2
    assert {name: finding["ok"] for name, finding in record.findings.items()} == {n: n != deadly for n in names}
    assert record.findings[deadly]["found"] == "exit code -6"


@pytest.mark.parametrize(("found", "ok"), [([1.0, 2.0001], True), ([1.0, 2.001], False), ("OOM", False)])
def test_losses_are_compared_with_those_of_the_cpu(found: Any, ok: bool) -> None:  # noqa: FBT001 (a case)
    assert numerics._finding(found, [1.0, 2.0], "fp32")["ok"] == ok
    assert numerics._finding(found, "no run", "fp32")["ok"] is False


# ---------------------------------------------------------------- the device


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
    ],
)
def test_a_device_is_found_by_its_name(name: str, fact: str) -> None:
    assert device._fact(name).name == fact


def test_an_unknown_device_is_said() -> None:
    with pytest.raises(LookupError, match="GeForce"):
        device._fact("NVIDIA GeForce RTX 9999")


def test_the_profile_of_one_device_is_a_profile(tmp_path: Path) -> None:
    cluster = device.one_gpu(H100)
    path = tmp_path / "one-gpu.yaml"
    path.write_text(device.profile_text(cluster))
    assert files.read_cluster(str(path)) == cluster
    assert (cluster.nodes, cluster.gpus_per_node, cluster.gpu.memory_gib) == (1, 1, 79.2)


def test_the_models_have_the_shapes_that_are_asked_for() -> None:
    """Brown et al. 2020, table 2.1."""
    shapes = {model.name: plan_of(model, device.one_gpu(H100)).config.shape for model in MODELS}
    small, large = shapes["gpt3-1.3b"], shapes["gpt3-2.7b"]
    assert (small.num_layers, small.hidden_size, small.num_attention_heads, small.kv_channels) == (24, 2048, 16, 128)
    assert (large.num_layers, large.hidden_size, large.num_attention_heads, large.kv_channels) == (32, 2560, 32, 80)
    assert small.seq_length == large.seq_length == 2048


# ---------------------------------------------------------------- collecting and scoring


def records_of(model: Model, bend: Callable[[Predictions], dict[str, Any]]) -> list[OutcomeRecord]:
    """A landscape as the predictor expects it, bent: `bend` answers with columns in the place of the predicted ones."""
    plan = plan_of(model, device.one_gpu(H100))
    expected = plan.predictions
    columns = {"step_time_s": expected.step_time_s, "memory_gib": expected.memory.allocated_gib} | {
        "oom": expected.p_fit < 0.5
    }
    columns |= bend(expected)
    found = []
    for i, layout in enumerate(plan.candidates.layouts.rows()):
        record = samples.record(layout.name, samples.failure(), run=layout.name)
        if not columns["oom"][i]:
            measured = replace(
                samples.measurement(float(columns["step_time_s"][i])),
                peak_memory_gib=float(columns["memory_gib"][i]),
                memory_kind="max allocated",
                tokens_per_s_per_gpu=float(expected.tokens_per_s_per_gpu[i])
                * float(expected.step_time_s[i] / columns["step_time_s"][i]),
            )
            record = replace(record, measurement=measured, failure=None)
        else:
            failure = replace(samples.failure(), kind=FailureKind.OOM, message="CUDA out of memory")
            record = replace(record, failure=failure)
        found.append(record)
    return found


def frame_of(model: Model, bend: Callable[[Predictions], dict[str, Any]]) -> pd.DataFrame:
    plan = plan_of(model, device.one_gpu(H100))
    return pd.DataFrame([collect.row_of(model, plan, H100, record) for record in records_of(model, bend)])


def noisy(share: float) -> Callable[[Predictions], dict[str, Any]]:
    """Times and memory that scatter so much around the predicted ones."""

    def bend(expected: Predictions) -> dict[str, Any]:
        generator = np.random.default_rng(1)
        times, memory = (np.exp(generator.uniform(-share, share, len(expected))) for _ in range(2))
        return {
            "step_time_s": expected.step_time_s * times,
            "memory_gib": expected.memory.allocated_gib * memory,
        }

    return bend


def unmet(scored: Score) -> set[str]:
    return {what for what, _, _, met in scored.verdicts() if met is False}


LARGE = named(MODELS, "gpt3-2.7b")


def test_a_landscape_as_predicted_meets_all_that_is_asked() -> None:
    (found,) = score.score(frame_of(LARGE, noisy(0.01)))
    assert unmet(found) == set()
    assert [met for _, _, _, met in found.verdicts()] == [*[True] * 5, None, True]  # nothing was calibrated
    assert found.rows == found.measured + found.out_of_memory == 42
    assert found.out_of_memory == found.oom_foreseen > 0
    assert found.runs_to_winner is not None
    assert 0 < (found.step_error or 0) < 0.01
    assert 0 < (found.memory_error_max or 0) < 0.0102


def test_each_figure_fails_where_it_is_missed() -> None:
    def all_slower(expected: Predictions) -> dict[str, Any]:
        return {"step_time_s": 1.2 * expected.step_time_s}

    (slower,) = score.score(frame_of(LARGE, all_slower))
    assert unmet(slower) == {"step time error"}  # learning takes it away
    assert slower.step_error == pytest.approx(1 / 6)
    assert slower.step_bias == pytest.approx(-1 / 6)

    def one_larger(expected: Predictions) -> dict[str, Any]:
        memory = expected.memory.allocated_gib.copy()
        memory[0] *= 1.05
        return {"memory_gib": memory}

    (larger,) = score.score(frame_of(LARGE, one_larger))
    assert unmet(larger) == {"memory error, worst"}
    assert larger.memory_error_max == pytest.approx(1 - 1 / 1.05)
    assert larger.memory_error_median == pytest.approx(0, abs=1e-9)
    assert larger.worst_memory == "tp1-pp1-vpp1-cp1-mbs1-none"

    def other_ooms(expected: Predictions) -> dict[str, Any]:
        oom = expected.p_fit < 0.5
        fits, fits_not = np.flatnonzero(~oom), np.flatnonzero(oom)
        slow = fits[np.argmax(expected.step_time_s[fits])]
        oom[slow], oom[fits_not[0]] = True, False
        return {"oom": oom}

    (other,) = score.score(frame_of(LARGE, other_ooms))
    assert {"out of memory foreseen", "wrongly called so"} <= unmet(other)
    assert (other.out_of_memory - other.oom_foreseen, other.oom_false) == (1, 1)

    def scrambled(expected: Predictions) -> dict[str, Any]:
        generator = np.random.default_rng(3)
        return {"step_time_s": expected.step_time_s * np.exp(generator.normal(0, 0.8, len(expected)))}

    (wild,) = score.score(frame_of(LARGE, scrambled))
    assert {"runs to the winner", "step time error", "step time error, learned"} <= unmet(wild)


def test_a_landscape_without_a_measured_run_says_nothing_about_times() -> None:
    (found,) = score.score(frame_of(LARGE, lambda expected: {"oom": np.ones(len(expected), dtype=np.bool_)}))
    assert found.measured == 0
    assert (found.best, found.runs_to_winner, found.step_error) == (None, None, None)
    assert unmet(found) == {"out of memory foreseen"}


def test_the_scoring_command_says_what_is_not_met(tmp_path: Path) -> None:
    codes = {}
    for name, bend in (("good", noisy(0.01)), ("bad", noisy(0.5))):
        path = tmp_path / f"{name}.csv"
        path.write_text(frame_of(LARGE, bend).to_csv(index=False))
        done = CliRunner().invoke(score.main, [str(path)])
        codes[name] = done.exit_code
        assert "hptool-gpt3-2.7b-h100-80gb-1g-seq2048-gbs64" in done.output
        assert ("not met" in done.output) == (name == "bad")
    assert codes == {"good": 0, "bad": 1}


def test_facts_that_were_measured_are_judged_beside_those_in_use(tmp_path: Path) -> None:
    frame = frame_of(LARGE, lambda _: {})
    cluster = device.one_gpu(H100)
    slower = replace(cluster, gpu=replace(cluster.gpu, peak_tflops={**cluster.gpu.peak_tflops, "bf16": 500.0}))
    path = tmp_path / "calibrated.yaml"
    path.write_text(device.profile_text(slower))
    (found,) = score.score(frame, score.read_gpu(path))
    assert found.step_error == pytest.approx(0, abs=1e-9)
    assert found.calibrated_step_error is not None
    assert found.calibrated_step_error > 0.2
    assert unmet(found) == {"step time error, calibrated"}


@pytest.mark.parametrize("model", MODELS[:3], ids=lambda model: model.name)
def test_the_table_says_what_was_predicted_for_the_search(tmp_path: Path, model: Model) -> None:
    """Read back by `hptool predict`, a row without block recomputation is predicted as the search predicts it."""
    path = tmp_path / "measured.csv"
    path.write_text(frame_of(model, lambda _: {}).to_csv(index=False))
    frame = tables.read_table(path, required=("grid_id", *tables.REQUIRED))
    frame = frame[~frame["recompute"].str.startswith("block")].reset_index(drop=True)
    expected = forecast.forecast(frame)
    assert not any(expected.rejection)
    ok = (frame["outcome"] == "ok").to_numpy()
    measured_s = forecast.measured_step_time_s(frame, expected)
    # A table knows no heads of BERT's and no widths of T5's attention.
    assert expected.predictions.step_time_s[ok] == pytest.approx(measured_s[ok], rel=0.05)
    assert expected.memory_gib[ok] == pytest.approx(forecast.measured_memory_gib(frame, expected)[ok], rel=0.05)
    assert replay.replay(frame, "adaptive").grids[0].rows == len(frame)


def test_of_several_runs_of_a_layout_the_fastest_is_kept() -> None:
    slow, fast = (samples.record("a", samples.measurement(seconds), run=f"a.{seconds}") for seconds in (2.0, 1.0))
    failed = samples.record("a", samples.failure(), run="a.3")
    assert collect.fastest([slow, fast, failed]) == [fast]
    assert collect.fastest([failed, slow]) == [slow]
    assert collect.fastest([failed]) == [failed]


def test_lost_runs_are_made_again(tmp_path: Path) -> None:
    lost = replace(samples.failure(), kind=FailureKind.LOST)
    records = [samples.record("a", lost, run="a"), samples.record("b", samples.failure(), run="b")]
    lines = [files.json_text(record, indent=None) for record in records]
    (tmp_path / "outcomes.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert landscapes.measured_names(tmp_path) == {"b"}


def test_a_landscape_is_searched_whole() -> None:
    words = landscapes.search_words(LARGE, Path("one-gpu.yaml"), Path("there"), 4)
    assert "--recompute=none,selective,uniform,block" in words
    assert "--mbs=1,2,4,8,16,32,64" in words
    assert int(words[words.index("--limit-search-runs") + 1]) > 200
    assert len(plan_of(LARGE, device.one_gpu(H100)).candidates.layouts) == 42


# ---------------------------------------------------------------- serving


def served(latency_ms: float, *, graphs: bool, **changes: Any) -> ServingMeasurement:
    """What a run of the worker's measured: one point, one out of memory, and those beyond it."""
    times = Percentiles(p50=latency_ms, p95=latency_ms, p99=latency_ms)
    point = ServedPoint(
        batch=1,
        input_len=60,
        output_len=20,
        repeats=6,
        warmups=1,
        ttft_ms=times,
        tpot_ms=times,
        latency_ms=times,
        latency_low_ms=latency_ms,
        latency_high_ms=latency_ms,
        tokens_per_s=20_000 / latency_ms,
        tokens_per_s_per_gpu=20_000 / latency_ms,
        tokens_per_s_per_user=20_000 / latency_ms,
        peak_memory_gib=2.0,
    )
    fields: dict[str, Any] = {
        "points": (point,),
        "failures": (PointFailure(name="60:20/8", kind=FailureKind.OOM, message="no room"),),
        "skipped": ("60:20/64", "512:64/1", "512:64/8", "512:64/64"),
        "engine": "megatron-core static, hptool's loop",
        "cuda_graphs": graphs,
        "gpus": 1,
        "startup_s": 3.0,
        "memory_kind": "max allocated",
        "num_parameters": 1,
        "device": "NVIDIA H100 80GB HBM3",
        "precision": "bf16",
    }
    return ServingMeasurement(**(fields | changes))


def test_what_was_served_is_a_table_that_hptool_reads(tmp_path: Path) -> None:
    orders = gpu_serving.orders_of(graphs=True, tiny=False)
    findings = {
        "gpt3-126m eager": gpu_serving.finding_of(served(100.0, graphs=False), orders),
        "gpt3-126m graphs": gpu_serving.finding_of(served(20.0, graphs=True), orders),
    }
    assert {found["outcome"] for found in findings.values()} == {"ok"}
    (small, *_) = gpu_serving.MODELS
    assert gpu_serving.speedup(findings, small) == pytest.approx(5)
    assert gpu_serving.told(findings, [small]) == {"gpt3-126m": (2, 12)}
    record = Record(tmp_path)
    for key, found in findings.items():
        record.find(key, found)
    gpu_serving._tabulate(Given(output=tmp_path, device=H100, clock=Clock(seconds=1), tiny=False), record)
    path = gpu_serving.table_of(tmp_path)
    assert path is not None
    rows = serving_tables.resolve(tables.read_table(path, required=serving_tables.REQUIRED))
    assert list(rows.rejection) == [""] * 4
    assert list(rows.points.batch) == [1, 8, 1, 8]
    assert list(rows.points.cuda_graphs) == [False, False, True, True]
    assert {scenario.engine.name for scenario in rows.scenarios} == {"hptool-worker"}


@pytest.mark.parametrize(
    ("outcome", "kind", "message"),
    [
        (Failure(kind=FailureKind.CRASH, message="no kernel"), "crash", "no kernel"),
        (served(1.0, graphs=True, skipped=()), "timeout", ""),
        (
            served(1.0, graphs=True, failures=(PointFailure(name="60:20/8", kind=FailureKind.HANG, message="stuck"),)),
            "hang",
            "60:20/8: hang: stuck",
        ),
    ],
)
def test_a_serving_run_that_is_not_whole_is_told(
    outcome: ServingMeasurement | Failure, kind: str, message: str
) -> None:
    found = gpu_serving.finding_of(outcome, gpu_serving.orders_of(graphs=True, tiny=False))
    assert (found["outcome"], found["message"]) == (kind, message)


def test_without_graphs_there_is_no_speedup_to_tell() -> None:
    orders = gpu_serving.orders_of(graphs=True, tiny=False)
    eager = gpu_serving.finding_of(served(100.0, graphs=False), orders)
    small = gpu_serving.MODELS[0]
    assert gpu_serving.speedup({"gpt3-126m eager": eager}, small) is None
    assert gpu_serving.speedup({"gpt3-126m eager": eager, "gpt3-126m graphs": eager}, small) is None


# ---------------------------------------------------------------- speed, gaps, summary


def speed_findings() -> dict[str, Any]:
    final = {"outcome": "ok", "layout": "tp1-pp1-vpp1-cp1-mbs4-block8", "mfu": 0.4812, "step_time_s": 1.2}
    utilised = {f"utilisation {name}": {"tries": {}, "final": final} for name in ("gpt3-1.3b", "llama3.2-3b")}
    return {
        "gpt2-124m worker mbs32": {"outcome": "ok", "tokens_per_s": 410_000.0},
        "gpt2-124m worker mbs64": {"outcome": "ok", "tokens_per_s": 400_000.0},
        "gpt2-124m plain mbs32": {"outcome": "oom"},
        "gpt2-124m plain mbs16": {"outcome": "ok", "tokens_per_s": 400_000.0},
        **utilised,
    }


def test_the_ratio_compares_the_best_of_each() -> None:
    compared = gpu_speed.ratio(speed_findings(), "gpt2-124m")
    assert compared is not None
    assert compared[0] == pytest.approx(1.025)
    assert compared[1:] == ("gpt2-124m worker mbs32", "gpt2-124m plain mbs16")
    assert gpu_speed.ratio({"gpt2-124m worker mbs32": {"outcome": "ok", "tokens_per_s": 1.0}}, "gpt2-124m") is None


def test_the_best_layout_is_the_final_one_or_else_the_fastest_tried() -> None:
    tries = {"a": {"outcome": "ok", "step_time_s": 2.0}, "b": {"outcome": "ok", "step_time_s": 1.0}}
    tries["c"] = {"outcome": "oom"}
    assert gpu_speed.best_layout({"tries": tries, "final": None}) == "b"
    assert gpu_speed.best_layout({"tries": tries, "final": {"outcome": "ok", "layout": "a"}}) == "a"
    assert gpu_speed.best_layout({"tries": {"c": {"outcome": "oom"}}, "final": None}) is None


def test_a_trace_is_added_up_without_overlaps() -> None:
    def event(category: str, name: str, start: float, length: float) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}

    events = [
        event("kernel", "gemm", 0, 100),
        event("kernel", "nccl", 50, 100),  # on another stream
        event("kernel", "gemm", 400, 200),
        event("gpu_memcpy", "Memcpy HtoD", 590, 20),
        event("cuda_runtime", "cudaLaunchKernel", 0, 4),
        event("cuda_runtime", "cudaLaunchKernelExC", 10, 8),
        event("cuda_runtime", "cudaStreamSynchronize", 10, 800),
        {"ph": "i", "cat": "kernel", "name": "marker", "ts": 0},
    ]
    trace = gpu_gaps.read_trace(events)
    assert trace.busy_s == pytest.approx((150 + 210) / 1e6)
    assert (trace.kernels, trace.launches) == (4, 2)
    name, seconds, times = trace.top[0]
    assert (name, times) == ("gemm", 2)
    assert seconds == pytest.approx(300e-6)
    found = gpu_gaps.finding_of(trace, plain_s=[400e-6], profiled_s=[500e-6])
    assert found["idle_share"] == pytest.approx(0.1)
    assert found["idle_share_profiled"] == pytest.approx(0.28)
    assert found["host_us_a_launch"] == pytest.approx(6)


def test_overlapping_intervals_count_once() -> None:
    generator = random.Random(1)
    intervals = [(start := generator.randint(0, 200), start + generator.randint(0, 30)) for _ in range(40)]
    covered = {instant for start, stop in intervals for instant in range(start, stop)}
    assert gpu_gaps.union(intervals) == len(covered)
    assert gpu_gaps.union([]) == 0


@pytest.fixture
def scores() -> list[Score]:
    (one,) = score.score(frame_of(LARGE, noisy(0.2)))
    return [replace(one, name=f"hptool-{model.name}-h100-80gb-1g-seq2048-gbs64") for model in MODELS]


def test_the_summary_fits_and_says_what_is_met(scores: list[Score]) -> None:
    gap = {"outcome": "ok", "idle_share": 0.07, "kernels_a_step": 4321.0}
    findings = {
        "numerics": {"a": {"ok": True, "found": "0"}, "b": {"ok": False, "found": "off"}},
        "speed": speed_findings(),
        "gaps": {"gpt2-124m": gap},
        "calibrate": {"outcome": "ok"},
        "serving": {"gpt3-1.3b eager": {"asked": 6, "points": [{}] * 6}},
        "landscapes": {model.name: {"layouts": 42, "measured": 42} for model in MODELS},
    }
    found = summary.verdicts(findings, scores, tiny=False)
    by_what = {verdict.what: verdict for verdict in found}
    assert by_what["checks passed"].measured == "1 of 2"
    assert by_what["checks passed"].met is False
    assert by_what["gpt2-124m: tokens/s to plain PyTorch"].met is True
    assert by_what["gpt3-1.3b: of the peak"].met is True
    assert by_what["gpt3-2.7b: of the peak"].met is None
    assert by_what["gpt2-124m: idle"].met is False
    assert by_what["gpt3-1.3b: points measured"].measured == "6 of 6"
    assert by_what["gpt3-1.3b: eager to CUDA graphs"].met is None
    reports = [
        summary.StageReport(
            name=stage.name,
            state=State.FAILED,
            seconds=100.0,
            detail="exit code 1: " + "long words " * 30,
            problems=[f"problem {i} " * 20 for i in range(20)],
            left=["this", "that"],
        )
        for stage in STAGES
    ]
    text = summary.table(H100, "2026-11-22", found, reports, ["of no stage"], wall_s=590.0)
    assert len(text.splitlines()) <= summary.MOST_LINES
    assert max(map(len, text.splitlines())) <= summary.WIDTH
    assert "NOT MET" in text
    document = summary.document(H100, "2026-11-22", found, reports, {})
    assert len(document["verdicts"]) == len(found) > 40
    json.dumps(document)


def test_ends_are_kept_of_logs_that_speak_of_errors(tmp_path: Path) -> None:
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed.log").write_text("\n".join(f"line {i}" for i in range(1000)))
    (tmp_path / "speed" / "quiet.log").write_text("all is well\n")
    (tmp_path / "speed" / "loud.log").write_text("RuntimeError: no kernel\n")
    text = suite.logs_text(tmp_path)
    assert "line 999" in text
    assert "line 10\n" not in text
    assert "no kernel" in text
    assert "all is well" not in text
    shutil.rmtree(tmp_path)
    assert suite.logs_text(tmp_path) == ""


def test_a_stage_without_an_end_is_told_by_its_record(tmp_path: Path) -> None:
    stage, ends = STAGES[1], dict[str, StageEnd]()
    assert stages.state_of(stage, tmp_path, ends, {}) is State.NOT_BEGUN
    Record(tmp_path / stage.name)
    assert stages.state_of(stage, tmp_path, ends, {}) is State.UNFINISHED
    assert stages.state_of(stage, tmp_path, ends, {stage.name: "done"}) is State.DONE
    ends[stage.name] = StageEnd(state=State.FAILED, seconds=1.0, detail="", tail=[])
    assert stages.state_of(stage, tmp_path, ends, {stage.name: "done"}) is State.FAILED
