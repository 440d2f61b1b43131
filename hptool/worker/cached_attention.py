"""Attention of a model that serves: to keys and values that are kept, instead of computed again for every token.

Megatron-core's own static path keeps keys before their rotation, so that it rotates the whole cache again for each
token, and knows its places as numbers of the host, which no CUDA graph can follow. Its context and its layers are used
here; what this module gives them is the pass through an attention: of all keys that were rotated when they came.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.transformer.enums import AttnMaskType


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """How a pass is made that a CUDA graph repeats: the token goes to `place` [1], a number on the device.

    It looks at the first `reach` places of the cache, of which those behind `place` are hidden.
    """

    place: torch.Tensor
    reach: int


class Cache(StaticInferenceContext):  # type: ignore[misc]  # Megatron has no types
    """The keys and values of a batch, for each of a rank's layers: [length, b, groups, d], and the encoder's of T5.

    A pass either reads prompts into an empty cache (prefill), or one token of each request behind what is there
    (decode). `recorded` is set while a decoding pass is made for a CUDA graph.
    """

    def __init__(self, batch: int, length: int) -> None:
        super().__init__(max_batch_size=batch, max_sequence_length=length)
        self.recorded: Recorded | None = None
        self._crossed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def allocate(self, chunk: torch.nn.Module, encoder_length: int, device: torch.device) -> None:
        """All that it will ever hold, at once: what does not fit is found before anything is computed."""

        def empty(length: int, groups: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            shape = (length, self.max_batch_size, groups, channels)
            return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)

        for layer in _attentions(chunk):
            of_encoder = isinstance(layer, CrossAttention)
            length = encoder_length if of_encoder else self.max_sequence_length
            memory = self._crossed if of_encoder else self.key_value_memory_dict
            groups, channels = layer.num_query_groups_per_partition, layer.hidden_size_per_attention_head
            memory[layer.layer_number] = empty(length, groups, channels, layer.config.params_dtype)

    def rows(self, table: torch.Tensor, count: int) -> torch.Tensor:
        """Of a table with a row for each place, those of the `count` tokens of this pass."""
        if self.recorded is not None:
            return table.index_select(0, self.recorded.place)
        start: int = self.sequence_len_offset
        return table[start : start + count]

    def add(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps a layer's keys and values of this pass; all that it has by now."""
        memory: tuple[torch.Tensor, torch.Tensor] = self.key_value_memory_dict[layer]
        if self.recorded is not None:
            for kept, new in zip(memory, (key, value), strict=True):
                kept.index_copy_(0, self.recorded.place, new)
            reach = self.recorded.reach
            return memory[0][:reach], memory[1][:reach]
        start: int = self.sequence_len_offset
        end = start + key.size(0)
        for kept, new in zip(memory, (key, value), strict=True):
            kept[start:end] = new
        return memory[0][:end], memory[1][:end]

    def cross(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values of the encoder's tokens, to be written with the prompt and read with each token."""
        return self._crossed[layer]


def serve_from_cache(chunk: torch.nn.Module) -> None:
    """Has the attentions of a model that serves use the cache that they are called with."""
    for layer in _attentions(chunk):
        attend = _cross_attention if isinstance(layer, CrossAttention) else _self_attention
        layer.forward = partial(attend, layer)


def _attentions(chunk: torch.nn.Module) -> Iterator[Any]:
    """Those that look back: not an encoder's, which sees all of its tokens at once."""
    for module in chunk.modules():
        looks_back = isinstance(module, SelfAttention) and module.attn_mask_type is AttnMaskType.causal
        if looks_back or isinstance(module, CrossAttention):
            yield module


def _self_attention(
    self: SelfAttention,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    inference_context: Cache,
    rotary_pos_emb: torch.Tensor | None = None,
    **_: object,
) -> Any:
    """In place of Megatron's `forward`: hidden states [s, b, h] to [s, b, h] and a bias to be added."""
    assert attention_mask is None  # noqa: S101 (ours)
    cache = inference_context
    query, key, value = self.get_query_key_value_tensors(hidden_states)
    if rotary_pos_emb is not None:
        rows = cache.rows(rotary_pos_emb, hidden_states.size(0))
        group = self.pg_collection.cp
        query, key = (apply_rotary_pos_emb(x, rows, config=self.config, cp_group=group) for x in (query, key))
    keys, values = cache.add(self.layer_number, key, value)
    if cache.is_decode_only():
        place = cache.recorded.place if cache.recorded is not None else None
        found = self.core_attention.look_back(query, keys, values, place)
    else:
        found = self.core_attention(query, key, value)
    return self.linear_proj(found)


def _cross_attention(
    self: CrossAttention,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    key_value_states: torch.Tensor,
    inference_context: Cache,
    **_: object,
) -> Any:
    """As `_self_attention`; the encoder's keys and values are the same for every token."""
    assert attention_mask is None and hidden_states.size(0) == 1  # noqa: PT018, S101 (ours)
    keys, values = inference_context.cross(self.layer_number)
    if inference_context.is_decode_only():
        query, _ = self.linear_q(hidden_states)
        query = query.unflatten(-1, (-1, self.hidden_size_per_attention_head))
    else:
        query, key, value = self.get_query_key_value_tensors(hidden_states, key_value_states)
        keys.copy_(key)
        values.copy_(value)
    return self.linear_proj(self.core_attention.look_back(query, keys, values))
