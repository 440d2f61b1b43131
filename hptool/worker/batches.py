"""What a rank reads in a step, and what its model makes of it: microbatches, the forward pass and the loss."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state

from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.worker.data import Samples

#: What the schedule wants of a forward pass: the output, and the loss of it (to differentiate, to report).
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """A rank's part of `mbs` samples, each tensor [mbs, seq_length / cp]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def microbatches(config: BaseConfig, samples: Samples, step: int, device: torch.device) -> list[Microbatch]:
    """All that this rank reads in a step."""
    rank = parallel_state.get_data_parallel_rank()
    gbs, mbs = config.model.global_batch_size, config.model.micro_batch_size
    batch = []
    for i in range(config.num_microbatches):
        first = step * gbs + (i * config.dp + rank) * mbs
        rows = np.stack([samples.sample(first + j) for j in range(mbs)])
        if rows.max() >= config.shape.vocab_size:
            raise InputError(
                f"model.override_vocab_size: {config.shape.vocab_size} given, "
                f"but model.data.data_prefix holds the token {rows.max()}"
            )
        batch.append(_microbatch(torch.from_numpy(rows), device))
    return batch


def zigzag(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The columns of a context-parallel rank: of 2·size chunks the one at `rank` and its mirror image.

    So every rank has as much to attend to as every other, although the mask is causal.
    """
    chunks = x.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)


def _microbatch(rows: torch.Tensor, device: torch.device) -> Microbatch:
    positions = torch.arange(rows.size(1) - 1).expand(rows.size(0), -1)
    parts = [rows[:, :-1], rows[:, 1:], positions]
    size = parallel_state.get_context_parallel_world_size()
    if size > 1:
        parts = [zigzag(part, parallel_state.get_context_parallel_rank(), size) for part in parts]
    tokens, labels, positions = (part.contiguous().to(device) for part in parts)
    return Microbatch(tokens=tokens, labels=labels, positions=positions)


def forward(batch: Microbatch, chunk: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
    """The output of one chunk for a microbatch, and the loss of it."""
    # No mask: the attention is causal by itself.
    return chunk(batch.tokens, batch.positions, None, labels=batch.labels), _loss


def schedule_length(config: BaseConfig) -> int:
    """Tokens of a sample in the tensor that the stages of a pipeline hand on."""
    return config.shape.seq_length


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over this rank's tokens, to differentiate and to report; every token counts.

    The schedule multiplies the first by CP, and the reduction divides by DP·CP: together the mean over the batch.
    """
    mean = output.float().mean()
    return mean / parallel_state.get_context_parallel_world_size(), mean.detach()
