"""A training that is interrupted, however that happens, goes on as if nothing had been."""

import itertools
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hptool import files
from hptool.measurement import FailureKind
from hptool.worker import full_training, orders
from hptool.worker.orders import Stop
from tests.worker.runs import tiny_family
from tests.worker.trainings import QUIET, curve, evaluations, every, killed, losses, start, train

STEPS: dict[str, Any] = {"trainer__max_steps": 8, "model__optim__sched": {"warmup_steps": 3, "min_lr": 0.001}}
DROPOUT: dict[str, Any] = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
DP2: dict[str, Any] = {"trainer__devices": 2}
TP2 = {**DP2, "model__tensor_model_parallel_size": 2}
PP2 = {**DP2, "model__pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "model__virtual_pipeline_model_parallel_size": 2}

WAYS = {
    "dp2": {**DP2, **DROPOUT},
    # The weights of a step are gathered by the next one, unless a checkpoint wants them before.
    "dp2-overlap-bf16": {
        **DP2,
        "trainer__precision": "bf16",
        "model__optim__overlap_grad_sync": True,
        "model__optim__overlap_param_sync": True,
    },
    "tp2": {**TP2, **DROPOUT},
    "pp2": {**PP2, **DROPOUT},
    "moe-ep2": tiny_family("moe", **DP2, model__expert_model_parallel_size=2),
    "t5-pp2": tiny_family("t5", **PP2),
}


@pytest.mark.parametrize("name", WAYS)
def test_killed_training_goes_on_with_the_same_curve(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hptool.worker.training import Training  # noqa: PLC0415 (imports torch and megatron)

    changes = {**STEPS, **WAYS[name]}
    given = replace(every(4), validate_every=3)  # so that nothing but the checkpoint wants what it stores
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(whole, given, **changes)
    with monkeypatch.context() as patch:
        killed(patch, Training, "step", lambda _self, step, *_: step == 6)
        run = start(part, given, **changes)
        assert run.wait() == 1
        assert "SIGKILL" in run.failures[0].message
    assert len(curve(part)) == 6
    result = train(part, given, **changes)
    assert (result.first_step, result.step, result.stopped) == (4, 8, Stop.DONE)
    assert curve(part) == curve(whole)
    assert evaluations(part) == evaluations(whole)
    assert [line["step"] for line in evaluations(whole)] == [0, 3, 6, 8]


def test_half_a_checkpoint_is_never_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(whole, every(2), **STEPS)
    with monkeypatch.context() as patch:
        # When the tensors are on disk and only the name is missing.
        killed(patch, files, "write_text", lambda path, _: ".step-00000004" in str(path))
        assert start(part, every(2), **STEPS).wait() == 1
    left = sorted(path.name for path in (part / "checkpoints").iterdir())
    assert left == [".step-00000004", "step-00000002"]
    assert train(part, every(2), **STEPS).first_step == 2
    assert curve(part) == curve(whole)
    assert sorted(path.name for path in (part / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize(
    ("first", "then"),
    [(TP2, DP2), (VPP2, {}), ({}, {**TP2, **PP2, "trainer__devices": 4})],
    ids=["tp2-dp2", "vpp2-1", "1-tp2pp2"],
)
def test_another_layout_goes_on(first: dict[str, Any], then: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, every(4), **STEPS, **first)
    whole = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")  # as if it had ended before
    assert train(tmp_path, every(4), **STEPS, **then).first_step == 4
    assert losses(tmp_path) == pytest.approx(whole, rel=1e-6)


def test_training_that_is_over_stays_as_it_is_and_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    first = train(tmp_path, **STEPS)
    before = curve(tmp_path)
    again = train(tmp_path, **STEPS)
    assert (again.first_step, again.step) == (8, 8)
    assert again.validation_loss == first.validation_loss
    assert curve(tmp_path) == before
    checkpoint = tmp_path / "checkpoints" / "step-00000008"
    for path in checkpoint.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    run = start(tmp_path, **STEPS)
    assert run.wait() == 1
    (failure,) = run.failures
    assert failure.kind is FailureKind.INVALID
    assert f"{checkpoint}: this checkpoint cannot be loaded" in failure.message


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_writes_a_checkpoint(signum: int, code: int, tmp_path: Path) -> None:
    changes = {**DP2, "trainer__max_steps": 1_000_000}
    run = start(tmp_path, **changes)
    run.until_step(3)
    ranks = run.ranks(2)
    for pid in (*ranks, run.pid):  # the ranks too, as a scheduler may
        os.kill(pid, signum)
    assert run.wait(timeout_s=20.0) == code
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    result = full_training.read_result(tmp_path)
    assert result.stopped is Stop.SIGNAL
    assert result.step >= 3
    assert result.checkpoint == str(tmp_path / "checkpoints" / f"step-{result.step:08}")
    assert train(tmp_path, **DP2, trainer__max_steps=result.step + 2).first_step == result.step
    assert len(curve(tmp_path)) == result.step + 2


def test_max_time_ends_with_a_checkpoint_before_it(tmp_path: Path) -> None:
    result = train(tmp_path, replace(QUIET, max_seconds=2.0), **DP2, trainer__max_steps=1_000_000)
    assert result.stopped is Stop.TIME
    assert result.checkpoint.endswith(f"step-{result.step:08}")
    assert sum(float(line.split(",")[5]) for line in (tmp_path / orders.LOSSES).read_text().splitlines()[1:]) < 2.0


def test_batch_grows_and_goes_on_growing(tmp_path: Path) -> None:
    # From 4 to 8 in two halves of 16 samples, as Megatron's calculator does; then 8.
    changes = {**STEPS, "model__rampup_batch_size": [4, 2, 16], "model__micro_batch_size": 1}
    train(tmp_path, every(3), **changes)
    tokens = [0, *(int(row[1]) for row in curve(tmp_path))]
    assert [(b - a) // 32 for a, b in itertools.pairwise(tokens)] == [4, 4, 6, 6, 8, 8, 8, 8]
    whole = losses(tmp_path)
    for step in (6, 8):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08}")
    train(tmp_path, every(3), **changes, **DP2)
    assert losses(tmp_path) == pytest.approx(whole, rel=1e-6)
