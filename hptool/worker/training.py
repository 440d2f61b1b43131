"""The training loop and its clock."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from hptool.base_config import BaseConfig
from hptool.worker import batches, data, initialise, model, optimizer
from hptool.worker.batches import LossFunction, Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step: the mean loss over the global batch, and the time of the slowest rank."""

    loss: float
    time_s: float


class Training:
    """A rank's part of the model, its optimizer and its data. All ranks must call `step` equally often.

    `chunks` are the rank's stages of the pipeline, from the first.
    """

    def __init__(self, config: BaseConfig, device: torch.device, beat: Callable[[], None]) -> None:
        self._config = config
        self._device = device
        self._beat = beat
        self._samples = data.samples_of(config)
        megatron = model.transformer_config(config)
        stages = model.build_chunks(config, megatron)
        if initialise.is_wanted():
            for stage in stages:
                initialise.fill(stage, config.model.init_method_std)
        self.chunks = optimizer.wrap(config, megatron, [stage.to(device) for stage in stages])
        self.optimizer = optimizer.build(config, megatron, self.chunks)
        self._forward_backward = get_forward_backward_func()
        if config.model.gc_interval:
            gc.disable()

    def step(self, step: int) -> StepReport:
        """Trains on the global batch of this step. FloatingPointError where its loss is not finite.

        The samples are on the device before the clock starts; a barrier starts it on all ranks at once.
        """
        config = self._config
        batch = batches.microbatches(config, self._samples, step, self._device)
        rate = optimizer.learning_rate(config.model.optim, step, config.trainer.max_steps)
        optimizer.set_learning_rate(self.optimizer, rate)
        torch.distributed.barrier()
        self._synchronise()
        start = time.perf_counter()
        losses = self.train(batch, step)
        self._synchronise()
        own_time = time.perf_counter() - start
        report = self._agree(losses, own_time)
        if not torch.isfinite(torch.tensor(report.loss)):
            msg = f"the loss of step {step + 1} is {report.loss}"
            raise FloatingPointError(msg)
        return report

    def train(self, batch: list[Microbatch], step: int) -> list[torch.Tensor]:
        """Forward, backward, reduction and update; the losses of the microbatches, on the last stage only."""
        config = self._config
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        one = len(self.chunks) == 1
        losses: list[torch.Tensor] = self._forward_backward(
            forward_step_func=self.forward,
            data_iterator=iter(batch) if one else [iter(batch) for _ in self.chunks],
            model=self.chunks[0] if one else self.chunks,
            num_microbatches=config.num_microbatches,
            seq_length=batches.schedule_length(config),
            micro_batch_size=config.model.micro_batch_size,
            forward_only=False,
        )
        self.optimizer.step()
        if config.model.gc_interval and step % config.model.gc_interval == 0:
            gc.collect()
        return losses

    def forward(self, waiting: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        """The output of one chunk for the next of the waiting microbatches, and the loss of it."""
        batch = next(waiting)
        self._beat()
        return batches.forward(batch, chunk)

    def _agree(self, losses: list[torch.Tensor], own_time: float) -> StepReport:
        """The same report on every rank: the mean of the last stage's losses, the longest time."""
        time_s = torch.tensor(own_time, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(time_s, op=torch.distributed.ReduceOp.MAX)
        loss = torch.zeros(2, dtype=torch.float64, device=self._device)
        if losses:
            loss[0], loss[1] = torch.stack(losses).double().mean(), 1
        torch.distributed.all_reduce(loss)
        return StepReport(loss=float(loss[0] / loss[1]), time_s=float(time_s))

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
