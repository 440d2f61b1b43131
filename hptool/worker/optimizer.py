"""Data parallelism, the optimizer sharded over it, and the learning rate."""

import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from hptool.base_config import BaseConfig
from hptool.nemo_keys import OptimSection
from hptool.units import MIB

#: Gradients are added up and reduced in fp32 (`megatron_amp_O2`).
_GRADIENT_BYTES = 4


def wrap(config: BaseConfig, megatron: TransformerConfig, chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """The stages with gradients that are reduced over the replicas, overlapped with the backward pass where asked."""
    optim = config.model.optim
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=optim.overlap_grad_sync,
        overlap_param_gather=optim.overlap_param_sync,
        use_distributed_optimizer=True,
        bucket_size=optim.bucket_cap_mb * MIB // _GRADIENT_BYTES,
        average_in_collective=config.model.grad_div_ar_fusion,
    )
    modules = [Float16Module(megatron, chunk) if megatron.bf16 else chunk for chunk in chunks]
    wrapped = [
        # Later stages of an interleaved pipeline reduce while the first still computes: no need for buckets.
        DistributedDataParallel(config=megatron, ddp_config=ddp, module=module, disable_bucketing=i > 0)
        for i, module in enumerate(modules)
    ]
    if optim.overlap_grad_sync:
        # As Megatron's own trainer sets them: a function for one stage, a list for several.
        no_sync = [chunk.no_sync for chunk in wrapped]
        start_sync = [chunk.start_grad_sync for chunk in wrapped]
        megatron.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
        megatron.grad_sync_func = start_sync if len(wrapped) > 1 else start_sync[0]
    megatron.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build(config: BaseConfig, megatron: TransformerConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Adam with decoupled weight decay, its state spread over the replicas; norms and biases do not decay."""
    optim = config.model.optim
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.sched.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=config.trainer.gradient_clip_val,
            bf16=megatron.bf16,
            params_dtype=megatron.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=optim.overlap_param_sync,
        ),
        chunks,
        use_gloo_process_groups=False,  # only checkpoints need them
    )
    megatron.grad_scale_func = optimizer.scale_loss
    for group in optimizer.param_groups:
        # Megatron leaves this to its scheduler, without which norms and biases would decay.
        group["weight_decay"] = optim.weight_decay * group.get("wd_mult", 1.0)
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(inner.optimizer, torch.optim.Optimizer) and "foreach" in inner.optimizer.defaults:
            # torch's Adam copies all it works on by default; fused, it does not, like Transformer Engine's and Apex'.
            for group in inner.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, value: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_mult", 1.0)


def learning_rate(optim: OptimSection, step: int, max_steps: int) -> float:
    """Linear warm-up, then the schedule, as NeMo computes both.

    CosineAnnealing falls to `min_lr`, which the last `constant_steps` keep; WarmupAnnealing falls in a line to zero.
    """
    sched = optim.sched
    warmup = sched.steps_of_warmup(max_steps)
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    if sched.name == "WarmupAnnealing":
        return optim.lr * max(0.0, max_steps - step) / max(1, max_steps - warmup)
    falling = max_steps - sched.constant_steps - warmup
    progress = min(1.0, (step - warmup) / falling) if falling > 0 else 1.0
    return sched.min_lr + (optim.lr - sched.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
