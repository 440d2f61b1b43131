"""A training's state on disk, by Megatron-core's distributed checkpointing: written and read by all ranks at once.

Weights and optimizer state are stored under their global names and shapes, so that a training may go on with another
layout or on another number of GPUs. A checkpoint is written aside and gets its name, `step-N`, when it is whole.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_to

from hptool import files
from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.worker import orders
from hptool.worker.training import Training

#: Beside the tensors of a checkpoint: where in the training it was made.
_POSITION = "position.json"

#: Optimizer state by the names and shapes of parameters, gathered in the memory of the host and not of the device.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}

#: The states of Adam beside its step.
_ADAM = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a training is: steps done, samples read, tokens trained on; and by which cut of the model."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    layout: str = ""
    gpus: int = 0


class Checkpoints:
    """The checkpoints of one training. All ranks must call everything equally often."""

    def __init__(self, directory: Path, keep: int, config: BaseConfig, training: Training) -> None:
        self._directory = directory
        self._keep = keep
        self._config = config
        self._training = training
        #: What the last one took to write.
        self.seconds = 0.0
        self._optimizers: list[DistributedOptimizer] = getattr(
            training.optimizer, "chained_optimizers", [training.optimizer]
        )
        for optimizer in self._optimizers:
            _let_gather(optimizer)
        if torch.distributed.get_rank() == 0:
            for left in (directory / orders.CHECKPOINTS).glob(".step-*"):  # by a process that died
                shutil.rmtree(left, ignore_errors=True)

    def load(self) -> Position:
        """Goes on from the newest checkpoint; where there is none, the training stays as it is."""
        found = [orders.newest_checkpoint(self._directory) if torch.distributed.get_rank() == 0 else None]
        torch.distributed.broadcast_object_list(found, src=0)  # or a node that sees the files late would go its own way
        (path,) = found
        if path is None:
            return Position()
        position: Position = files.read(path / _POSITION, Position)
        same_ranks = (position.layout, position.gpus) == (self._config.layout.name, self._config.gpus)
        for optimizer in self._optimizers:
            optimizer._init_optimizer_states_with_dummy_values()  # noqa: SLF001 (what it is for; there is no other way)
        settings = [_settings(group) for group in self._training.optimizer.param_groups]
        try:
            loaded = dist_checkpointing.load(self._state(with_generators=same_ranks, is_loading=True), str(path))
        except (Exception, CheckpointException) as error:  # whatever it is, the files are not what they must be
            raise InputError(f"{path}: this checkpoint cannot be loaded: {error}") from error
        for i, chunk in enumerate(self._training.chunks):
            unwrap_model(chunk).load_state_dict(loaded[f"model{i}"])
        parts = loaded["optimizer"] if len(self._optimizers) > 1 else {0: loaded["optimizer"]}
        for i, optimizer in enumerate(self._optimizers):
            _load(optimizer, parts[i])
        for group, kept in zip(self._training.optimizer.param_groups, settings, strict=True):
            group.update(kept)  # the config's, should it have been changed
        if same_ranks:
            _set_generators(loaded["generators"])
        return position

    def save(self, position: Position) -> None:
        """Writes a checkpoint, and removes those that are too many; nothing where it is there already."""
        path = self._path(position.step)
        rank = torch.distributed.get_rank()
        if path == self.newest():
            return
        begin = time.monotonic()
        aside = path.with_name(f".{path.name}")
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        torch.distributed.barrier()
        if self._config.model.optim.overlap_param_sync:
            for chunk in self._training.chunks:
                chunk.start_param_sync(force_sync=True)  # else the next forward pass would gather the weights
        state = self._state(with_generators=True, is_loading=False)
        try:
            dist_checkpointing.save(state, str(aside), sharded_strategy=_InThisProcess())
        except CheckpointException as error:  # no Exception, so that nobody would tell of it
            raise RuntimeError(f"{path}: this checkpoint cannot be written: {error}") from error
        if rank == 0:
            files.write_text(aside / _POSITION, files.json_text(position))
            aside.rename(path)
            self._remove_oldest()
        torch.distributed.barrier()
        self.seconds = time.monotonic() - begin

    def newest(self) -> Path | None:
        """The newest whole checkpoint, on the first rank; None on the others where they do not see it yet."""
        found = [orders.newest_checkpoint(self._directory)]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def _path(self, step: int) -> Path:
        return self._directory / orders.CHECKPOINTS / f"step-{step:08}"

    def _remove_oldest(self) -> None:
        for old in sorted((self._directory / orders.CHECKPOINTS).glob("step-*"))[: -self._keep]:
            going = old.with_name(f".{old.name}")  # what is half removed must not be taken for whole
            old.rename(going)
            shutil.rmtree(going, ignore_errors=True)

    def _state(self, *, with_generators: bool, is_loading: bool) -> dict[str, Any]:
        """What is stored, or what is to be filled: this rank's part under its place in the whole."""
        state: dict[str, Any] = {
            f"model{i}": unwrap_model(chunk).sharded_state_dict() for i, chunk in enumerate(self._training.chunks)
        }
        models = dict(state)
        state["optimizer"] = self._training.optimizer.sharded_state_dict(
            models, is_loading=is_loading, metadata=_METADATA
        )
        if with_generators:
            # Each rank's own: they differ by stage and tensor rank, and with dropout move differently.
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            state["generators"] = ShardedObject("generators", _generators(), (world,), (rank,))
        return state


