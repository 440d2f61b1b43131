"""The learning rate of each step."""

import pytest

from hptool.base_config import OptimSection, SchedSection


def rates(max_steps: int, **sched: float) -> list[float]:
    """Of all steps, with lr 1 and min_lr 0.1."""
    from hptool.worker.optimizer import learning_rate  # noqa: PLC0415 (imports torch and megatron)

    optim = OptimSection(lr=1.0, sched=SchedSection(min_lr=0.1, **sched))  # type: ignore[arg-type]
    return [learning_rate(optim, step, max_steps) for step in range(max_steps)]


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    assert rates(10, warmup_steps=4)[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_cosine_falls_from_lr_to_min_lr() -> None:
    found = rates(12, warmup_steps=2, constant_steps=2)
    falling = found[2:10]
    assert falling[0] == pytest.approx(1.0)
    assert falling[4] == pytest.approx(0.55)  # half way: half way down
    assert all(a > b for a, b in zip(falling, falling[1:], strict=False))
    assert found[10:] == pytest.approx([0.1, 0.1])


def test_training_shorter_than_its_warm_up_keeps_warming_up() -> None:
    assert rates(3, warmup_steps=636)[-1] == pytest.approx(3 / 637)
