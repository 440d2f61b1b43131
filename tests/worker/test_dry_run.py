"""A dry run finds what a rank of a large job holds, and what a real rank of a small one allocates."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from click.testing import CliRunner

from hptool import catalogue, files
from hptool.base_config import BaseConfig
from hptool.candidates import Layout, Layouts, Recompute
from hptool.errors import InputError
from hptool.predict import stack
from hptool.predict.memory import layer_activation_bytes, rank_parameters, stage_memory
from hptool.predict.parallel import Table
from hptool.units import GIB
from hptool.worker import initialise
from hptool.worker.dry_run import DryRun, dry_run, main
from tests.worker.runs import fork, tiny_config, tiny_document, tiny_family

TP8_PP8 = Layout(tp=8, pp=8)

#: Elements of an activation [s, b, h] of GPT-3 175B that one of eight tensor ranks holds.
SBH_T = 2048 * 12288 // 8

DROPOUT: Mapping[str, Any] = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}


def in_child(directory: Path, function: Callable[[], Any]) -> Any:
    """What the function answers (as JSON) in a process of its own, since a dry run leaves torch patched."""

    def work() -> int:
        del os.environ[initialise.ENVIRONMENT_VARIABLE]
        (directory / "answer.json").write_text(files.json_text(function()))
        return 0

    log = directory / "dry_run.log"
    if os.waitstatus_to_exitcode(os.waitpid(fork(work, log), 0)[1]):
        pytest.fail(log.read_text()[-3000:])
    return json.loads((directory / "answer.json").read_text())


def gpt3_175b(layout: Layout = TP8_PP8, **changes: Any) -> BaseConfig:
    """The preset on 512 GPUs, in bf16 and without dropout."""
    preset = catalogue.preset("gpt3/175b")
    document = {
        "trainer__num_nodes": 64,
        "trainer__devices": 8,
        "trainer__accelerator": "gpu",
        "trainer__precision": "bf16",
        "model__encoder_seq_length": preset.seq_length,
        "model__max_position_embeddings": preset.seq_length,
        "model__override_vocab_size": preset.vocab_size,
        "model__optim__overlap_grad_sync": True,
        "model__optim__overlap_param_sync": True,
        "model__data__seq_length": preset.seq_length,
    }
    for name in ("global_batch_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
        document[f"model__{name}"] = getattr(preset, name)
    return tiny_config(**{**document, **changes}).with_layout(layout)


def eight_layers(layout: Layout = TP8_PP8, **changes: Any) -> BaseConfig:
    """As `gpt3_175b`, with eight layers instead of 96."""
    return gpt3_175b(layout, model__num_layers=8, **changes)


def recomputed(mode: Recompute, num_layers: int = 0, pp: int = 8) -> BaseConfig:
    """Eight layers with this recomputation."""
    return eight_layers(replace(TP8_PP8, pp=pp, recompute=mode, recompute_num_layers=num_layers))


#: Configs and stages that one process traces, one after the other. Late stages have fewer microbatches to trace.
LARGE: Mapping[str, tuple[BaseConfig, int]] = {
    "175b": (gpt3_175b(), 0),
    "stage 3": (eight_layers(), 3),
    "stage 6": (eight_layers(), 6),
    "last": (eight_layers(), 7),
    "dropout": (eight_layers(**DROPOUT), 6),
    "whole sequences": (eight_layers(model__sequence_parallel=False, **DROPOUT), 6),
    "plain attention": (eight_layers(model__use_flash_attention=False, **DROPOUT), 6),
    "grouped queries": (eight_layers(model__num_query_groups=8), 6),
    "selective": (recomputed(Recompute.SELECTIVE), 6),
    "uniform": (recomputed(Recompute.UNIFORM, 1), 6),
    "block": (recomputed(Recompute.BLOCK, 1, pp=4), 2),
    "mbs 4": (eight_layers(replace(TP8_PP8, mbs=4)), 6),
    "cp 2": (eight_layers(replace(TP8_PP8, cp=2)), 6),
    "pp 4": (eight_layers(replace(TP8_PP8, pp=4)), 0),
    "pp 4, vpp 2": (eight_layers(replace(TP8_PP8, pp=4, vpp=2)), 0),
    "last again": (eight_layers(), 7),
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, DryRun]:
    """The dry runs of `LARGE`."""
    found = in_child(
        tmp_path_factory.mktemp("large"),
        lambda: {name: asdict(dry_run(config, stage)) for name, (config, stage) in LARGE.items()},
    )
    return {name: DryRun(**run) for name, run in found.items()}


def saved(run: DryRun) -> float:
    """Bytes that a microbatch leaves for its backward pass, in SBH_T."""
    return run.saved_activations_gib_per_microbatch * GIB / SBH_T


# ---------------------------------------------------------------- large jobs


def test_gpt3_175b_holds_what_its_layers_come_to(large: Mapping[str, DryRun]) -> None:
    run = large["175b"]
    assert run.parameters == 2_822_731_776
    # bf16 weights, fp32 gradients, and fp32 weights and two moments over eight replicas.
    assert run.weights_gib == pytest.approx(2 * run.parameters / GIB, rel=1e-4)
    assert run.gradients_gib == pytest.approx(4 * run.parameters / GIB, rel=1e-4)
    assert run.optimizer_gib == pytest.approx(12 / 8 * run.parameters / GIB, rel=1e-4)
    assert run.static_gib == run.weights_gib + run.gradients_gib + run.optimizer_gib
    assert run.static_gib == pytest.approx(19.717, abs=5e-4)
    # Eight microbatches of 12 layers and what a layer's backward pass works with.
    assert saved(run) == pytest.approx(12 * 32, rel=2e-3)
    assert run.peak_gib == pytest.approx(28.993, rel=5e-3)
    assert run.schedule == "1F1B, 9 of 256 microbatches"
    assert set(run.versions) == {"torch", "megatron-core"}


@pytest.mark.parametrize(
    ("name", "per_layer"),
    [
        # Korthikanti et al. 2022, table 2, with flash attention for the scores: sbh/t·34, of which dropout masks 2.
        ("stage 6", 32),
        ("dropout", 34),
        # sbh·(10 + 24/t).
        ("whole sequences", 10 * 8 + 24),
        # Keys and values of 8 groups for 96 heads: of the 32, 4 become a third of one.
        ("grouped queries", 28 + 4 * 8 / 96),
        # Nothing of flash attention's is worth recomputing but the log-sum-exp.
        ("selective", 32),
        # The input of the layer.
        ("uniform", 2),
        # Two layers: one as before, of one the input.
        ("block", 34),
        ("mbs 4", 4 * 32),
        # Half of all; but the keys and values of the whole sequence besides, and the output once in pieces and once.
        ("cp 2", 32 / 2 + 4 + 1),
    ],
)
def test_saved_activations_are_those_of_the_formula(large: Mapping[str, DryRun], name: str, per_layer: float) -> None:
    assert saved(large[name]) == pytest.approx(per_layer, rel=5e-3)
    assert large[name].saved_by_output_layer_gib_per_microbatch == 0


def test_plain_attention_keeps_the_scores(large: Mapping[str, DryRun]) -> None:
    # A softmax in fp32, a dropout mask and its result in bf16: 7 bytes a score, and a mask of bytes for all heads.
    scores = 2048 * 2048 * 96 // 8
    expected = 34 * SBH_T + 7 * scores + 2048 * 2048
    assert saved(large["plain attention"]) * SBH_T == pytest.approx(expected, rel=1e-3)


def test_last_stage_keeps_the_logits(large: Mapping[str, DryRun]) -> None:
    last = large["last"]
    head = last.saved_by_output_layer_gib_per_microbatch * GIB
    assert head == pytest.approx(2 * 2048 * 51200 / 8, rel=1e-2)  # themselves, in bf16
    # Of a rank without the embedding: a layer and the final norm's input.
    assert saved(last) * SBH_T - head == pytest.approx((32 + 2 + 2) * SBH_T, rel=5e-3)


def test_each_later_stage_has_one_microbatch_less_under_way(large: Mapping[str, DryRun]) -> None:
    early, late = large["stage 3"], large["stage 6"]
    assert (early.static_gib, early.parameters) == (late.static_gib, late.parameters)
    less = (early.peak_gib - late.peak_gib) / 3
    assert less == pytest.approx(early.saved_activations_gib_per_microbatch, rel=1e-3)


def test_interleaving_holds_more_by_the_published_part(large: Mapping[str, DryRun]) -> None:
    # 1 + (p - 1)/(p·v) of the activations of p microbatches, Korthikanti et al. 2022, section 4.2.3.
    plain, interleaved = large["pp 4"], large["pp 4, vpp 2"]
    assert interleaved.static_gib == pytest.approx(plain.static_gib, rel=1e-6)
    more = 4 * plain.saved_activations_gib_per_microbatch * (4 - 1) / (4 * 2)
    assert interleaved.peak_gib - plain.peak_gib == pytest.approx(more, rel=0.1)
    assert interleaved.schedule == "interleaved 1F1B of 2 chunks, 8 of 128 microbatches"


def test_a_dry_run_leaves_nothing_to_the_next(large: Mapping[str, DryRun]) -> None:
    assert replace(large["last again"], seconds=0) == replace(large["last"], seconds=0)


# ---------------------------------------------------------------- against the predictions


@pytest.mark.parametrize("name", LARGE)
def test_predicted_is_what_the_workers_own_model_holds(large: Mapping[str, DryRun], name: str) -> None:
    """Parameters to the last one, what a microbatch saves within 5 %, the peak of a first or last stage within 6 %."""
    (config, stage), run = LARGE[name], large[name]
    layout = config.layout
    first, last = stage == 0, stage == layout.pp - 1
    table = Layouts.of([layout])
    setting = stack([(config.workload, files.read_cluster("dgx-a100"), files.read_framework("hptool-worker"))])
    assert rank_parameters(table, setting, first=first, last=last).total[0] == run.parameters
    on_first, on_last = stage_memory(Table.of(table, setting))
    if first or last:
        memory = on_first if first else on_last
        tensors = memory.allocated_gib[0] - memory.framework_gib[0]
        assert tensors == pytest.approx(run.peak_gib, rel=0.06)
        assert memory.gradients_gib[0] == pytest.approx(run.gradients_gib, rel=1e-4)
        assert memory.optimizer_gib[0] == pytest.approx(run.optimizer_gib, rel=1e-4)
    if layout.recompute in (Recompute.NONE, Recompute.SELECTIVE) and not last and layout.vpp == 1:
        layers = config.shape.num_layers / layout.pp
        expected = layers * layer_activation_bytes(table, setting)[0] / GIB
        assert expected == pytest.approx(run.saved_activations_gib_per_microbatch, rel=0.05)


# ---------------------------------------------------------------- other families

_WIDE: Mapping[str, Any] = {"hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16}


def wide(family: str, layout: Layout, **changes: Any) -> BaseConfig:
    """Eight layers of a family, wide enough that activations matter, in bf16 on sixteen GPUs."""
    document: dict[str, Any] = {
        "trainer__num_nodes": 2,
        "trainer__devices": 8,
        "trainer__accelerator": "gpu",
        "trainer__precision": "bf16",
        "model__global_batch_size": 64,
        "model__override_vocab_size": 32000,
        "model__max_position_embeddings": 1024,
        "model__data__seq_length": 1024,
    }
    if family == "t5":
        document |= {f"model__{part}__{key}": _WIDE[key] for part in ("encoder", "decoder") for key in _WIDE}
        document |= {"model__seq_length": 1024, "model__data__seq_length_dec": 512}
    else:
        document |= {f"model__{key}": value for key, value in _WIDE.items()}
        document |= {"model__num_layers": 8, "model__encoder_seq_length": 1024}
    return tiny_config(**tiny_family(family, **(document | changes))).with_layout(layout)


FAMILY_RUNS: Mapping[str, tuple[BaseConfig, int]] = {
    "llama": (wide("llama", Layout(tp=2, pp=2), model__num_query_groups=4, model__qkv_bias=True), 0),
    "alibi": (wide("alibi", Layout(pp=2)), 0),
    "bert": (wide("bert", Layout(tp=2, pp=2)), 1),
    "t5, first": (wide("t5", Layout(tp=2, pp=2)), 0),
    "t5, last": (wide("t5", Layout(pp=2, vpp=2)), 1),
    "t5, recomputed": (wide("t5", Layout(recompute=Recompute.BLOCK, recompute_num_layers=6)), 0),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, DryRun]:
    """The dry runs of `FAMILY_RUNS`."""
    found = in_child(
        tmp_path_factory.mktemp("families"),
        lambda: {name: asdict(dry_run(config, stage)) for name, (config, stage) in FAMILY_RUNS.items()},
    )
    return {name: DryRun(**run) for name, run in found.items()}


@pytest.mark.parametrize("name", FAMILY_RUNS)
def test_predicted_is_what_a_rank_of_another_family_holds(families: Mapping[str, DryRun], name: str) -> None:
    """Parameters to the last one, the peak of a first or last stage within 7 %."""
    (config, stage), run = FAMILY_RUNS[name], families[name]
    layout = config.layout
    first = stage == 0
    table = Layouts.of([layout])
    setting = stack([(config.workload, files.read_cluster("dgx-a100"), files.read_framework("hptool-worker"))])
    last = stage == layout.pp - 1
    assert rank_parameters(table, setting, first=first, last=last).total[0] == run.parameters
    memory = stage_memory(Table.of(table, setting))[0 if first else 1]
    assert memory.allocated_gib[0] - memory.framework_gib[0] == pytest.approx(run.peak_gib, rel=0.07)


# ---------------------------------------------------------------- against real tensors

UNIFORM: Mapping[str, Any] = {
    "model__activations_checkpoint_granularity": "full",
    "model__activations_checkpoint_method": "uniform",
    "model__activations_checkpoint_num_layers": 1,
}


def traces(config: BaseConfig) -> list[dict[str, int]]:
    """The same accounting of the same step of one rank: on fake tensors, and on real ones."""
    from hptool.worker import attention, fake_rank  # noqa: PLC0415 (imports torch and megatron)

    fake = fake_rank.trace(config, 0, 2)
    with (
        mock.patch.object(fake_rank, "_cuda_attention", attention.fused_attention),
        mock.patch.object(fake_rank, "FakeTensorMode", return_value=nullcontext()),
    ):
        real = fake_rank.trace(config, 0, 2)
    return [asdict(fake), asdict(real)]


def test_fake_is_real(tmp_path: Path) -> None:
    small = {"model__num_layers": 2, "model__hidden_dropout": 0.1}
    plain = [tiny_config(model__use_flash_attention=False, **small, **mode) for mode in ({}, UNIFORM)]
    flash = [tiny_config(**small, **mode) for mode in ({}, UNIFORM)]
    found = in_child(tmp_path, lambda: [traces(config) for config in (*plain, *flash)])
    for fake, real in found[:2]:
        assert fake["peak"] > fake["weights"] + fake["gradients"] + fake["optimizer"] + fake["saved"]
        assert fake == real
    for fake, real in found[2:]:
        # CUDA's kernel keeps a random state, which the CPU's has not: two numbers of 8 bytes a layer.
        assert {key for key in fake if fake[key] != real[key]} <= {"saved", "peak"}
        for key in ("saved", "peak"):
            assert 0 <= fake[key] - real[key] <= 2 * 16


# ---------------------------------------------------------------- the process


def test_torch_is_as_before(tmp_path: Path) -> None:
    config = tiny_config(trainer__precision="bf16")

    def functions() -> list[str]:
        import torch  # noqa: PLC0415 (heavy)

        from hptool.worker import attention  # noqa: PLC0415 (imports torch and megatron)

        found = (torch.nn.functional.dropout, torch.Tensor.item, torch.nn.Module._apply, attention.fused_attention)
        return [*map(repr, found), str(torch.distributed.is_initialized())]

    def work() -> list[Any]:
        before = functions()
        dry_run(config)
        between = functions()
        with (
            mock.patch("hptool.worker.fake_rank.Training", side_effect=ValueError("no such layout")),
            pytest.raises(InputError) as raised,
        ):
            dry_run(config)
        return [before, between, functions(), str(raised.value)]

    before, between, after, said = in_child(tmp_path, work)
    assert before == between == after
    assert after[-1] == "False"
    assert said == "Megatron-core refuses this config: no such layout"


def test_command_prints_a_line_a_stage(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(files.yaml_text(tiny_document(trainer__devices=2)))
    result = subprocess.run(
        [sys.executable, "-m", "hptool.worker.dry_run", path, "model.pipeline_model_parallel_size=2", "--pp-rank=all"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    stages = [files.parse_json(line, DryRun, "stdout") for line in result.stdout.splitlines()]
    assert [stage.pp_rank for stage in stages] == [0, 1]
    for stage in stages:
        assert stage.peak_gib > stage.static_gib + stage.saved_activations_gib_per_microbatch


def test_it_is_imported_without_torch() -> None:
    code = "import sys, hptool.worker.dry_run; sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.micro_batch_sise=4"], "model.micro_batch_sise: unknown key; did you mean micro_batch_size?"),
        (["model.tensor_model_parallel_size=3"], "tp does not divide the 4 attention heads"),
        (["--pp-rank", "1"], "--pp-rank: 1 given, allowed is 0 to 0, or all"),
        (["--pp-rank=-1"], "--pp-rank: -1 given, allowed is 0 to 0, or all"),
        (["--pp-rank", "first"], "--pp-rank: first given, allowed is 0 to 0, or all"),
        (["model.gradient_accumulation_fusion=true"], "model.gradient_accumulation_fusion: True given"),
        (["model.kv_channels=12"], "model.kv_channels: 12 given, allowed in a dry run"),
        (["model.num_query_groups=2"], "model.num_query_groups: 2 given, allowed in a dry run in fp32"),
        (
            ["model.num_moe_experts=2", "model.bias=false"],
            "model.num_moe_experts: 2 given, allowed in a dry run is null",
        ),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(files.yaml_text(tiny_document()))
    result = CliRunner().invoke(main, [str(path), *words])
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("hptool: error: ")
    assert said in line
