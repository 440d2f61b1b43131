"""The weights of a model that `hptool train` has trained, for one that serves; see `checkpoints` for how they lie."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch.distributed.checkpoint.api import CheckpointException

from hptool.errors import InputError
from hptool.worker import orders

#: So many differences between a checkpoint and a model are named.
_NAMED = 4


def load(path: Path, chunk: LanguageModule) -> None:
    """Fills this rank's stage from a checkpoint, or from the newest one of a training's directory.

    InputError where it cannot be read, or is of another model: then with what differs.
    """
    if (path / orders.CHECKPOINTS).is_dir():
        path = orders.newest_checkpoint(path) or path
    if not path.is_dir():
        raise InputError(f"checkpoint: {path} given, allowed is a directory of hptool train or one of its checkpoints")
    state: dict[str, Any] = {"model0": chunk.sharded_state_dict()}
    try:
        held = dist_checkpointing.load_tensors_metadata(str(path))
    except (Exception, CheckpointException) as error:  # whatever it is, the files are not what they must be
        raise InputError(f"{path}: this checkpoint cannot be read: {error}") from error
    _refuse_another_model(path, state["model0"], held)
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:
        raise InputError(f"{path}: this checkpoint cannot be loaded: {error}") from error
    chunk.load_state_dict(loaded["model0"])


def _refuse_another_model(path: Path, wanted: dict[str, Any], held: dict[str, Any]) -> None:
    problems: dict[str, None] = {}
    for value in wanted.values():
        if not isinstance(value, ShardedTensor):
            continue
        there = held.get(value.key)
        if there is None:
            problems[f"{value.key} is not there"] = None
        elif tuple(there.global_shape) != tuple(value.global_shape) and not value.allow_shape_mismatch:
            problems[f"{value.key} is {_size(there)} there, and {_size(value)} in this config"] = None
    # Every stage has looked at its own part, and all say the same.
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, list(problems))
    found = list(dict.fromkeys(problem for part in everywhere for problem in part))
    if found:
        more = f"; {len(found) - _NAMED} more differ" if len(found) > _NAMED else ""
        raise InputError(f"{path}: is a checkpoint of another model: {'; '.join(found[:_NAMED])}{more}")


def _size(tensor: Any) -> str:
    return "×".join(map(str, tensor.global_shape))
