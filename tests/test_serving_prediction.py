"""Predictions of serving: what physics demands, published figures, and calibration that few points cannot ruin."""

import dataclasses
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import files
from hptool.errors import InputError
from hptool.facts import Engine
from hptool.predict.inference import (
    PassTime,
    Served,
    ServingMemory,
    ServingPredictions,
    calibrate_engine,
    most_running,
    predict_serving,
)
from hptool.predict.inference_case import CEILINGS, CONSTANTS, constants_of
from hptool.predict.parts import Column
from hptool.units import GIB
from tests.served import GPT_20B, cluster, column, points

ENGINES = sorted(files.read_engines())

LLAMA_70B = replace(
    GPT_20B,
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    vocab_size=128256,
    gated_mlp=True,
    rms_norm=True,
    tied_embeddings=False,
)

SHAPES = {
    "dense": GPT_20B,
    "grouped queries, gated": LLAMA_70B,
    "experts": replace(GPT_20B, num_experts=8, experts_per_token=2, expert_ffn_hidden_size=6144),
    "experts beside dense layers": replace(
        GPT_20B, num_experts=64, experts_per_token=6, expert_ffn_hidden_size=1536, shared_ffn_hidden_size=3072,
        num_dense_layers=2,
    ),
    "encoder": replace(GPT_20B, num_layers=22, encoder_num_layers=22, encoder_seq_length=512),
}  # fmt: skip


def engine(name: str = "fastertransformer", **changes: Any) -> Engine:
    return replace(files.read_engine(name), **changes)


def predicted(*several: dict[str, Any], shape: Any = GPT_20B, by: Engine | None = None) -> ServingPredictions:
    return predict_serving(points(*several), shape, cluster(), by or engine())


def figures(p: ServingPredictions) -> Column:
    return np.array([p.latency_ms, p.ttft_ms, p.tpot_ms, p.memory_gib])


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_of_the_files_is_one_and_says_where_it_is_from(name: str) -> None:
    found = files.read_engine(name)
    assert found.name == name
    assert len(found.source) > 50
    assert all(getattr(found, constant) <= CEILINGS.get(constant, np.inf) for constant in CONSTANTS)


def test_an_unknown_engine_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="--engine: unknown engine 'vlm'; did you mean vllm"):
        files.read_engine("vlm")


@pytest.mark.parametrize(
    ("field", "value"), [("gemm_speed", 0.0), ("burst", 1.5), ("kv_block_tokens", 0), ("latency_error", float("nan"))]
)
def test_an_engine_that_cannot_be_is_refused(field: str, value: float) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field}: {value} given"):
        engine(**changes)


# ---------------------------------------------------------------- what physics demands

POINT = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4, 8]),
        "pp": st.sampled_from([1, 2, 4]),
        "batch": st.integers(1, 2048),
        "input_len": st.integers(1, 16384),
        "output_len": st.integers(1, 4096),
        "cuda_graphs": st.booleans(),
    }
)
KINDS = st.tuples(st.sampled_from(ENGINES), st.sampled_from(sorted(SHAPES)))


@settings(max_examples=60, deadline=None)
@given(point=POINT, kind=KINDS)
def test_everything_is_finite_and_positive_and_adds_up(point: dict[str, Any], kind: tuple[str, str]) -> None:
    p = predicted(point, shape=SHAPES[kind[1]], by=engine(kind[0]))
    assert np.isfinite(figures(p)).all()
    assert (figures(p) > 0).all()
    assert 0 <= p.p_fit[0] <= 1
    assert 1 <= p.running[0] <= point["batch"]
    for part in (p.prefill, p.decode, p.memory):
        assert all((getattr(part, f.name) >= 0).all() for f in dataclasses.fields(part))
    assert p.memory.total_gib == pytest.approx(p.memory_gib)
    assert p.ttft_ms + (point["output_len"] - 1) * p.tpot_ms == pytest.approx(p.latency_ms)
    assert p.tokens_per_s_per_gpu * point["tp"] * point["pp"] == pytest.approx(p.tokens_per_s)


@settings(max_examples=60, deadline=None)
@given(point=POINT, kind=KINDS, grows=st.sampled_from(["batch", "input_len", "output_len"]), by=st.integers(1, 2000))
def test_more_work_takes_longer(point: dict[str, Any], kind: tuple[str, str], grows: str, by: int) -> None:
    p = predicted(point, point | {grows: point[grows] + by}, shape=SHAPES[kind[1]], by=engine(kind[0]))
    assert p.latency_ms[1] > p.latency_ms[0]


