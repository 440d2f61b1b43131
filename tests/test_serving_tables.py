"""Tables of served points: every row kept, nothing measured looked at, and as near to published points as promised."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result

from hptool import serving_forecast, serving_tables, tables
from hptool.errors import InputError
from hptool.serving_tables import REQUIRED, engine_of, resolve
from tests.benchmarks.serving_errors import errors_of
from tests.served import IS_WHOLE, PUBLISHED
from tests.test_cli import hptool

ROW: dict[str, Any] = {
    "model": "GPT-20B",
    "hidden": 6144,
    "layers": 44,
    "heads": 48,
    "gpu": "A100-80GB",
    "tp": 2,
    "batch": 8,
    "input_len": 128,
    "output_len": 20,
    "engine": "FasterTransformer",
}

FIGURES = ["predicted_latency_ms", "predicted_ttft_ms", "predicted_tpot_ms", "predicted_memory_gib", "predicted_p_fit"]


def rows(*cells: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame([{**ROW, **c} for c in cells])


def predicted(frame: pd.DataFrame) -> pd.DataFrame:
    return serving_forecast.forecast(frame).columns(frame)


def predict(*words: str | Path) -> Result:
    result = hptool("predict", *words, columns=80)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    return tables.read_table(PUBLISHED, REQUIRED)


# ---------------------------------------------------------------- rows


def test_a_row_is_a_point_of_a_model_on_a_cluster() -> None:
    found = resolve(rows({"precision": "fp16", "pp": 3, "gpus": 6, "cuda_graphs": 1}))
    point, (scenario,) = found.points.row(0), found.scenarios
    assert (point.layout.tp, point.layout.pp, point.layout.precision, point.layout.cuda_graphs) == (2, 3, "fp16", True)
    assert (point.batch, point.lengths.name) == (8, "128:20")
    assert scenario.shape.ffn_hidden_size == 4 * 6144
    assert scenario.shape.num_query_groups == 48
    assert scenario.cluster.gpu.name == "a100-80gb"
    assert scenario.engine.name == "fastertransformer"


def test_empty_cells_stand_for_what_is_usual() -> None:
    (point,) = resolve(rows({"tp": None, "precision": "unstated", "kv_heads": np.nan, "gated": 1})).points.rows()
    assert point.layout.precision == "bf16"
    assert point.layout.gpus == 1


@pytest.mark.parametrize(
    ("model", "width"), [("Qwen3-32B", 128), ("qwen/Qwen3-32B-FP8", 128), ("Qwen3-32B2", 96), ("GPT", 96)]
)
def test_heads_are_as_wide_as_the_model_is_published(model: str, width: int) -> None:
    (scenario,) = resolve(rows({"model": model, "heads": 64})).scenarios
    assert scenario.shape.kv_channels == width


@pytest.mark.parametrize(
    ("cells", "experts"),
    [
        ({}, (0, 0, 0)),
        ({"model": "Mixtral 8x7B"}, (8, 2, 14336)),
        ({"num_experts": 16, "experts_per_token": 4}, (16, 4, 24576)),
        ({"num_experts": 16, "experts_per_token": 4, "expert_ffn": 512}, (16, 4, 512)),
        ({"model": "Mixtral 8x7B", "expert_ffn": 512}, (8, 2, 512)),
    ],
)
def test_experts_are_those_of_the_row_or_of_the_model(cells: dict[str, Any], experts: tuple[int, int, int]) -> None:
    (scenario,) = resolve(rows(cells)).scenarios
    shape = scenario.shape
    assert (shape.num_experts, shape.experts_per_token, shape.expert_ffn_hidden_size) == experts


@pytest.mark.parametrize("name", ["H100-SXM", "h100 sxm", "NVIDIA_H100", "H100-80GB"])
def test_gpus_go_by_many_names(name: str) -> None:
    assert resolve(rows({"gpu": name})).scenarios[0].cluster.gpu.name == "h100-80gb"


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"batch": 0}, "batch: 0 given, allowed is a whole number of 1 or more"),
        ({"batch": -3}, "batch: -3 given"),
        ({"batch": 1.5}, "batch: 1.5 given"),
        ({"batch": "many"}, "batch: 'many' given, allowed is a number"),
        ({"batch": 1e12}, "batch: 1000000000000 given, allowed is at most"),
        ({"batch": None}, "batch: nothing given, allowed is a whole number of 1 or more"),
        ({"input_len": 0}, "input_len: 0 given"),
        ({"output_len": None}, "output_len: nothing given"),
        ({"gpu": "A100-80"}, ""),
        ({"gpu": "H1000"}, "gpu: unknown GPU 'H1000'; did you mean h100-80gb?"),
        ({"gpu": "an abacus"}, "gpu: unknown GPU 'an abacus'; allowed are"),
        ({"gpu": None}, "gpu: unknown GPU ''"),
        ({"tp": 5}, "tp: 5 given, allowed is what divides the 48 heads"),
        ({"tp": 4, "gpus": 2}, "tp·pp: 4 given, allowed is at most the 2 GPUs"),
        ({"pp": 64}, "pp: 64 given, allowed is at most the 44 layers"),
        ({"precision": "fp8"}, "precision: 'fp8' given, allowed on a100-80gb is bf16"),
        ({"precision": "int3"}, "precision: 'int3' given"),
        ({"kv_heads": 96}, "kv_heads: 96 given, allowed is at most the 48 heads"),
        ({"heads": 10**6}, "heads: 1000000 given, allowed is at most hidden"),
        ({"layers": 0}, "layers: 0 given"),
        ({"num_experts": 8}, "experts_per_token: nothing given"),
        ({"num_experts": 2, "experts_per_token": 4}, "experts_per_token: 4 given, allowed is at most the 2 experts"),
        ({"model": "DeepSeek-V3"}, "multi-latent attention cannot be predicted yet"),
        ({"gated": "perhaps"}, "gated: 'perhaps' given, allowed is 0, 1 or unknown"),
    ],
)
def test_a_row_that_cannot_be_predicted_says_why(cells: dict[str, Any], reason: str) -> None:
    frame = rows({}, cells, {"batch": 2})
    table = predicted(frame)
    assert str(table.loc[1, "rejection"]).startswith(reason)
    assert bool(table.loc[1, "rejection"]) == bool(reason)
    assert table.loc[[0, 2], FIGURES].notna().all(axis=None)
    assert table.loc[1, FIGURES].isna().all() == bool(reason)


def test_an_unknown_engine_is_predicted_and_trusted_less() -> None:
    table = predicted(rows({}, {"engine": "something of ours"}, {"engine": None}))
    assert table[FIGURES].notna().all(axis=None)
    assert (table.predicted_latency_error[1:] > 3 * table.predicted_latency_error[0]).all()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("FasterTransformer+Triton", "fastertransformer"),
        ("Megatron-LM (2022 torch)", "megatron-torch-2022"),
        ("TensorRT-LLM 0.5.0", "tensorrt-llm-0.5"),
        ("TensorRT-LLM 0.9.0", "tensorrt-llm-0.9"),
        ("TensorRT-LLM 0.17", "tensorrt-llm"),
        ("trtllm 1.0.0rc3", "trtllm-serve"),
        ("sglang 0.5.1.post1", "sglang"),
        ("vLLM (2024)", "vllm"),
        ("vllm 0.12.0", "vllm"),
        ("NIM 1.8.0", "nim"),
        ("megatron-core dynamic eager", "megatron-core-eager"),
        ("megatron-core dynamic CUDA graphs", "megatron-core-graphs"),
        ("hptool", "hptool-worker"),
        ("DeepSpeed-MII", "other"),
        ("", "other"),
    ],
)
def test_engines_go_by_what_tables_call_them(text: str, name: str) -> None:
    assert engine_of(text).name == name


def test_without_a_batch_memory_is_full_where_requests_are_in_flight() -> None:
    full, half = (
        predicted(rows({"batch": None, "engine": "TensorRT-LLM 0.17", "input_len": length, "output_len": 2048}))
        for length in (2048, 16384)
    )
    assert full.predicted_batch[0] > 2 * half.predicted_batch[0] > 0
    assert full.predicted_p_fit[0] > 0.5


def test_every_row_of_the_published_table_is_predicted_in_its_place(published: pd.DataFrame) -> None:
    table = predicted(published)
    assert table.index.equals(published.index)
    assert (table.rejection == "").all()
    assert np.isfinite(table[FIGURES]).all(axis=None)
    assert (table[FIGURES] >= 0).all(axis=None)
    order = np.random.default_rng(0).permutation(len(published))
    mixed = predicted(published.iloc[order].reset_index(drop=True))
    assert mixed[FIGURES].to_numpy() == pytest.approx(table[FIGURES].to_numpy()[order], rel=1e-12)


def test_no_row_is_predicted_from_what_it_was_measured(published: pd.DataFrame) -> None:
    measured = ["latency_ms", "tokens_per_s", "ttft_ms", "tpot_ms", "memory_gb", "notes"]
    lied = published.assign(**dict.fromkeys(measured[:-1], 1.0), notes="OOM")
    pd.testing.assert_frame_equal(predicted(published), predicted(lied))
    pd.testing.assert_frame_equal(predicted(published), predicted(published.drop(columns=measured)))


# ---------------------------------------------------------------- how good it is


def test_who_ran_out_of_memory_is_foreseen_and_nobody_else(published: pd.DataFrame) -> None:
    p_fit, ran_out = predicted(published).predicted_p_fit, published.notes.astype(str) == "OOM"
    assert ran_out.sum() >= 6
    assert (p_fit[ran_out] < 0.5).all()
    assert (p_fit[~ran_out] >= 0.5).all()


def test_memory_is_that_of_the_published_runs(published: pd.DataFrame) -> None:
    expected = serving_forecast.forecast(published)
    errors = {row.name: row.memory_median_error for row in serving_forecast.accuracy(published, expected)}
    assert errors["FT-GPT-6.7B"] is not None
    assert errors["FT-GPT-6.7B"] < 0.03


#: What `tests.benchmarks.serving_errors` prints, and a bit more for another split: shares of the latency. First-token
#: tables of a dozen points scatter by more than the 6 % of the rest: half of them are of models whose TP is not that of
#: the formula (one all-reduce a layer).
FIRST_TOKENS = ("TRTLLM-0.5-ttft", "TRTLLM-0.9-ttft")
HALF, ANEW, EIGHT = 0.06, 0.09, 0.10


@pytest.mark.skipif(not IS_WHOLE, reason="the whole table is not at hand, and a part of it says little")
def test_latencies_are_as_near_as_promised(published: pd.DataFrame) -> None:
    errors = {name: found.medians() for name, found in errors_of(published, splits=2).items()}
    assert {"FT-20B", "BigNLP", "Megatron-torch", "TRTLLM-0.9", "TRTLLM-0.17", "silicon", "NIM"} <= set(errors)
    large = {name: found for name, found in errors.items() if name not in FIRST_TOKENS and name != "mcore-golden"}
    assert {name: found["half"] for name, found in large.items() if found["half"] > HALF} == {}
    # As much is due to calibration alone: constants that were never fitted to these points end almost as near.
    assert {name: found["anew"] for name, found in large.items() if found["anew"] > ANEW} == {}
    assert {name: found["eight"] for name, found in large.items() if found["eight"] > EIGHT} == {}
    assert np.median([found["half"] for found in errors.values()]) < 0.04
    assert np.median([found["eight"] for found in errors.values()]) < 0.07


def test_without_calibration_it_is_sensible(published: pd.DataFrame) -> None:
    found = {row.name: row for row in serving_forecast.accuracy(published, serving_forecast.forecast(published))}
    for name, row in found.items():
        assert (row.median_error or 0) < 0.15, name
    assert (found["silicon"].tpot_median_error or 1) < 0.08


# ---------------------------------------------------------------- calibration


def test_what_is_learned_is_learned_for_engine_series_and_gpu() -> None:
    slow = [{"series": "a", "latency_ms": 1000.0 * b, "batch": b} for b in (1, 2, 4, 8)]
    fast = [{"series": "b", "latency_ms": 100.0 * b, "batch": b} for b in (1, 2, 4, 8)]
    engines = serving_forecast.learn(rows(*slow, *fast))
    assert set(engines) == {("fastertransformer",), ("fastertransformer", "a"), ("fastertransformer", "b")}
    frame = rows({"series": "a"}, {"series": "b"}, {"series": "c"}, {"series": "a", "engine": "vLLM"})
    before, after = serving_forecast.forecast(frame), serving_forecast.forecast(frame, engines)
    assert after.latency_ms[0] > before.latency_ms[0] > after.latency_ms[1]
    assert after.latency_ms[3] == before.latency_ms[3]


def test_without_series_engines_and_gpus_are_learned() -> None:
    frame = rows(*({"latency_ms": 900.0, "gpu": gpu} for gpu in ("A100-80GB", "H100-SXM")))
    assert {key[0] for key in serving_forecast.learn(frame)} == {"fastertransformer"}
    assert serving_forecast.learn(rows({}, {"batch": 4})) == {}


def test_unknown_engines_are_learned_apart() -> None:
    measured = rows(*({"engine": "ours", "latency_ms": 5000.0, "batch": b} for b in (1, 2, 4)))
    engines = serving_forecast.learn(measured)
    frame = rows({"engine": "ours"}, {"engine": "theirs"})
    before, after = serving_forecast.forecast(frame), serving_forecast.forecast(frame, engines)
    assert after.latency_ms[0] > before.latency_ms[0]
    assert after.latency_ms[1] == before.latency_ms[1]


# ---------------------------------------------------------------- the command


def test_the_command_tells_served_points_apart(tmp_path: Path) -> None:
    table, out = tmp_path / "points.csv", tmp_path / "out.csv"
    rows({"latency_ms": 487, "series": "FT"}, {"batch": 0}, {"batch": 2, "gpu": "X"}).to_csv(table, index=False)
    result = predict(table, "--output", out)
    assert "1 of 3 rows predicted:" in result.stdout
    assert "Predicted against measured, by series" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if not line.startswith(("written", "  ")))
    written = pd.read_csv(out)
    assert list(written.batch) == [8, 0, 2]
    assert written.predicted_latency_ms.notna().tolist() == [True, False, False]
    assert {*FIGURES, "rejection"} <= set(written)


def test_calibrating_by_the_command_brings_it_nearer(tmp_path: Path) -> None:
    measured, table = tmp_path / "measured.csv", tmp_path / "points.csv"
    batches = (1, 2, 4, 8, 16, 32)
    rows(*({"latency_ms": 700 + 30 * b, "series": "x", "batch": b} for b in batches[::2])).to_csv(measured, index=False)
    rows(*({"latency_ms": 700 + 30 * b, "series": "x", "batch": b} for b in batches[1::2])).to_csv(table, index=False)
    before = json.loads(predict(table, "--json").stdout)
    after = json.loads(predict(table, "--json", "--calibrate", measured).stdout)
    assert before["predicted"] == after["predicted"] == after["rows"] == 3
    assert before["learned"] == {}
    assert list(after["learned"]) == ["fastertransformer"]
    assert after["series"][0]["median_error"] < before["series"][0]["median_error"] / 3
    assert "learned for fastertransformer" in predict(table, "--calibrate", measured).stdout


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("hidden,layers,heads,gpu,input_len,output_len", "columns batch missing"),
        ("hidden,layers,heads,batch,input_len,output_len", "columns gpu missing"),
        ("layers,heads,gpu,batch,input_len,output_len", "columns hidden missing"),
    ],
)
def test_a_table_without_what_is_needed_is_refused(tmp_path: Path, header: str, said: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(f"{header}\n1,1,1,1,1,1\n")
    result = hptool("predict", path)
    assert result.exit_code == 2
    assert said in result.stderr


def test_measured_points_without_a_figure_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "points.csv"
    rows({}).to_csv(table, index=False)
    result = hptool("predict", table, "--calibrate", table)
    assert result.exit_code == 2
    assert "no row has a measured latency" in result.stderr


def test_a_table_of_training_runs_is_none_of_served_points(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("hidden,layers,heads,seq,gpu,gbs,batch\n")
    assert not serving_tables.is_serving(path)
    assert not serving_tables.is_serving(tmp_path / "nothing.csv")
    with pytest.raises(InputError):
        tables.read_table(tmp_path / "nothing.csv", REQUIRED)


def test_the_columns_are_told() -> None:
    said = predict("--columns").stdout
    assert "input_len" in said
    assert json.loads(predict("--columns", "--json").stdout)["serving"]["needed"] == list(REQUIRED)
