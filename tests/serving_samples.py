"""Points of a serving search, measured and failed, and reports of them, to test with."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hptool import files
from hptool.candidates import Rejection
from hptool.measurement import Failure, FailureKind, Percentiles, PointFailure, ServedPoint, ServingMeasurement
from hptool.report import Spent
from hptool.serving import Lengths, ServingLayout, Targets
from hptool.serving_report import Answer, ExpectedPoint, PointPrediction, ServingReport, ServingRow, Trust

SHORT, LONG = Lengths(input_len=60, output_len=20), Lengths(input_len=512, output_len=128)
ONE, TWO, GRAPHS = ServingLayout(), ServingLayout(tp=2), ServingLayout(tp=2, cuda_graphs=True)
LIMITED = Targets(max_latency_ms=260.0, max_ttft_ms=50.0, percentile=95)


def served(layout: ServingLayout, batch: int, latency_ms: float, lengths: Lengths = SHORT) -> ServedPoint:
    """Five repeats around this latency, a tenth of it for the first token."""
    rate = 1000 * batch * lengths.output_len / latency_ms
    return ServedPoint(
        batch=batch,
        input_len=lengths.input_len,
        output_len=lengths.output_len,
        repeats=5,
        warmups=2,
        ttft_ms=_around(latency_ms / 10),
        tpot_ms=_around(0.9 * latency_ms / (lengths.output_len - 1)),
        latency_ms=_around(latency_ms),
        latency_low_ms=0.99 * latency_ms,
        latency_high_ms=1.02 * latency_ms,
        tokens_per_s=rate,
        tokens_per_s_per_gpu=rate / layout.gpus,
        tokens_per_s_per_user=rate / batch,
        peak_memory_gib=1.5 + batch / 64,
    )


def _around(p50: float) -> Percentiles:
    return Percentiles(p50=p50, p95=1.05 * p50, p99=1.1 * p50)


def measurement(layout: ServingLayout, *points: ServedPoint) -> ServingMeasurement:
    """A run of this layout on a GPU that gave these points."""
    return ServingMeasurement(
        points=points,
        engine="megatron-core",
        cuda_graphs=layout.cuda_graphs,
        gpus=layout.gpus,
        startup_s=20.0,
        memory_kind="max allocated",
        max_reserved_gib=3.0,
        device_used_gib=4.0,
        device_memory_gib=80.0,
        num_parameters=925_056,
        device="a GPU",
        precision=layout.precision,
    )


def predicted(latency_ms: float, lengths: Lengths = SHORT) -> PointPrediction:
    """As `served` has them."""
    ttft_ms, tpot_ms = latency_ms / 10, 0.9 * latency_ms / (lengths.output_len - 1)
    return PointPrediction(latency_ms=latency_ms, ttft_ms=ttft_ms, tpot_ms=tpot_ms, memory_gib=1.7, p_fit=0.97)


def row(layout: ServingLayout, batch: int, latency_ms: float, lengths: Lengths = SHORT, **others: Any) -> ServingRow:
    """A measured point that was predicted to take a fifth longer, and in the end a twentieth."""
    point = served(layout, batch, latency_ms, lengths)
    values: dict[str, Any] = {"meets_targets": True, **others}
    return ServingRow(
        layout=layout,
        lengths=lengths,
        batch=batch,
        run=layout.name,
        log_path=f"runs/{layout.name}/logs",
        predicted=predicted(1.2 * latency_ms, lengths),
        learned=predicted(1.05 * latency_ms, lengths),
        measurement=measurement(layout, point),
        served=point,
        **values,
    )


def failed(
    layout: ServingLayout, batch: int, failure: Failure | PointFailure | None = None, lengths: Lengths = SHORT
) -> ServingRow:
    """A point that gave nothing."""
    name = f"{lengths.name}/{batch}"
    return ServingRow(
        layout=layout,
        lengths=lengths,
        batch=batch,
        run=layout.name,
        log_path=f"runs/{layout.name}/logs",
        predicted=predicted(500.0, lengths),
        failure=failure or PointFailure(name=name, kind=FailureKind.OOM, message="out of memory"),
    )


def rows() -> list[ServingRow]:
    """Two layouts that differ, one that hardly does, one point outside the limits, and failures of two runs."""
    crash = Failure(kind=FailureKind.CRASH, rank=1, message="no kernel", log_path="runs/tp2/logs/rank-1.log")
    return [
        row(ONE, 8, 240.0, is_pareto=True),
        row(TWO, 16, 241.0),
        row(TWO, 8, 150.0, is_pareto=True),
        row(TWO, 1, 100.0, is_pareto=True),
        row(ONE, 1, 200.0),
        row(ONE, 16, 400.0, meets_targets=False),
        failed(ONE, 64),
        failed(GRAPHS, 1, crash),
        failed(GRAPHS, 8, crash),
    ]


def report(rows: Sequence[ServingRow], lengths: Sequence[Lengths] = (SHORT,), **others: Any) -> ServingReport:
    """A search for throughput of the tiny GPT-3 on two CPU ranks that ended with these points, the best first."""
    best = {x: next((r for r in rows if r.lengths == x and r.meets_targets), None) for x in lengths}
    measured = {x: next((r for r in rows if r.lengths == x and r.served), None) for x in lengths}
    made = ServingReport(
        model="gpt3_tiny",
        num_parameters=925_056,
        cluster=files.read_cluster("local"),
        nodes=1,
        engine="megatron-core",
        objective="throughput-per-gpu",
        targets=LIMITED,
        layouts=4,
        points=24,
        rejections=(Rejection(reason="tp does not divide the 4 heads", count=2, example="tp3-pp1-bf16"),),
        rows=rows,
        answers=[Answer(lengths=x, best=best[x], closest=None if best[x] else measured[x]) for x in lengths],
        expected=[
            ExpectedPoint(layout=layout, lengths=SHORT, batch=8, predicted=predicted(ms))
            for layout, ms in ((TWO, 155.0), (ONE, 245.0))
        ],
        trust=Trust(points=6, before=0.2, after=0.05)
        if measured[lengths[0]]
        else Trust(points=0, before=None, after=None),
        spent=Spent(gpu_hours=0.03, runs=3, grid_layouts=4, grid_gpu_hours=0.5, ended="done: tested"),
        notes=("Latencies are of whole batches.",),
        best_path="results/demo/best.yaml" if any(best.values()) else None,
        serve_command="hptool serve --config results/demo/best.yaml" if any(best.values()) else None,
        skipped={"larger batches of one that left the limits": 5},
    )
    return replace(made, **others)
