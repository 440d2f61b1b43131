"""Predictions against published runs, an exact trace of Megatron-core, and properties that physics demands."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import files
from hptool.candidates import Layout, Layouts, Recompute, SearchSpace, Workload, enumerate_layouts
from hptool.facts import Cluster, ModelShape
from hptool.predict import Predictions, predict, stack
from hptool.predict.flops import model_flops_per_step
from hptool.predict.layer import layer_cost
from hptool.predict.memory import Memory, predict_memory, rank_parameters, stage_memory
from hptool.predict.parallel import Table, stage_kinds, stage_layers
from hptool.predict.setting import Setting
from hptool.predict.step_time import step_time_bounds
from tests.test_candidates import LIMITS, workload
from tests.test_facts import shape

GPT3 = shape()
LLAMA_3_8B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    seq_length=8192,
    max_position_embeddings=8192,
    vocab_size=128256,
    tied_embeddings=False,
    has_bias=False,
    gated_mlp=True,
    rms_norm=True,
    learned_positions=False,
)
MIXTRAL_8X7B = replace(
    LLAMA_3_8B, vocab_size=32000, num_experts=8, experts_per_token=2, expert_ffn_hidden_size=14336, seq_length=4096
)
T5_220M = replace(
    GPT3,
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=2048,
    num_attention_heads=12,
    num_query_groups=12,
    kv_channels=64,
    seq_length=128,
    max_position_embeddings=512,
    encoder_num_layers=12,
    encoder_seq_length=512,
)

FRAMEWORKS = files.read_frameworks()
DGX_A100 = files.read_cluster("dgx-a100")

GPT3_175B = Workload(shape=shape(), gbs=512, gpus=512, gpus_per_node=8)
TP8_PP8 = Layouts.of([Layout(tp=8, pp=8)])


def setting(work: Workload, cluster: Cluster, framework: str = "hptool-worker") -> Setting:
    """What the formulas read for one workload."""
    return stack([(work, cluster, FRAMEWORKS[framework])])


def expect(layouts: Layouts, work: Workload, cluster: Cluster, framework: str = "hptool-worker") -> Predictions:
    """Predictions for one workload."""
    return predict(layouts, setting(work, cluster, framework))


def memory_of(layouts: Layouts, work: Workload, cluster: Cluster, framework: str = "hptool-worker") -> Memory:
    """Memory of the fullest rank."""
    return predict_memory(Table.of(layouts, setting(work, cluster, framework)))


def test_parameters_of_a_rank_of_175b_are_those_that_megatron_core_holds(dgx_a100: Cluster) -> None:
    # Counted in the real model of each stage, TP8·PP8 (Megatron-core 0.16.1, dry run on fake tensors).
    s = setting(GPT3_175B, dgx_a100)
    assert rank_parameters(TP8_PP8, s, first=True, last=False).total[0] == 2_822_731_776
    assert rank_parameters(TP8_PP8, s, first=False, last=False).total[0] == 2_718_922_752
    assert rank_parameters(TP8_PP8, s, first=False, last=True).total[0] == 2_797_590_528


def test_memory_of_175b_is_that_of_megatrons_own_schedule_on_fake_tensors(dgx_a100: Cluster) -> None:
    # The same dry run, first stage: 19.717 GiB of states and a peak of 28.993 GiB, without dropout; 20.641 GiB with
    # full recomputation; 31.650 GiB interleaved three times. Nothing is reserved on fake tensors.
    layouts = [
        Layout(tp=8, pp=8),
        Layout(tp=8, pp=8, recompute=Recompute.UNIFORM, recompute_num_layers=1),
        Layout(tp=8, pp=8, vpp=3),
    ]
    first, _ = stage_memory(Table.of(Layouts.of(layouts), setting(GPT3_175B, dgx_a100)))
    states = first.weights_gib + first.gradients_gib + first.optimizer_gib
    assert states[0] == pytest.approx(19.717, rel=1e-4)
    assert first.allocated_gib - first.framework_gib == pytest.approx([28.993, 20.641, 31.650], rel=0.03)


def test_activations_add_up_to_the_published_34_bytes(dgx_a100: Cluster) -> None:
    # Korthikanti et al. 2022 (arXiv:2205.05198), table 2: 34·s·b·h a layer with dropout, all of it split by sequence
    # parallelism, and 5·a·s²·b more for attention without a flash kernel.
    work = replace(GPT3_175B, dropout=True)
    tp8 = Layouts.of([Layout(tp=8, pp=1)])
    flash = memory_of(tp8, work, dgx_a100, "megatron-core")
    unfused = memory_of(tp8, replace(work, flash_attention=False), dgx_a100, "megatron-core")
    s, h, a, layers = 2048, 12288, 96, 96
    assert flash.activations_gib[0] * 2**30 == pytest.approx(layers * 34 * s * h / 8, rel=0.005)
    more = (unfused.activations_gib[0] - flash.activations_gib[0]) * 2**30
    assert more == pytest.approx(layers * 5 * a * s * s / 8, rel=0.005)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        # Published sizes; the shapes are those of the models' own configs (huggingface.co, config.json).
        (LLAMA_3_8B, 8.03),
        (replace(LLAMA_3_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64), 70.6),
        (MIXTRAL_8X7B, 46.7),
        (GPT3, 174.6),
    ],
)
def test_published_models_have_their_published_size(shape: ModelShape, billions: float) -> None:
    assert shape.num_parameters / 1e9 == pytest.approx(billions, rel=0.002)


def test_flops_are_those_of_the_published_formula() -> None:
    # Narayanan et al. 2021, equation 3, counts attention in full and one recomputation more (96·B·s·l·h² ...).
    s, h, layers, vocab, batch = 2048, 12288, 96, 51200, 1536
    published = 72 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))
    halved_attention = 72 * batch * s * layers * h**2 * s / (12 * h)
    assert model_flops_per_step(shape(), batch) == pytest.approx(published - halved_attention, rel=1e-12)


@pytest.mark.parametrize("profile", ["dgx-a100", "local"])
def test_parts_add_up(profile: str) -> None:
    cluster = files.read_cluster(profile)
    work = workload(gpus=64 if profile == "dgx-a100" else 2, gpus_per_node=cluster.gpus_per_node)
    work = replace(work, precision=cluster.gpu.default_precision)
    layouts = enumerate_layouts(SearchSpace(), work, LIMITS).layouts
    expected = expect(layouts, work, cluster)
    for parts, total in ((expected.memory, expected.memory_gib), (expected.step_time, expected.step_time_s)):
        columns = [getattr(parts, f.name) for f in fields(parts)]
        assert all((column >= 0).all() for column in columns)
        assert np.sum(columns, axis=0) == pytest.approx(total)
    assert ((expected.p_fit >= 0) & (expected.p_fit <= 1)).all()
    assert (expected.model_tflops_per_gpu < cluster.gpu.peak_tflops[work.precision]).all()


def test_a_table_of_one_is_the_row_of_a_table_of_many(dgx_a100: Cluster) -> None:
    layouts = enumerate_layouts(SearchSpace(), workload(), LIMITS).layouts
    many = expect(layouts, workload(), dgx_a100)
    for i in range(0, len(layouts), 97):
        one = expect(Layouts.of([layouts.row(i)]), workload(), dgx_a100)
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
    cluster, work = DGX_A100, replace(workload(), flash_attention=False)
    ladder = [
        layout,
        replace(layout, recompute=Recompute.SELECTIVE),
        replace(layout, recompute=Recompute.BLOCK, recompute_num_layers=2),
        replace(layout, recompute=Recompute.UNIFORM, recompute_num_layers=1),
    ]
    expected = expect(Layouts.of(ladder), work, cluster)
    none, selective, block, full = expected.memory_gib
    assert none > selective > full
    assert none > block > full
    none, selective, block, full = expected.step_time_s
    assert none < selective < full
    assert none < block < full


@settings(max_examples=60, deadline=None)
@given(layout=layouts, factor=st.sampled_from([1.5, 2.0, 10.0]))
def test_better_hardware_is_never_slower(layout: Layout, factor: float) -> None:
    cluster = DGX_A100
    gpu = cluster.gpu
    table = Layouts.of([layout])
    base = expect(table, workload(), cluster).step_time_s[0]
    better = [
        replace(cluster, gpu=replace(gpu, peak_tflops={k: v * factor for k, v in gpu.peak_tflops.items()})),
        replace(cluster, gpu=replace(gpu, memory_gb_per_s=gpu.memory_gb_per_s * factor)),
        replace(cluster, inter_node=replace(cluster.inter_node, bandwidth_gb_per_s=25 * factor)),
        replace(cluster, intra_node=replace(cluster.intra_node, latency_us=5 / factor)),
    ]
    for other in better:
        assert expect(table, workload(), other).step_time_s[0] <= base


def test_ranking_prefers_what_fits(dgx_a100: Cluster) -> None:
    small = replace(dgx_a100, gpu=replace(dgx_a100.gpu, memory_gib=30.0))
    work = replace(GPT3_175B, gpus=512)
    table = Layouts.of([Layout(tp=8, pp=8), Layout(tp=8, pp=8, recompute=Recompute.UNIFORM, recompute_num_layers=1)])
    assert list(expect(table, work, dgx_a100).ranking()) == [0, 1]
    assert list(expect(table, work, replace(small, gpu=replace(small.gpu, memory_gib=27.0))).ranking()) == [1, 0]


def test_what_overlaps_lies_between_all_and_nothing(dgx_a100: Cluster) -> None:
    layouts = enumerate_layouts(SearchSpace(), workload(), LIMITS).layouts
    for framework in ("hptool-worker", "megatron-core", "megatron-deepspeed", "nanotron"):
        s = setting(workload(), dgx_a100, framework)
        expected = predict(layouts, s).step_time_s
        best, worst = step_time_bounds(Table.of(layouts, s))
        assert (best <= expected * (1 + 1e-12)).all()
        assert (expected <= worst * (1 + 1e-12)).all()


def test_a_run_that_may_not_fit_is_worth_trying_if_it_would_be_much_faster(dgx_a100: Cluster) -> None:
    # Full recomputation costs a quarter. Without it there is an even chance: second place, ahead of all that are safe
    # and slower than the first.
    work = replace(GPT3_175B, gpus=512)
    safe = Layout(tp=8, pp=8, recompute=Recompute.UNIFORM, recompute_num_layers=1)
    layouts = [safe, Layout(tp=8, pp=8), replace(safe, mbs=2), replace(safe, pp=16)]
    limit = float(memory_of(TP8_PP8, work, dgx_a100).total_gib[0])
    tight = replace(dgx_a100, gpu=replace(dgx_a100.gpu, memory_gib=limit * 0.98))
    expected = expect(Layouts.of(layouts), work, tight)
    assert 0.2 < expected.p_fit[1] < 0.5
    assert 1 in expected.ranking()[:2]


@pytest.mark.parametrize("shape", [LLAMA_3_8B, MIXTRAL_8X7B, T5_220M], ids=["gated", "experts", "encoder"])
def test_every_kind_of_model_is_predicted_with_parts_that_add_up(shape: ModelShape, dgx_a100: Cluster) -> None:
    work = Workload(shape=shape, gbs=64, gpus=16, gpus_per_node=8)
    layouts = enumerate_layouts(SearchSpace(), work, LIMITS).layouts
    expected = expect(layouts, work, dgx_a100, "megatron-core")
    assert len(layouts) > 10
    for parts, total in ((expected.memory, expected.memory_gib), (expected.step_time, expected.step_time_s)):
        columns = [getattr(parts, f.name) for f in fields(parts)]
        assert all(np.isfinite(column).all() and (column >= 0).all() for column in columns)
        assert np.sum(columns, axis=0) == pytest.approx(total)
    assert (expected.model_tflops_per_gpu < 312).all()


def test_experts_spread_over_ranks_take_less_memory_and_send_tokens(dgx_a100: Cluster) -> None:
    work = Workload(shape=MIXTRAL_8X7B, gbs=64, gpus=32, gpus_per_node=8)
    expected = expect(Layouts.of([Layout(tp=2, ep=ep, pp=2) for ep in (1, 2, 4, 8)]), work, dgx_a100)
    assert (np.diff(expected.memory.weights_gib) < 0).all()
    assert expected.step_time.ep_communication_s[0] == 0
    assert (np.diff(expected.step_time.ep_communication_s) > 0).all()


def test_exchanging_heads_costs_less_than_gathering_keys_where_ranks_are_many(dgx_a100: Cluster) -> None:
    work = replace(workload(), shape=replace(workload().shape, seq_length=32768, max_position_embeddings=32768))
    table = Layouts.of([Layout(tp=4, cp=2), Layout(tp=4, cp=8), Layout(tp=4)])
    gathered = expect(table, work, dgx_a100)
    exchanged = expect(table, replace(work, cp_comm_type="a2a"), dgx_a100)
    # Of 8 ranks each gets 7 parts of keys and values, or sends 7/8 of its queries, keys, values and output.
    ratio = exchanged.step_time.cp_communication_s / np.maximum(1e-12, gathered.step_time.cp_communication_s)
    assert ratio[0] == pytest.approx(1.0, rel=0.05)
    assert ratio[1] == pytest.approx(2 / 8, rel=0.05)
    assert exchanged.memory.activations_gib[1] < gathered.memory.activations_gib[1]
    assert exchanged.step_time_s[2] == gathered.step_time_s[2]
    assert exchanged.memory_gib[2] == gathered.memory_gib[2]


def test_recomputing_a_flash_attention_costs_only_those_who_do_it(dgx_a100: Cluster) -> None:
    table = Layouts.of([Layout(tp=8, pp=8), Layout(tp=8, pp=8, recompute=Recompute.SELECTIVE)])
    for framework, costs in (("hptool-worker", False), ("megatron-core", True)):
        plain, again = expect(table, workload(), dgx_a100, framework).step_time_s.tolist()
        assert (again > plain) is costs


def test_groups_across_nodes_share_their_nodes_ports(dgx_a100: Cluster) -> None:
    # Eight ranks of a group in each node have eight ports, one rank has one: gradients of as many bytes take longer.
    work = replace(GPT3_175B, shape=LLAMA_3_8B, gbs=1024)
    wide = expect(Layouts.of([Layout(tp=1), Layout(tp=8)]), work, dgx_a100)
    per_byte = wide.step_time.dp_communication_s / wide.memory.weights_gib
    assert per_byte[1] > 3 * per_byte[0]


def test_ethernet_costs_more_than_infiniband(dgx_a100: Cluster) -> None:
    ethernet = files.read_cluster("ethernet-a100")
    work = replace(workload(), gpus=64)
    layouts = Layouts.of([Layout(tp=8, pp=2)])
    assert expect(layouts, work, ethernet).step_time_s[0] > 1.1 * expect(layouts, work, dgx_a100).step_time_s[0]


def test_blocks_of_a_table_do_not_show() -> None:
    # A table longer than a block is predicted in several, each with its own shared rows.
    cluster, work = files.read_cluster("dgx-a100"), workload()
    layouts = enumerate_layouts(SearchSpace(), work, LIMITS).layouts
    times = 1 + 70_000 // len(layouts)
    long = layouts.select(np.tile(np.arange(len(layouts)), times))
    once, often = expect(layouts, work, cluster), expect(long, work, cluster)
    assert often.step_time_s == pytest.approx(np.tile(once.step_time_s, times), rel=1e-12)
    assert often.p_fit == pytest.approx(np.tile(once.p_fit, times), rel=1e-12)


def test_one_setting_a_row_is_the_same_as_one_for_all(dgx_a100: Cluster) -> None:
    layouts = enumerate_layouts(SearchSpace(), workload(), LIMITS).layouts
    one = setting(workload(), dgx_a100)
    each = stack([(workload(), dgx_a100, FRAMEWORKS["hptool-worker"])] * len(layouts))
    assert predict(layouts, each).step_time_s == pytest.approx(predict(layouts, one).step_time_s, rel=1e-12)
    assert predict(layouts, each).memory_gib == pytest.approx(predict(layouts, one).memory_gib, rel=1e-12)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 4), (2, 6)])
@pytest.mark.parametrize(("encoder", "decoder"), [(12, 12), (18, 6), (3, 21), (7, 17)])
def test_stages_hold_the_encoders_layers_first(
    dgx_a100: Cluster, pp: int, vpp: int, encoder: int, decoder: int
) -> None:
    work = Workload(
        shape=replace(T5_220M, num_layers=decoder, encoder_num_layers=encoder), gbs=512, gpus=512, gpus_per_node=8
    )
    table, s = Layouts.of([Layout(pp=pp, vpp=vpp)]), setting(work, dgx_a100)
    layers = [True] * encoder + [False] * decoder
    chunk = len(layers) // (pp * vpp)
    for first, stage in ((True, 0), (False, pp - 1)):
        own = [x for k in range(vpp) for x in layers[(k * pp + stage) * chunk : (k * pp + stage + 1) * chunk]]
        kinds = stage_kinds(table, s, first=first)
        assert [float(x[0]) for x in kinds] == [sum(own), len(own) - sum(own)]


def test_a_stage_of_long_encoder_layers_holds_up_the_pipeline(dgx_a100: Cluster) -> None:
    # Half of the layers take four fifths of the tokens: the first stage takes longer than half of the model.
    work = Workload(shape=replace(T5_220M, seq_length=128, encoder_seq_length=512), gbs=4096, gpus=512, gpus_per_node=8)
    table, s = Layouts.of([Layout(), Layout(pp=2), Layout(pp=2, vpp=12)]), setting(work, dgx_a100)
    whole, halves, mixed = stage_layers(table, s)
    assert whole == pytest.approx(12)
    assert 1.2 * 6 < halves < 1.8 * 6
    assert mixed == pytest.approx(6, rel=0.01)


def test_stages_hand_on_the_tokens_of_both_sequences(dgx_a100: Cluster) -> None:
    work = Workload(shape=T5_220M, gbs=512, gpus=512, gpus_per_node=8)
    cost = layer_cost(Layouts.of([Layout(pp=2)]), setting(work, dgx_a100))
    assert cost.send_bytes[0] == (512 + 128) * 768 * 2


def test_heads_and_biases_of_other_families_are_counted_once() -> None:
    bert = replace(GPT3, causal=False, has_mlm_head=True)
    hidden, vocabulary = GPT3.hidden_size, GPT3.vocab_size
    mlm = hidden * hidden + hidden + 2 * hidden + vocabulary
    assert bert.num_parameters - GPT3.num_parameters == mlm
    # The pooler, two outputs, and two segments' embeddings.
    pooler = hidden * hidden + hidden + 2 * hidden + 2 + 2 * hidden
    assert replace(bert, has_binary_head=True).num_parameters - bert.num_parameters == pooler
    plain = replace(GPT3, has_bias=False)
    assert replace(plain, has_qkv_bias=True).num_parameters - plain.num_parameters == 96 * 3 * hidden
    assert replace(GPT3, has_qkv_bias=True).num_parameters == GPT3.num_parameters
