"""Stand-ins that let Megatron-core run on a CPU: its code says `cuda` in many places and means "the device".

Only for a process whose config says `trainer.accelerator: cpu`. Without them nothing trains: every schedule makes a
tensor with device="cuda". With them tensor, pipeline, data and context parallelism work over gloo as they do over NCCL.
"""

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

_CPU = torch.device("cpu")

#: torch.compile itself, for those who want it on a CPU all the same.
torch_compile = torch.compile

#: The functions that Megatron-core gives the literal device="cuda": in the schedules, the masks and the optimizer.
_FACTORIES = ("ones", "tensor", "zeros")


@functools.cache  # patching twice would wrap the wrappers
def stand_in_for_cuda() -> None:
    """Makes torch answer Megatron-core's CUDA calls with the CPU. To be called before megatron is imported."""
    # Megatron's fused functions are torch.compile'd, which would call a C++ compiler in the first step of every rank.
    setattr(torch, "compile", _not_compiled)  # noqa: B010 (mypy will not have a function replaced)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    stand_ins: dict[str, object] = {
        "current_device": lambda: _CPU,  # passed on as `device=`
        "synchronize": lambda *_: None,  # nothing is ever behind
        "current_stream": lambda *_: None,  # Megatron-core 0.19 hands it on, no more
        # One generator for all. Not torch.manual_seed, which would call manual_seed_all, and so this again.
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        # Tokens are sent to their experts by numbers that a stream beside the first one copies to the host.
        "Stream": _Stream,
        "stream": lambda _: nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    for kind in (torch.Tensor, torch.nn.Module):
        setattr(kind, "cuda", _itself)  # noqa: B010 (mypy will not have a method replaced)
    setattr(torch.Tensor, "type", _type_named_cuda(torch.Tensor.type))  # noqa: B010 (as above)


@functools.cache
def drive_megatron() -> None:
    """Makes Megatron-core take random states and numbers of tokens from the CPU. To be called after its import."""
    from megatron.core.tensor_parallel import random as megatron_random  # noqa: PLC0415 (after stand_in_for_cuda)
    from megatron.core.transformer.moe import token_dispatcher  # noqa: PLC0415 (as above)

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # noqa: SLF001 (there is no hook)
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # noqa: SLF001 (as above)
    # It warns when the CPU's generator moves inside a fork of the GPU's: here that is the point.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    # Collectives want lists of numbers, which it makes of CUDA tensors alone.
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numbers
    # Ranks of a tensor group hold different numbers of tokens for an expert, which NCCL gathers and gloo does not.
    distributed: Any = torch.distributed
    distributed.all_gather = _gathering_unequal(distributed.all_gather)
    distributed.reduce_scatter = _scattering_unequal(distributed.reduce_scatter)


def _as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:  # noqa: FBT001, FBT002 (Megatron's signature)
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gathering_unequal(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def all_gather(parts: list[torch.Tensor], own: torch.Tensor, group: Any = None, **options: Any) -> Any:
        if _are_equal(parts):
            return original(parts, own, group=group, **options)
        parts[torch.distributed.get_rank(group)].copy_(own)
        for i, part in enumerate(parts):
            torch.distributed.broadcast(part, group=group, group_src=i)
        return None

    return all_gather


def _scattering_unequal(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reduce_scatter(own: torch.Tensor, parts: list[torch.Tensor], group: Any = None, **options: Any) -> Any:
        if _are_equal(parts):
            return original(own, parts, group=group, **options)
        parts = [part.clone() for part in parts]
        for i, part in enumerate(parts):
            torch.distributed.reduce(part, group=group, group_dst=i)
        own.copy_(parts[torch.distributed.get_rank(group)])
        return None

    return reduce_scatter


def _are_equal(parts: list[torch.Tensor]) -> bool:
    return len({part.shape for part in parts}) == 1


class _Stream:
    """A CUDA stream and its event in one, on which everything has happened already."""

    def wait_stream(self, stream: object) -> None:
        """At once."""

    def record_event(self) -> "_Stream":
        """An event that is over."""
        return self

    def synchronize(self) -> None:
        """At once."""


def _not_compiled(function: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
    """For use as a decorator, with options and without."""
    return function if function is not None else _not_compiled


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)  # there is no device to copy to (rotary positions with context parallelism)
        return factory(*args, **kwargs)

    return make


def _type_named_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers sort parameters by names such as 'torch.cuda.FloatTensor'."""

    def tensor_type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        if dtype is None:
            return str(original(self)).replace("torch.", "torch.cuda.", 1)
        return original(self, dtype, **kwargs)

    return tensor_type


def _itself(self: Any, *_: object, **__: object) -> Any:
    return self
