"""Measuring itself, on the CPU: clocks that count right, inputs that differ, and everything that ranks measure."""

import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch

from hptool import files
from hptool.predict import curves
from hptool.predict.curves import Benchmarks
from hptool.units import GB, MIB, MICRO, TERA
from hptool.worker import collectives, microbenchmarks, supervisor
from hptool.worker.microbenchmarks import Clock, Pool
from tests.worker.runs import tiny_document

CPU = torch.device("cpu")

#: A core's GEMMs reach 3 TFLOP/s at most (two AVX-512 units at 5 GHz give 0.32), and its memory 1 TB/s.
FASTEST_FLOPS = 3 * TERA
FASTEST_BYTES = 1000 * GB


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured in a few seconds: one small shape of each kind, three repetitions."""
    layer = {"hidden": 64, "ffn": 256, "heads": 2, "length": 64, "batch": 1}
    changes = {
        "_POINT_S": {"cpu": 0.0},
        "_POOL_BYTES": {"cpu": MIB},
        "_COPY_BYTES": {"cpu": MIB},
        "_LAYERS": {"cpu": (layer,)},
        "_LINEAR": {"cpu": ((64, 128, 64),)},
        "_LENGTHS": (128, 64, 32),
        "_ATTENTION_TOKENS": {"cpu": 64},
    }
    for name, value in changes.items():
        monkeypatch.setattr(microbenchmarks, name, value)
    monkeypatch.setattr(collectives, "SIZES", {"cpu": (65_536, 1024, 16_384)})


def test_a_clock_times_one_call_and_not_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbenchmarks, "_POINT_S", {"cpu": 0.0})
    seen: list[int] = []

    def run(i: int) -> None:
        seen.append(i)
        time.sleep(1e-4)

    timing = Clock(CPU).time(run)
    assert 1e-4 <= timing.seconds < 1e-2
    last = seen[-1]
    assert last >= 1
    assert seen[-last - 1 :] == list(
        range(last + 1)
    )  # other inputs each time, however many a busy machine lets it take
    assert timing.spread >= 0


def test_a_clock_repeats_no_more_than_it_has_to_after_its_deadline() -> None:
    taken: list[int] = []

    def measure(i: int) -> float:
        taken.append(i)
        return 1.0 + i

    timing = Clock(CPU, deadline=0.0).repeat(measure, guess_s=1e-3)
    assert taken == [0, 1, 2]
    assert timing.seconds == 2.0
    taken.clear()
    Clock(CPU).repeat(measure, guess_s=1e-9)
    assert len(taken) == 40


def test_a_timing_is_the_median_and_the_half_range_between_quartiles() -> None:
    timing = microbenchmarks.timing_of([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert timing.seconds == 3.0
    assert timing.spread == pytest.approx((502 - 1.5) / 2 / 3)


def test_sets_of_inputs_are_random_and_share_nothing() -> None:
    sets = Pool(CPU, torch.float32).sets((128, 512), (512, 256))
    assert len(sets) == 64
    starts = sorted((x.data_ptr(), x.numel() * x.element_size()) for tensors in sets for x in tensors)
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(starts))
    assert [x.shape for x in sets[0]] == [(128, 512), (512, 256)]
    assert all(0.9 < float(x.std()) < 1.1 for tensors in sets[:3] for x in tensors)


def test_inputs_larger_than_the_pool_are_made_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbenchmarks, "_POOL_BYTES", {"cpu": 4096})
    (only,) = Pool(CPU, torch.float32).sets((64, 64), (64, 64))
    assert [x.shape for x in only] == [(64, 64), (64, 64)]


def test_the_gemms_of_a_layer_are_its_flops() -> None:
    # 12·hidden² weights with a MLP of four times the width, each used in three GEMMs for each token.
    gemms = curves.layer_gemms(1024, 4096, 2048)
    flops = sum(2 * gemm["rows"] * gemm["columns"] * gemm["depth"] for gemm in gemms)
    assert flops == 3 * 2 * 12 * 1024**2 * 2048


def run(directory: Path, ranks: int, seconds: float) -> Benchmarks:
    """What so many ranks measure."""
    config = directory / "config.yaml"
    document = tiny_document(trainer__devices=ranks, model__global_batch_size=2 * ranks, model__hidden_dropout=0.1)
    files.write_text(config, files.yaml_text(document))
    job = supervisor.NodeJob(config_path=str(config), run_directory=str(directory), max_minutes=5, benchmark_s=seconds)
    supervisor.run_node(job)
    path = directory / "result.json"
    found: Benchmarks = files.parse_json(path.read_text(), Benchmarks, str(path))
    return found


@pytest.mark.usefixtures("small")
def test_two_ranks_measure_every_kind_plausibly(tmp_path: Path) -> None:
    found = run(tmp_path, 2, math.inf)
    assert found.left_out == ()
    assert (found.nodes, found.gpus_per_node, found.precision) == (1, 2, "fp32")
    assert {"python", "torch", "hptool"} <= set(found.versions)
    kinds = {point.kind for point in found.points}
    alone = {curves.COPY, curves.GEMM, curves.ATTENTION, curves.TINY_LAYER, *curves.KERNELS}
    assert alone | set(curves.RING_SHARE) <= kinds
    for point in found.points:
        assert 0 < point.time_us < 10e6
        size, seconds = point.sizes, point.time_us * MICRO
        if point.kind == curves.GEMM:
            assert 2 * size["rows"] * size["columns"] * size["depth"] / seconds < FASTEST_FLOPS
        elif point.kind == curves.ATTENTION:
            assert curves.attention_flops(point) / seconds < FASTEST_FLOPS
        elif point.kind in curves.RING_SHARE:
            assert (size["ranks"], size["across"]) == (2, 0)
            assert size["bytes"] / seconds < FASTEST_BYTES
        elif point.kind == curves.COPY:
            assert size["bytes"] / seconds < FASTEST_BYTES
    passes = {point.sizes["pass"] for point in found.points if point.kind == curves.GEMM}
    assert passes == {0, 1, 2}
    masks = {point.sizes["causal"] for point in found.points if point.kind == curves.ATTENTION}
    assert masks == {0, 1}
    assert next(size for size in found.points if size.kind == "all_reduce").sizes["bytes"] == 65_536
    fitted = curves.fit_curves(found, files.read_gpu("cpu", "test"), files.read_framework("hptool-worker"))
    assert fitted.launch_overhead_us > 0
    assert fitted.intra_node is not None
    assert 0 < fitted.efficiency.gemm <= 1


@pytest.mark.usefixtures("small")
def test_a_lone_rank_exchanges_nothing(tmp_path: Path) -> None:
    found = run(tmp_path, 1, math.inf)
    assert not {point.kind for point in found.points} & set(curves.RING_SHARE)
    assert curves.GEMM in {point.kind for point in found.points}


@pytest.mark.usefixtures("small")
def test_without_time_everything_is_left_out_and_named(tmp_path: Path) -> None:
    found = run(tmp_path, 2, 0.0)
    assert found.points == ()
    assert "copy bytes 1048576" in found.left_out
    assert len(found.left_out) > 30


@pytest.mark.usefixtures("small")
def test_what_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(microbenchmarks.Operations, "_multiply", refuse)
    found = run(tmp_path, 1, math.inf)
    assert curves.GEMM not in {point.kind for point in found.points}
    assert curves.ATTENTION in {point.kind for point in found.points}
    assert any(name.startswith("gemm rows") for name in found.left_out)


def test_devices_are_printed_for_those_who_must_not_import_torch(capsys: pytest.CaptureFixture[str]) -> None:
    print(json.dumps(microbenchmarks.devices()))  # noqa: T201 (as the module does)
    assert isinstance(json.loads(capsys.readouterr().out), list)
