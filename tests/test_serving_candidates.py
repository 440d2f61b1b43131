"""Points of a serving search: what can start and what cannot, by example and by properties."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hptool import catalogue, files
from hptool.facts import Cluster, ModelShape, Precision
from hptool.serving import Lengths, ServingLayout, ServingPoint
from hptool.serving_candidates import ServingCandidates, ServingSpace, enumerate_points

SHORT = Lengths(input_len=60, output_len=20)
A100, H100, CPU = files.read_cluster("dgx-a100"), files.read_cluster("dgx-h100"), files.read_cluster("local")
ONE = ServingSpace(tp=(1,), pp=(1,), batch_sizes=(1,), cuda_graphs=(False,))


def shape(name: str) -> ModelShape:
    return catalogue.preset(name).shape


def found(
    space: ServingSpace,
    model: str = "gpt3/5b",
    cluster: Cluster = A100,
    *,
    lengths: Sequence[Lengths] = (SHORT,),
    nodes: int = 1,
    loop: bool = True,
) -> ServingCandidates:
    return enumerate_points(space, lengths, shape(model), cluster, nodes=nodes, precision="bf16", loop=loop)


def reasons(candidates: ServingCandidates) -> list[str]:
    return [rejection.reason for rejection in candidates.rejections]


# ---------------------------------------------------------------- each rule


@pytest.mark.parametrize(
    ("axes", "model", "cluster", "nodes", "loop", "reason"),
    [
        ({"precision": ("fp8",)}, "gpt3/5b", A100, 1, False, "a100-80gb does not compute in fp8"),
        ({"precision": ("fp8",)}, "gpt3/5b", H100, 1, True, "hptool's own loop serves in fp32, bf16, fp16 and no fp8"),
        (
            {"precision": ("tf32",)}, "gpt3/5b", A100, 1, False,
            "hptool's configs know fp32, bf16, fp16, fp8 and no tf32",
        ),
        ({"cuda_graphs": (True,)}, "mixtral/8x7b", A100, 1, True, "CUDA graphs need a model without experts"),
        (
            {"cuda_graphs": (True,), "precision": ("fp32",)}, "gpt3/5b", CPU, 1, True,
            "CUDA graphs need a GPU, and cpu is none",
        ),
        ({"tp": (3,)}, "gpt3/5b", A100, 1, True, "tp does not divide the 32 attention heads"),
        ({"tp": (16,)}, "llama/llama3_8b", A100, 2, True, "tp does not divide the 8 query groups"),
        ({"pp": (5,)}, "gpt3/5b", A100, 1, True, "pp does not divide the 24 layers"),
        ({"tp": (16,)}, "gpt3/5b", A100, 1, True, "tp·pp is more than the 8 GPUs"),
        ({"tp": (4,), "pp": (4,)}, "gpt3/5b", A100, 1, True, "tp·pp is more than the 8 GPUs"),
        ({"tp": (4,), "pp": (3,)}, "gpt3/5b", A100, 2, True, "tp·pp does not fill whole nodes of 8 GPUs"),
        ({"tp": (12,), "pp": (2,)}, "gpt3/175b", A100, 4, True, "tp does not fill whole nodes of 8 GPUs"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_start_says_why(
    axes: dict[str, tuple[object, ...]], model: str, cluster: Cluster, nodes: int, *, loop: bool, reason: str
) -> None:
    space = replace(ONE, **axes)  # type: ignore[arg-type]
    made = found(space, model, cluster, nodes=nodes, loop=loop)
    assert not made.points
    assert reasons(made) == [reason]


def test_the_mlp_is_divided_too() -> None:
    odd = replace(shape("gpt3/5b"), ffn_hidden_size=4 * 4096 + 2)
    made = enumerate_points(replace(ONE, tp=(4,)), [SHORT], odd, A100, nodes=1, precision="bf16")
    assert not made.points
    assert len(made.rejections) == 1
    assert "16386" in made.rejections[0].reason


def test_eight_bits_need_parts_of_sixteen() -> None:
    odd = replace(shape("gpt3/5b"), ffn_hidden_size=8 * 24)
    space = replace(ONE, tp=(1, 8), precision=("bf16", "fp8"))
    made = enumerate_points(space, [SHORT], odd, H100, nodes=1, precision="bf16", loop=False)
    assert {(p.layout.tp, p.layout.precision) for p in made.points} == {(1, "bf16"), (8, "bf16"), (1, "fp8")}
    assert "16" in made.rejections[0].reason


@pytest.mark.parametrize(
    ("model", "lengths", "fits"),
    [
        # The last token is made and not read again.
        ("gpt3/5b", Lengths(input_len=2000, output_len=49), True),
        ("gpt3/5b", Lengths(input_len=2000, output_len=50), False),
        # The encoder reads the prompt, and the decoder what it has made.
        ("t5/11b", Lengths(input_len=512, output_len=512), True),
        ("t5/11b", Lengths(input_len=513, output_len=1), False),
        ("t5/11b", Lengths(input_len=1, output_len=513), False),
        # Rotary positions have no table.
        ("llama/llama2_7b", Lengths(input_len=8000, output_len=8000), True),
    ],
)
def test_positions_that_were_learned_have_an_end(model: str, lengths: Lengths, *, fits: bool) -> None:
    made = found(ONE, model, lengths=[lengths])
    assert bool(made.points) == fits
    assert fits or "positions" in reasons(made)[0]


# ---------------------------------------------------------------- what is tried where nobody says


def test_auto_tries_every_split_of_a_replica_on_whole_nodes() -> None:
    layouts = {(p.layout.tp, p.layout.pp) for p in found(ServingSpace(), nodes=2).points}
    # 24 layers are no multiple of 16, and tensor parallelism stays within a node.
    pairs = itertools.product((1, 2, 4, 8), (1, 2, 4, 8))
    assert layouts == {(tp, pp) for tp, pp in pairs if tp * pp <= 16}
    assert not reasons(found(ServingSpace(), nodes=2))


def test_auto_batches_begin_with_a_single_request() -> None:
    batches = {p.batch for p in found(ServingSpace(tp=(1,), pp=(1,))).points}
    assert batches == {1, 2, 4, 8, 16, 32, 64, 128, 256}


def test_auto_graphs_are_both_on_a_gpu_and_none_on_a_cpu() -> None:
    assert {p.layout.cuda_graphs for p in found(ServingSpace()).points} == {False, True}
    on_cpu = enumerate_points(ServingSpace(), [SHORT], shape("gpt3/5b"), CPU, nodes=1, precision="fp32")
    assert {p.layout.cuda_graphs for p in on_cpu.points} == {False}


def test_auto_precision_is_the_models() -> None:
    made = enumerate_points(ServingSpace(), [SHORT], shape("gpt3/5b"), A100, nodes=1, precision="fp32")
    assert {p.layout.precision for p in made.points} == {"fp32"}


def test_a_layout_is_blamed_before_its_points_and_counts_for_each_of_them() -> None:
    lengths = [SHORT, Lengths(input_len=4000, output_len=10)]
    made = found(replace(ONE, tp=(1, 3), batch_sizes=(1, 2)), lengths=lengths)
    assert {r.reason: (r.count, r.example) for r in made.rejections} == {
        "prompt and answer have more tokens than the model's 2048 positions": (2, "tp1-pp1-bf16 4000:10/1"),
        "tp does not divide the 32 attention heads": (4, "tp3-pp1-bf16 60:20/1"),
    }


# ---------------------------------------------------------------- properties

MODELS = ("gpt3/126m", "gpt3/5b", "llama/llama3_8b", "mixtral/8x7b", "t5/11b", "qwen2/7b")
SIZES = st.none() | st.lists(st.integers(1, 24), min_size=1, max_size=4).map(tuple)
PRECISIONS: list[Precision] = ["fp32", "bf16", "fp16", "fp8"]
SPACES = st.builds(
    ServingSpace,
    tp=SIZES,
    pp=SIZES,
    batch_sizes=SIZES,
    precision=st.none() | st.lists(st.sampled_from(PRECISIONS), min_size=1, max_size=3).map(tuple),
    cuda_graphs=st.none() | st.lists(st.booleans(), min_size=1, max_size=2).map(tuple),
)
LENGTHS = st.lists(
    st.builds(Lengths, input_len=st.integers(1, 3000), output_len=st.integers(1, 600)), min_size=1, max_size=3
)
SEARCHES = st.tuples(SPACES, LENGTHS, st.sampled_from(MODELS), st.sampled_from([A100, H100, CPU]), st.booleans())


def searched(
    space: ServingSpace, lengths: Sequence[Lengths], model: str, cluster: Cluster, *, loop: bool, nodes: int
) -> ServingCandidates:
    nodes = min(nodes, cluster.nodes)
    return enumerate_points(space, lengths, shape(model), cluster, nodes=nodes, precision="bf16", loop=loop)


@given(search=SEARCHES, nodes=st.integers(1, 3))
def test_every_point_is_legal_and_there_once(
    search: tuple[ServingSpace, list[Lengths], str, Cluster, bool], nodes: int
) -> None:
    space, lengths, model, cluster, loop = search
    made = searched(space, lengths, model, cluster, loop=loop, nodes=nodes)
    assert len(set(made.points)) == len(made.points)
    assert len({(p.layout.name, p.name) for p in made.points}) == len(made.points), "names tell points apart"
    dimensions = shape(model)
    gpus = min(nodes, cluster.nodes) * cluster.gpus_per_node
    for layout in {p.layout for p in made.points}:
        assert dimensions.num_attention_heads % layout.tp == 0
        assert dimensions.num_query_groups % layout.tp == 0
        assert dimensions.pipeline_layers % layout.pp == 0
        assert layout.gpus <= gpus
        assert layout.gpus <= cluster.gpus_per_node or layout.gpus % cluster.gpus_per_node == 0
        assert layout.precision in cluster.gpu.peak_tflops
        assert layout.precision != "fp8" or not loop
        assert not layout.cuda_graphs or cluster.gpu.device == "cuda"
    for point in made.points:
        assert point.lengths in lengths
        for axis in ("tp", "pp", "precision", "cuda_graphs"):
            listed = getattr(space, axis)
            assert listed is None or getattr(point.layout, axis) in listed
        assert space.batch_sizes is None or point.batch in space.batch_sizes


@given(search=SEARCHES, nodes=st.integers(1, 3))
def test_what_starts_and_what_does_not_are_all_there_is(
    search: tuple[ServingSpace, list[Lengths], str, Cluster, bool], nodes: int
) -> None:
    space, lengths, model, cluster, loop = search
    space = replace(space, tp=space.tp or (1, 2, 8), pp=space.pp or (1, 2), batch_sizes=space.batch_sizes or (1, 5))
    space = replace(space, precision=space.precision or ("bf16",), cuda_graphs=space.cuda_graphs or (False, True))
    made = searched(space, lengths, model, cluster, loop=loop, nodes=nodes)
    product = len(set(lengths))
    for axis in ("tp", "pp", "batch_sizes", "precision", "cuda_graphs"):
        product *= len(set(getattr(space, axis)))
    assert len(made.points) + sum(r.count for r in made.rejections) == product
    assert all(r.count > 0 for r in made.rejections)
    assert len(set(reasons(made))) == len(made.rejections)


@given(search=SEARCHES, nodes=st.integers(1, 2))
def test_the_order_is_that_of_the_axes_however_they_are_listed_and_of_the_lengths_as_given(
    search: tuple[ServingSpace, list[Lengths], str, Cluster, bool], nodes: int
) -> None:
    space, lengths, model, cluster, loop = search
    made = searched(space, lengths, model, cluster, loop=loop, nodes=nodes)
    backwards = {
        axis: tuple(reversed(listed)) * 2
        for axis in ("tp", "pp", "batch_sizes", "precision", "cuda_graphs")
        if (listed := getattr(space, axis)) is not None
    }
    other = searched(replace(space, **backwards), [*lengths, *lengths], model, cluster, loop=loop, nodes=nodes)
    assert other.points == made.points

    def place(point: ServingPoint) -> tuple[ServingLayout, int, int]:
        return point.layout, lengths.index(point.lengths), point.batch

    assert [place(p) for p in made.points] == sorted(place(p) for p in made.points)