class _InThisProcess(SaveShardedStrategy):  # type: ignore[misc]  # Megatron-core has no types
    """Megatron's format `torch_dist`, by torch's own writer.

    Megatron's hands the data to processes that it forks, and asks one that it spawns for their answers: they would
    outlive a rank that is killed, and there is nothing for the training to do meanwhile.
    """

    can_handle_sharded_objects = True

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Each rank writes a file with those of its tensors that no other rank has to write."""
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        save_to(
            mcore_to_pyt_state_dict(tensors, is_loading=False),
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


# ---------------------------------------------------------------- optimizer


def _let_gather(optimizer: DistributedOptimizer) -> None:
    """Makes it gather its state over the replicas in the memory of the host, each number in its place."""
    group = optimizer.data_parallel_group
    if torch.distributed.get_backend(group) != "gloo":
        ranks = torch.distributed.get_process_group_ranks(group)
        group = torch.distributed.new_group(ranks, backend="gloo", use_local_synchronization=True)
    optimizer.data_parallel_group_gloo = group
    gather = optimizer.get_parameter_state_dp_zero

    def gather_in_place(**options: Any) -> dict[Any, Any] | None:
        # Megatron leaves out the padding between buckets, but then looks for parameters where they were with it
        # (megatron-core 0.16.1, sharded_param_state_fully_reshardable): all behind the first padding come out wrong.
        state: dict[Any, Any] | None = gather(**options)
        for i, buffer in enumerate(optimizer.buffers if state is not None else ()):
            assert state is not None  # noqa: S101 (mypy does not see it)
            for tensors in state[i].values():
                tensors.update({name: _with_padding(tensors[name], buffer) for name in _ADAM})
        return state

    optimizer.get_parameter_state_dp_zero = gather_in_place


def _with_padding(row: torch.Tensor, buffer: _ParamAndGradBuffer) -> torch.Tensor:
    """The buckets' numbers, which lie one behind the other in the row, as they lie in the buffer."""
    whole = torch.zeros(buffer.numel, dtype=row.dtype)
    start = 0
    for bucket in buffer.buckets:
        whole[bucket.offset : bucket.offset + bucket.numel_unpadded] = row[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return whole


def _load(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    """As its `load_state_dict`, which fails with torch's Adam: it misses the step of each parameter."""
    parameters = state.pop("param_state")
    optimizer.load_state_dict(state)
    inner = optimizer.optimizer.state
    # Megatron gives one tensor to all parameters, and Adam would count each step as often as there are parameters.
    steps = {parameter: values.pop("step").clone() for parameter, values in inner.items() if "step" in values}
    optimizer.load_parameter_state_from_fully_reshardable(parameters)
    for parameter, step in steps.items():
        inner[parameter]["step"] = step


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the config has set in a group of parameters."""
    return {key: value for key, value in group.items() if key not in {"params", "step"}}


# ---------------------------------------------------------------- random numbers


def _generators() -> dict[str, Any]:
    """The generators of random numbers of this rank."""
    states: dict[str, Any] = {"host": torch.get_rng_state(), "megatron": _copies()}
    if torch.cuda.is_available():
        states["device"] = torch.cuda.get_rng_state()
    return states


def _copies() -> dict[str, torch.Tensor]:
    states: dict[str, torch.Tensor] = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {name: state.clone() for name, state in states.items()}


def _set_generators(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["host"])
    if "device" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])
