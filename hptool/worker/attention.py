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


class AlibiBias:
    """Positions as a bias on the scores of causal attention (Press et al. 2021, arXiv:2108.12409), for a TP rank.

    One object serves all layers of a model, so that the bias of the longest sequence is there once.
    """

    def __init__(self, num_heads: int, group: torch.distributed.ProcessGroup) -> None:
        own = num_heads // group.size()
        self._slopes = alibi_slopes(num_heads)[group.rank() * own : (group.rank() + 1) * own]
        self._bias: torch.Tensor | None = None
        self._column: torch.Tensor | None = None

    def look_back(self, places: int, place: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[heads, places] for a query at `place` [1] of its sequence: as a row of `__call__`, of the type of `like`."""
        if self._column is None or self._column.device != like.device:
            self._column = torch.tensor(self._slopes, device=like.device)[:, None]
        distance = place - torch.arange(places, device=like.device)
        return (-self._column * distance).masked_fill(distance < 0, -math.inf).to(like.dtype)

    def __call__(self, query: torch.Tensor) -> torch.Tensor:
        """[1, heads, s, s] for queries [b, heads, s, d]: minus slope · distance, and no look ahead."""
        length = query.size(2)
        if self._bias is None or self._bias.size(2) != length or self._bias.device != query.device:
            places = torch.arange(length, device=query.device, dtype=torch.float32)
            distance = places[:, None] - places[None, :]
            slopes = torch.tensor(self._slopes, device=query.device)[:, None, None]
            bias = (-slopes * distance).masked_fill(distance < 0, -math.inf)
            self._bias = bias[None].to(query.dtype)
        return self._bias


def alibi_slopes(num_heads: int) -> list[float]:
    """The geometric sequence of the paper; with a number of heads that is no power of two, filled up by its recipe."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]


class SdpaAttention(torch.nn.Module):
    """Attention of one layer, in place of `DotProductAttention`: causal or over all keys, with a mask or with ALiBi.

    A query whose keys are all masked attends to all of them: it is padding, and no number is a better answer.

    With context parallelism, which knows neither masks nor ALiBi, each rank holds two chunks of the sequence (see
    `batches.zigzag`). By `all_gather` keys and values of all ranks are gathered, and each chunk of queries attends to
    what comes before it; by `a2a` the ranks exchange the sequence for heads, each attends with its part of them over
    the whole sequence, and they exchange them back.

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
        *,
        alibi: AlibiBias | None = None,
        rotates: bool = False,
    ) -> None:
        super().__init__()
        del layer_number, attention_type
        self._causal: bool = attn_mask_type is AttnMaskType.causal
        self._alibi = alibi
        # Queries and keys that were rotated are tensors of their own. The values, a part of what all three were
        # projected to, would keep the whole of it alive until the backward pass.
        self._copies_values: bool = rotates
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self._context_group = groups.cp
        self._context_size: int = config.context_parallel_size
        self._exchanges_heads: bool = cp_comm_type == "a2a"
        if self._context_size > 1 and alibi:
            msg = "context parallelism is for attention without ALiBi"
            raise ValueError(msg)
        if self._context_size > 1 and cp_comm_type not in (None, "all_gather", "a2a"):
            msg = f"cp_comm_type: {cp_comm_type} given, allowed is all_gather or a2a"
            raise ValueError(msg)
        # Megatron draws what tensor ranks drop apart in a state of its own, which no compiler can enter.
        self._draws_apart: bool = groups.tp.size() > 1 and not config.sequence_parallel
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
        """Query [s, b, heads, d], key and value [s, b, groups, d] to [s, b, heads·d].

        `attention_mask` is true where a query must not look: bool, broadcast over [b, heads, s, s], as Megatron's.
        """
        assert attention_bias is None and packed_seq_params is None  # noqa: PT018, S101 (ours)
        del attn_mask_type
        if self._context_size == 1:
            value = value.contiguous() if self._copies_values and self.training else value
            context = self._attend(query, key, value, attention_mask)
        else:
            assert attention_mask is None  # noqa: S101 (as above)
            exchange = self._attend_to_whole if self._exchanges_heads else self._attend_to_gathered
            context = exchange(query, key, value)
        return context.reshape(context.size(0), context.size(1), -1)

    def look_back(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, place: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One query [1, b, heads, d] to keys and values [s, b, groups, d] that were kept: [1, b, heads·d].

        It is the last of its sequence, or at `place` [1] of it, a number on the device behind which it must not look.
        """
        places, batch, groups, channels = key.shape
        # The heads of a group look at the same keys: as so many queries of one head they read them once.
        query = query.reshape(batch, groups, -1, channels)
        key, value = (x.permute(1, 2, 0, 3) for x in (key, value))
        bias: torch.Tensor | None = None
        if self._alibi is not None:
            at = torch.full((1,), places - 1, device=query.device) if place is None else place
            bias = self._alibi.look_back(places, at, query).view(1, groups, -1, places)
        elif place is not None:
            bias = (torch.arange(places, device=query.device) <= place).view(1, 1, 1, places)
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self._scale)
        return found.flatten(1)[None]

    def _attend_to_whole(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        group = self._context_group
        query, key, value = (_in_sequence(_exchange_for_heads(x, group), group.size()) for x in (query, key, value))
        return _exchange_for_sequence(_as_pairs(self._attend(query, key, value), group.size()), group)

    def _attend_to_gathered(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        size, rank = self._context_size, self._context_group.rank()
        key, value = (_in_sequence(_gather(x, self._context_group), size) for x in (key, value))
        if not self._causal:
            return self._attend(query, key, value)
        half = query.size(0) // 2
        early, late = ((chunk + 1) * half for chunk in (rank, 2 * size - 1 - rank))
        return torch.cat(
            [
                self._attend(query[:half], key[:early], value[:early]),
                self._attend(query[half:], key[:late], value[:late]),
            ]
        )

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of queries that, where it is causal, are the last ones of the keys' sequence."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
        dropout = self._dropout if self.training else 0.0
        bias = self._alibi(query) if self._alibi else None
        if mask is not None:
            hidden = _hidden(mask, query.size(2), key.size(2), causal=self._causal)
            bias = ~hidden if bias is None else bias.masked_fill(hidden, -math.inf)

        def attend() -> torch.Tensor:
            return fused_attention(
                query, key, value, causal=self._causal, bias=bias, dropout=dropout, scale=self._scale
            )

        if dropout and self._draws_apart:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = attend()
        else:
            context = attend()
        return context.permute(2, 0, 1, 3)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    bias: torch.Tensor | None,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Attention by torch's fused kernels, [b, heads, s, d]; causal queries are the last ones of the keys' sequence.

    A bias on the scores (or, of bool, what may be looked at), which has to hide what comes later itself, rules out
    flash kernels and not fused ones.
    """
    grouped = query.size(1) != key.size(1)
    if grouped and not query.is_cuda:  # the CPU's flash kernel takes as many key heads as query heads
        repeats = query.size(1) // key.size(1)
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        grouped = False
    whole = query.size(2) == key.size(2)
    mask = bias
    if causal and bias is None and not whole:
        mask = causal_lower_right(query.size(2), key.size(2))
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=grouped,
    )


def _hidden(mask: torch.Tensor, queries: int, keys: int, *, causal: bool) -> torch.Tensor:
    """What queries must not look at: what is masked and, where it is causal, what comes later."""
    if causal:
        ones = torch.ones(queries, keys, dtype=torch.bool, device=mask.device)
        mask = mask | ones.triu(keys - queries + 1)
    return mask & ~mask.all(-1, keepdim=True)


def _exchange_for_heads(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """[s/cp, b, heads, d] to [s, b, heads/cp, d]: the own heads of all ranks' tokens, one rank after the other."""
    parts = x.reshape(*x.shape[:2], group.size(), -1, x.size(3)).permute(2, 0, 1, 3, 4)
    exchanged: torch.Tensor = tensor_parallel.all_to_all(group, parts.flatten(0, 1).contiguous())
    return exchanged


def _exchange_for_sequence(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """As `_exchange_for_heads`, back."""
    exchanged: torch.Tensor = tensor_parallel.all_to_all(group, x.contiguous())
    return exchanged.view(group.size(), -1, *x.shape[1:]).permute(1, 2, 0, 3, 4).flatten(2, 3)


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


def _as_pairs(x: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `_in_sequence`."""
    early, late = x.view(2, size, x.size(0) // (2 * size), *x.shape[1:])
    return torch.stack([early, late.flip(0)], dim=1).flatten(0, 2)


class _ZeroCentredLayerNorm(torch.nn.LayerNorm):
    """A LayerNorm that stores its weight less one, so that weight decay and few bits pull it towards one."""

    def reset_parameters(self) -> None:
        """The identity."""
        super().reset_parameters()
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As LayerNorm."""
        return torch.nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class _ZeroCentredRmsNorm(torch.nn.RMSNorm):
    """As `_ZeroCentredLayerNorm`."""

    def reset_parameters(self) -> None:
        """The identity."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As RMSNorm."""
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


class LocalNorm:
    """Makes torch's norms; Megatron's `WrappedTorchNorm` does too, but refuses sequence parallelism.

    What it lacks is the mark on the parameters by which Megatron adds up their gradients over the tensor group. It
    refuses zero-centred weights as well.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.Module:  # type: ignore[misc]
        """The norm of the config for `hidden_size`."""
        kinds: dict[str, tuple[type[torch.nn.Module], type[torch.nn.Module]]] = {
            "LayerNorm": (torch.nn.LayerNorm, _ZeroCentredLayerNorm),
            "RMSNorm": (torch.nn.RMSNorm, _ZeroCentredRmsNorm),
        }
        kind = kinds[config.normalization][bool(config.layernorm_zero_centered_gamma)]
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
