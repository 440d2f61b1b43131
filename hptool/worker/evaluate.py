"""What a model is worth while it trains: its loss on validation samples, how it chooses endings, and what it writes.

Everything goes through the pipeline's own schedule, forwards only, so that it works for every layout. All ranks must
call these functions together, and all of them get the same answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from hptool.base_config import BaseConfig
from hptool.worker import batches
from hptool.worker.batches import CausalBatch, LossFunction, Microbatch
from hptool.worker.data import Samples
from hptool.worker.hellaswag import Choice
from hptool.worker.text import Tokenizer
from hptool.worker.training import Training

Tokens = NDArray[np.int64]


def is_generative(config: BaseConfig) -> bool:
    """The model predicts the next token of one sequence: it can choose endings and write text."""
    return config.shape.causal and not config.is_encoder_decoder


def validation_loss(
    config: BaseConfig, training: Training, samples: Samples, count: int, device: torch.device
) -> float:
    """The mean over the first `count` samples; nearly the same for every layout, as sums are in another order.

    Of a whole global batch or more, as many samples are read as fill global batches.
    """
    gbs = config.model.global_batch_size
    if count < gbs:
        whole, sizes = _one_by_one(config, count), [count]
    else:
        whole, sizes = config, [gbs] * (count // gbs)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for i, size in enumerate(sizes):
        batch = batches.microbatches(whole, samples, 0, device, start=i * gbs)
        for j, loss in enumerate(training.evaluate(training.forward, batch, whole.model.micro_batch_size)):
            if _first_sample(whole, j) < size:  # the others only fill the last round of the replicas
                total += torch.tensor([float(loss), 1.0], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])


def score(config: BaseConfig, training: Training, given: Sequence[Choice], device: torch.device) -> list[float]:
    """The mean log-likelihood of each choice's ending, a token, in nats."""
    whole = _one_by_one(config, len(given)) if len(given) < config.model.global_batch_size else config
    mbs = whole.model.micro_batch_size
    sums = torch.zeros(len(given), dtype=torch.float64, device=device)
    counts = torch.zeros_like(sums)
    rows = _Rows([choice.tokens for choice in given], config.shape.seq_length)
    for start in range(0, len(given), whole.model.global_batch_size):
        batch = batches.microbatches(whole, rows, 0, device, start=start)
        found = training.evaluate(_keeping(training, _token_losses), batch, mbs)
        if parallel_state.get_tensor_model_parallel_rank() > 0:
            continue  # the ranks of a tensor group know the same losses
        for i, (losses, positions) in enumerate(found):
            for row in range(mbs):
                number = start + _first_sample(whole, i) + row
                if number >= len(given):
                    continue
                end = len(given[number].tokens) - 1  # position p predicts token p + 1
                mine = (positions[row] >= end - given[number].scored) & (positions[row] < end)
                sums[number] -= losses[row][mine].double().sum()
                counts[number] += mine.sum()
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(counts)
    return [float(x) for x in sums / counts]


def write(
    config: BaseConfig,
    training: Training,
    tokenizer: Tokenizer,
    prompt: str,
    device: torch.device,
    *,
    length: int,
    temperature: float,
) -> str:
    """The prompt with `length` tokens behind it, fewer where the document ends: the likeliest, or drawn ones."""
    alone = _one_by_one(config, 1)
    tokens = tokenizer.encode(prompt) or [tokenizer.end]
    drawn = torch.Generator().manual_seed(config.model.seed)
    shape = config.shape
    padded = shape.padded_vocab_size(config.layout.tp, config.model.make_vocab_size_divisible_by)
    for _ in range(length):
        seen = tokens[-shape.seq_length :]
        rows = _Rows([seen], shape.seq_length)
        batch = [_unlabelled(x) for x in batches.microbatches(alone, rows, 0, device)]
        found = training.evaluate(_keeping(training, _logits), batch, 1)
        logits = torch.zeros(padded, dtype=torch.float64, device=device)
        if found and parallel_state.get_data_parallel_rank() == 0:
            part, positions = found[0]
            mine = positions[0] == len(seen) - 1
            begin = parallel_state.get_tensor_model_parallel_rank() * part.size(-1)
            logits[begin : begin + part.size(-1)] = part[0][mine].double().sum(0)  # none of this context rank's: zeros
        torch.distributed.all_reduce(logits)
        token = _next(logits[: tokenizer.vocab_size].cpu(), temperature, drawn)
        if token == tokenizer.end:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


def _next(logits: torch.Tensor, temperature: float, drawn: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    chances = torch.softmax(logits / temperature, 0)
    token: int = torch.multinomial(chances, 1, generator=drawn).tolist()[0]
    return token


class _Rows:
    """Samples of given tokens, filled up with zeros: what stands behind a token does not change it."""

    def __init__(self, rows: Sequence[Sequence[int]], seq_length: int) -> None:
        self._rows = rows
        self._length = seq_length + 1

    def sample(self, number: int) -> Tokens:
        """As `Samples.sample`."""
        row = self._rows[number % len(self._rows)]
        found = np.zeros(self._length, dtype=np.int64)
        found[: len(row)] = row
        return found


def _one_by_one(config: BaseConfig, count: int) -> BaseConfig:
    """A batch of `count` samples or a few more, each a microbatch, so that any number goes with any layout."""
    rounds = -(-count // config.dp)
    if config.layout.vpp > 1:  # interleaving counts in whole rounds of the pipeline
        rounds = -(-rounds // config.layout.pp) * config.layout.pp
    model = replace(config.model, micro_batch_size=1, global_batch_size=rounds * config.dp)
    return replace(config, model=model)


def _first_sample(config: BaseConfig, i: int) -> int:
    """Which of a batch's samples is the first of this rank's microbatch `i`; see `batches.microbatches`."""
    rank: int = parallel_state.get_data_parallel_rank()
    return (i * config.dp + rank) * config.model.micro_batch_size


def _unlabelled(batch: Microbatch) -> Microbatch:
    """Without labels Megatron's models answer with logits, and with them with losses."""
    assert isinstance(batch, CausalBatch)  # noqa: S101 (see `is_generative`)
    return replace(batch, labels=None)  # type: ignore[arg-type]  # only here


def _keeping(training: Training, pick: Callable[[torch.Tensor, Any], Any]) -> Any:
    """A forward step for `Training.evaluate` that reports what `pick` makes of the last stage's output."""

    def forward(waiting: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        (batch,) = kept = [next(waiting)]
        output, _ = training.forward(iter(kept), chunk)
        return output, lambda output: (output.new_zeros(()), pick(output, batch))

    return forward


def _token_losses(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[mbs, seq_length / cp] each: the losses and the positions that they are of."""
    return output.float(), batch.positions


def _logits(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[mbs, seq_length / cp, vocabulary / tp], and the positions."""
    return output.float(), batch.positions
