"""T5: an encoder and a decoder in one pipeline, which Megatron-core's own T5Model refuses.

Its stages are cut from the layers of both, the encoder's first. What one stage hands to the next is one tensor, as
Megatron's schedules expect: the hidden states of the encoder's tokens and of the decoder's, one behind the other,
[s_encoder + s_decoder, b, h]. The schedule is told the sum as the sequence's length; all else is Megatron's.
"""

import copy
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import scaled_init_method_normal

from hptool.base_config import BaseConfig
from hptool.worker.layers import block, cross_layer, encoder_layer


class EncoderDecoderStage(LanguageModule):  # type: ignore[misc]  # Megatron has no types
    """One stage of the pipeline: some layers of the encoder, of the decoder, or of both.

    No attention needs a mask, because nothing that one attends to is padding (`masking`). The parameters are those
    of Megatron's T5Model.
    """

    def __init__(self, config: BaseConfig, megatron: TransformerConfig, stage: int, vp_stage: int | None) -> None:
        super().__init__(config=megatron)
        shape, stages = config.shape, config.layout.pp * config.layout.vpp
        self.vp_stage = vp_stage
        self.pre_process, self.post_process = stage == 0, stage == stages - 1
        self.share_embeddings_and_output_weights: bool = shape.tied_embeddings
        self.model_type = ModelType.encoder_or_decoder
        self._received: torch.Tensor | None = None
        vocabulary = shape.padded_vocab_size(config.layout.tp, config.model.make_vocab_size_divisible_by)
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=megatron,
                vocab_size=vocabulary,
                max_sequence_length=shape.max_position_embeddings,
                tp_group=self.tp_group,
            )
        own = shape.pipeline_layers // stages
        first, end = stage * own, (stage + 1) * own
        encoder = range(min(first, shape.encoder_num_layers), min(end, shape.encoder_num_layers))
        decoder = range(*(max(0, x - shape.encoder_num_layers) for x in (first, end)))
        again = megatron.recompute_num_layers
        self.encoder = self._block(config, encoder, shape.encoder_num_layers, again) if encoder else None
        if megatron.recompute_method == "block":
            # Blocks count within a stage, whatever its layers are.
            again = max(0, again - len(encoder))
        self.decoder = self._block(config, decoder, shape.num_layers, again, crossing=True) if decoder else None
        if self.post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                shape.hidden_size,
                vocabulary,
                config=megatron,
                init_method=megatron.init_method,
                bias=True,  # as T5Model has it
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                tp_group=self.tp_group,
            )
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def _block(
        self, config: BaseConfig, numbers: range, layers: int, again: int | None, *, crossing: bool = False
    ) -> TransformerBlock:
        """The layers of a stack with these numbers (from 0), and its norm behind the last of them."""
        own = copy.copy(self.config)
        own.num_layers, own.recompute_num_layers = layers, again
        if config.stack.use_scaled_init_method:
            own.output_layer_init_method = scaled_init_method_normal(own.init_method_std, layers, multiplier=2.0)
        layer = cross_layer(config) if crossing else encoder_layer(config)
        made = _Stack(
            own,
            block(config, layer, len(numbers)),
            pre_process=True,  # it is given its input, wherever that comes from
            post_process=numbers[-1] == layers - 1,
            pg_collection=self.pg_collection,
            vp_stage=self.vp_stage,
        )
        # Megatron numbers them as if each stack were spread over all stages.
        for number, module in zip(numbers, made.layers, strict=True):
            module.layer_number = number + 1
        return made

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor | None] | None) -> None:
        """What the stage before has sent; called by Megatron's schedules."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, encoder_tokens: torch.Tensor, decoder_tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Tokens and labels [b, s] to what the next stage needs, or on the last one to each label's loss [b, s]."""
        if self.pre_process:
            encoded, decoded = self._embed(encoder_tokens), self._embed(decoder_tokens)
        else:
            assert self._received is not None  # noqa: S101 (the schedule has seen to it)
            split = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
            length = encoder_tokens.size(1) // split
            encoded, decoded = self._received[:length], self._received[length:]
        if self.encoder is not None:
            encoded = self.encoder(hidden_states=encoded, attention_mask=None)
        if self.decoder is not None:
            decoded = self.decoder(hidden_states=decoded, attention_mask=None, context=encoded)
        if not self.post_process:
            return torch.cat([encoded, decoded])
        shared = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(decoded, weight=shared)
        losses: torch.Tensor = self.compute_language_model_loss(labels, logits)
        return losses

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        embedded: torch.Tensor = self.embedding(input_ids=tokens, position_ids=positions)
        return embedded


class _Stack(TransformerBlock):  # type: ignore[misc]  # as above
    """The layers of the encoder or of the decoder that a stage holds; their numbers are those of the whole stack."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As TransformerBlock's, which takes the layers' places in the stage from the pipeline's rank."""
        found: dict[str, Any] = {}
        for i, layer in enumerate(self.layers):
            place = (len(sharded_offsets), layer.layer_number - 1, self.config.num_layers)
            own = layer.sharded_state_dict(f"{prefix}layers.{i}.", (*sharded_offsets, place), metadata)
            replace_prefix_for_sharding(own, f"{prefix}layers.{i}.", f"{prefix}layers.")
            found |= own
        if self.final_layernorm is not None:
            name = f"{prefix}final_layernorm."
            found |= sharded_state_dict_default(self.final_layernorm, name, sharded_offsets, metadata, self.tp_group)
        return found


def build_stage(config: BaseConfig, megatron: TransformerConfig, vp_stage: int | None) -> LanguageModule:
    """One stage of the pipeline."""
    stage = (vp_stage or 0) * config.layout.pp + parallel_state.get_pipeline_model_parallel_rank()
    return EncoderDecoderStage(config, megatron, stage, vp_stage)
