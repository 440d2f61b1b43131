"""The loss over a vocabulary that is spread over ranks is Megatron-core's, and its gradient costs no memory."""

from pathlib import Path
from typing import Any

import pytest

from hptool.base_config import BaseConfig
from tests.worker.runs import on_ranks, tiny_config


def differences(dtype: str) -> list[float]:
    """Of losses and gradients, relative to their largest entry, from Megatron's own on the same ranks, in fp32."""
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core import parallel_state  # noqa: PLC0415 (heavy)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # noqa: PLC0415 (heavy)

    from hptool.worker import cross_entropy  # noqa: PLC0415 (heavy)

    group = parallel_state.get_tensor_model_parallel_group()
    width = 96 // group.size()
    generator = torch.Generator().manual_seed(3)
    # Logits as large as those of a bad model: exponentials that do not fit into fp32 unless the largest is taken away.
    everywhere = (60 * torch.randn(10, 3, 96, generator=generator)).to(getattr(torch, dtype))
    labels = torch.randint(0, 96, (3, 10), generator=generator)
    weight = torch.randn(3, 10, generator=generator)
    cross_entropy._CHUNK_ELEMENTS = 7 * width  # so that the last chunk is not a full one
    results = []
    for own in (True, False):
        logits = everywhere[..., group.rank() * width : (group.rank() + 1) * width].clone()
        logits = (logits if own else logits.float()).requires_grad_()
        losses: Any
        if own:
            losses = cross_entropy.language_model_loss(labels, logits + 0, group)
        else:
            losses = vocab_parallel_cross_entropy(logits + 0, labels.T.contiguous()).T
        (losses * weight).sum().backward()
        results.append([losses.detach(), logits.grad])
    return [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("dtype", "of_losses", "of_gradients"), [("float32", 1e-6, 1e-6), ("bfloat16", 1e-6, 4e-3)])
def test_loss_and_gradient_are_megatrons(
    tmp_path: Path, tp: int, dtype: str, of_losses: float, of_gradients: float
) -> None:
    config = tiny_config(trainer__devices=tp, model__tensor_model_parallel_size=tp)
    for losses, gradients in on_ranks(tmp_path, config, lambda: differences(dtype)):
        assert losses < of_losses
        assert gradients < of_gradients  # rounded to the logits' precision once


def new_bytes(config: BaseConfig) -> list[int]:
    """Bytes that the forward pass keeps beside the logits, and whether the gradient lies elsewhere than they did."""
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core import parallel_state  # noqa: PLC0415 (heavy)

    from hptool.worker.cross_entropy import language_model_loss  # noqa: PLC0415 (heavy)

    logits = torch.randn(config.shape.seq_length, 2, 512, dtype=torch.bfloat16, requires_grad=True)
    taken = logits * 2
    labels = torch.zeros(2, config.shape.seq_length, dtype=torch.int64)
    place = taken.untyped_storage().data_ptr()
    kept: dict[int, int] = {}
    places: list[int] = []

    def keep(x: Any) -> Any:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses: Any = language_model_loss(labels, taken, parallel_state.get_tensor_model_parallel_group())
    kept.pop(place)
    taken.register_hook(lambda gradient: places.append(gradient.untyped_storage().data_ptr()))  # type: ignore[no-untyped-call]  # torch leaves it so
    losses.sum().backward()
    return [sum(kept.values()), int(places != [place])]


def test_a_few_numbers_a_token_are_kept_and_the_gradient_takes_the_logits_place(tmp_path: Path) -> None:
    config = tiny_config()
    ((kept, elsewhere),) = on_ranks(tmp_path, config, lambda: new_bytes(config))
    assert kept <= 2 * config.shape.seq_length * (8 + 2 * 4)  # the label, the largest logit and the sum
    assert not elsewhere
