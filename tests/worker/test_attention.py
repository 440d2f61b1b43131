"""The attention through torch's kernels is the attention that Megatron-core computes."""

from pathlib import Path
from typing import Any

import pytest

from hptool.base_config import BaseConfig
from tests.worker.runs import on_ranks, tiny_config


def largest_differences(config: BaseConfig) -> list[float]:
    """Of output and gradients, relative to their largest entry, from Megatron's DotProductAttention on one rank."""
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: PLC0415 (heavy)
    from megatron.core.transformer.enums import AttnMaskType  # noqa: PLC0415 (heavy)

    from hptool.worker.attention import SdpaAttention  # noqa: PLC0415 (heavy)
    from hptool.worker.model import transformer_config  # noqa: PLC0415 (heavy)

    megatron = transformer_config(config)
    shape = config.shape
    generator = torch.Generator().manual_seed(5)
    inputs = [
        torch.randn(shape.seq_length, 3, heads, shape.kv_channels, generator=generator)
        for heads in (shape.num_attention_heads, shape.num_query_groups, shape.num_query_groups)
    ]
    weight = torch.randn(shape.seq_length, 3, shape.attention_width, generator=generator)
    results = []
    for kind in (DotProductAttention, SdpaAttention):
        query, key, value = (x.clone().requires_grad_() for x in inputs)
        # Layer 3: query-key layer scaling divides by the layer's number.
        attention = kind(megatron, 3, AttnMaskType.causal, "self")
        output = attention(query, key, value, None)
        (output * weight).sum().backward()
        results.append([output.detach(), *(x.grad for x in (query, key, value))])
    return [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__num_query_groups": 2}, {"model__kv_channels": 24}, {"model__apply_query_key_layer_scaling": True}],
    ids=str,
)
def test_equals_dot_product_attention(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    (differences,) = on_ranks(tmp_path, config, lambda: largest_differences(config))
    assert len(differences) == 4
    assert max(differences) < 1e-5


def context_parallel_differences(config: BaseConfig) -> list[float]:
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
    output = SdpaAttention(megatron, 1, AttnMaskType.causal, "self")(query, key, value)
    (output * own(weight)).sum().backward()
    parts = [output.detach(), query.grad, key.grad, value.grad]

    megatron.context_parallel_size = 1
    query, key, value = (x.clone().requires_grad_() for x in inputs)
    output = SdpaAttention(megatron, 1, AttnMaskType.causal, "self")(query, key, value)
    (output * weight).sum().backward()
    wholes = [own(x) for x in (output.detach(), *(x.grad for x in (query, key, value)))]
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(parts, wholes, strict=True)]


@pytest.mark.parametrize(("size", "groups"), [(2, 4), (2, 2), (4, 4)])
def test_context_parallel_ranks_compute_their_part(tmp_path: Path, size: int, groups: int) -> None:
    config = tiny_config(trainer__devices=size, model__context_parallel_size=size, model__num_query_groups=groups)
    for differences in on_ranks(tmp_path, config, lambda: context_parallel_differences(config)):
        assert max(differences) < 1e-5
