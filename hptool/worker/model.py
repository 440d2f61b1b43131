"""A BaseConfig as Megatron-core's config and this rank's part of the model: GPT-3 and what it was made into since."""

import copy
import importlib.util

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal

from hptool.base_config import BaseConfig
from hptool.candidates import Recompute
from hptool.errors import InputError
from hptool.worker.attention import LocalNorm, SdpaAttention


def transformer_config(config: BaseConfig) -> TransformerConfig:
    """What Megatron-core has to know. Fusions that need Apex or its kernels are refused by name."""
    _refuse_missing_kernels(config)
    model, shape, layout = config.model, config.shape, config.layout
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    interleaved = layout.vpp > 1
    return TransformerConfig(
        # shape
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        add_bias_linear=shape.has_bias,
        normalization="LayerNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=torch.nn.functional.gelu,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        apply_query_key_layer_scaling=model.apply_query_key_layer_scaling,
        # weights
        init_method_std=model.init_method_std,
        output_layer_init_method=None if model.use_scaled_init_method else init_method_normal(model.init_method_std),
        use_cpu_initialization=model.use_cpu_initialization,
        params_dtype=dtype,
        bf16=config.precision == "bf16",
        # layout
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if interleaved else None,
        context_parallel_size=layout.cp,
        sequence_parallel=model.sequence_parallel and layout.tp > 1,
        # Overlap is for interleaving only, and there it is not a choice: with batched sends and PP=2, where both
        # neighbours are the same rank, the schedule silently computes garbage.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=model.batch_p2p_comm and not interleaved,
        batch_p2p_sync=model.sync_batch_comm,
        # A stage's output may go once it is sent. gloo still reads it then where sends overlap; NCCL holds it.
        deallocate_pipeline_outputs=not (interleaved and config.trainer.accelerator == "cpu"),
        pipeline_dtype=dtype,
        # recomputation
        recompute_granularity=model.activations_checkpoint_granularity,
        recompute_method=layout.recompute.name.lower() if layout.recompute.is_full else None,
        recompute_num_layers=layout.recompute_num_layers if layout.recompute.is_full else None,
        recompute_modules=["core_attn"] if layout.recompute is Recompute.SELECTIVE else None,
        # kernels
        bias_activation_fusion=model.bias_activation_fusion and shape.has_bias,
        bias_dropout_fusion=model.bias_dropout_add_fusion,
        masked_softmax_fusion=model.masked_softmax_fusion,
        cross_entropy_loss_fusion=model.cross_entropy_loss_fusion,
        gradient_accumulation_fusion=model.gradient_accumulation_fusion,
        persist_layer_norm=False,  # a kernel of Apex; torch's LayerNorm is fused already
    )


def build_chunks(config: BaseConfig, megatron: TransformerConfig) -> list[GPTModel]:
    """The rank's stages of the pipeline, from the first; one unless the pipeline is interleaved."""
    vpp = config.layout.vpp
    return [_build_stage(config, megatron, stage if vpp > 1 else None) for stage in range(vpp)]


def attention_name(config: BaseConfig) -> str:
    """What computes the core attention, for the measurement."""
    return "torch sdpa" if config.model.use_flash_attention else "megatron dot product"


def _build_stage(config: BaseConfig, megatron: TransformerConfig, vp_stage: int | None) -> GPTModel:
    layers = get_num_layers_to_build(megatron, vp_stage=vp_stage)
    block = TransformerBlockSubmodules(layer_specs=[_layer_spec(config)] * layers, layer_norm=LocalNorm)
    return GPTModel(
        config=megatron,
        transformer_layer_spec=block,
        vocab_size=config.shape.padded_vocab_size(config.layout.tp, config.model.make_vocab_size_divisible_by),
        max_sequence_length=config.shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=config.shape.tied_embeddings,
        position_embedding_type="learned_absolute",
        vp_stage=vp_stage,
    )


def _layer_spec(config: BaseConfig) -> ModuleSpec:
    """Megatron's local layer with norms that know sequence parallelism, and the attention that the config asks for."""
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="LayerNorm"))
    spec.submodules.input_layernorm = LocalNorm
    spec.submodules.pre_mlp_layernorm = LocalNorm
    core = SdpaAttention if config.model.use_flash_attention else DotProductAttention
    spec.submodules.self_attention.submodules.core_attention = core
    return spec


def _refuse_missing_kernels(config: BaseConfig) -> None:
    model = config.model
    needs = []
    if model.gradient_accumulation_fusion:
        needs.append(("gradient_accumulation_fusion", "fused_weight_gradient_mlp_cuda", "Apex"))
    # With flash attention there is no softmax kernel to fuse, and nothing to refuse.
    if model.masked_softmax_fusion and not model.use_flash_attention and config.precision == "bf16":
        needs.append(("masked_softmax_fusion", "scaled_upper_triang_masked_softmax_cuda", "Apex' megatron kernels"))
    problems = [
        f"model.{key}: True given, allowed is False where {owner} ({module}) is not installed"
        for key, module, owner in needs
        if importlib.util.find_spec(module) is None
    ]
    if problems:
        raise InputError(*problems)
