"""Serving runs: what they measure, what a point's failure costs, and what they refuse."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hptool import files
from hptool.errors import InputError
from hptool.measurement import FailureKind
from hptool.serving import Targets
from hptool.serving_orders import SERVING, ServingOrders
from hptool.worker import outcome, served
from hptool.worker.nodes import Place
from hptool.worker.processes import Heartbeats
from hptool.worker.refusals import refuse_unservable
from tests.worker.runs import FAMILIES, on_ranks, tiny_config, tiny_document
from tests.worker.servings import PP2, TP2, points, serve, start
from tests.worker.test_main import worker
from tests.worker.trainings import train


def test_points_of_a_cut_model_are_measured_and_told(tmp_path: Path) -> None:
    serving = serve(tmp_path, ["8:9/1", "8:9/2", "4:1/2"], **FAMILIES["llama"], **TP2)
    found = serving.measured
    assert serving.names == ["8:9/1", "8:9/2", "4:1/2"]
    assert not found.failures
    assert not found.skipped
    for point in found.points:
        assert point.repeats >= 5
        assert point.warmups >= 1
        assert point.latency_low_ms <= point.latency_ms.p50 <= point.latency_high_ms
        whole = point.ttft_ms.p50 + (point.output_len - 1) * point.tpot_ms.p50
        assert whole == pytest.approx(point.latency_ms.p50, rel=0.3)
        made = point.batch * point.output_len
        assert point.tokens_per_s == pytest.approx(made / point.latency_ms.p50 * 1000)
        assert point.tokens_per_s_per_gpu == pytest.approx(point.tokens_per_s / 2)
        assert point.tokens_per_s_per_user == pytest.approx(point.tokens_per_s / point.batch)
        assert 0.05 < point.peak_memory_gib < 2
    assert found.points[-1].tpot_ms.p99 == 0
    assert found.engine == "megatron-core static, hptool's loop"
    assert found.kernels["dynamic engine"] == "not used: it needs flash_attn, which is not installed"
    assert found.kernels["attention"] == "torch SDPA"
    assert (found.gpus, found.cuda_graphs, found.precision) == (2, False, "fp32")
    assert found.memory_kind == "max resident"
    assert found.num_parameters == tiny_config(**FAMILIES["llama"]).shape.num_parameters
    assert 0 < found.startup_s < 60
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert (progress["step"], progress["of"]) == (3, 3)
    assert progress["tokens_per_s"] == pytest.approx(found.points[-1].tokens_per_s)
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "8:9/2: begins" in log
    assert not (tmp_path / ".point").exists()


def test_times_are_of_the_passes_behind_the_warm_up() -> None:
    from hptool.worker.serving import _served  # noqa: PLC0415 (imports megatron)

    first_s = [9.0, 0.01, 0.03, 0.02]
    found = _served(points("4:3/2")[0], (first_s, [10.0, 0.11, 0.23, 0.12]), warmups=1, gpus=4, peak_gib=1.5)
    assert (found.repeats, found.warmups, found.peak_memory_gib) == (3, 1, 1.5)
    assert (found.ttft_ms.p50, found.latency_ms.p50) == pytest.approx((20, 120))
    assert found.latency_ms.p95 == pytest.approx(219)
    assert found.tpot_ms.p50 == pytest.approx(50)  # of 50, 100 and 50
    assert (found.latency_low_ms, found.latency_high_ms) == pytest.approx((110, 230))
    assert (found.tokens_per_s, found.tokens_per_s_per_gpu) == pytest.approx((50, 12.5))
    assert found.tokens_per_s_per_user == pytest.approx(25)


@pytest.mark.parametrize("fails_on", [None, 1])
def test_without_recorded_graphs_the_measurement_says_so(
    fails_on: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hptool.worker.generation import Generator  # noqa: PLC0415 (imports megatron)

    def record(_: Generator) -> None:
        import torch  # noqa: PLC0415 (heavy)

        if torch.distributed.get_rank() == fails_on:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Generator, "record", record)
    config = tiny_config(**TP2)

    def work() -> None:
        import torch  # noqa: PLC0415 (heavy)

        from hptool.worker.serving import _Server  # noqa: PLC0415 (imports megatron)

        rank, device = torch.distributed.get_rank(), torch.device("cpu")
        place = Place(rank=rank, local_rank=0, world_size=2, directory=tmp_path)
        orders = ServingOrders(points=points("4:3/1", "5:3/1"), cuda_graphs=True)
        generator = Generator(config, device, beat=lambda: None)
        _Server(orders, config, place, Heartbeats(1), generator, device).run()

    on_ranks(tmp_path, config, work)
    found = served.read(tmp_path)
    assert found is not None
    assert found.cuda_graphs == (fails_on is None)
    assert len(found.points) == 2


@pytest.mark.parametrize("family", ["moe", "t5"])
def test_other_families_are_served_over_a_pipeline(family: str, tmp_path: Path) -> None:
    serving = serve(tmp_path, ["6:4/2"], **FAMILIES[family], **PP2)
    assert serving.names == ["6:4/2"]
    assert ("encoder" in serving.measured.kernels["cache"]) == (family == "t5")


def test_a_trained_model_is_served_and_another_is_not(tmp_path: Path) -> None:
    train(tmp_path / "trained", trainer__max_steps=2)
    checkpoint = str(tmp_path / "trained")
    assert serve(tmp_path / "good", ["4:3/1"], orders__checkpoint=checkpoint, **PP2).names == ["4:3/1"]
    orders = ServingOrders(points=points("4:3/1"), checkpoint=checkpoint)
    bad = start(tmp_path / "bad", orders, model__ffn_hidden_size=128)
    assert bad.wait() == 1
    (failure,) = bad.run.failures
    assert failure.kind is FailureKind.INVALID
    assert "decoder.layers.mlp.linear_fc1.weight is 4×256×64 there, and 4×128×64 in this config" in failure.message


def test_a_point_beyond_the_targets_ends_its_lengths(tmp_path: Path) -> None:
    targets = Targets(max_ttft_ms=1e-6, percentile=99)
    named = ["4:3/1", "4:3/2", "4:3/4", "6:3/1"]
    serving = serve(tmp_path, named, orders__stops_early=True, orders__targets=targets)
    assert serving.names == ["4:3/1", "6:3/1"]
    assert serving.measured.skipped == ("4:3/2", "4:3/4")
    without = serve(tmp_path, named[:2], orders__targets=targets)
    assert without.names == named[:2]


def test_no_point_but_the_first_is_begun_when_time_is_over(tmp_path: Path) -> None:
    serving = serve(tmp_path, ["4:3/1", "4:3/2"], orders__max_seconds=1e-3)
    assert serving.names == ["4:3/1"]
    assert not serving.measured.skipped
    assert "not begun after 0.001 s: 4:3/2" in (tmp_path / "logs" / "rank-0.log").read_text()


def disturbed(monkeypatch: pytest.MonkeyPatch, owner: str, name: str, rank: int, act: Callable[[], None]) -> None:
    """Has this rank do something before a call for a batch of 2: of `Generator.open`, or of `Cache.add`."""
    import torch  # noqa: PLC0415 (heavy)

    from hptool.worker import cached_attention, generation  # noqa: PLC0415 (imports megatron)

    kind: Any = {"Generator": generation.Generator, "Cache": cached_attention.Cache}[owner]
    original = getattr(kind, name)

    def call(self: Any, *given: Any) -> Any:
        batch = given[0] if owner == "Generator" else self.max_batch_size
        if batch == 2 and torch.distributed.get_rank() == rank:
            act()
        return original(self, *given)

    monkeypatch.setattr(kind, name, call)


def run_out() -> None:
    """As a device's allocator does."""
    import torch  # noqa: PLC0415 (heavy)

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def kill() -> None:
    """As the kernel does."""
    os.kill(os.getpid(), signal.SIGKILL)


