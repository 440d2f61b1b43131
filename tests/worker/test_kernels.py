"""What is compiled computes what is not, and a measurement says what ran."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hptool import files
from hptool.base_config import BaseConfig
from hptool.candidates import Layouts
from hptool.predict import stack
from hptool.predict.memory import layer_activation_bytes
from hptool.worker import supervisor
from tests.worker.runs import Launcher, on_ranks, tiny_config, tiny_family

#: Inductor's decompositions and partition into forward and backward pass, run without generating code.
BACKEND = "aot_eager_decomp_partition"

FULL = {"model__activations_checkpoint_granularity": "full"}

TRAININGS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "uniform": {**FULL, "model__activations_checkpoint_method": "uniform"},
    "dp2, overlapped": {
        "trainer__devices": 2,
        "model__optim__overlap_grad_sync": True,
        "model__optim__overlap_param_sync": True,
    },
    "pp2, vpp2": {
        "trainer__devices": 2,
        "model__pipeline_model_parallel_size": 2,
        "model__virtual_pipeline_model_parallel_size": 2,
    },
    **{family: tiny_family(family) for family in ("llama", "alibi", "bert", "t5")},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_compiled_layers_learn_the_same(name: str, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = launcher.run(**TRAININGS[name])
    assert plain.kernels["layers"] == "Megatron-core local"
    monkeypatch.setenv("HPTOOL_COMPILE", BACKEND)
    compiled = launcher.run(**TRAININGS[name])
    assert compiled.kernels["layers"] == f"Megatron-core local, compiled whole ({BACKEND})"
    assert list(compiled.losses) == pytest.approx(list(plain.losses), rel=2e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__devices": 2, "model__tensor_model_parallel_size": 2},
        tiny_family("moe"),
    ],
    ids=["tp2", "experts"],
)
def test_what_cannot_be_compiled_whole_runs_all_the_same(
    changes: dict[str, Any], launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = launcher.run(**changes)
    monkeypatch.setenv("HPTOOL_COMPILE", BACKEND)
    found = launcher.run(**changes)
    assert found.kernels["layers"] == f"Megatron-core local, fused functions by torch.compile ({BACKEND})"
    assert list(found.losses) == pytest.approx(list(plain.losses), rel=2e-6)


def graphs_of_four_layers() -> int:
    """How many graphs dynamo makes of a forward pass through all layers, and of evaluations in many shapes."""
    import torch  # noqa: PLC0415 (heavy)

    from hptool.worker import kernels, model  # noqa: PLC0415 (heavy)
    from hptool.worker.optimizer import wrap  # noqa: PLC0415 (heavy)

    config = tiny_config()
    megatron = model.transformer_config(config)
    made = []

    def count(graph: Any, _: Any) -> Any:
        made.append(graph)
        return graph.forward

    kernels.backend = lambda _: count  # type: ignore[assignment,return-value]  # torch takes functions too
    chunks = wrap(config, megatron, model.build_chunks(config, megatron))
    kernels.compile_layers(config, chunks)
    layers = chunks[0].module.decoder.layers
    hidden = torch.randn(32, 2, 64, requires_grad=True)
    for layer in layers:
        hidden, _ = layer(hidden, attention_mask=None)
    chunks[0].eval()
    for length in range(1, 12):  # more shapes than the compiler takes
        layers[0](torch.randn(length, 2, 64), attention_mask=None)
    return len(made)


def test_all_layers_share_one_graph_and_evaluations_have_none(tmp_path: Path) -> None:
    assert on_ranks(tmp_path, tiny_config(), graphs_of_four_layers) == [1]


def test_transformer_engine_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hptool.worker import kernels, layers  # noqa: PLC0415 (imports torch and megatron)

    spec = object()
    monkeypatch.setattr(layers, "get_gpt_layer_with_transformer_engine_spec", lambda *_: spec)
    config = tiny_config(trainer__accelerator="gpu", trainer__precision="bf16")
    assert layers.gpt_layer(config) is not spec
    assert kernels.names(config)["layers"] == "Megatron-core local, compiled whole (inductor)"
    stand_in = ModuleType("transformer_engine")
    stand_in.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "transformer_engine", stand_in)
    assert layers.gpt_layer(config) is spec
    assert {kernels.names(config)[part] for part in ("layers", "attention", "norms")} == {"Transformer Engine"}
    assert kernels.names(config)["optimizer"] == "Transformer Engine FusedAdam"
    for changes in ({"transformer_engine": False}, {"use_flash_attention": False}):
        other = tiny_config(trainer__accelerator="gpu", **{f"model__{key}": value for key, value in changes.items()})
        assert layers.gpt_layer(other) is not spec
    assert layers.gpt_layer(tiny_config()) is not spec  # it knows no CPU


def bytes_saved_by_a_compiled_layer(config: BaseConfig) -> int:
    """What inductor's partition of a layer keeps for its backward pass, its weights and positions left out."""
    import torch  # noqa: PLC0415 (heavy)
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415 (heavy)

    from hptool.worker import kernels, model  # noqa: PLC0415 (heavy)
    from hptool.worker.optimizer import wrap  # noqa: PLC0415 (heavy)

    def as_inductor_would(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=lambda made, _, **__: made.forward)

    kernels.backend = lambda _: as_inductor_would  # type: ignore[assignment,return-value]  # torch takes functions too
    megatron = model.transformer_config(config)
    chunks = wrap(config, megatron, [chunk.bfloat16() for chunk in model.build_chunks(config, megatron)])
    kernels.compile_layers(config, chunks)
    gpt = chunks[0].module.module
    layer, shape = gpt.decoder.layers[1], config.shape
    hidden = torch.randn(
        shape.seq_length, config.layout.mbs, shape.hidden_size, dtype=torch.bfloat16, requires_grad=True
    )
    positions = None if shape.learned_positions else gpt.rotary_pos_emb(shape.seq_length)
    known = {x.untyped_storage().data_ptr() for x in (*layer.parameters(), *([positions] * (positions is not None)))}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output, _ = layer(hidden, attention_mask=None, rotary_pos_emb=positions)
    assert output.requires_grad
    return sum(size for place, size in kept.items() if place not in known)


@pytest.mark.parametrize("changes", [{}, tiny_family("llama", model__num_query_groups=4)], ids=["gpt", "llama"])
def test_a_compiled_layer_keeps_what_is_predicted(tmp_path: Path, changes: dict[str, Any]) -> None:
    sizes = {"model__hidden_size": 256, "model__ffn_hidden_size": 1024, "model__num_attention_heads": 4}
    config = tiny_config(**{**changes, **sizes, "trainer__precision": "bf16"})
    (saved,) = on_ranks(tmp_path, config, lambda: bytes_saved_by_a_compiled_layer(config))
    table = Layouts.of([config.layout])
    setting = stack([(config.workload, files.read_cluster("dgx-a100"), files.read_framework("hptool-worker"))])
    assert saved == pytest.approx(layer_activation_bytes(table, setting)[0], rel=0.05)


def test_off_turns_off_what_megatron_compiles_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    supervisor.load_framework("cpu")
    assert "TORCH_COMPILE_DISABLE" not in os.environ
    monkeypatch.setenv("HPTOOL_COMPILE", "off")
    supervisor.load_framework("cpu")
    assert os.environ.pop("TORCH_COMPILE_DISABLE") == "1"
