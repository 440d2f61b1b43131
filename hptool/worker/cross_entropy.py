"""Cross-entropy over a vocabulary that is spread over the tensor group, in two passes over the logits.

Megatron's own copies the logits to fp32 and keeps a softmax of that size, and its fused one rounds every gradient to
bf16, also where the model is fp32. This one reads the logits once in their own precision, keeps two numbers a token,
and writes the gradient over the logits: of all memory of a step the most in a small model.
"""

from typing import Any

import torch

from hptool.worker import kernels

#: Elements in fp32 that are worked on at once where no compiler fuses the steps: 64 MiB, so that they never show.
_CHUNK_ELEMENTS = 2**24


def language_model_loss(
    labels: torch.Tensor, logits: torch.Tensor, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """The loss of each label, fp32 [b, s], for labels [b, s] and this rank's part of the logits [s, b, v/tp].

    The logits must not be used again: their gradient takes their place.
    """
    losses: torch.Tensor = _CrossEntropy.apply(logits, labels.transpose(0, 1).contiguous(), group)  # type: ignore[no-untyped-call]  # torch's decorator
    return losses.transpose(0, 1).contiguous()


class _CrossEntropy(torch.autograd.Function):
    """Log of the sum of exponentials, less the logit of the label."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: torch.distributed.ProcessGroup
    ) -> torch.Tensor:
        width = logits.size(-1)
        own = labels.flatten() - group.rank() * width
        rows = logits.reshape(-1, width)
        # Evaluations, which want no gradient, come in many shapes: not worth compiling for each.
        found = _by_chunks(_statistics, rows, own, may_compile=ctx.needs_input_grad[0])
        largest, total, chosen = (torch.cat(parts) for parts in zip(*found, strict=True))
        if group.size() > 1:
            greatest = largest.clone()
            torch.distributed.all_reduce(greatest, op=torch.distributed.ReduceOp.MAX, group=group)
            sums = torch.stack([total * (largest - greatest).exp(), chosen])
            torch.distributed.all_reduce(sums, group=group)
            largest, (total, chosen) = greatest, sums
        ctx.save_for_backward(rows, own, largest, total)
        return (total.log() + (largest - chosen)).view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows, own, largest, total = ctx.saved_tensors
        (gradient,) = gradients
        _by_chunks(_become_gradient, rows, own, largest, gradient.flatten() / total, gradient.flatten())
        return rows.view(*gradient.shape, -1), None, None


def _by_chunks(function: Any, rows: torch.Tensor, *columns: torch.Tensor, may_compile: bool = True) -> list[Any]:
    """What it answers for all rows, in parts so small that its intermediate results do not matter, unless compiled."""
    compiled = kernels.compiled(function, rows.device) if may_compile else None
    if compiled is not None:
        return [compiled(rows, *columns)]
    count = max(1, _CHUNK_ELEMENTS // rows.size(1))
    return [function(*parts) for parts in zip(*(torch.split(x, count) for x in (rows, *columns)), strict=True)]


def _statistics(rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest logit of each row, the sum of exponentials less it, and the label's logit (0 where not here)."""
    scores = rows.float()
    largest = scores.amax(-1)
    total = (scores - largest[:, None]).exp().sum(-1)
    here = (labels >= 0) & (labels < rows.size(1))
    chosen = scores.gather(1, labels.clamp(0, rows.size(1) - 1)[:, None])[:, 0]
    return largest, total, torch.where(here, chosen, 0.0)


def _become_gradient(
    rows: torch.Tensor,
    labels: torch.Tensor,
    largest: torch.Tensor,
    share: torch.Tensor,
    gradient: torch.Tensor,
) -> None:
    """Softmax less one at the label, times the gradient of the row's loss, written over the logits.

    `share` is that gradient over the sum of exponentials: so much of each is the softmax's part. Less the largest logit
    first, since the logarithm of the sum would round what is left of a large one.
    """
    softmax = (rows.float() - largest[:, None]).exp() * share[:, None]
    is_label = torch.arange(rows.size(1), device=rows.device)[None] == labels[:, None]
    rows.copy_(softmax - torch.where(is_label, gradient[:, None], 0.0))