NAMED = ["4:3/1", "4:3/2", "4:3/4", "5:3/1"]


@pytest.mark.parametrize(
    ("owner", "name", "layout"),
    [
        ("Generator", "open", TP2),  # agreed upon, and the ranks go on
        ("Cache", "add", {}),  # alone, and it goes on
        ("Cache", "add", PP2),  # the other rank waits for it: both are started anew
    ],
)
def test_a_point_out_of_memory_costs_itself_and_the_larger_ones(
    owner: str, name: str, layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbed(monkeypatch, owner, name, len(layout) // 2, run_out)
    serving = serve(tmp_path, NAMED, **layout)
    assert serving.names == ["4:3/1", "5:3/1"]
    assert serving.failed == {"4:3/2": "oom"}
    assert serving.measured.skipped == ("4:3/4",)
    assert not serving.run.failures
    died = ["Traceback" in log.read_text() for log in (tmp_path / "logs").glob("*.log")]
    assert any(died) == (name == "add" and bool(layout))


def test_a_killed_rank_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed(monkeypatch, "Cache", "add", 1, kill)
    serving = serve(tmp_path, NAMED, **TP2)
    assert serving.names == ["4:3/1"]
    assert serving.failed == {"4:3/2": "crash"}
    assert "rank 1 was killed by SIGKILL" in serving.measured.failures[0].message
    assert serving.measured.skipped == ()


def test_a_rank_that_dies_of_the_first_point_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed(monkeypatch, "Cache", "add", 0, kill)
    serving = start(tmp_path, ServingOrders(points=points("4:3/2", "5:3/1")))
    assert serving.wait() == 1
    assert [failure.kind for failure in serving.run.failures] == [FailureKind.CRASH]
    assert not (tmp_path / "measurement.json").exists()


def test_a_point_that_hangs_is_ended_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed(monkeypatch, "Cache", "add", 1, lambda: time.sleep(600))
    serving = serve(tmp_path, NAMED, limits={"hang_s": 1.0}, **TP2)
    assert serving.names == ["4:3/1"]
    assert serving.failed == {"4:3/2": "hang"}


def test_a_run_that_is_cancelled_keeps_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed(monkeypatch, "Cache", "add", 0, lambda: time.sleep(600))
    serving = start(tmp_path, ServingOrders(points=points(*NAMED)))
    deadline = time.monotonic() + 30
    while not (tmp_path / ".point").exists() or (tmp_path / ".point").read_text() != "4:3/2":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(serving.run.pid, signal.SIGTERM)
    assert serving.wait() == 128 + signal.SIGTERM
    assert serving.names == ["4:3/1"]


def test_another_run_in_the_directory_begins_anew(tmp_path: Path) -> None:
    serve(tmp_path, ["4:3/1", "4:3/2"])
    assert serve(tmp_path, ["5:3/1"]).names == ["5:3/1"]


def test_memory_limits_hold(tmp_path: Path) -> None:
    serving = serve(
        tmp_path, ["4:3/1", "4:16000/64", "5:3/1"], limits={"memory_gib_per_rank": 1.0}, **FAMILIES["llama"]
    )
    assert serving.names == ["4:3/1", "5:3/1"]
    assert serving.failed == {"4:16000/64": "oom"}
    assert "memory" in serving.measured.failures[0].message


def test_by_hand_the_command_serves_what_lies_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(files.yaml_text(tiny_document(**TP2)))
    (tmp_path / SERVING).write_text(files.json_text(ServingOrders(points=points("4:3/1"))))
    result = worker(str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "megatron-core static, hptool's loop" in result.stdout
    assert "4:3/1: " in result.stdout
    assert (tmp_path / "out" / "measurement.json").exists()


@pytest.mark.parametrize(
    ("changes", "orders", "said"),
    [
        (FAMILIES["bert"], {}, "model.bert_binary_head: True given, allowed is null: BERT writes no text to serve"),
        ({"trainer__devices": 8, "model__tensor_model_parallel_size": 8}, {}, "a divisor of num_attention_heads (4)"),
        (
            {**FAMILIES["llama"], "trainer__devices": 4, "model__tensor_model_parallel_size": 4},
            {},
            "model.tensor_model_parallel_size: 4 given, allowed is a divisor of num_query_groups (2)",
        ),
        (
            {"trainer__devices": 3, "model__pipeline_model_parallel_size": 3},
            {},
            "model.pipeline_model_parallel_size: 3 given, allowed is a divisor of the 4 layers",
        ),
        ({"trainer__devices": 2}, {}, "trainer.devices: 2 given, allowed is TP·PP (1) on all nodes together"),
        (
            {**PP2, "model__virtual_pipeline_model_parallel_size": 2},
            {},
            "model.virtual_pipeline_model_parallel_size: 2 given, allowed is 1 for serving",
        ),
        ({"trainer__devices": 2, "model__context_parallel_size": 2}, {}, "model.context_parallel_size: 2 given"),
        (
            {**FAMILIES["moe"], "trainer__devices": 2, "model__expert_model_parallel_size": 2},
            {},
            "model.expert_model_parallel_size: 2 given, allowed is 1 for serving",
        ),
        ({}, {"cuda_graphs": True}, "cuda_graphs: True given, allowed is false on a CPU: CUDA graphs need a GPU"),
        (
            {**FAMILIES["moe"], "trainer__accelerator": "gpu"},
            {"cuda_graphs": True},
            "cuda_graphs: True given, allowed is false with experts",
        ),
        (
            {},
            {"points": points("30:4/1")},
            "points: '30:4/1' given, allowed is at most the 32 places of model.max_position_embeddings",
        ),
        (
            FAMILIES["t5"],
            {"points": points("8:40/1")},
            "points: '8:40/1' given, allowed is at most the 32 places of model.decoder.max_position_embeddings",
        ),
        (
            {"trainer__precision": "bf16", "model__fp8": True, "model__fp8_hybrid": True},
            {},
            "model.fp8: True given, allowed is false for serving",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes: dict[str, Any], orders: dict[str, Any], said: str) -> None:
    asked = ServingOrders(**{"points": points("4:3/1"), **orders})
    with pytest.raises(InputError) as caught:
        refuse_unservable(tiny_config(**changes), asked, "config.yaml")
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_what_is_for_training_alone_is_not_looked_at() -> None:
    changes = {
        "model__global_batch_size": 7,
        "model__sequence_parallel": True,
        "model__activations_checkpoint_granularity": "full",
        "model__apply_rope_fusion": True,
        "trainer__max_steps": 1,
    }
    config = tiny_config(**FAMILIES["llama"], **TP2, **changes)
    refuse_unservable(config, ServingOrders(points=points("30:30/1")), "config.yaml")
    assert not served.serving_config(config).model.sequence_parallel


def test_orders_that_cannot_be_read_are_a_failure_of_the_run(tmp_path: Path) -> None:
    serving = start(tmp_path, ServingOrders(points=points("4:3/1")))
    assert serving.wait() == 0
    (tmp_path / SERVING).write_text('{"points": [], "repeat": 3}')
    with pytest.raises(InputError, match="did you mean repeats"):
        served.read_orders(tmp_path / "config.yaml")


def test_a_failures_message_is_short_and_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    failure = served.failure_of(points("4:3/1")[0], FailureKind.CRASH, f"hf_verysecret {'x' * 9999}")
    assert failure.message.startswith("<masked: HF_TOKEN> xxx")
    assert len(failure.message) == outcome.MESSAGE_LIMIT
