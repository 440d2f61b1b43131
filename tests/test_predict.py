"""Predictions against published runs, an exact trace of Megatron-core, and properties that physics demands."""

import csv
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import files
from hptool.candidates import Layout, Layouts, Recompute, SearchSpace, Workload, enumerate_layouts
from hptool.facts import Cluster
from hptool.predict import predict
from hptool.predict.flops import model_flops_per_step
from hptool.predict.memory import predict_memory, rank_parameters
from tests.test_candidates import LIMITS, workload
from tests.test_facts import shape

GPT3_175B = Workload(shape=shape(), gbs=512, gpus=512, gpus_per_node=8)
TP8_PP8 = Layouts.of([Layout(tp=8, pp=8)])


def test_parameters_of_a_rank_of_175b_are_those_that_megatron_core_holds() -> None:
    # Counted in the real model of each stage, TP8·PP8 (Megatron-core 0.16.1, dry run on fake tensors).
    assert rank_parameters(TP8_PP8, GPT3_175B, first=True, last=False)[0] == 2_822_731_776
    assert rank_parameters(TP8_PP8, GPT3_175B, first=False, last=False)[0] == 2_718_922_752
    assert rank_parameters(TP8_PP8, GPT3_175B, first=False, last=True)[0] == 2_797_590_528


def test_memory_of_175b_is_that_of_megatrons_own_schedule_on_fake_tensors(dgx_a100: Cluster) -> None:
    # The same dry run, first stage: 19.717 GiB of states and a peak of 28.993 GiB, without dropout; 20.641 GiB with
    # full recomputation; 31.650 GiB interleaved three times. Nothing is reserved on fake tensors.
    gpu = replace(dgx_a100.gpu, device="cpu", reserved_gib=0.0)
    layouts = [
        Layout(tp=8, pp=8),
        Layout(tp=8, pp=8, recompute=Recompute.UNIFORM, recompute_num_layers=1),
        Layout(tp=8, pp=8, vpp=3),
    ]
    memory = predict_memory(Layouts.of(layouts), GPT3_175B, gpu)
    states = memory.weights_gib + memory.gradients_gib + memory.optimizer_gib
    assert states[0] == pytest.approx(19.717, rel=1e-4)
    assert memory.total_gib == pytest.approx([28.993, 20.641, 31.650], rel=0.03)


def test_activations_add_up_to_the_published_34_bytes() -> None:
    # Korthikanti et al. 2022 (arXiv:2205.05198), table 2: 34·s·b·h a layer with dropout, all of it split by sequence
    # parallelism, and 5·a·s²·b more for attention without a flash kernel.
    work = replace(GPT3_175B, dropout=True)
    tp8 = Layouts.of([Layout(tp=8, pp=1)])
    gpu = files.read_gpu("a100", "test")
    flash = predict_memory(tp8, work, gpu)
    unfused = predict_memory(tp8, replace(work, flash_attention=False), gpu)
    s, h, a, layers = 2048, 12288, 96, 96
    assert flash.activations_gib[0] * 2**30 == pytest.approx(layers * 34 * s * h / 8, rel=0.005)
    more = (unfused.activations_gib[0] - flash.activations_gib[0]) * 2**30
    assert more == pytest.approx(layers * 5 * a * s * s / 8, rel=0.005)


def test_flops_are_those_of_the_published_formula() -> None:
    # Narayanan et al. 2021, equation 3, counts attention in full and one recomputation more (96·B·s·l·h² ...).
    s, h, layers, vocab, batch = 2048, 12288, 96, 51200, 1536
    published = 72 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))
    halved_attention = 72 * batch * s * layers * h**2 * s / (12 * h)
    assert model_flops_per_step(shape(), batch) == pytest.approx(published - halved_attention, rel=1e-12)


def test_step_times_of_korthikanti_et_al(published: Path, dgx_a100: Cluster) -> None:
    """Eight runs of 22B to 1T on A100s: each within 15 %, no factor fitted to them."""
    with published.open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row["dataset"] == "korthikanti"]
    assert len(table) == 8
    for row in table:
        heads, layers = int(row["heads"]), int(row["layers"])
        dims = {
            "num_layers": layers,
            "hidden_size": int(row["hidden"]),
            "ffn_hidden_size": int(row["ffn"]),
            "num_attention_heads": heads,
            "num_query_groups": heads,
            "kv_channels": int(row["hidden"]) // heads,
            "seq_length": int(row["seq"]),
        }
        work = Workload(
            shape=shape(**dims),
            gbs=int(row["gbs"]),
            gpus=int(row["gpus"]),
            gpus_per_node=8,
            sequence_parallel=row["sequence_parallel"] == "1",
            flash_attention=False,
            dropout=True,
        )
        full = row["recompute"] == "full"
        layout = Layout(
            tp=int(row["tp"]),
            pp=int(row["pp"]),
            vpp=int(row["vpp"]),
            mbs=int(row["mbs"]),
            recompute=Recompute.UNIFORM if full else Recompute.SELECTIVE,
            recompute_num_layers=1 if full else 0,
        )
        expected = predict(Layouts.of([layout]), work, dgx_a100)
        assert expected.tokens_per_s_per_gpu[0] == pytest.approx(float(row["tps_gpu_norm"]), rel=0.15), row["id"]
        assert expected.memory_gib[0] < 80, row["id"]  # all of them ran