@settings(max_examples=40, deadline=None)
@given(point=POINT, shape=st.sampled_from(sorted(SHAPES)), grows=st.sampled_from(["batch", "input_len", "output_len"]))
def test_a_static_batch_takes_more_memory_the_more_it_holds(point: dict[str, Any], shape: str, grows: str) -> None:
    p = predicted(point, point | {grows: 2 * point[grows]}, shape=SHAPES[shape])
    assert p.memory_gib[1] > p.memory_gib[0]
    assert p.p_fit[1] <= p.p_fit[0]


@settings(max_examples=30, deadline=None)
@given(several=st.lists(POINT, min_size=2, max_size=20), kind=KINDS, seed=st.integers(0, 100))
def test_rows_do_not_know_one_another(several: list[dict[str, Any]], kind: tuple[str, str], seed: int) -> None:
    shape, by = SHAPES[kind[1]], engine(kind[0])
    order = np.random.default_rng(seed).permutation(len(several))
    whole, mixed = predicted(*several, shape=shape, by=by), predicted(*[several[i] for i in order], shape=shape, by=by)
    assert figures(mixed) == pytest.approx(figures(whole)[:, order], rel=1e-12)
    assert figures(predicted(several[0], shape=shape, by=by)) == pytest.approx(figures(whole)[:, :1], rel=1e-12)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_tp_splits_the_weights_and_pp_the_layers(name: str) -> None:
    p = predicted({}, {"tp": 2}, {"tp": 4}, {"tp": 8}, {"pp": 2}, shape=SHAPES[name])
    weights = p.memory.weights_gib
    assert weights[:4] * [1, 2, 4, 8] == pytest.approx(np.full(4, weights[0]), rel=0.06)  # keys are shared, not split
    assert weights[4] == pytest.approx(weights[0] / 2, rel=0.03)


def test_weights_are_those_of_the_model() -> None:
    (gib,) = predicted({}).memory.weights_gib
    tables = 2 * 51200 * 6144  # one for the first layer, one for the last
    assert gib * GIB == pytest.approx(2 * (44 * 12 * 6144**2 + tables), rel=1e-9)


def test_keys_and_values_are_those_of_the_requests() -> None:
    p = predicted({"batch": 64, "input_len": 200, "output_len": 200})
    assert p.memory.kv_cache_gib[0] * GIB == pytest.approx(64 * 400 * 2 * 44 * 6144 * 2)
    blocks = predicted({"batch": 3, "input_len": 100, "output_len": 29}, by=engine(kv_block_tokens=64))
    assert blocks.memory.kv_cache_gib[0] * GIB == pytest.approx(3 * 192 * 2 * 44 * 6144 * 2)


def test_shared_keys_cost_less_memory_and_time() -> None:
    many = {"batch": 128, "input_len": 1024, "tp": 8, "output_len": 256}
    alone = predicted(many, shape=replace(LLAMA_70B, num_query_groups=64), by=engine("vllm"))
    shared = predicted(many, shape=LLAMA_70B, by=engine("vllm"))
    assert shared.memory.kv_cache_gib[0] < alone.memory.kv_cache_gib[0]
    assert shared.latency_ms[0] < alone.latency_ms[0]


def test_experts_that_are_not_chosen_are_not_read() -> None:
    wide = replace(GPT_20B, num_experts=64, experts_per_token=2, expert_ffn_hidden_size=6144)
    one, all_chosen = predicted({"batch": 1}, {"batch": 512}, shape=wide).decode.memory_ms
    dense = predicted({"batch": 1}, shape=replace(GPT_20B, ffn_hidden_size=2 * 6144)).decode.memory_ms[0]
    assert one == pytest.approx(dense, rel=0.05)
    assert all_chosen > 10 * one


def test_an_encoder_reads_the_prompt_once() -> None:
    p = predicted({"batch": 8}, {"batch": 8, "input_len": 1024}, shape=SHAPES["encoder"])
    assert p.ttft_ms[1] > 4 * p.ttft_ms[0]
    assert p.tpot_ms[1] < 2 * p.tpot_ms[0]


def test_less_bits_are_faster_and_smaller() -> None:
    gpu = files.read_gpus()["h100-80gb"]
    several = points({"precision": "bf16"}, {"precision": "fp8"})
    p = predict_serving(several, GPT_20B, cluster(gpu), engine("tensorrt-llm-0.9"))
    assert p.tpot_ms[1] < 0.7 * p.tpot_ms[0]
    assert p.memory_gib[1] < 0.6 * p.memory_gib[0]


def test_a_precision_that_the_gpu_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="precision: fp8 given, allowed on a100-80gb is bf16 or fp16 or fp32 or tf32"):
        predicted({"precision": "fp8"})


def test_graphs_take_the_host_out_of_the_way() -> None:
    eager, graphs = predicted({}, {"cuda_graphs": True}, by=engine("hptool-worker", host_layer_us=2000)).tpot_ms
    assert eager > 2000e-3 * 44
    assert graphs < 0.6 * eager


