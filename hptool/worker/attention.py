"""Core attention and norm for Megatron-core's local layers, where neither Transformer Engine nor Apex is there.

Megatron's own `DotProductAttention` keeps the whole matrix of scores and knows no context parallelism. torch's
`scaled_dot_product_attention` is flash attention on a GPU that has it.
"""

import math

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right


class SdpaAttention(torch.nn.Module):
    """Causal self-attention of one layer, in place of `DotProductAttention`.

    With context parallelism each rank holds two chunks of the sequence (see `batches.zigzag`); keys and values of all
    ranks are gathered, and each chunk of queries attends to what comes before it.

    `apply_query_key_layer_scaling` has no effect: Megatron divides the scores by the layer's number and multiplies
    them again within the softmax, for the range of fp16, which no config here uses.
    """

    def __init__(  # noqa: PLR0917 (Megatron's signature)
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        del layer_number, attention_type, cp_comm_type
        if attn_mask_type is not AttnMaskType.causal:
            msg = f"SdpaAttention is causal, {attn_mask_type} asked for"
            raise ValueError(msg)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self._context_group = groups.cp
        self._context_size: int = config.context_parallel_size
        self._sequence_parallel: bool = config.sequence_parallel
        self._dropout: float = config.attention_dropout if attention_dropout is None else attention_dropout
        self._scale: float = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(  # noqa: PLR0917 (Megatron's signature)
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object = None,
    ) -> torch.Tensor:
        """Query [s, b, heads, d], key and value [s, b, groups, d] to [s, b, heads·d]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None  # noqa: PT018, S101 (ours)
        del attn_mask_type
        if self._context_size > 1:
            context = self._forward_context_parallel(query, key, value)
        else:
            context = self._attend(query, key, value)
        return context.reshape(context.size(0), context.size(1), -1)

    def _forward_context_parallel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        size, rank = self._context_size, self._context_group.rank()
        key, value = (_in_sequence(_gather(x, self._context_group), size) for x in (key, value))
        half = query.size(0) // 2
        early, late = ((chunk + 1) * half for chunk in (rank, 2 * size - 1 - rank))
        return torch.cat(
            [
                self._attend(query[:half], key[:early], value[:early]),
                self._attend(query[half:], key[:late], value[:late]),
            ]
        )

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of queries that are the last ones of the keys' sequence."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        dropout = self._dropout if self.training else 0.0

        def attend() -> torch.Tensor:
            return causal_attention(query, key, value, dropout=dropout, scale=self._scale)

        if dropout and not self._sequence_parallel:  # as DotProductAttention: ranks of a tensor group differ
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = attend()
        else:
            context = attend()
        return context.permute(2, 0, 1, 3)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float, scale: float
) -> torch.Tensor:
    """Attention by torch's fused kernels, [b, heads, s, d], of queries that are the last ones of the keys' sequence."""
    grouped = query.size(1) != key.size(1)
    if grouped and not query.is_cuda:  # the CPU's flash kernel takes as many key heads as query heads
        repeats = query.size(1) // key.size(1)
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        grouped = False
    whole = query.size(2) == key.size(2)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if whole else causal_lower_right(query.size(2), key.size(2)),
        dropout_p=dropout,
        is_causal=whole,
        scale=scale,
        enable_gqa=grouped,
    )


def _gather(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """[s/cp, …] of all ranks of the group, one after the other; the gradient is scattered back, summed."""
    gathered: torch.Tensor = tensor_parallel.gather_from_sequence_parallel_region(x.contiguous(), group=group)
    return gathered


def _in_sequence(x: torch.Tensor, size: int) -> torch.Tensor:
    """The gathered pairs of chunks (0, 2n-1), (1, 2n-2), … in the order of the sequence.

    By slices, whose gradients are slices; an index would be added up element by element.
    """
    pairs = x.view(size, 2, x.size(0) // (2 * size), *x.shape[1:])
    return torch.cat([pairs[:, 0].flatten(0, 1), pairs[:, 1].flip(0).flatten(0, 1)])


class LocalNorm:
    """Makes torch's LayerNorm; Megatron's `WrappedTorchNorm` does too, but refuses sequence parallelism.

    What it lacks is the mark on the parameters by which Megatron adds up their gradients over the tensor group.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.LayerNorm:  # type: ignore[misc]
        """A LayerNorm of `hidden_size`."""
        norm = torch.nn.LayerNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
