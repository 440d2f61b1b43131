"""Curves fitted to points that the formulas of predictions have made: the figures behind them must come back."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import files
from hptool.facts import Cluster, GpuSpec, Link, MeasuredPoint
from hptool.predict import curves, layer, stack
from hptool.predict.curves import Benchmarks, Floats
from hptool.predict.setting import Setting
from hptool.units import GB, MICRO, TERA
from tests.conftest import preset_config

H100 = files.read_cluster("dgx-h100")
FRAMEWORK = files.read_framework("hptool-worker")
PEAK = H100.gpu.peak_tflops["bf16"] * TERA
MEMORY = H100.gpu.memory_gb_per_s * GB * H100.gpu.efficiency.memory

#: The shapes of linear layers from narrow to wide, as ranks of tensor parallelism and whole GPUs have them.
SHAPES = [
    gemm
    for tokens, width_in, width_out in [
        (16384, 1024, 4096), (16384, 1024, 1024), (8192, 2048, 8192), (8192, 2048, 2048), (8192, 4096, 16384),
        (2048, 4096, 512), (512, 2048, 2048), (4096, 8192, 1024), (1024, 1024, 1024), (4096, 512, 512),
    ]
    for gemm in curves.linear_gemms(tokens, width_in, width_out)
]  # fmt: skip
ROWS, COLUMNS, DEPTH = (np.array([float(shape[name]) for shape in SHAPES]) for name in ("rows", "columns", "depth"))
LENGTHS = np.array([512.0, 1024.0, 2048.0, 4096.0, 8192.0] * 4)


def setting(gpu: GpuSpec, cluster: Cluster = H100) -> Setting:
    """What the formulas read, of a GPT-3 on this GPU."""
    config = preset_config("5b", cluster, 1)
    return stack([(config.workload, replace(cluster, gpu=gpu), FRAMEWORK)])


def with_efficiency(gpu: GpuSpec = H100.gpu, **figures: float) -> GpuSpec:
    return replace(gpu, efficiency=replace(gpu.efficiency, **figures))


def disturbed(seconds: Floats, seed: int, noise: float = 0.03, outliers: float = 0.15) -> Floats:
    """As a timer on a busy machine would have it: a few per cent of noise, and so many points three times as slow.

    No more than that: where most points of one length are slow, no fit can tell that they should not be.
    """
    random = np.random.default_rng(seed)
    late = random.permutation(len(seconds)) < int(outliers * len(seconds))
    return np.asarray(seconds * np.exp(noise * random.standard_normal(len(seconds))) * np.where(late, 3.0, 1.0))


def gemm_seconds(efficiency: float, half_waves: float, half_depth: float) -> Floats:
    gpu = with_efficiency(gemm=efficiency, gemm_half_waves=half_waves, gemm_half_depth=half_depth)
    return np.asarray(layer.gemm_s(ROWS, COLUMNS, DEPTH, setting(gpu)))


def fitted_gemm(seconds: Floats) -> curves.Fit:
    return curves.fit_gemm(
        ROWS,
        COLUMNS,
        DEPTH,
        seconds,
        peak_flops_per_s=PEAK,
        multiprocessors=H100.gpu.multiprocessors,
        element_bytes=2,
        memory_bytes_per_s=MEMORY,
    )


GEMM_CURVES = {
    "efficiency": st.floats(0.3, 0.95),
    "half_waves": st.one_of(st.just(0.0), st.floats(0.02, 4.0)),
    "half_depth": st.one_of(st.just(0.0), st.floats(5.0, 600.0)),
}


@settings(max_examples=25, deadline=None)
@given(**GEMM_CURVES)
def test_a_gemm_curve_comes_back(efficiency: float, half_waves: float, half_depth: float) -> None:
    seconds = gemm_seconds(efficiency, half_waves, half_depth)
    fit = fitted_gemm(seconds)
    assert fit.figures["gemm"] == pytest.approx(efficiency, rel=0.02)
    assert fit.error < 0.01
    again = gemm_seconds(fit.figures["gemm"], fit.figures["gemm_half_waves"], fit.figures["gemm_half_depth"])
    assert np.max(np.abs(np.log(again / seconds))) < 0.02


@settings(max_examples=25, deadline=None)
@given(**GEMM_CURVES, seed=st.integers(0, 10**6))
def test_noise_and_outliers_move_a_gemm_curve_little(
    efficiency: float, half_waves: float, half_depth: float, seed: int
) -> None:
    seconds = gemm_seconds(efficiency, half_waves, half_depth)
    fit = fitted_gemm(disturbed(seconds, seed))
    again = gemm_seconds(fit.figures["gemm"], fit.figures["gemm_half_waves"], fit.figures["gemm_half_depth"])
    assert np.median(np.abs(np.log(again / seconds))) < 0.06


@settings(max_examples=25, deadline=None)
@given(
    efficiency=st.floats(0.1, 0.9),
    half_length=st.one_of(st.just(0.0), st.floats(20.0, 3000.0)),
    seed=st.integers(0, 10**6),
)
def test_an_attention_curve_comes_back(efficiency: float, half_length: float, seed: int) -> None:
    s = setting(with_efficiency(attention=efficiency, attention_half_length=half_length))
    whole: Any = SimpleNamespace(tp=1)
    causal = np.array([0.0, 1.0] * 10)
    queries = 16384.0
    forward = np.concatenate(
        [
            layer._attention_s(whole, s, np.array([queries]), np.array([keys]), np.array([mask]))[0]
            for keys, mask in zip(LENGTHS, causal, strict=True)
        ]
    )
    seconds = forward * (1 + layer.BACKWARD_ATTENTION)
    width = float(s.attention_width[0])
    flops = 4 * queries * LENGTHS * width * (1 - 0.5 * causal) * (1 + layer.BACKWARD_ATTENTION)
    fit = curves.fit_attention(flops, LENGTHS, seconds, peak_flops_per_s=PEAK)
    assert fit.figures["attention"] == pytest.approx(efficiency, rel=0.01)
    assert fit.figures["attention_half_length"] == pytest.approx(half_length, rel=0.03, abs=1.0)
    noisy = curves.fit_attention(flops, LENGTHS, disturbed(seconds, seed), peak_flops_per_s=PEAK)
    again = flops / (PEAK * noisy.figures["attention"]) * (1 + noisy.figures["attention_half_length"] / LENGTHS)
    assert np.median(np.abs(np.log(again / seconds))) < 0.06


@settings(max_examples=25, deadline=None)
@given(
    bandwidth=st.floats(0.5, 800.0), latency_us=st.floats(1.0, 3000.0), ranks=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_link_comes_back(bandwidth: float, latency_us: float, ranks: int, seed: int) -> None:
    link = Link(bandwidth_gb_per_s=bandwidth, latency_us=latency_us, efficiency=1.0)
    s = setting(H100.gpu, replace(H100, intra_node=link))
    sizes = np.array([8192.0, 262_144.0, 4e6, 64e6, 256e6] * 4)
    group = np.array([float(ranks)])
    ring = 2 * (ranks - 1) / ranks * sizes
    seconds = layer.transfer_s(ring, s, group, layer.ONE) + layer.latency_s(s, group, layer.ONE)
    fit = curves.fit_link(ring, np.full(len(sizes), math.log2(ranks)), seconds)
    again = ring / fit.figures["bytes_per_s"] + math.log2(ranks) * fit.figures["latency_s"]
    assert np.max(np.abs(np.log(again / seconds))) < 0.02
    noisy = curves.fit_link(ring, np.full(len(sizes), math.log2(ranks)), disturbed(seconds, seed))
    again = ring / noisy.figures["bytes_per_s"] + math.log2(ranks) * noisy.figures["latency_s"]
    assert np.median(np.abs(np.log(again / seconds))) < 0.06


def test_a_rate_is_that_of_the_middle() -> None:
    fit = curves.fit_rate(np.array([10.0, 20.0, 30.0]), np.array([1.0, 2.0, 30.0]))
    assert fit.figures["rate"] == pytest.approx(10.0)
    assert fit.error > 1  # the third point says so


# ---------------------------------------------------------------- all of a GPU

TRUE = replace(
    with_efficiency(
        gemm=0.7, gemm_half_waves=0.3, gemm_half_depth=120.0, attention=0.45, attention_half_length=400.0, memory=0.6
    ),
    launch_overhead_us=7.0,
    intra_node=Link(bandwidth_gb_per_s=450.0, efficiency=0.8, latency_us=9.0),
    inter_node=Link(bandwidth_gb_per_s=50.0, efficiency=0.9, latency_us=20.0),
)
LAYER = {"hidden": 1024, "ffn": 4096, "heads": 16, "length": 2048, "batch": 8}


def point(kind: str, seconds: float, **sizes: int) -> MeasuredPoint:
    return MeasuredPoint(kind=kind, sizes=sizes, time_us=seconds / MICRO)


def benchmarks(*points: MeasuredPoint, nodes: int = 2) -> Benchmarks:
    return Benchmarks(
        device="NVIDIA H100 80GB HBM3",
        multiprocessors=132,
        memory_gib=79.2,
        versions={"torch": "2.13.0"},
        took_s=120.0,
        nodes=nodes,
        gpus_per_node=8,
        precision="bf16",
        points=points,
    )


def true_points() -> list[MeasuredPoint]:
    """What a GPU would show whose facts are TRUE."""
    s = setting(TRUE)
    found = []
    for shape in SHAPES:
        m, n, k = (np.array([float(shape[name])]) for name in ("rows", "columns", "depth"))
        found.append(point(curves.GEMM, float(layer.gemm_s(m, n, k, s)[0]), **shape))
    for length in (512, 1024, 2048, 4096, 8192):
        for causal in (0, 1):
            sizes = {"batch": 16384 // length, "length": length, "heads": 16, "head_size": 128, "causal": causal}
            flops = curves.attention_flops(point(curves.ATTENTION, 1.0, **sizes))
            seconds = flops / (PEAK * TRUE.efficiency.attention) * (1 + TRUE.efficiency.attention_half_length / length)
            found.append(point(curves.ATTENTION, seconds, **sizes))
    operations = FRAMEWORK.forward_operations + FRAMEWORK.backward_operations
    found.append(point(curves.TINY_LAYER, operations * TRUE.launch_overhead_us * MICRO, **LAYER))
    passes = FRAMEWORK.hidden_passes * LAYER["hidden"] + FRAMEWORK.ffn_passes * LAYER["ffn"]
    moved = 3 * LAYER["batch"] * LAYER["length"] * passes * 2
    found.append(point(curves.LAYER_REST, moved / (TRUE.memory_gb_per_s * GB * TRUE.efficiency.memory), **LAYER))
    for across, link, ranks in ((0, TRUE.intra_node, 8), (1, TRUE.inter_node, 2)):
        rate = link.bandwidth_gb_per_s * link.efficiency * GB
        for kind, share in curves.RING_SHARE.items():
            for size in (8192, 262_144, 4_194_304, 268_435_456):
                hops = 1 if kind == "send" else math.log2(ranks)
                seconds = share(ranks) * size / rate + hops * link.latency_us * MICRO
                found.append(point(kind, seconds, bytes=size, ranks=ranks, across=across))
    return found


def test_all_facts_of_a_gpu_come_back() -> None:
    fitted = curves.fit_curves(benchmarks(*true_points()), H100.gpu, FRAMEWORK)
    assert fitted.kept == ()
    assert fitted.launch_overhead_us == pytest.approx(7.0)
    for name in ("gemm", "attention", "memory"):
        assert getattr(fitted.efficiency, name) == pytest.approx(getattr(TRUE.efficiency, name), rel=0.02), name
    assert fitted.efficiency.attention_half_length == pytest.approx(400.0, rel=0.03)
    for link, true in ((fitted.intra_node, TRUE.intra_node), (fitted.inter_node, TRUE.inter_node)):
        assert link is not None
        assert link.bandwidth_gb_per_s == true.bandwidth_gb_per_s  # the data sheet's
        assert link.efficiency == pytest.approx(true.efficiency, rel=0.02)
        assert link.latency_us == pytest.approx(true.latency_us, rel=0.05)
    assert (fitted.peak_tflops, fitted.memory_gb_per_s) == (H100.gpu.peak_tflops["bf16"], H100.gpu.memory_gb_per_s)
    assert max(fitted.errors.values()) < 0.02


def test_what_was_not_measured_stays_and_is_named() -> None:
    tiny = [p for p in true_points() if p.kind == curves.TINY_LAYER]
    fitted = curves.fit_curves(benchmarks(*tiny), H100.gpu, FRAMEWORK)
    assert fitted.efficiency == H100.gpu.efficiency
    assert fitted.launch_overhead_us == pytest.approx(7.0)
    assert {"gemm", "attention", "memory", "intra_node", "inter_node"} <= set(fitted.kept)
    assert "launch_overhead_us" not in fitted.kept


def test_a_lone_node_misses_no_network() -> None:
    assert "inter_node" not in curves.fit_curves(benchmarks(nodes=1), H100.gpu, FRAMEWORK).kept


def test_half_of_the_known_kernels_is_the_least_that_a_layer_takes_beside_its_gemms() -> None:
    tokens = LAYER["batch"] * LAYER["length"]
    kernels = [
        point("norm", 1e-3, tokens=tokens, width=1024),
        point("activation", 2e-3, tokens=tokens, width=4096),
        point("residual_add", 3e-3, tokens=tokens, width=1024),
    ]
    # The difference of two noisy times came out far too small.
    fitted = curves.fit_curves(benchmarks(point(curves.LAYER_REST, 1e-6, **LAYER), *kernels), H100.gpu, FRAMEWORK)
    passes = FRAMEWORK.hidden_passes * 1024 + FRAMEWORK.ffn_passes * 4096
    rate = 3 * tokens * passes * 2 / (0.5 * (2 * 1e-3 + 2e-3 + 2 * 3e-3))
    assert fitted.efficiency.memory == pytest.approx(rate / (H100.gpu.memory_gb_per_s * GB))


def test_a_cpu_faster_than_was_held_for_its_peak_raises_the_peak() -> None:
    cpu = files.read_gpu("cpu", "test")
    peak = cpu.peak_tflops["fp32"]
    # GEMMs whose operands move in no time, at twice the peak.
    points = [
        point(curves.GEMM, 2.0 * rows**2 * depth / (2 * peak * TERA), rows=rows, columns=rows, depth=depth)
        for depth in (256, 1024)
        for rows in (256, 512, 640, 768, 896, 1024, 1280, 1536)
    ]
    found = replace(benchmarks(*points, nodes=1), precision="fp32")
    fitted = curves.fit_curves(found, replace(cpu, memory_gb_per_s=1e6), FRAMEWORK)
    assert fitted.peak_tflops * fitted.efficiency.gemm == pytest.approx(2 * peak, rel=0.05)
    assert 0 < fitted.efficiency.gemm <= 1
    # A rate stays a rate: attention, which was not measured, is as fast as before.
    assert fitted.efficiency.attention * fitted.peak_tflops == pytest.approx(cpu.efficiency.attention * peak)


def test_no_gpu_is_faster_than_its_data_sheet() -> None:
    points = [replace(p, time_us=p.time_us / 10) for p in true_points()]
    fitted = curves.fit_curves(benchmarks(*points), H100.gpu, FRAMEWORK)
    assert max(fitted.efficiency.gemm, fitted.efficiency.attention) <= 1
    assert fitted.efficiency.memory == 1.0
    assert fitted.peak_tflops == H100.gpu.peak_tflops["bf16"]
    assert fitted.intra_node is not None
    assert fitted.intra_node.efficiency == 1.0  # and the bandwidth what was measured
    assert fitted.intra_node.bandwidth_gb_per_s > 450


def test_rates_are_the_best_of_each_kind() -> None:
    found = curves.rates(true_points())
    assert 0 < found["gemm (TFLOP/s)"] < PEAK / TERA
    assert found["all_reduce (GB/s)"] == pytest.approx(360, rel=0.05)
