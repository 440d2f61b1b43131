"""Which kernels a run computes with, chosen by what is installed: Transformer Engine's, Apex', or torch's own.

Without Transformer Engine a layer is attention by torch's scaled_dot_product_attention, GEMMs by cuBLAS, and everything
between them as torch's compiler fuses it. On one tensor rank, where nothing is exchanged within a layer, that is the
layer as a whole: norms, biases, activation, dropout and residual merge into what surrounds them, and the backward pass
computes again what is cheaper to compute than to keep. With more, it is each of Megatron's fused functions.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer

from hptool.base_config import BaseConfig
from hptool.worker import cpu
from hptool.worker.installed import COMPILER_VARIABLE, FLASH_ATTENTION, is_installed, uses_transformer_engine


def backend(device_type: str) -> str | None:
    """What compiles for such a device; None where nothing does: on a CPU, compiling takes longer than it saves."""
    chosen = os.environ.get(COMPILER_VARIABLE) or ("inductor" if device_type == "cuda" else "off")
    return None if chosen == "off" else chosen


@functools.cache
def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any] | None:
    """The function as the compiler makes it; None where nothing compiles for this device."""
    own = backend(device.type)
    return cpu.torch_compile(function, backend=own, dynamic=False) if own else None


def compiles_layers(config: BaseConfig) -> bool:
    """Layers are compiled as a whole.

    Not where ranks exchange within a layer, nor where the host decides which tokens go to which expert, nor where
    kernels of others do the work: of Megatron's attention, of Transformer Engine, of Apex for weight gradients.
    """
    layout, model = config.layout, config.model
    exchanges = layout.tp > 1 or layout.cp > 1 or bool(model.num_moe_experts)
    others = uses_transformer_engine(config) or model.gradient_accumulation_fusion or not model.use_flash_attention
    return backend(_device_type(config)) is not None and not (exchanges or others)


def compile_layers(config: BaseConfig, chunks: list[DistributedDataParallel]) -> None:
    """Compiles the layers of a rank's stages in their place, each with the same code, where `compiles_layers`."""
    own = backend(_device_type(config))
    if own is None or not compiles_layers(config):
        return
    # torch's name for it. Only its own compiler knows of graphs; the others are for finding faults.
    options: dict[str, Any] | None = (
        {"triton.cudagraphs": True} if config.model.enable_cuda_graph and own == "inductor" else None
    )
    for chunk in chunks:
        for layer in [module for module in chunk.modules() if isinstance(module, TransformerLayer)]:
            _wait_outside(chunk, layer)
            for module in layer.modules():
                if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                    module._forward_impl = _linear  # noqa: SLF001 (Megatron's own is for several ranks)
            compiled_forward = cpu.torch_compile(
                layer.forward, backend=own, dynamic=False, fullgraph=True, options=options
            )
            layer.forward = _in_training(layer, compiled_forward, layer.forward)


def names(config: BaseConfig) -> dict[str, str]:
    """What computes what, for the measurement."""
    if uses_transformer_engine(config):
        layers = "Transformer Engine"
        attention = norms = layers
    else:
        own = backend(_device_type(config))
        fused = f"Megatron-core local, fused functions by torch.compile ({own})" if own else "Megatron-core local"
        graphs = ", CUDA graphs" if config.model.enable_cuda_graph else ""
        layers = f"Megatron-core local, compiled whole ({own}{graphs})" if compiles_layers(config) else fused
        attention, norms = "Megatron-core dot product", "torch"
        if config.model.use_flash_attention:
            attention = "torch SDPA with ALiBi" if config.is_alibi else "torch SDPA"
    return {"layers": layers, "attention": attention, "norms": norms, "loss": "hptool", "optimizer": _optimizer()}


def serving_names(config: BaseConfig) -> dict[str, str]:
    """What computes what in a run that serves, for its measurement."""
    found = {name: names(config)[name] for name in ("layers", "attention", "norms")}
    found["layers"] = names(replace(config, model=replace(config.model, use_flash_attention=False)))["layers"]
    found["cache"] = "keys and values of all tokens, one piece of memory a layer"
    if config.is_encoder_decoder:
        found["cache"] = "keys and values of all decoder tokens and, once for all of them, of the encoder's"
    if not is_installed(FLASH_ATTENTION):
        found["dynamic engine"] = f"not used: it needs {FLASH_ATTENTION}, which is not installed"
    else:
        found["dynamic engine"] = "not used: hptool has no loop over it"
    return found


def _optimizer() -> str:
    """In the order in which Megatron-core takes them."""
    if is_installed("transformer_engine"):
        return "Transformer Engine FusedAdam"
    return "Apex FusedAdam" if is_installed("apex") else "torch AdamW, fused"


def _device_type(config: BaseConfig) -> str:
    return "cpu" if config.trainer.accelerator == "cpu" else "cuda"


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **_: object) -> torch.Tensor:  # noqa: A002 (Megatron's signature)
    """What Megatron's linear layers compute on one rank."""
    return torch.nn.functional.linear(input, weight, bias)


def _in_training(
    layer: TransformerLayer, compiled_forward: Callable[..., Any], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """The compiled pass in training, whose shape is always the same; evaluations come in many, each to be compiled."""

    def forward(*args: Any, **options: Any) -> Any:
        return (compiled_forward if layer.training else plain)(*args, **options)

    return forward


def _wait_outside(chunk: DistributedDataParallel, layer: TransformerLayer) -> None:
    """Has the layer wait for its weights, on their way from other replicas, before it enters what is compiled.

    With overlapped gathers Megatron has each module wait, by a hook that no compiler can take.
    """
    handles = chunk.remove_forward_pre_hook_handles
    inner = [module for module in layer.modules() if module in handles]
    if not inner:
        return
    for module in inner:
        handles[module].remove()  # which may be said again
    wait = chunk._make_forward_pre_hook()  # noqa: SLF001 (as above)

    def wait_for_all(_: torch.nn.Module, *__: object) -> None:
        for module in inner:
            wait(module)

    layer.register_forward_pre_hook(wait_for_all)
