"""Stand-ins that let Megatron-core run on a CPU: its code says `cuda` in many places and means "the device".

Only for a process whose config says `trainer.accelerator: cpu`. Without them nothing trains: every schedule makes a
tensor with device="cuda". With them tensor, pipeline, data and context parallelism work over gloo as they do over NCCL.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")

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
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    for kind in (torch.Tensor, torch.nn.Module):
        setattr(kind, "cuda", _itself)  # noqa: B010 (mypy will not have a method replaced)
    setattr(torch.Tensor, "type", _type_named_cuda(torch.Tensor.type))  # noqa: B010 (as above)


@functools.cache
def drive_megatron_rng() -> None:
    """Megatron's random-number trackers take their states from the CPU's generator. To be called after its import."""
    from megatron.core.tensor_parallel import random as megatron_random  # noqa: PLC0415 (after stand_in_for_cuda)

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # noqa: SLF001 (there is no hook)
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # noqa: SLF001 (as above)
    # It warns when the CPU's generator moves inside a fork of the GPU's: here that is the point.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)


def _not_compiled(function: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
    """For use as a decorator, with options and without."""
    return function if function is not None else _not_compiled


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
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
