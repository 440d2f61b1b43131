"""What the predecessor got wrong in base configs, sizes, counts, time limits and serving: one test a defect.

Its answers to single inputs are compared in `test_parity.py`; what other tests hold already is not repeated.
"""

from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest

from hptool import catalogue, files, launch, rates
from hptool.candidates import Layout, Recompute, SearchSpace, Workload, enumerate_layouts, refusal
from hptool.configuration import ConfigRequest, MadeConfig, make_config
from hptool.errors import InputError
from hptool.facts import Cluster
from hptool.measurement import FailureKind
from hptool.predict.flops import model_flops_per_sequence
from hptool.presets import lightning_time
from hptool.results import ResultsDirectory
from hptool.serving import ServingLayout, Targets
from hptool.serving_plan import ServingRequest, make_serving_plan
from hptool.serving_search import read_serving_report
from tests import samples
from tests.conftest import preset_config
from tests.test_candidates import LIMITS, workload
from tests.test_serving_agenda import BATCHES, ONE, TWO, plan_of, point, record


def made(model: str, **options: object) -> tuple[MadeConfig, list[str]]:
    """The base config of a model, and what was said of it."""
    said: list[str] = []
    request = ConfigRequest(model=model, **options)  # type: ignore[arg-type]
    return make_config(request, said.append), said


def carrying(model: str, gpus: int) -> Workload:
    """A preset on these GPUs, in nodes of eight."""
    preset = catalogue.preset(model)
    return Workload(shape=preset.shape, gbs=preset.global_batch_size, gpus=gpus, gpus_per_node=8)


# ---------------------------------------------------------------- base configs


def test_a18_a_small_t5_on_40_gb_is_not_split_by_two() -> None:
    config, _ = made("t5/0.22b", gpu="a100-40gb")
    assert config.layout.startswith("tp1-pp1-")


@pytest.mark.parametrize(
    ("days", "slurm", "lightning"), [(0.01, "0-00:14:24", "00:00:07:12"), (1 / 24, "0-01:00:00", "00:00:30:00")]
)
def test_a20_a_limit_of_under_an_hour_never_ends_before_it_begins(days: float, slurm: str, lightning: str) -> None:
    config, _ = made("gpt3/126m", gpu="a100-80gb", days=days)
    assert f'time_limit: "{slurm}"' in config.text
    assert f'max_time: "{lightning}"' in config.text


@pytest.mark.parametrize(("gpu", "devices"), [("gb200", 4), ("h100-80gb", 8), ("l40s", None)])
def test_a22_nodes_are_as_large_as_they_are(gpu: str, devices: int | None) -> None:
    node = devices or rates.cluster_of(gpu, None).gpus_per_node
    config, _ = made("gpt3/126m", gpu=gpu, nodes=4)
    assert config.gpus == 4 * node
    assert f"devices: {node}" in config.text


@pytest.mark.parametrize("gpu", ["v100-32gb", "h100-96gb", "h200", "b300"])
@pytest.mark.parametrize("seq_length", [1024, 4096])
def test_a23_any_memory_and_sequence_length_will_do(gpu: str, seq_length: int) -> None:
    precision = () if gpu != "v100-32gb" else ("trainer.precision=32",)
    config, _ = made("gpt3/126m", gpu=gpu, seq_length=seq_length, overrides=precision)
    assert config.p_fit > 0.9


def test_a36_sequence_parallelism_is_on_in_small_models_too(dgx_a100: Cluster) -> None:
    config = preset_config("5b", dgx_a100, 16).with_layout(Layout(tp=4))
    assert config.model.sequence_parallel


def test_a43_no_recomputation_means_none_in_t5(dgx_a100: Cluster) -> None:
    # With full granularity NeMo turned 0 layers into 1.
    config = preset_config("t5/11b", dgx_a100, 20).with_layout(Layout(tp=4))
    for stack in (config.model.encoder, config.model.decoder):
        assert stack is not None
        assert stack.activations_checkpoint_granularity is None


