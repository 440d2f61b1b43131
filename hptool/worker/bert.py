"""BERT: an encoder alone, with a head for masked tokens and where asked one for the order of two segments."""

from megatron.core import parallel_state
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from hptool.base_config import BaseConfig
from hptool.worker.layers import bert_layer, block


class _UnpaddedBert(BertModel):  # type: ignore[misc]  # Megatron has no types
    """BERT on samples that fill their length: attention needs no mask, and so may take a flash kernel."""

    def _sanity_check_attention_and_get_attn_mask_dimension(self) -> str:
        """Megatron's own wants a single layer's spec and looks for Transformer Engine in it."""
        return "b1ss"

    def bert_extended_attention_mask(self, attention_mask: None) -> None:
        """No mask, where Megatron's own makes one of [b, 1, s, s]."""


def build_stage(config: BaseConfig, megatron: TransformerConfig, vp_stage: int | None) -> LanguageModule:
    """One stage of the pipeline."""
    binary = config.shape.has_binary_head
    return _UnpaddedBert(
        config=megatron,
        num_tokentypes=2 if binary else 0,
        transformer_layer_spec=block(config, bert_layer(config), get_num_layers_to_build(megatron, vp_stage=vp_stage)),
        vocab_size=config.shape.padded_vocab_size(config.layout.tp, config.model.make_vocab_size_divisible_by),
        max_sequence_length=config.shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=config.shape.tied_embeddings,
        add_binary_head=binary,
        vp_stage=vp_stage,
    )
