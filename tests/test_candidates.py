"""Layouts: each legal one once, each illegal one counted, checked against rules written out one by one."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import files
from hptool.candidates import (
    Layout,
    Layouts,
    Recompute,
    SearchLimits,
    SearchSpace,
    Workload,
    enumerate_layouts,
    refusal,
)
from tests.test_facts import shape

LIMITS = files.read(Path(files.data_directory("base_configs")) / "search_space.yaml", SearchLimits)


def workload(**changes: int) -> Workload:
    """GPT-3 175B on 128 nodes of 8."""
    values = {"gbs": 1536, "gpus": 1024, "gpus_per_node": 8}
    return Workload(shape=shape(), **(values | changes))  # type: ignore[arg-type]


def is_legal(layout: Layout, work: Workload) -> bool:  # noqa: PLR0912 (as C901)
    """Megatron-core's demands, one layout at a time, as its documentation states them."""
    s, x = work.shape, layout
    if s.num_attention_heads % x.tp or s.num_query_groups % x.tp:
        return False
    widths = [s.expert_ffn_hidden_size, s.shared_ffn_hidden_size] if s.num_experts else [s.ffn_hidden_size]
    if any(width % x.tp for width in widths):
        return False
    if s.num_experts and x.tp > 1 and (s.has_bias or not work.sequence_parallel):
        return False
    if (s.num_experts or 1) % x.ep or work.gpus % (x.tp * x.ep * x.pp):
        return False
    if x.cp > 1 and (not s.causal or s.encoder_num_layers):
        return False
    if x.tp > work.gpus_per_node or work.gpus_per_node % x.tp:
        return False
    all_layers = s.encoder_num_layers + s.num_layers
    if work.gpus % (x.tp * x.pp * x.cp) or all_layers % (x.pp * x.vpp):
        return False
    if x.vpp > 1 and x.pp == 1:
        return False
    if x.cp > 1 and (s.seq_length % (2 * x.cp) or not work.flash_attention):
        return False
    lengths = [s.seq_length, s.encoder_seq_length]
    if work.sequence_parallel and x.tp > 1 and any((length // x.cp) % x.tp for length in lengths):
        return False
    dp = work.gpus // (x.tp * x.pp * x.cp)
    if work.gbs % (x.mbs * dp):
        return False
    if x.vpp > 1 and (work.gbs // (x.mbs * dp)) % x.pp:
        return False
    layers = all_layers // (x.pp * x.vpp)
    if x.recompute is Recompute.UNIFORM:
        # No chunk may begin in the encoder and end in the decoder: each stage starts anew.
        mixed = s.encoder_num_layers % layers
        return x.recompute_num_layers >= 1 and layers % x.recompute_num_layers == mixed % x.recompute_num_layers == 0
    if x.recompute is Recompute.BLOCK:
        return 1 <= x.recompute_num_layers < layers
    return True


sizes = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]), min_size=1, max_size=4, unique=True).map(tuple)
modes = st.sampled_from(
    [(Recompute.NONE, None), (Recompute.SELECTIVE, None), (Recompute.UNIFORM, 2), (Recompute.BLOCK, 5)]
)


