"""The long training of one rank: from the newest checkpoint to the last step, or to where it is to stop."""

import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import num_microbatches_calculator as batch_size

from hptool import files
from hptool.base_config import BaseConfig
from hptool.worker import data, evaluate, hellaswag, journal, optimizer, orders, text
from hptool.worker.checkpoints import Checkpoints, Position
from hptool.worker.journal import Journal
from hptool.worker.nodes import Place
from hptool.worker.orders import Orders, Stop, TrainingResult
from hptool.worker.processes import Heartbeats
from hptool.worker.rank import attempt, join, refusals_by_name, tell_progress
from hptool.worker.training import StepReport, Training

_PROGRESS_INTERVAL_S = 1.0

#: Of the time that a step, and a checkpoint, took last, what the next may take, for trainer.max_time to be kept.
_SLOWER_STEP, _SLOWER_CHECKPOINT = 2.0, 1.5


def train_rank(given: Orders, config: BaseConfig, place: Place, heartbeats: Heartbeats) -> int:
    """Trains to the end or to a stop, and leaves a result or a failure; answers the exit code of the process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor gets it too, and asks for a checkpoint
    return attempt(lambda: _train(given, config, place, heartbeats), place)


def _train(given: Orders, config: BaseConfig, place: Place, heartbeats: Heartbeats) -> None:
    begin = time.monotonic()
    device = join(config, place)
    with refusals_by_name(place, heartbeats):
        training = Training(config, device, beat=lambda: heartbeats.beat(place.local_rank))
        trainer = _Trainer(given, config, place, heartbeats, training, device, begin)
        result = trainer.run()
    if place.rank == 0:
        files.write_text(place.directory / orders.RESULT, files.json_text(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class _Trainer:
    """One rank's view of the training; all ranks go through the same."""

    def __init__(  # noqa: PLR0917 (what a rank is made of)
        self,
        given: Orders,
        config: BaseConfig,
        place: Place,
        heartbeats: Heartbeats,
        training: Training,
        device: torch.device,
        begin: float,
    ) -> None:
        self._orders = given
        self._config = config
        self._place = place
        self._heartbeats = heartbeats
        self._training = training
        self._device = device
        self._begin = begin
        self._checkpoints = Checkpoints(place.directory, given.keep_checkpoints, config, training)
        self._validation = _validation(config, given)
        self._questions = hellaswag.read_questions(Path(given.hellaswag)) if given.hellaswag else []
        self._tokenizer = text.tokenizer_of(config) if self._questions or given.prompt is not None else None
        self._told = 0.0
        self._slowest_s = 0.0
        model = config.model
        batch_size.init_num_microbatches_calculator(
            rank=place.rank,
            rampup_batch_size=list(model.rampup_batch_size) if model.rampup_batch_size else None,
            global_batch_size=model.global_batch_size,
            micro_batch_size=model.micro_batch_size,
            data_parallel_size=config.dp,
        )

    def run(self) -> TrainingResult:
        """From where the checkpoints end to where the training does."""
        position = self._checkpoints.load()
        first_step, max_steps = position.step, self._config.trainer.max_steps
        book = Journal(self._place.directory, position.step, self._orders.log_every) if self._place.rank == 0 else None
        self._log(f"begins after step {position.step} of {max_steps}")
        for note in self._notes(book):
            self._log(note)
        loss, stop = None, Stop.DONE
        if position.step == 0:
            self._evaluate(position, book, sampled=False)
        while position.step < max_steps:
            report, position = self._step(position, book)
            loss = report.loss
            stop = self._stop()
            done = position.step == max_steps
            if stop is Stop.DONE and not done:
                validated = _is_due(position.step, self._orders.validate_every)
                self._evaluate(
                    position, book, validated=validated, sampled=_is_due(position.step, self._orders.sample_every)
                )
            if stop is not Stop.DONE or done or _is_due(position.step, self._orders.checkpoint_every):
                self._log(f"writing a checkpoint after step {position.step}")
                self._checkpoints.save(position)
            if stop is not Stop.DONE:
                break
        ended = position.step >= max_steps
        found = self._evaluate(position, book, chosen=True) if ended else {}
        if book is not None:
            book.close()
        return TrainingResult(
            stopped=Stop.DONE if ended else stop,
            first_step=first_step,
            step=position.step,
            max_steps=max_steps,
            parameters=self._config.shape.num_parameters,
            tokens=position.tokens,
            loss=loss,
            validation_loss=_number(found, "validation_loss"),
            hellaswag_accuracy=_number(found, "hellaswag_accuracy"),
            checkpoint=str(self._checkpoints.newest()),
            notes=self._notes(book),
        )

    def _step(self, position: Position, book: Journal | None) -> tuple[StepReport, Position]:
        """Trains a step; where the training is after it."""
        config, step = self._config, position.step
        batch_size.update_num_microbatches(position.samples)
        gbs: int = batch_size.get_current_global_batch_size()
        report = self._training.step(step, position.samples, gbs)
        self._heartbeats.finish_step(self._place.local_rank)
        self._slowest_s = max(report.time_s, self._slowest_s if step else 0.0)
        tokens = gbs * (config.shape.seq_length + config.shape.encoder_seq_length)
        position = replace(
            position,
            step=step + 1,
            samples=position.samples + gbs,
            tokens=position.tokens + tokens,
            layout=config.layout.name,
            gpus=config.gpus,
        )
        if book is not None:
            values = {
                "tokens": position.tokens,
                "loss": report.loss,
                "learning_rate": optimizer.learning_rate(config.model.optim, step, config.trainer.max_steps),
                "grad_norm": None if report.grad_norm is None else float(report.grad_norm),
                "step_time_s": report.time_s,
                "tokens_per_s": tokens / report.time_s,
            }
            book.add_step(position.step, values)
            self._tell(step, report)
        return report, position

    def _tell(self, step: int, report: StepReport) -> None:
        last = step + 1 == self._config.trainer.max_steps
        if last or (step + 1) % self._orders.log_every == 0:
            self._log(f"step {step + 1} of {self._config.trainer.max_steps}: loss {report.loss:.6f}")
        if last or time.monotonic() - self._told > _PROGRESS_INTERVAL_S:
            self._told = time.monotonic()
            tell_progress(self._config, self._place.directory, step, report)

    def _stop(self) -> Stop:
        """Why all ranks stop now, `DONE` where they do not: one of them that wants to is enough."""
        elapsed = time.monotonic() - self._begin
        needed = _SLOWER_STEP * self._slowest_s + _SLOWER_CHECKPOINT * self._checkpoints.seconds
        limit = self._orders.max_seconds
        wanted = [self._heartbeats.is_asked_to_stop, limit is not None and elapsed + needed > limit]
        flags = torch.tensor(wanted, dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        asked, late = flags.tolist()
        if asked:
            return Stop.SIGNAL
        return Stop.TIME if late else Stop.DONE

    def _evaluate(
        self,
        position: Position,
        book: Journal | None,
        *,
        validated: bool = True,
        sampled: bool = True,
        chosen: bool = False,
    ) -> dict[str, float | str]:
        """Looks at the model after a step and writes down what it finds: all that is wanted and can be had."""
        found: dict[str, float | str] = {}
        config, given = self._config, self._orders
        if validated and self._validation is not None:
            samples, count = self._validation
            found["validation_loss"] = evaluate.validation_loss(config, self._training, samples, count, self._device)
        if chosen and self._questions and self._tokenizer is not None:
            asked = hellaswag.choices(self._questions, self._tokenizer, config.shape.seq_length)
            self._log(f"scoring {len(asked)} endings of {given.hellaswag}")
            scores = evaluate.score(config, self._training, asked, self._device)
            found["hellaswag_accuracy"] = hellaswag.accuracy(self._questions, scores)
        if sampled and given.prompt is not None and self._tokenizer is not None:
            found["sample"] = evaluate.write(
                config,
                self._training,
                self._tokenizer,
                given.prompt,
                self._device,
                length=given.sample_tokens,
                temperature=given.temperature,
            )
        if book is not None and found:
            book.add_evaluation(position.step, found)
            self._log("; ".join(f"{name.replace('_', ' ')} {value!r}" for name, value in found.items()))
        return found

    def _notes(self, book: Journal | None) -> Sequence[str]:
        notes = []
        if self._validation is None:
            notes.append(
                f"No validation: model.data.splits_string ({self._config.model.data.splits_string}) leaves no sample "
                "for it, or trainer.limit_val_batches is 0; so there is no row for runs.csv either. A small text wants "
                "more of it: model.data.splits_string=90,10,0"
            )
        if book is not None and not book.has_tensorboard:
            notes.append(journal.NO_TENSORBOARD)
        return notes

    def _log(self, message: str) -> None:
        if self._place.rank == 0:
            print(message, flush=True)  # noqa: T201 (the log)


def _validation(config: BaseConfig, given: Orders) -> tuple[data.Samples, int] | None:
    """What to validate with, and how many samples of it; None where there is nothing, or nothing is wanted."""
    samples, count = data.validation_samples_of(config)
    limit = given.validation_batches
    wanted = limit * config.model.global_batch_size if isinstance(limit, int) else int(limit * count)
    count = min(count, wanted)
    return (samples, count) if count else None


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _number(found: dict[str, float | str], name: str) -> float | None:
    value = found.get(name)
    return value if isinstance(value, float) else None
