"""Parameters of every family as predicted: against Megatron-core's own models, and against the worker's ranks."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hptool import files
from hptool.candidates import Layout, Layouts, Workload, refusal
from hptool.facts import ModelShape
from hptool.predict import stack
from hptool.predict.memory import rank_parameters
from tests.test_predict import LLAMA_3_8B, MIXTRAL_8X7B, T5_220M
from tests.worker.runs import on_ranks, tiny_config, tiny_family
from tests.worker.test_dry_run import in_child

#: Shapes and cuts: TP, and EP where there are experts.
MODELS: Mapping[str, tuple[ModelShape, Layout]] = {
    "llama": (LLAMA_3_8B, Layout(tp=4)),
    "mixtral": (MIXTRAL_8X7B, Layout(ep=4)),
    "t5": (T5_220M, Layout(tp=2)),
}
GPUS = 8


def built(shape: ModelShape, layout: Layout) -> int:
    """Parameters of the first rank, counted in Megatron-core's model on tensors without contents."""
    import torch  # noqa: PLC0415 (in the process of its own alone)
    from megatron.core import parallel_state  # noqa: PLC0415
    from megatron.core.models.gpt import GPTModel  # noqa: PLC0415
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: PLC0415
    from megatron.core.models.T5 import T5Model  # noqa: PLC0415
    from megatron.core.models.T5.t5_spec import (  # noqa: PLC0415
        get_t5_decoder_with_local_block_spec,
        get_t5_encoder_with_local_block_spec,
    )
    from megatron.core.transformer import TransformerConfig  # noqa: PLC0415
    from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: PLC0415
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=GPUS)
    parallel_state.initialize_model_parallel(
        layout.tp, expert_model_parallel_size=layout.ep, create_gloo_process_groups=False
    )
    options: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "add_bias_linear": shape.has_bias,
        "gated_linear_unit": shape.gated_mlp,
        "normalization": "RMSNorm" if shape.rms_norm else "LayerNorm",
        "tensor_model_parallel_size": layout.tp,
        "expert_model_parallel_size": layout.ep,
        "use_cpu_initialization": True,
        "perform_initialization": False,
    }
    if shape.num_experts:
        options |= {"num_moe_experts": shape.num_experts, "moe_router_topk": shape.experts_per_token}
        options |= {"moe_ffn_hidden_size": shape.expert_ffn_hidden_size}
    config = TransformerConfig(**options)
    common: dict[str, Any] = {
        "vocab_size": shape.padded_vocab_size(layout.tp),
        "max_sequence_length": shape.max_position_embeddings,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "position_embedding_type": "learned_absolute" if shape.learned_positions else "rope",
    }
    with torch.device("meta"):
        if shape.encoder_num_layers:
            layers = shape.num_layers
            model: torch.nn.Module = T5Model(
                config=config,
                encoder_config=config,
                # Without Transformer Engine Megatron's own spec forgets the norms at the end.
                transformer_encoder_layer_spec=replace(
                    get_t5_encoder_with_local_block_spec(shape.encoder_num_layers), layer_norm=WrappedTorchNorm
                ),
                transformer_decoder_layer_spec=replace(
                    get_t5_decoder_with_local_block_spec(layers), layer_norm=WrappedTorchNorm
                ),
                **common,
            )
        else:
            spec = get_gpt_layer_local_spec(shape.num_experts or None, normalization=options["normalization"])
            model = GPTModel(config=config, transformer_layer_spec=spec, **common)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return parameters


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, int]:
    """What Megatron-core's models hold."""
    answer: Mapping[str, int] = in_child(
        tmp_path_factory.mktemp("models"), lambda: {name: built(*model) for name, model in MODELS.items()}
    )
    return answer


@pytest.mark.parametrize("name", MODELS)
def test_predicted_parameters_are_those_of_megatrons_model(name: str, counted: Mapping[str, int]) -> None:
    shape, layout = MODELS[name]
    work = Workload(shape=shape, gbs=GPUS, gpus=GPUS, gpus_per_node=GPUS)
    setting = stack([(work, files.read_cluster("dgx-a100"), files.read_framework("hptool-worker"))])
    assert rank_parameters(Layouts.of([layout]), setting, first=True, last=True).total[0] == counted[name]


@pytest.mark.parametrize(
    ("family", "layout", "changes"),
    [
        ("llama", Layout(tp=2, pp=2), {"model__qkv_bias": True}),
        ("gemma", Layout(tp=2, pp=2), {}),
        ("bert", Layout(tp=2, pp=2), {}),
        ("bert", Layout(pp=2, vpp=2), {"model__bert_binary_head": False}),
        ("moe", Layout(tp=2, ep=2), {"model__moe_shared_expert_intermediate_size": 48}),
        ("moe", Layout(pp=2, ep=2), {"model__bias": True, "model__activation": "gelu"}),
        ("t5", Layout(tp=2, pp=2), {}),
        ("t5", Layout(pp=4), {}),
        ("t5", Layout(pp=2, vpp=2), {"model__encoder__num_layers": 6, "model__decoder__num_layers": 2}),
        ("t5", Layout(pp=2, vpp=2), {"model__encoder__num_layers": 3, "model__decoder__num_layers": 5}),
    ],
)
def test_predicted_parameters_are_those_that_ranks_hold(
    tmp_path: Path, family: str, layout: Layout, changes: dict[str, Any]
) -> None:
    config = tiny_config(**tiny_family(family, trainer__devices=4, **changes)).with_layout(layout)
    assert refusal(layout, config.workload) is None

    def held() -> list[int]:
        from megatron.core import parallel_state  # noqa: PLC0415 (imports torch)

        from hptool.worker import model  # noqa: PLC0415 (imports torch and megatron)

        chunks = model.build_chunks(config, model.transformer_config(config))
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return [stage, sum(x.numel() for chunk in chunks for x in chunk.parameters())]

    setting = stack([(config.workload, files.read_cluster("local"), files.read_framework("hptool-worker"))])
    table = Layouts.of([layout])
    ends = {0: (True, layout.pp == 1), layout.pp - 1: (layout.pp == 1, True)}
    expected = {
        stage: rank_parameters(table, setting, first=first, last=last).total[0] for stage, (first, last) in ends.items()
    }
    ranks = on_ranks(tmp_path, config, held)
    assert {stage for stage, _ in ranks} >= set(ends)
    for stage, parameters in ranks:
        if stage in expected:
            assert parameters == expected[stage]