@settings(max_examples=150, deadline=None)
@given(
    tp=sizes,
    pp=sizes,
    vpp=sizes,
    cp=sizes,
    ep=sizes,
    mbs=sizes,
    recompute=st.lists(modes, min_size=1, unique=True).map(tuple),
    kind=st.sampled_from(["gpt", "bert", "t5", "experts", "experts with biases"]),
    sequence_parallel=st.booleans(),
    heads=st.sampled_from([8, 12, 16]),
    groups=st.sampled_from([2, 4, 8]),
    layers=st.sampled_from([4, 12, 24]),
    gbs=st.sampled_from([8, 48, 96]),
    nodes=st.integers(1, 4),
    gpus_per_node=st.sampled_from([2, 4, 8]),
    flash=st.booleans(),
)
def test_every_layout_of_the_grid_is_either_legal_or_counted(
    *,
    heads: int,
    groups: int,
    layers: int,
    gbs: int,
    nodes: int,
    gpus_per_node: int,
    flash: bool,
    kind: str,
    sequence_parallel: bool,
    **axes: tuple[Any, ...],
) -> None:
    kinds: dict[str, dict[str, int | bool]] = {
        "gpt": {},
        "bert": {"causal": False},
        "t5": {"encoder_num_layers": 6, "encoder_seq_length": 36},
        "experts": {"num_experts": 12, "expert_ffn_hidden_size": 40, "has_bias": False},
        "experts with biases": {"num_experts": 12, "expert_ffn_hidden_size": 40, "shared_ffn_hidden_size": 36},
    }
    sizes = {"num_layers": layers, "num_attention_heads": heads, "num_query_groups": groups, "seq_length": 96}
    work = Workload(
        shape=shape(**sizes, **kinds[kind]),
        sequence_parallel=sequence_parallel,
        gbs=gbs,
        gpus=nodes * gpus_per_node,
        gpus_per_node=gpus_per_node,
        flash_attention=flash,
    )
    found = enumerate_layouts(SearchSpace(**axes), work, LIMITS)
    grid = [
        Layout(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, mbs=mbs, recompute=mode, recompute_num_layers=count or 0)
        for tp, pp, vpp, cp, ep, mbs, (mode, count) in itertools.product(*axes.values())
    ]
    rows = found.layouts.rows()
    assert len(set(rows)) == len(rows)
    assert set(rows) == {layout for layout in grid if is_legal(layout, work)}
    assert len(rows) + sum(r.count for r in found.rejections) == len(grid)
    assert rows == sorted(rows)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(tp=5), "attention heads"),
        (Layout(tp=16), "does not divide a node"),
        (Layout(tp=8, pp=5), "does not divide the 1024 GPUs"),
        (Layout(tp=8, pp=64), "does not divide the 96 layers"),
        (Layout(tp=8, vpp=2), "needs pp > 1"),
        (Layout(tp=8, pp=8, mbs=5), "global batch"),
        (Layout(tp=8, pp=2, vpp=2, mbs=8), "microbatches of an interleaved"),
        (Layout(tp=8, cp=2048), "1024 GPUs"),
        (Layout(tp=8, pp=8, recompute=Recompute.UNIFORM, recompute_num_layers=5), "uniform recomputation"),
        (Layout(tp=8, pp=8, recompute=Recompute.BLOCK, recompute_num_layers=12), "same as uniform-1"),
    ],
)
def test_an_illegal_layout_is_refused_by_name(layout: Layout, reason: str) -> None:
    said = refusal(layout, workload())
    assert said is not None
    assert reason in said


@pytest.mark.parametrize(
    ("changes", "layout", "reason"),
    [
        ({"causal": False}, Layout(cp=2), "context parallelism needs a causal model"),
        ({"encoder_num_layers": 96, "encoder_seq_length": 512}, Layout(cp=2), "without an encoder"),
        ({"encoder_num_layers": 8, "encoder_seq_length": 512}, Layout(pp=16, tp=8), "the 104 layers"),
        ({"encoder_num_layers": 96, "encoder_seq_length": 516}, Layout(tp=8), "part of the sequence of 516"),
        (
            {"encoder_num_layers": 48, "encoder_seq_length": 512},
            Layout(tp=8, recompute=Recompute.UNIFORM, recompute_num_layers=36),
            "both encoder and decoder layers",
        ),
        ({"num_experts": 8, "expert_ffn_hidden_size": 1024}, Layout(tp=8), "experts with biases"),
        ({"num_experts": 8, "expert_ffn_hidden_size": 1020, "has_bias": False}, Layout(tp=8), "moe_ffn_hidden_size"),
        ({"num_experts": 6, "expert_ffn_hidden_size": 1024}, Layout(ep=4), "the 6 experts"),
        ({"num_experts": 512, "expert_ffn_hidden_size": 1024}, Layout(pp=4, ep=512), "tp·ep·pp does not divide"),
    ],
)
def test_an_illegal_layout_of_another_family_is_refused_by_name(
    changes: dict[str, int | bool], layout: Layout, reason: str
) -> None:
    work = Workload(shape=shape(**changes), gbs=1536, gpus=1024, gpus_per_node=8)
    said = refusal(layout, work)
    assert said is not None
    assert reason in said