def test_a42_one_layer_of_t5_recomputed_is_not_none(dgx_a100: Cluster) -> None:
    config = preset_config("t5/203b", dgx_a100, 128)
    one = Layout(tp=8, pp=16, recompute=Recompute.BLOCK, recompute_num_layers=1)
    assert config.with_layout(one).layout == one
    assert config.with_layout(one) != config.with_layout(Layout(tp=8, pp=16))


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("model", "gpus", "layout"),
    [
        ("qwen2/14b", 16, Layout(tp=8, pp=4)),
        ("qwen2/7b", 8, Layout(tp=8, pp=2)),
        ("t5/100b", 640, Layout(tp=8, pp=6)),
        ("t5/100b", 640, Layout(tp=8, pp=12)),
        ("bert/100b", 1024, Layout(tp=4, pp=6)),
    ],
)
def test_a07_a_layout_for_other_gpus_than_there_are_is_refused(model: str, gpus: int, layout: Layout) -> None:
    said = refusal(layout, carrying(model, gpus))
    assert said is not None
    assert f"the {gpus} GPUs" in said


def test_a09_a_large_model_gets_pipelines_at_every_sequence_length() -> None:
    # 70B at 8192 tokens fell through all tables to PP=1.
    for model in ("llama/llama3_70b", "qwen2/72b_seq32768"):
        layouts = enumerate_layouts(SearchSpace(vpp=(1,)), carrying(model, 64), LIMITS).layouts
        assert {1, 2, 4, 8} <= set(layouts.pp.tolist())


def test_a15_virtual_pipelines_are_all_that_divide_a_stage() -> None:
    layouts = enumerate_layouts(SearchSpace(tp=(8,), pp=(8,), mbs=(1,)), workload(), LIMITS).layouts
    assert set(layouts.vpp.tolist()) == {1, 2, 3, 4, 6, 12}


def test_a17_a_micro_batch_may_be_larger_than_the_number_of_layers() -> None:
    work = workload()
    few = Workload(shape=catalogue.preset("gpt3/tiny").shape, gbs=64, gpus=8, gpus_per_node=work.gpus_per_node)
    assert few.shape.num_layers < 8
    assert refusal(Layout(mbs=8), few) is None


def test_a35_experts_lie_inside_data_and_context_parallelism() -> None:
    # The predecessor multiplied EP into the size of a replica, and knew no layout with CP and EP.
    layout = Layout(tp=2, cp=2, ep=4)
    assert refusal(layout, carrying("mixtral/8x7b", 16)) is None
    assert layout.gpus_per_replica == 4


# ---------------------------------------------------------------- counts and sizes


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a37_a_vocabulary_that_divides_gets_no_padding(tp: int) -> None:
    assert catalogue.preset("gpt3/5b").shape.padded_vocab_size(tp) == 51_200


def test_a25_flops_are_those_of_the_experts_that_a_token_passes() -> None:
    shape = catalogue.preset("mixtral/8x7b").shape
    active = model_flops_per_sequence(shape) / (6 * shape.seq_length)
    assert active / 1e9 == pytest.approx(12.9, rel=0.05)  # Jiang et al. 2024 (arXiv 2401.04088): 13B active


@pytest.mark.parametrize(
    ("model", "vocabulary"),
    [
        ("chatglm/6b", 65_024),
        ("llama/llama3_8b", 128_256),
        ("llama/llama3_70b", 128_256),
        ("baichuan2/7b", 125_696),
        ("baichuan2/13b", 125_696),
    ],
)
def test_a26_vocabularies_are_the_models_own(model: str, vocabulary: int) -> None:
    assert catalogue.preset(model).shape.vocab_size == vocabulary


@pytest.mark.parametrize(("model", "limit"), [("bert/251b", "250.5b"), ("t5/251b", "250b"), ("gpt3/1106b", "1105b")])
def test_a39_the_largest_size_is_said_as_it_is(model: str, limit: str) -> None:
    with pytest.raises(InputError, match=f"sizes up to {limit}"):
        catalogue.preset(model)


