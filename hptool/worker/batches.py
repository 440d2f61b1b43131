"""What a rank reads in a step, and what its model makes of it: microbatches, the forward pass and the loss.

Samples fill their lengths, so that no attention needs a mask (`masking`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.worker import masking
from hptool.worker.data import Samples

#: What the schedule wants of a forward pass: the output, and the loss of it (to differentiate, to report).
LossFunction = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]


class Microbatch(Protocol):
    """A rank's part of `mbs` samples."""

    def forward(self, chunk: torch.nn.Module) -> tuple[Any, LossFunction]:
        """The output of one chunk, and the loss of it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalBatch:
    """GPT's: each token's label is the next one. Each tensor [mbs, seq_length / cp]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor

    def forward(self, chunk: torch.nn.Module) -> tuple[Any, LossFunction]:
        """As `Microbatch.forward`."""
        # No mask: the attention is causal by itself.
        return chunk(self.tokens, self.positions, None, labels=self.labels), _mean


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedBatch:
    """BERT's: [mbs, seq_length] each, and with a binary head the segments, and [mbs] whether they are in order."""

    tokens: torch.Tensor
    labels: torch.Tensor
    counted: torch.Tensor
    segments: torch.Tensor | None
    in_order: torch.Tensor | None

    def forward(self, chunk: torch.nn.Module) -> tuple[Any, LossFunction]:
        """As `Microbatch.forward`; the loss of both heads is added up."""
        output = chunk(self.tokens, None, tokentype_ids=self.segments, lm_labels=self.labels)
        return output, self._loss

    def _loss(self, output: tuple[torch.Tensor, torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
        losses, order = output
        loss = _mean_of(losses, self.counted)
        if order is not None and self.in_order is not None:
            loss += torch.nn.functional.cross_entropy(order.float(), self.in_order)
        return loss, loss.detach().clone()


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """T5's: the encoder's tokens [mbs, encoder_seq_length], the others [mbs, seq_length]."""

    encoder_tokens: torch.Tensor
    decoder_tokens: torch.Tensor
    labels: torch.Tensor
    counted: torch.Tensor

    def forward(self, chunk: torch.nn.Module) -> tuple[Any, LossFunction]:
        """As `Microbatch.forward`."""
        return chunk(self.encoder_tokens, self.decoder_tokens, self.labels), self._loss

    def _loss(self, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = _mean_of(losses, self.counted)
        return loss, loss.detach().clone()


def microbatches(
    config: BaseConfig, samples: Samples, step: int, device: torch.device, start: int | None = None
) -> list[Microbatch]:
    """All that this rank reads in a step, whose first sample is `start` where not all steps before were as large."""
    rank = parallel_state.get_data_parallel_rank()
    gbs, mbs = config.model.global_batch_size, config.model.micro_batch_size
    start = step * gbs if start is None else start
    batch = []
    for i in range(config.num_microbatches):
        first = start + (i * config.dp + rank) * mbs
        numbers = range(first, first + mbs)
        rows = np.stack([samples.sample(number) for number in numbers])
        if rows.max() >= config.shape.vocab_size:
            raise InputError(
                f"model.override_vocab_size: {config.shape.vocab_size} given, "
                f"but model.data.data_prefix holds the token {rows.max()}"
            )
        batch.append(_microbatch(config, rows, numbers, device))
    return batch


def blank(config: BaseConfig) -> Microbatch:
    """A microbatch of zeros."""
    rows = torch.zeros(config.layout.mbs, config.shape.seq_length // config.layout.cp, dtype=torch.int64)

    def zeros(**changes: Any) -> torch.Tensor:
        return torch.zeros_like(rows, **changes)

    if config.is_encoder_decoder:
        encoder = torch.zeros(config.layout.mbs, config.shape.encoder_seq_length, dtype=torch.int64)
        counted = zeros(dtype=torch.float32)
        return PairBatch(encoder_tokens=encoder, decoder_tokens=rows, labels=zeros(), counted=counted)
    if config.is_bert:
        binary = config.shape.has_binary_head
        return MaskedBatch(
            tokens=rows,
            labels=zeros(),
            counted=zeros(dtype=torch.float32),
            segments=zeros() if binary else None,
            in_order=torch.zeros(config.layout.mbs, dtype=torch.int64) if binary else None,
        )
    return CausalBatch(tokens=rows, labels=zeros(), positions=zeros())


def zigzag(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The columns of a context-parallel rank: of 2·size chunks the one at `rank` and its mirror image.

    So every rank has as much to attend to as every other, although the mask is causal.
    """
    chunks = x.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)


def forward(batch: Microbatch, chunk: torch.nn.Module) -> tuple[Any, LossFunction]:
    """The output of one chunk for a microbatch, and the loss of it."""
    return batch.forward(chunk)


def schedule_length(config: BaseConfig) -> int:
    """Tokens of a sample in the tensor that the stages of a pipeline hand on."""
    return config.shape.encoder_seq_length + config.shape.seq_length


def _microbatch(
    config: BaseConfig, rows: NDArray[np.int64], numbers: Sequence[int], device: torch.device
) -> Microbatch:
    def stacked(samples: Sequence[object], name: str) -> torch.Tensor:
        column = torch.from_numpy(np.stack([getattr(sample, name) for sample in samples])).to(device)
        return column.float() if column.dtype is torch.bool else column

    if config.is_encoder_decoder:
        pairs = [masking.hide_spans(row, config, number) for row, number in zip(rows, numbers, strict=True)]
        names = ("encoder_tokens", "decoder_tokens", "labels", "counted")
        return PairBatch(**{name: stacked(pairs, name) for name in names})
    if config.is_bert:
        masked = [masking.hide_tokens(row, config, number) for row, number in zip(rows, numbers, strict=True)]
        parts = {name: stacked(masked, name) for name in ("tokens", "labels", "counted")}
        binary = config.shape.has_binary_head
        return MaskedBatch(
            **parts,
            segments=stacked(masked, "segments") if binary else None,
            in_order=stacked(masked, "in_order").long() if binary else None,
        )
    return _causal(torch.from_numpy(rows), device)


def _causal(rows: torch.Tensor, device: torch.device) -> CausalBatch:
    positions = torch.arange(rows.size(1) - 1).expand(rows.size(0), -1)
    parts = [rows[:, :-1], rows[:, 1:], positions]
    size = parallel_state.get_context_parallel_world_size()
    if size > 1:
        parts = [zigzag(part, parallel_state.get_context_parallel_rank(), size) for part in parts]
    tokens, labels, positions = (part.contiguous().to(device) for part in parts)
    return CausalBatch(tokens=tokens, labels=labels, positions=positions)


def _mean(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over this rank's tokens, to differentiate and to report; every token counts.

    The schedule multiplies the first by CP, and the reduction divides by DP·CP: together the mean over the batch.
    """
    mean = losses.float().mean()
    return mean / parallel_state.get_context_parallel_world_size(), mean.detach()


def _mean_of(losses: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens that count, as many in each microbatch as in any other; without context parallelism."""
    return (losses.float() * counted).sum() / counted.sum()
