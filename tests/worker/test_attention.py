"""The attention through torch's kernels is the attention that Megatron-core computes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hptool.base_config import BaseConfig
from tests.worker.runs import on_ranks, tiny_config, tiny_family


def largest_differences(
    config: BaseConfig, mask: str = "causal", keys: int | None = None, padded: Sequence[int] = ()
) -> list[float]:
    """Of output and gradients, relative to their largest entry, from Megatron's DotProductAttention on one rank.

    With `keys`, attention to another sequence of so many tokens. So many tokens at the end of each of three samples
    are `padded`: no key of theirs is looked at, and what their queries find does not count.
    """
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: PLC0415 (heavy)
    from megatron.core.transformer.enums import AttnMaskType  # noqa: PLC0415 (heavy)

    from hptool.worker.attention import SdpaAttention  # noqa: PLC0415 (heavy)
    from hptool.worker.model import transformer_config  # noqa: PLC0415 (heavy)

    megatron = transformer_config(config)
    shape, dtype = config.shape, torch.bfloat16 if config.precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(5)
    inputs = [
        torch.randn(length, 3, heads, shape.kv_channels, generator=generator)
        for length, heads in (
            (shape.seq_length, shape.num_attention_heads),
            (keys or shape.seq_length, shape.num_query_groups),
            (keys or shape.seq_length, shape.num_query_groups),
        )
    ]
    weight = torch.randn(shape.seq_length, 3, shape.attention_width, generator=generator)
    masks: dict[type, torch.Tensor | None] = {DotProductAttention: None, SdpaAttention: None}
    if padded:
        is_padding = torch.arange(shape.seq_length)[None] >= shape.seq_length - torch.tensor(padded)[:, None]
        hidden = (is_padding[:, None, :] | is_padding[:, :, None])[:, None]  # as Megatron's BERT masks
        later = torch.ones(shape.seq_length, shape.seq_length, dtype=torch.bool).triu(1)
        # Megatron wants all that is hidden in its mask, also where its attention is causal.
        masks = {DotProductAttention: hidden | later if mask == "causal" else hidden, SdpaAttention: hidden}
        weight = weight.masked_fill(is_padding.T[:, :, None], 0)
    results = []
    for kind in masks:
        query, key, value = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
        # Layer 3: query-key layer scaling divides by the layer's number.
        attention = kind(megatron, 3, AttnMaskType[mask], "cross" if keys else "self")
        output = attention(query, key, value, masks[kind])
        (output * weight).sum().backward()
        results.append([(output * (weight != 0)).detach(), *(x.grad for x in (query, key, value))])
    return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__num_query_groups": 2}, {"model__kv_channels": 24}, {"model__apply_query_key_layer_scaling": True}],
    ids=str,
)
def test_equals_dot_product_attention(tmp_path: Path, changes: dict[str, Any]) -> None:
    for precision, most in ((32, 1e-5), ("bf16", 1e-2)):
        config = tiny_config(**changes, trainer__precision=precision)
        (differences,) = on_ranks(tmp_path / str(precision), config, partial(largest_differences, config))
        assert len(differences) == 4
        assert max(differences) < most


@pytest.mark.parametrize(
    ("mask", "keys", "changes"),
    [
        ("padding", None, {}),
        ("arbitrary", 20, {}),
        ("padding", 48, {"model__num_query_groups": 2}),
    ],
)
def test_attention_to_all_keys_equals_dot_product_attention(
    tmp_path: Path, mask: str, keys: int | None, changes: dict[str, Any]
) -> None:
    config = tiny_config(**changes)
    (differences,) = on_ranks(tmp_path, config, lambda: largest_differences(config, mask, keys))
    assert len(differences) == 4
    assert max(differences) < 1e-5


@pytest.mark.parametrize(("mask", "groups"), [("padding", 4), ("padding", 2), ("causal", 4)])
def test_padding_is_not_looked_at(tmp_path: Path, mask: str, groups: int) -> None:
    config = tiny_config(model__num_query_groups=groups)
    padded = (0, 5, 31)
    (differences,) = on_ranks(tmp_path, config, lambda: largest_differences(config, mask, padded=padded))
    assert len(differences) == 4
    assert max(differences) < 1e-5
    (unmasked,) = on_ranks(tmp_path, config, lambda: largest_differences(config, mask))
    assert max(unmasked) < 1e-5


def alibi_differences(config: BaseConfig, slopes: list[float]) -> list[float]:
    """Of output and gradients of this rank's heads, from scores written out with these slopes."""
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core import parallel_state  # noqa: PLC0415 (heavy)
    from megatron.core.transformer.enums import AttnMaskType  # noqa: PLC0415 (heavy)

    from hptool.worker.attention import AlibiBias, SdpaAttention  # noqa: PLC0415 (heavy)
    from hptool.worker.model import transformer_config  # noqa: PLC0415 (heavy)

    shape, tp, rank = config.shape, config.layout.tp, parallel_state.get_tensor_model_parallel_rank()
    heads = shape.num_attention_heads // tp
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(7, 2, heads, shape.kv_channels, generator=generator) for _ in range(3)]
    weight = torch.randn(7, 2, heads * shape.kv_channels, generator=generator)
    results = []

    def plainly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        outputs = []
        for head in range(heads):
            scores = torch.einsum("qbd,kbd->bqk", query[:, :, head], key[:, :, head]) / shape.kv_channels**0.5
            for q in range(7):
                for k in range(7):
                    bias = -slopes[rank * heads + head] * (q - k) if k <= q else -torch.inf
                    scores = scores + torch.zeros_like(scores).index_put(
                        (torch.tensor([0, 1]), torch.tensor([q, q]), torch.tensor([k, k])), torch.tensor(bias)
                    )
            outputs.append(torch.einsum("bqk,kbd->qbd", scores.softmax(-1), value[:, :, head]))
        return torch.cat(outputs, dim=-1)

    alibi = AlibiBias(shape.num_attention_heads, parallel_state.get_tensor_model_parallel_group())
    attention = SdpaAttention(transformer_config(config), 1, AttnMaskType.causal, "self", alibi=alibi)
    for function in (plainly, attention):
        query, key, value = (x.clone().requires_grad_() for x in inputs)
        output = function(query, key, value)
        (output * weight).sum().backward()
        results.append([output.detach(), *(x.grad for x in (query, key, value))])
    return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        # The published recipe for other numbers: those of the power of two below, and every other of the one above.
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_alibi_is_a_bias_of_slope_times_distance(tmp_path: Path, heads: int, slopes: list[float]) -> None:
    changes = {"trainer__devices": 2, "model__tensor_model_parallel_size": 2, "model__hidden_size": 96}
    config = tiny_config(**tiny_family("alibi", model__num_attention_heads=heads, **changes))
    for differences in on_ranks(tmp_path, config, lambda: alibi_differences(config, slopes)):
        assert len(differences) == 4
        assert max(differences) < 1e-5


