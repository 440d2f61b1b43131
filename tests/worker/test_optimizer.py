"""The optimizer that the config asks for, and the learning rate of each step."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from hptool.nemo_keys import OptimSection, SchedSection
from tests.worker.runs import on_ranks, tiny_config


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
    assert all(a > b for a, b in itertools.pairwise(falling))
    assert found[10:] == pytest.approx([0.1, 0.1])


def test_training_shorter_than_its_warm_up_keeps_warming_up() -> None:
    assert rates(3, warmup_steps=636)[-1] == pytest.approx(3 / 637)


def test_adam_is_fused_and_leaves_norms_and_biases_alone(tmp_path: Path) -> None:
    config = tiny_config(model__optim__weight_decay=0.3, model__optim__betas=[0.8, 0.9])

    def groups() -> list[dict[str, Any]]:
        from hptool.worker import model, optimizer  # noqa: PLC0415 (imports torch and megatron)

        megatron = model.transformer_config(config)
        chunks = optimizer.wrap(config, megatron, model.build_chunks(config, megatron))
        built = optimizer.build(config, megatron, chunks)
        return [
            {
                "weight_decay": group["weight_decay"],
                "betas": list(group["betas"]),
                "fused": group["fused"],
                "numbers": sum(x.numel() for x in group["params"]),
            }
            for group in built.param_groups
        ]

    (found,) = on_ranks(tmp_path, config, groups)
    shape = config.shape
    undecayed = shape.num_layers * (shape.layer_parameters - shape.layer_matmul_parameters) + 2 * shape.hidden_size
    padding = (shape.padded_vocab_size(1) - shape.vocab_size) * shape.hidden_size
    assert {group["weight_decay"]: group["numbers"] for group in found} == {
        0.3: shape.num_parameters + padding - undecayed,
        0.0: undecayed,
    }
    assert all(group["betas"] == [0.8, 0.9] and group["fused"] for group in found)
