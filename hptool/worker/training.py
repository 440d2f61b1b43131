"""The training loop and its clock."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from hptool.base_config import BaseConfig
from hptool.worker import batches, data, initialise, kernels, model, optimizer
from hptool.worker.batches import LossFunction, Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step: the mean loss over the global batch, the time of the slowest rank, and the gradient's norm.

    The norm is the one before clipping; None where nothing was updated.
    """

    loss: float
    time_s: float
    grad_norm: float | None


#: A forward pass as the schedule calls it: the output for the next of the waiting microbatches, and the loss of it.
Forward = Callable[[Iterator[Microbatch], torch.nn.Module], tuple[torch.Tensor, LossFunction]]


def with_global_batch(config: BaseConfig, gbs: int) -> BaseConfig:
    """The same training with another global batch."""
    return replace(config, model=replace(config.model, global_batch_size=gbs))


class Training:
    """A rank's part of the model, its optimizer and its data. All ranks must call `step` equally often.

    `chunks` are the rank's stages of the pipeline, from the first. `grad_norm` is of the last step.
    """

    def __init__(self, config: BaseConfig, device: torch.device, beat: Callable[[], None]) -> None:
        self._config = config
        self._device = device
        self._beat = beat
        self._samples = data.samples_of(config)
        self.grad_norm: float | None = None
        megatron = model.transformer_config(config)
        stages = model.build_chunks(config, megatron)
        if initialise.is_wanted():
            for stage in stages:
                initialise.fill(stage, config.model.init_method_std)
        self.chunks = optimizer.wrap(config, megatron, [stage.to(device) for stage in stages])
        kernels.compile_layers(config, self.chunks)
        self.optimizer = optimizer.build(config, megatron, self.chunks)
        self._forward_backward = get_forward_backward_func()
        if config.model.gc_interval:
            gc.disable()

    def step(self, step: int, start: int | None = None, gbs: int | None = None) -> StepReport:
        """Trains on the global batch of this step. FloatingPointError where its loss is not finite.

        `start` and `gbs` are the first sample and the size of a batch that is not the config's. The samples are on the
        device before the clock starts; a barrier starts it on all ranks at once.
        """
        config = self._config if gbs is None else with_global_batch(self._config, gbs)
        batch = batches.microbatches(config, self._samples, step, self._device, start)
        rate = optimizer.learning_rate(config.model.optim, step, config.trainer.max_steps)
        optimizer.set_learning_rate(self.optimizer, rate)
        torch.distributed.barrier()
        self._synchronise()
        begin = time.perf_counter()
        losses = self.train(batch, step, config.num_microbatches)
        self._synchronise()
        own_time = time.perf_counter() - begin
        report = self._agree(losses, own_time)
        if not torch.isfinite(torch.tensor(report.loss)):
            msg = f"the loss of step {step + 1} is {report.loss}"
            raise FloatingPointError(msg)
        return report

    def train(self, batch: list[Microbatch], step: int, num_microbatches: int | None = None) -> list[torch.Tensor]:
        """Forward, backward, reduction and update; the losses of the microbatches, on the last stage only.

        Of the batch the first `num_microbatches` are used, which are the config's where none are given.
        """
        config = self._config
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses: list[torch.Tensor] = self._run(
            self.forward, batch, num_microbatches or config.num_microbatches, config.model.micro_batch_size
        )
        _, self.grad_norm, _ = self.optimizer.step()
        if config.model.gc_interval and step % config.model.gc_interval == 0:
            gc.collect()
        return losses

    @torch.no_grad()
    def evaluate(self, forward: Forward, batch: list[Microbatch], mbs: int) -> list[Any]:
        """Forward passes of microbatches of `mbs` samples; what their loss functions report, on the last stage only.

        Nothing is dropped out, and no generator of random numbers moves.
        """
        for chunk in self.chunks:
            chunk.eval()
        found = self._run(forward, batch, len(batch), mbs, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return found

    def _run(
        self, forward: Forward, batch: list[Microbatch], num_microbatches: int, mbs: int, *, forward_only: bool = False
    ) -> list[Any]:
        one = len(self.chunks) == 1
        found: list[Any] = self._forward_backward(
            forward_step_func=forward,
            data_iterator=iter(batch) if one else [iter(batch) for _ in self.chunks],
            model=self.chunks[0] if one else self.chunks,
            num_microbatches=num_microbatches,
            seq_length=batches.schedule_length(self._config),
            micro_batch_size=mbs,
            forward_only=forward_only,
        )
        return found

    def forward(self, waiting: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        """The output of one chunk for the next of the waiting microbatches, and the loss of it."""
        batch = next(waiting)
        self._beat()
        if self._config.model.enable_cuda_graph:
            # What the graphs of the microbatch before have left in their memory is needed no more.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch leaves it so
        return batches.forward(batch, chunk)

    def _agree(self, losses: list[torch.Tensor], own_time: float) -> StepReport:
        """The same report on every rank: the mean of the last stage's losses, the longest time."""
        time_s = torch.tensor(own_time, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(time_s, op=torch.distributed.ReduceOp.MAX)
        loss = torch.zeros(2, dtype=torch.float64, device=self._device)
        if losses:
            loss[0], loss[1] = torch.stack(losses).double().mean(), 1
        torch.distributed.all_reduce(loss)
        return StepReport(loss=float(loss[0] / loss[1]), time_s=float(time_s), grad_norm=self.grad_norm)

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