def context_parallel_differences(config: BaseConfig, mask: str) -> list[float]:
    """Of this rank's part of output and gradients, from the same attention over the whole sequence on one rank."""
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core import parallel_state  # noqa: PLC0415 (heavy)
    from megatron.core.transformer.enums import AttnMaskType  # noqa: PLC0415 (heavy)

    from hptool.worker.attention import SdpaAttention  # noqa: PLC0415 (heavy)
    from hptool.worker.batches import zigzag  # noqa: PLC0415 (heavy)
    from hptool.worker.model import transformer_config  # noqa: PLC0415 (heavy)

    shape = config.shape
    rank, size = parallel_state.get_context_parallel_rank(), config.layout.cp
    generator = torch.Generator().manual_seed(5)
    inputs = [
        torch.randn(shape.seq_length, 2, heads, shape.kv_channels, generator=generator)
        for heads in (shape.num_attention_heads, shape.num_query_groups, shape.num_query_groups)
    ]
    weight = torch.randn(shape.seq_length, 2, shape.attention_width, generator=generator)

    def own(x: torch.Tensor) -> torch.Tensor:
        return zigzag(x.transpose(0, 1), rank, size).transpose(0, 1)

    megatron = transformer_config(config)
    query, key, value = (own(x).clone().requires_grad_() for x in inputs)
    exchange = config.model.cp_comm_type
    output = SdpaAttention(megatron, 1, AttnMaskType[mask], "self", cp_comm_type=exchange)(query, key, value)
    (output * own(weight)).sum().backward()
    parts = [output.detach(), query.grad, key.grad, value.grad]

    megatron.context_parallel_size = 1
    query, key, value = (x.clone().requires_grad_() for x in inputs)
    output = SdpaAttention(megatron, 1, AttnMaskType[mask], "self")(query, key, value)
    (output * weight).sum().backward()
    wholes = [own(x) for x in (output.detach(), *(x.grad for x in (query, key, value)))]
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(parts, wholes, strict=True)]


@pytest.mark.parametrize("mask", ["causal", "no_mask"])
@pytest.mark.parametrize(
    ("exchange", "size", "groups"),
    [("all_gather", 2, 4), ("all_gather", 2, 2), ("all_gather", 4, 4), ("a2a", 2, 2), ("a2a", 4, 4)],
)
def test_context_parallel_ranks_compute_their_part(
    tmp_path: Path, exchange: str, size: int, groups: int, mask: str
) -> None:
    changes = {"context_parallel_size": size, "num_query_groups": groups, "cp_comm_type": exchange}
    config = tiny_config(trainer__devices=size, **{f"model__{key}": value for key, value in changes.items()})
    for differences in on_ranks(tmp_path, config, lambda: context_parallel_differences(config, mask)):
        assert max(differences) < 1e-5
