"""The layers that models are built of: Transformer Engine's where they are used, else Megatron's local ones.

Megatron's local layers need neither Transformer Engine nor Apex. Their norms refuse sequence parallelism and their
attention keeps all scores; see `attention.py` for what takes their place.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.bert.bert_layer_specs import (
    bert_layer_local_spec,
    get_bert_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.T5.t5_spec import (
    decoder_model_with_local_spec,
    decoder_model_with_transformer_engine_default_spec,
    encoder_model_with_local_spec,
    encoder_model_with_transformer_engine_default_spec,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from hptool.base_config import BaseConfig
from hptool.worker.attention import AlibiBias, LocalNorm, SdpaAttention
from hptool.worker.installed import uses_transformer_engine


def gpt_layer(config: BaseConfig) -> ModuleSpec:
    """A causal layer, its MLP replaced by experts where there are any."""
    model = config.model
    if uses_transformer_engine(config):
        return get_gpt_layer_with_transformer_engine_spec(model.num_moe_experts, model.moe_grouped_gemm)
    return _adapted(get_gpt_layer_local_spec(model.num_moe_experts, model.moe_grouped_gemm), config)


def bert_layer(config: BaseConfig) -> ModuleSpec:
    """A layer that attends to all tokens."""
    if uses_transformer_engine(config):
        return _without_padding(get_bert_layer_with_transformer_engine_spec())
    return _adapted(bert_layer_local_spec, config)


def encoder_layer(config: BaseConfig) -> ModuleSpec:
    """A layer of T5's encoder, which attends to all tokens."""
    if uses_transformer_engine(config):
        return _without_padding(encoder_model_with_transformer_engine_default_spec())
    return _adapted(encoder_model_with_local_spec(), config)


def cross_layer(config: BaseConfig) -> ModuleSpec:
    """A layer of T5's decoder: causal, then over the encoder's result."""
    if uses_transformer_engine(config):
        return _without_padding(decoder_model_with_transformer_engine_default_spec())
    return _adapted(decoder_model_with_local_spec(), config)


def block(config: BaseConfig, layer: ModuleSpec, count: int) -> TransformerBlockSubmodules:
    """So many layers, and the norm behind the last of a stack, which T5's own local specs leave out."""
    norm = TENorm if uses_transformer_engine(config) else LocalNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def _without_padding(layer: ModuleSpec) -> ModuleSpec:
    """The layer, where what it attends to all of is never padding (`masking`), so that a flash kernel serves."""
    spec = copy.deepcopy(layer)
    for attention in (spec.submodules.self_attention, spec.submodules.cross_attention):
        if getattr(attention, "params", {}).get("attn_mask_type") is AttnMaskType.padding:
            attention.params["attn_mask_type"] = AttnMaskType.no_mask
    return spec


def _adapted(layer: ModuleSpec, config: BaseConfig) -> ModuleSpec:
    spec = copy.deepcopy(layer)
    parts, attention = spec.submodules, _core_attention(config)
    parts.input_layernorm = parts.pre_mlp_layernorm = LocalNorm
    parts.self_attention.submodules.core_attention = attention
    if hasattr(parts.cross_attention, "submodules"):
        parts.pre_cross_attn_layernorm = LocalNorm
        parts.cross_attention.submodules.core_attention = attention
    return spec


def _core_attention(config: BaseConfig) -> Callable[..., Any]:
    if not config.model.use_flash_attention:
        return DotProductAttention  # type: ignore[no-any-return]  # Megatron has no types
    if config.is_alibi:
        heads = config.shape.num_attention_heads
        return partial(SdpaAttention, alibi=AlibiBias(heads, parallel_state.get_tensor_model_parallel_group()))
    return partial(SdpaAttention, rotates=config.stack.position_embedding_type == "rope")
