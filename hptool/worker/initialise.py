"""Weights that do not depend on the layout, so that the losses of two layouts can be compared.

Megatron draws each rank's shard from the rank's own generator: right for training, but it makes every layout another
model. Here each whole parameter is drawn from a generator seeded by its global name, and each rank keeps its shard.
Slow, since every rank draws everything: only where HPTOOL_LAYOUT_INDEPENDENT_INIT=1 asks for it. Experts have to be
modules of their own, as they are without grouped GEMMs.
"""

import os
import re
import zlib

import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule

ENVIRONMENT_VARIABLE = "HPTOOL_LAYOUT_INDEPENDENT_INIT"


def is_wanted() -> bool:
    """The environment asks for it."""
    return os.environ.get(ENVIRONMENT_VARIABLE) == "1"


@torch.no_grad()
def fill(chunk: LanguageModule, std: float) -> None:
    """Overwrites all parameters of a stage; norms become the identity, the rest normal with `std`."""
    one = 0.0 if chunk.config.layernorm_zero_centered_gamma else 1.0
    for name, parameter in chunk.named_parameters():
        whole = _global_name(chunk, name)
        if "norm" in whole:
            parameter.fill_(one if whole.endswith("weight") else 0.0)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(whole.encode()))
        parameter.copy_(_own_shard(parameter, generator) * std)


def _global_name(chunk: LanguageModule, name: str) -> str:
    """Layers and experts by their numbers in the whole model; the tied output layer by the name of the embedding."""
    if chunk.share_embeddings_and_output_weights and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    match = re.match(r"(encoder|decoder)\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name
    layer = getattr(chunk, match[1]).layers[int(match[2])]
    rest = re.sub(
        r"local_experts\.(\d+)", lambda found: f"experts.{layer.mlp.local_expert_indices[int(found[1])]}", match[3]
    )
    return f"{match[1]}.layers.{layer.layer_number}.{rest}"


def _own_shard(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Row by row, so that a vocabulary padded further by a larger TP begins with the same rows.

    A gated MLP's values lie behind its gates, and each rank holds a part of both: strides of one parameter.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    if not getattr(parameter, "tensor_model_parallel", False) or size == 1:
        return torch.randn(parameter.shape, generator=generator)
    dimension: int = parameter.partition_dim  # type: ignore[attr-defined]
    strides: int = parameter.partition_stride  # type: ignore[attr-defined]
    shape = list(parameter.shape)
    shape[dimension] *= size
    rank = parallel_state.get_tensor_model_parallel_rank()
    pieces = torch.randn(shape, generator=generator).chunk(size * strides, dimension)
    return torch.cat(pieces[rank::size], dimension)