def test_a41_no_recomputation_is_counted_as_work() -> None:
    # 8 FLOPs a parameter and token are 6 of the model's and 2 of recomputation.
    shape = catalogue.preset("gpt3/175b").shape
    assert model_flops_per_sequence(shape) / (shape.num_parameters * shape.seq_length) == pytest.approx(6, rel=0.02)


@pytest.mark.parametrize(("model", "length"), [("bert/4b_seq4096", 4096), ("gpt3/5b_seq3000", 3000)])
def test_n08_a_sequence_length_need_not_be_in_a_list(model: str, length: int) -> None:
    assert catalogue.preset(model).shape.seq_length == length


def test_n12_heads_of_a_large_t5_keep_their_width() -> None:
    assert {catalogue.preset(f"{family}/150b").kv_channels for family in ("t5", "mt5")} == {128}


# ---------------------------------------------------------------- time limits


@pytest.mark.parametrize(
    ("minutes", "clock"), [(1440, "01:00:00:00"), (3600, "02:12:00:00"), (7200, "05:00:00:00"), (65, "00:01:05:00")]
)
def test_a19_a_day_has_1440_minutes(minutes: int, clock: str, dgx_a100: Cluster) -> None:
    run = launch.Run(name="run", directory=Path("results/x/runs/run"), nodes=1, max_minutes=minutes)
    assert lightning_time(timedelta(minutes=minutes)) == clock
    assert 0 <= launch.run_parameters(run, dgx_a100)["time"] - minutes < 10


# ---------------------------------------------------------------- serving


@pytest.mark.parametrize("model", ["t5/11b", "mt5/11.9b", "llama/llama3_8b", "mixtral/8x7b", "chatglm/6b", "gpt3/5b"])
def test_a05_serving_is_a_search_of_its_own_for_every_model_that_writes(model: str) -> None:
    # The predecessor served GPT-3 alone, and broke off its training searches on the way there.
    plan = make_serving_plan(ServingRequest(model=model, cluster="dgx-a100", nodes=1))
    assert plan.engine.name == "hptool-worker"  # which needs no other program to be there
    assert plan.candidates.points


def test_a06_a_run_that_failed_is_a_row_of_a_sorted_table_and_limits_are_kept(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", targets=Targets(max_latency_ms=150.0))
    results = ResultsDirectory(plan.directory)
    results.begin(plan.document(), resume=False)
    results.close()
    parts = [f"16:4/{batch}" for batch in BATCHES]
    for ended in (
        record(failure=samples.failure(FailureKind.CRASH, "no log"), layout=TWO, parts=parts),
        record(point(1, 100.0), point(2, 125.0), point(4, 160.0), layout=ONE, parts=parts),
    ):
        files.append_line(plan.directory / "outcomes.jsonl", files.json_text(ended, indent=None))
    made = read_serving_report(plan.directory)
    assert [(row.layout, row.batch, row.meets_targets) for row in made.rows if row.served] == [
        (ONE, 2, True), (ONE, 1, True), (ONE, 4, False)
    ]  # fmt: skip
    assert [(row.layout, row.failure.kind) for row in made.rows if row.failure] == [(TWO, FailureKind.CRASH)] * 3
    assert made.answers[0].best == made.rows[0]
    table = pd.read_csv(plan.directory / "results.csv")
    assert len(table) == 6
    theirs = pd.read_csv(plan.directory / "final_output.csv")
    rates = list(theirs["Throughput per GPU [samples/sec/gpu]"])
    assert rates
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a37_a_vocabulary_that_divides_is_served_without_padding(tp: int) -> None:
    plan = make_serving_plan(ServingRequest(model="gpt3/5b", cluster="dgx-a100", nodes=1))
    assert plan.config_of(ServingLayout(tp=tp)).shape.padded_vocab_size(tp) == 51_200