@pytest.mark.parametrize("profile", ["dgx-a100", "local"])
def test_parts_add_up(profile: str) -> None:
    cluster = files.read_cluster(profile)
    work = workload(gpus=64 if profile == "dgx-a100" else 2, gpus_per_node=cluster.gpus_per_node)
    work = replace(work, precision=cluster.gpu.default_precision)
    layouts = enumerate_layouts(SearchSpace(), work, LIMITS).layouts
    expected = predict(layouts, work, cluster)
    for parts, total in ((expected.memory, expected.memory_gib), (expected.step_time, expected.step_time_s)):
        columns = [getattr(parts, f.name) for f in fields(parts)]
        assert all((column >= 0).all() for column in columns)
        assert np.sum(columns, axis=0) == pytest.approx(total)
    assert ((expected.p_fit >= 0) & (expected.p_fit <= 1)).all()
    assert (expected.model_tflops_per_gpu < cluster.gpu.peak_tflops[work.precision]).all()


def test_a_table_of_one_is_the_row_of_a_table_of_many(dgx_a100: Cluster) -> None:
    layouts = enumerate_layouts(SearchSpace(), workload(), LIMITS).layouts
    many = predict(layouts, workload(), dgx_a100)
    for i in range(0, len(layouts), 97):
        one = predict(Layouts.of([layouts.row(i)]), workload(), dgx_a100)
        assert one.step_time_s[0] == pytest.approx(many.step_time_s[i], rel=1e-12)
        assert one.memory_gib[0] == pytest.approx(many.memory_gib[i], rel=1e-12)


layouts = st.builds(
    Layout,
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([2, 4, 8]),
    vpp=st.sampled_from([1, 3]),
    mbs=st.sampled_from([1, 2]),
)


@settings(max_examples=60, deadline=None)
@given(layout=layouts)
def test_recomputing_more_holds_less_and_takes_longer(layout: Layout) -> None:
    cluster, work = files.read_cluster("dgx-a100"), replace(workload(), flash_attention=False)
    ladder = [
        layout,
        replace(layout, recompute=Recompute.SELECTIVE),
        replace(layout, recompute=Recompute.BLOCK, recompute_num_layers=2),
        replace(layout, recompute=Recompute.UNIFORM, recompute_num_layers=1),
    ]
    expected = predict(Layouts.of(ladder), work, cluster)
    none, selective, block, full = expected.memory_gib
    assert none > selective > full
    assert none > block > full
    none, selective, block, full = expected.step_time_s
    assert none < selective < full
    assert none < block < full


@settings(max_examples=60, deadline=None)
@given(layout=layouts, factor=st.sampled_from([1.5, 2.0, 10.0]))
def test_better_hardware_is_never_slower(layout: Layout, factor: float) -> None:
    cluster = files.read_cluster("dgx-a100")
    gpu = cluster.gpu
    table = Layouts.of([layout])
    base = predict(table, workload(), cluster).step_time_s[0]
    better = [
        replace(cluster, gpu=replace(gpu, peak_tflops={k: v * factor for k, v in gpu.peak_tflops.items()})),
        replace(cluster, gpu=replace(gpu, memory_gb_per_s=gpu.memory_gb_per_s * factor)),
        replace(cluster, inter_node=replace(cluster.inter_node, bandwidth_gb_per_s=25 * factor)),
        replace(cluster, intra_node=replace(cluster.intra_node, latency_us=5 / factor)),
    ]
    for other in better:
        assert predict(table, workload(), other).step_time_s[0] <= base


def test_ranking_prefers_what_fits(dgx_a100: Cluster) -> None:
    small = replace(dgx_a100, gpu=replace(dgx_a100.gpu, memory_gib=30.0))
    work = replace(GPT3_175B, gpus=512)
    table = Layouts.of([Layout(tp=8, pp=8), Layout(tp=8, pp=8, recompute=Recompute.UNIFORM, recompute_num_layers=1)])
    assert list(predict(table, work, dgx_a100).ranking()) == [0, 1]
    assert list(predict(table, work, replace(small, gpu=replace(small.gpu, memory_gib=27.0))).ranking()) == [1, 0]