def test_pages_make_requests_wait_and_static_batches_fail() -> None:
    large = {"batch": 512, "input_len": 200, "output_len": 200}
    static, paged = predicted(large), predicted(large, by=engine("vllm"))
    assert static.p_fit[0] < 0.01
    assert static.running[0] == 512
    assert paged.p_fit[0] > 0.99
    assert paged.running[0] < 256
    assert paged.waiting_ms[0] > 0
    assert paged.ttft_ms[0] > paged.waiting_ms[0]
    assert paged.memory_gib[0] < 80
    assert most_running(points(large), GPT_20B, cluster(), engine("vllm"))[0] == pytest.approx(paged.running[0])


def test_weights_that_do_not_fit_fit_with_no_engine() -> None:
    huge = replace(GPT_20B, num_layers=200)
    assert predicted({}, shape=huge, by=engine("vllm")).p_fit[0] < 0.01
    assert np.isfinite(predicted({}, shape=huge, by=engine("vllm")).latency_ms[0])


def test_parts_have_names_of_columns() -> None:
    p = predicted({}, {"tp": 2})
    columns = p.columns()
    assert {len(found) for found in columns.values()} == {2}
    wanted = [f"predicted_prefill_{f}" for f in PassTime.__dataclass_fields__]
    assert {*wanted, *(f"predicted_{f}" for f in ServingMemory.__dataclass_fields__)} <= set(columns)
    assert columns["predicted_prefill_all_reduce_ms"][0] == 0 < columns["predicted_prefill_all_reduce_ms"][1]


def test_experts_are_trusted_less() -> None:
    assert predicted({}, shape=SHAPES["experts"]).latency_error[0] > predicted({}).latency_error[0]


# ---------------------------------------------------------------- published figures

#: FasterTransformer's gpt_guide.md, GPT-20B on A100s in fp16: TP, batch, input, output, milliseconds.
PUBLISHED = [
    (1, 1, 20, 8, 225),
    (1, 64, 60, 20, 1352),
    (1, 64, 200, 200, 10766),
    (2, 16, 128, 20, 618),
    (2, 128, 200, 200, 10538),
    (4, 1, 200, 200, 2481),
    (8, 1, 60, 20, 212),
    (8, 256, 60, 20, 1152),
    (8, 256, 200, 200, 7895),
]


@pytest.mark.parametrize(("tp", "batch", "input_len", "output_len", "latency_ms"), PUBLISHED)
def test_gpt_20b_takes_what_fastertransformer_published(
    tp: int, batch: int, input_len: int, output_len: int, latency_ms: float
) -> None:
    point = {"tp": tp, "batch": batch, "input_len": input_len, "output_len": output_len, "precision": "fp16"}
    p = predicted(point)
    assert p.latency_ms[0] == pytest.approx(latency_ms, rel=0.12)
    assert p.p_fit[0] > 0.9


def test_a_token_takes_no_less_than_reading_the_weights() -> None:
    for name in ENGINES:
        p = predicted({"precision": "bf16"}, by=engine(name))
        assert p.tpot_ms[0] > 40.5e9 / 2039e9 * 1e3


# ---------------------------------------------------------------- calibration

TRUE: dict[str, Any] = {
    "gemm_speed": 0.8,
    "weight_speed": 0.8,
    "kv_speed": 0.6,
    "collective_hops": 5.0,
    "request_us": 30.0,
}

MANY = [
    {"tp": tp, "batch": batch, "input_len": i, "output_len": o}
    for tp in (1, 2, 8)
    for batch in (1, 8, 32)
    for i, o in ((64, 64), (512, 32), (128, 256))
]


def served(*several: dict[str, Any], by: Engine | None = None, **measured: Column) -> Served:
    by = by or engine(**TRUE)
    p = predicted(*several, by=by)
    times = {"latency_ms": p.latency_ms, "ttft_ms": p.ttft_ms, "tpot_ms": p.tpot_ms} | measured
    return Served(points=p.points, shape=GPT_20B, cluster=cluster(), **times)


def off(fitted: Engine, *several: dict[str, Any], truth: Engine | None = None) -> float:
    wanted = predicted(*several, by=truth or engine(**TRUE)).latency_ms
    return float(np.median(np.abs(predicted(*several, by=fitted).latency_ms / wanted - 1)))


@pytest.mark.parametrize("name", ENGINES)
def test_nothing_teaches_nothing(name: str) -> None:
    nothing = np.full(2, np.nan)
    unknown = served({}, {"tp": 2}, latency_ms=nothing, ttft_ms=nothing, tpot_ms=nothing)
    assert calibrate_engine(engine(name), []) == engine(name)
    assert calibrate_engine(engine(name), [unknown]) == engine(name)


