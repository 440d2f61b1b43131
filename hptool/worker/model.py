"""A BaseConfig as Megatron-core's config and this rank's part of the model, of whatever family."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal

from hptool.base_config import BaseConfig
from hptool.candidates import Recompute
from hptool.worker import bert, encoder_decoder
from hptool.worker.cross_entropy import language_model_loss
from hptool.worker.installed import uses_transformer_engine
from hptool.worker.layers import block, gpt_layer
from hptool.worker.megatron_fixes import cure_megatron
from hptool.worker.refusals import fuses_rope, refuse_missing_kernels

#: Of the MLP, without the gate and without NeMo's wish for a fused kernel.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "geglu": torch.nn.functional.gelu,
    "swiglu": torch.nn.functional.silu,
    "squared-relu": squared_relu,
}


#: Of weights and activations; where GEMMs take 8 bits, both stay bf16.
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def transformer_config(config: BaseConfig) -> TransformerConfig:
    """What Megatron-core has to know. Fusions whose kernels are not installed are refused by name.

    Of T5 it describes the decoder; `encoder_decoder` derives the encoder's.
    """
    refuse_missing_kernels(config)
    model, stack, shape, layout = config.model, config.stack, config.shape, config.layout
    dtype = _DTYPES.get(config.precision, torch.bfloat16)
    interleaved = layout.vpp > 1
    # Selective recomputation is for the scores of attention, and a flash kernel has kept none: there is nothing to gain
    # from computing it again.
    keeps_nothing = layout.recompute is Recompute.SELECTIVE and model.use_flash_attention
    return TransformerConfig(
        # shape
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        add_bias_linear=shape.has_bias,
        add_qkv_bias=shape.has_qkv_bias,
        normalization="RMSNorm" if shape.rms_norm else "LayerNorm",
        layernorm_epsilon=stack.layernorm_epsilon,
        layernorm_zero_centered_gamma=stack.layernorm_zero_centered_gamma,
        activation_func=_ACTIVATIONS[stack.activation.removeprefix("fast-")],
        gated_linear_unit=shape.gated_mlp,
        rotary_interleaved=stack.rotary_interleaved,
        hidden_dropout=stack.hidden_dropout,
        attention_dropout=stack.attention_dropout,
        apply_query_key_layer_scaling=stack.apply_query_key_layer_scaling,
        # weights
        init_method_std=stack.init_method_std,
        output_layer_init_method=None if stack.use_scaled_init_method else init_method_normal(stack.init_method_std),
        use_cpu_initialization=model.use_cpu_initialization,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        **_fp8(config),
        # layout
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if interleaved else None,
        context_parallel_size=layout.cp,
        cp_comm_type="p2p" if uses_transformer_engine(config) else model.cp_comm_type,
        expert_model_parallel_size=layout.ep,
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
        recompute_granularity=None if keeps_nothing else stack.activations_checkpoint_granularity,
        recompute_method=layout.recompute.name.lower() if layout.recompute.is_full else None,
        recompute_num_layers=layout.recompute_num_layers if layout.recompute.is_full else None,
        recompute_modules=["core_attn"] if layout.recompute is Recompute.SELECTIVE and not keeps_nothing else None,
        # kernels
        bias_activation_fusion=stack.bias_activation_fusion and _can_fuse_activation(config),
        bias_dropout_fusion=stack.bias_dropout_add_fusion,
        masked_softmax_fusion=stack.masked_softmax_fusion,
        apply_rope_fusion=fuses_rope(config),
        gradient_accumulation_fusion=model.gradient_accumulation_fusion,
        persist_layer_norm=False,  # a kernel of Apex; torch's LayerNorm is fused already
        **_experts(config),
    )


def build_chunks(config: BaseConfig, megatron: TransformerConfig) -> list[LanguageModule]:
    """The rank's stages of the pipeline, from the first; one unless the pipeline is interleaved."""
    cure_megatron()
    build = _build_gpt
    if config.is_encoder_decoder:
        build = encoder_decoder.build_stage
    elif config.is_bert:
        build = bert.build_stage
    chunks = []
    for stage in range(config.layout.vpp):
        chunk = build(config, megatron, stage if config.layout.vpp > 1 else None)
        if config.model.scale_embeddings and chunk.pre_process:
            chunk.embedding.register_forward_hook(_scale_embeddings)
        if chunk.post_process:
            chunk.compute_language_model_loss = partial(language_model_loss, group=chunk.pg_collection.tp)
        chunks.append(chunk)
    return chunks


def _build_gpt(config: BaseConfig, megatron: TransformerConfig, vp_stage: int | None) -> LanguageModule:
    stack = config.stack
    # GPTModel knows no ALiBi: a model without positions is one whose attention brings them.
    positions = "none" if config.is_alibi else stack.position_embedding_type
    return GPTModel(
        config=megatron,
        transformer_layer_spec=block(config, gpt_layer(config), get_num_layers_to_build(megatron, vp_stage=vp_stage)),
        vocab_size=config.shape.padded_vocab_size(config.layout.tp, config.model.make_vocab_size_divisible_by),
        max_sequence_length=config.shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=config.shape.tied_embeddings,
        position_embedding_type=positions,
        rotary_percent=stack.rotary_percentage,
        rotary_base=stack.rotary_base,
        seq_len_interpolation_factor=stack.seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )


def _scale_embeddings(module: torch.nn.Module, inputs: object, embeddings: torch.Tensor) -> torch.Tensor:
    """By the root of their width, rounded as they are (Gemma's `normalizer`; Gemma Team 2024, arXiv:2403.08295)."""
    del module, inputs
    return embeddings * embeddings.new_full((), embeddings.size(-1) ** 0.5)


def _experts(config: BaseConfig) -> dict[str, Any]:
    model, shape = config.model, config.shape
    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": shape.shared_ffn_hidden_size or None,
        "moe_router_topk": shape.experts_per_token,
        # The softmax of one logit is one, whatever the logit: a single expert is weighted by the softmax over all.
        "moe_router_pre_softmax": shape.experts_per_token == 1,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff,
        "moe_token_dispatcher_type": model.moe_token_dispatcher_type,
        "moe_grouped_gemm": model.moe_grouped_gemm,
    }


def _can_fuse_activation(config: BaseConfig) -> bool:
    """Megatron-core has a kernel: for experts SwiGLU without biases, else gated activations and GELU with a bias."""
    shape, activation = config.shape, config.stack.activation.removeprefix("fast-")
    if shape.num_experts:
        return activation == "swiglu" and not shape.has_bias
    return shape.gated_mlp or (activation == "gelu" and shape.has_bias)


def _fp8(config: BaseConfig) -> dict[str, Any]:
    """8-bit GEMMs by Transformer Engine, with scales that follow the largest values seen (NeMo's recipe and keys)."""
    model = config.model
    if not model.fp8:
        return {}
    return {
        "fp8": "e4m3" if model.fp8_e4m3 else "hybrid",
        "fp8_recipe": "delayed",
        "fp8_margin": model.fp8_margin,
        "fp8_amax_history_len": model.fp8_amax_history_len,
        "fp8_amax_compute_algo": model.fp8_amax_compute_algo,
        "fp8_wgrad": model.fp8_wgrad,
    }