def test_heads_of_a_group_are_exchanged_whole() -> None:
    grouped = Workload(shape=shape(num_query_groups=8), gbs=1024, gpus=1024, gpus_per_node=8, cp_comm_type="a2a")
    assert refusal(Layout(tp=4, cp=2), grouped) is None
    assert refusal(Layout(tp=4, cp=4), grouped) == "cp does not divide a rank's query groups (cp_comm_type a2a)"
    assert refusal(Layout(tp=4, cp=4), replace(grouped, cp_comm_type="all_gather")) is None
    alike = replace(workload(), cp_comm_type="a2a")
    assert refusal(Layout(tp=8, cp=16), alike) == "cp does not divide a rank's attention heads (cp_comm_type a2a)"
    assert refusal(Layout(tp=8, cp=4), alike) is None


def test_gemms_of_8_bits_come_in_sixteens() -> None:
    odd = Workload(shape=shape(ffn_hidden_size=4 * 12288 + 64), gbs=1024, gpus=1024, gpus_per_node=8, precision="fp8")
    assert refusal(Layout(tp=4), odd) is None
    assert refusal(Layout(tp=8), odd) == (
        "tp leaves a rank a part of ffn_hidden_size 49216 that no multiple of 16 is (fp8)"
    )
    assert refusal(Layout(tp=8), replace(odd, precision="bf16")) is None
    short = replace(odd, shape=shape(seq_length=2056))
    assert refusal(Layout(), short) == "mbs times a rank's part of the sequence is no multiple of 16 (fp8)"
    assert refusal(Layout(mbs=2), replace(short, gbs=2048)) is None


def test_cuda_graphs_are_for_one_gpu_a_replica() -> None:
    graphs = replace(workload(gbs=1024), cuda_graph=True)
    assert refusal(Layout(), graphs) is None
    for layout in (Layout(tp=8), Layout(pp=8), Layout(cp=8)):
        assert refusal(layout, graphs) == "CUDA graphs need tp, pp and cp of 1"


def test_experts_need_sequence_parallelism_where_they_are_split() -> None:
    experts = shape(num_experts=8, expert_ffn_hidden_size=1024, has_bias=False)
    work = Workload(shape=experts, gbs=1024, gpus=1024, gpus_per_node=8, sequence_parallel=False)
    assert refusal(Layout(tp=8), work) == "experts need sequence parallelism where tp > 1"
    assert refusal(Layout(ep=8), work) is None


def test_stages_of_an_encoder_decoder_are_listed_for_the_layers_of_both() -> None:
    work = Workload(
        shape=shape(num_layers=6, encoder_num_layers=9, encoder_seq_length=512), gbs=240, gpus=120, gpus_per_node=8
    )
    found = enumerate_layouts(SearchSpace(tp=(1,)), work, LIMITS).layouts.rows()
    assert {x.pp * x.vpp for x in found} == {1, 3, 5, 15}
    assert {x.cp for x in found} == {1}


def test_published_layouts_of_175b_can_start() -> None:
    # Narayanan et al. 2021 and Korthikanti et al. 2022 ran these.
    for layout in (Layout(tp=8, pp=8, mbs=1), Layout(tp=8, pp=8, vpp=3, mbs=1), Layout(tp=8, pp=16, mbs=1)):
        assert refusal(layout, workload()) is None


def test_auto_never_lists_the_same_work_twice() -> None:
    found = enumerate_layouts(SearchSpace(), workload(), LIMITS).layouts.rows()
    whole_stage = [
        x for x in found if x.recompute is Recompute.BLOCK and x.recompute_num_layers >= 96 // (x.pp * x.vpp)
    ]
    assert not whole_stage
    assert len({x.name for x in found}) == len(found) > 1000


def test_names_are_safe_file_names() -> None:
    for layout in enumerate_layouts(SearchSpace(), workload(), LIMITS).layouts.rows():
        assert set(layout.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_table_gives_back_its_rows() -> None:
    rows = [Layout(tp=2, recompute=Recompute.BLOCK, recompute_num_layers=3), Layout(pp=4, vpp=2, mbs=8)]
    assert Layouts.of(rows).rows() == rows