def test_points_that_are_as_predicted_move_nothing() -> None:
    fitted = calibrate_engine(engine(), [served(*MANY, by=engine())])
    for constant, value in constants_of(engine()).items():
        assert getattr(fitted, constant) == pytest.approx(value, rel=1e-3)
    assert fitted.latency_error < engine().latency_error


def test_eight_points_bring_a_strange_engine_near() -> None:
    eight = [*MANY[::4], MANY[1]]
    assert len(eight) == 8
    fitted = calibrate_engine(engine("hptool-worker"), [served(*eight)])
    assert off(engine("hptool-worker"), *MANY) > 0.15
    assert off(fitted, *MANY) < 0.05
    assert fitted.fitted


def test_parts_of_a_latency_teach_too() -> None:
    no_latency = served(*MANY, latency_ms=np.full(len(MANY), np.nan))
    assert off(calibrate_engine(engine(), [no_latency]), *MANY) < 0.02


def test_few_points_move_little() -> None:
    one = calibrate_engine(engine(), [served({"batch": 1, "tp": 1})])
    for constant, value in constants_of(engine()).items():
        assert 0.5 < getattr(one, constant) / value < 2


@pytest.mark.parametrize("factor", [0.1, 8.0])
def test_a_disturbed_point_ruins_nothing(factor: float) -> None:
    clean = served(*MANY)
    disturbed = clean.latency_ms.copy()
    disturbed[[3, 11]] *= factor
    nothing = np.full(len(MANY), np.nan)
    fitted = calibrate_engine(engine(), [served(*MANY, latency_ms=disturbed, ttft_ms=nothing, tpot_ms=nothing)])
    assert off(fitted, *MANY) < 0.02


def test_it_is_the_same_every_time_and_in_any_order() -> None:
    several = served(*MANY)
    shuffled = served(*MANY[::-1])
    fitted = calibrate_engine(engine(), [several])
    assert fitted == calibrate_engine(engine(), [several])
    other = constants_of(calibrate_engine(engine(), [shuffled]))
    assert list(constants_of(fitted).values()) == pytest.approx(list(other.values()), rel=1e-3)


def test_the_error_tells_how_much_is_left() -> None:
    noise = np.exp(np.random.default_rng(0).normal(0, 0.2, len(MANY)))
    nothing = np.full(len(MANY), np.nan)
    noisy = served(*MANY, latency_ms=served(*MANY).latency_ms * noise, ttft_ms=nothing, tpot_ms=nothing)
    clean = calibrate_engine(engine(), [served(*MANY)])
    assert clean.latency_error < 0.05
    assert 0.1 < calibrate_engine(engine(), [noisy]).latency_error < 0.35


def test_constants_stay_possible() -> None:
    nothing = np.full(len(MANY), np.nan)
    quick = served(*MANY, latency_ms=served(*MANY).latency_ms / 20, ttft_ms=nothing, tpot_ms=nothing)
    fitted = calibrate_engine(engine("hptool-worker"), [quick])
    assert all(getattr(fitted, name) <= most + 1e-9 for name, most in CEILINGS.items())


def test_keys_of_eight_bits_are_found_out() -> None:
    gpu = files.read_gpus()["h200"]
    by = engine("vllm", kv_bytes=1)
    several = points(
        *({"precision": "fp8", "batch": b, "input_len": 4000, "output_len": 500} for b in (8, 64, 128, 256))
    )
    p = predict_serving(several, LLAMA_70B, cluster(gpu), by)
    measured = {"latency_ms": p.latency_ms, "ttft_ms": p.ttft_ms, "tpot_ms": p.tpot_ms}
    known = Served(points=several, shape=LLAMA_70B, cluster=cluster(gpu), **measured)
    assert calibrate_engine(engine("other"), [known]).kv_bytes == 1
    assert calibrate_engine(engine("vllm"), [known]).kv_bytes == 2  # of an engine that is known it is no question


def test_several_models_teach_one_engine() -> None:
    by = engine(**TRUE)
    p = predict_serving(points({"tp": 8}, {"tp": 8, "batch": 64}), LLAMA_70B, cluster(), by)
    other = Served(
        points=p.points, shape=LLAMA_70B, cluster=cluster(), latency_ms=p.latency_ms,
        ttft_ms=column(np.nan, np.nan), tpot_ms=column(np.nan, np.nan),
    )  # fmt: skip
    assert off(calibrate_engine(engine(), [served(*MANY), other]), *MANY) < 0.02


def test_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="ttft_ms: 1 entries given, allowed are 2"):
        served({}, {"tp": 2}, ttft_ms=column(1.0))


def test_a_fit_is_done_before_a_run_is_over() -> None:
    eight = [served(*MANY[:8])]
    calibrate_engine(engine(), eight)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        calibrate_engine(engine("hptool-worker"), eight)
        times.append(time.perf_counter() - start)
    # A tenth of a second is wanted; a busy machine may be some times slower.
    assert min(times) < 0.3
