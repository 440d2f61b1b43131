"""Measurements, failures and reports to test with."""

from pathlib import Path

from hptool import files
from hptool.candidates import Layout, Rejection, SearchSpace, enumerate_layouts
from hptool.measurement import Failure, FailureKind, Measurement
from hptool.predict import predict, stack
from hptool.report import Full, Report, Row, Spent, Training
from hptool.results import OutcomeRecord, Submission
from tests.conftest import preset_config
from tests.test_candidates import LIMITS


def measurement(step_time_s: float = 0.5, tflops: float = 0.01) -> Measurement:
    """Three steps around a median."""
    return Measurement(
        step_times_s=(step_time_s * 1.1, step_time_s, step_time_s * 0.9),
        step_time_s=step_time_s,
        step_time_low_s=step_time_s * 0.9,
        step_time_high_s=step_time_s * 1.1,
        is_steady=True,
        warmup_steps=2,
        startup_s=3.0,
        losses=(6.3, 6.2, 6.1, 6.0, 5.9),
        peak_memory_gib=0.4,
        memory_kind="max resident",
        gpus=2,
        gbs=8,
        seq_length=128,
        model_flops_per_step=1e10,
        model_flops_convention="as tested",
        model_tflops_per_gpu=tflops,
        tokens_per_s_per_gpu=1024 / step_time_s,
        num_parameters=925_056,
        device="a CPU",
        precision="fp32",
        kernels={"layers": "Megatron-core local", "attention": "torch SDPA"},
        versions={"torch": "2.13.0"},
    )


def row(layout: Layout, outcome: Measurement | Failure) -> Row:
    """A run of this layout that ended so."""
    return Row(
        layout=layout,
        nodes=1,
        gpus=2,
        gbs=8,
        predicted_step_time_s=0.45,
        predicted_model_tflops_per_gpu=0.011,
        predicted_memory_gib=0.41,
        log_path=f"runs/{layout.name}/logs",
        measurement=outcome if isinstance(outcome, Measurement) else None,
        failure=outcome if isinstance(outcome, Failure) else None,
        full=Full(
            step_time_s=outcome.step_time_s,
            error=0.02,
            model_tflops_per_gpu=outcome.model_tflops_per_gpu,
            predicted_step_time_s=0.45,
        )
        if isinstance(outcome, Measurement)
        else None,
        gpu_hours=0.01,
    )


def sample_report(rows: list[Row], notes: tuple[str, ...] = ()) -> Report:
    """A search of the tiny GPT-3 on two CPU ranks with these runs."""
    cluster = files.read_cluster("local")
    config = preset_config("tiny", cluster, 1)
    framework = files.read_framework("hptool-worker")
    candidates = enumerate_layouts(SearchSpace(tp=(1, 2), pp=(1, 2), mbs=(1, 2)), config.workload, LIMITS)
    rows = sorted(rows, key=lambda r: -r.measurement.model_tflops_per_gpu if r.measurement else 0.0)
    winner = next((r for r in rows if r.measurement), None)
    return Report(
        model="gpt3_tiny",
        num_parameters=config.shape.num_parameters,
        cluster=cluster,
        nodes=1,
        gbs=8,
        seq_length=128,
        precision="fp32",
        peak_tflops=0.095,
        candidates=len(candidates.layouts),
        rejections=(Rejection(reason="tp·pp·cp does not divide the 2 GPUs", count=2, example="tp2-pp2"),),
        rows=rows,
        planned_runs=4,
        predictions=predict(candidates.layouts, stack([(config.workload, cluster, framework)])),
        spent=Spent(gpu_hours=0.03, runs=3, grid_layouts=4, grid_gpu_hours=0.5, ended="done: tested"),
        training=Training(
            steps=1000,
            predicted_days=0.0052,
            days=winner.full.step_time_s * 1000 / 86400 if winner and winner.full else None,
            days_error=0.02 if winner else None,
        ),
        notes=notes,
        optimal_path=str(Path("results/demo/optimal.yaml")) if winner else None,
        train_command="hptool train --config results/demo/optimal.yaml" if winner else None,
    )


def submission(name: str, run: str | None = None, job_id: str | None = None) -> Submission:
    """A run of this layout on one node of two GPUs."""
    return Submission(
        name=name,
        run=run or name,
        token=f"token-of-{run or name}",
        nodes=1,
        gpus=2,
        steps=8,
        predicted_step_time_s=0.45,
        job_id=job_id,
    )


def record(name: str, outcome: Measurement | Failure, *, run: str | None = None, job_id: str = "7") -> OutcomeRecord:
    """What came of such a run after a minute."""
    return OutcomeRecord(
        name=name,
        run=run or name,
        job_id=job_id,
        nodes=1,
        gpus=2,
        steps=8,
        ran_s=60.0,
        measurement=outcome if isinstance(outcome, Measurement) else None,
        failure=outcome if isinstance(outcome, Failure) else None,
    )


def failure(kind: FailureKind = FailureKind.OOM, message: str = "out of memory") -> Failure:
    """A failure of rank 1."""
    return Failure(kind=kind, rank=1, message=message, log_path="runs/x/logs/rank-1.log")
