"""What a search found: its records, its plan and what was learnt, as the report's rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from hptool import report, train
from hptool.campaign import spent_gpu_hours
from hptool.candidates import Layouts
from hptool.cost import Estimate
from hptool.course import Course, Standing, standing
from hptool.plan import Plan, facts_remark
from hptool.predict import predict, stack
from hptool.results import OutcomeRecord, ResultsDirectory
from hptool.timed_runs import timed_run
from hptool.training_agenda import rows_of, timings_of
from hptool.units import SECONDS_PER_DAY


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Search:
    """A search as it stands: its plan and course, what it was to cost, its files, and why it ended."""

    plan: Plan
    course: Course
    estimate: Estimate
    results: ResultsDirectory
    ended: str | None = None


def make_report(search: Search, notes: Sequence[str] = ()) -> report.Report:
    """Everything known about the search."""
    plan, results, estimate = search.plan, search.results, search.estimate
    records = results.outcomes()
    row_of = rows_of(search.course)
    now = standing(search.course, timings_of(search.course, row_of, records.values()))
    by_layout: dict[int, list[OutcomeRecord]] = {}
    for record in records.values():
        if record.name in row_of:
            by_layout.setdefault(row_of[record.name], []).append(record)
    failed = sorted(by_layout.keys() - set(now.ranking), key=lambda row: plan.predictions.layouts.row(row).name)
    rows = [_row(search, now, row, by_layout[row]) for row in (*now.ranking, *failed)]
    best = next((row for row in rows if row.measurement), None)
    return report.Report(
        model=plan.config.run.name,
        num_parameters=plan.config.shape.num_parameters,
        cluster=plan.cluster,
        nodes=plan.nodes,
        gbs=plan.config.model.global_batch_size,
        seq_length=plan.config.shape.seq_length,
        precision=plan.config.precision,
        peak_tflops=plan.cluster.gpu.peak_tflops[plan.config.precision],
        candidates=len(plan.candidates.layouts),
        rejections=plan.candidates.rejections,
        rows=rows,
        planned_runs=plan.planned_runs,
        predictions=plan.predictions,
        spent=report.Spent(
            gpu_hours=spent_gpu_hours(plan.cluster, results, records.values()),
            runs=len(records),
            grid_layouts=estimate.grid_layouts,
            grid_gpu_hours=estimate.grid_gpu_hours,
            ended=search.ended,
        ),
        training=_training(plan, best),
        notes=[*notes, *_notes(plan, best, rows)],
        optimal_path=str(results.optimal) if best is not None else None,
        train_command=_train_command(plan, results) if best is not None else None,
    )


def _row(search: Search, now: Standing, row: int, tries: Sequence[OutcomeRecord]) -> report.Row:
    """One layout: its longest timing, or what became of it."""
    plan = search.plan
    layout = plan.predictions.layouts.row(row)
    small = [r for r in tries if r.nodes == search.course.nodes[row]] or tries
    measured = [r for r in small if r.measurement] if row in now.timings else []
    shown = max(measured, key=_weight) if measured else small[-1]
    config = timed_run(
        plan.config,
        layout,
        nodes=shown.nodes,
        steps=shown.steps,
        max_minutes=plan.request.max_minutes_per_run,
    )
    expected = predict(Layouts.of([layout]), stack([(config.workload, plan.cluster, plan.framework)]))
    return report.Row(
        layout=layout,
        nodes=shown.nodes,
        gpus=config.gpus,
        gbs=config.model.global_batch_size,
        predicted_step_time_s=float(expected.step_time_s[0]),
        predicted_model_tflops_per_gpu=float(expected.model_tflops_per_gpu[0]),
        predicted_memory_gib=float(expected.memory_gib[0]),
        log_path=(shown.failure and shown.failure.log_path) or str(search.results.run_directory(shown.run) / "logs"),
        measurement=shown.measurement,
        failure=shown.failure,
        full=_full(plan, now, row, tries) if shown.measurement else None,
        disagreeing_s=tuple(r.measurement.step_time_s for r in small if r.measurement)
        if row in now.disagreeing
        else (),
        runs=len(tries),
        gpu_hours=sum(r.gpu_hours for r in tries),
        is_equal_to_best=row in now.equals,
    )


def _weight(record: OutcomeRecord) -> tuple[int, float]:
    """As the course weighs timings: the longest counts, and of equally long ones the fastest."""
    return record.steps, -record.measurement.step_time_s if record.measurement else 0.0


def _full(plan: Plan, now: Standing, row: int, tries: Sequence[OutcomeRecord]) -> report.Full:
    """The measured layout on all nodes."""
    target = plan.predictions
    step_time_s = float(now.outlook.step_time_s[row])
    at_scale = None
    if (timing := now.at_scale.get(row)) is not None and timing.nodes != now.timings[row].nodes:
        at_scale = next(r for r in tries if r.measurement and (r.nodes, r.steps) == (timing.nodes, timing.steps))
    flops = float(target.model_tflops_per_gpu[row] * target.step_time_s[row])
    return report.Full(
        step_time_s=step_time_s,
        error=float(now.outlook.step_time_error[row]),
        model_tflops_per_gpu=flops / step_time_s,
        predicted_step_time_s=float(target.step_time_s[row]),
        at_scale_nodes=at_scale.nodes if at_scale else None,
        at_scale=at_scale.measurement if at_scale else None,
    )


def _training(plan: Plan, best: report.Row | None) -> report.Training:
    steps = plan.config.trainer.max_steps
    first = int(plan.predictions.ranking()[0])
    full = best.full if best else None
    return report.Training(
        steps=steps,
        predicted_days=steps * float(plan.predictions.step_time_s[first]) / SECONDS_PER_DAY,
        days=steps * full.step_time_s / SECONDS_PER_DAY if full else None,
        days_error=full.error if full else None,
    )


def _notes(plan: Plan, best: report.Row | None, rows: Sequence[report.Row]) -> list[str]:
    notes = [] if (remark := facts_remark(plan.cluster)) is None else [f"Predictions use {remark}."]
    if any(row.gbs != plan.config.model.global_batch_size for row in rows):
        notes.append(
            f"Runs used fewer than {plan.nodes} nodes where their layout allows it; each replica worked through the "
            f"same microbatches as in the full training with its global batch of "
            f"{plan.config.model.global_batch_size}, so the batch of a run is smaller by its missing replicas. The "
            f"step on {plan.nodes} nodes is the measured one and, predicted on top, what the missing replicas add."
        )
    if best and not plan.config.model.data.data_prefix:
        notes.append(
            "The winning config trains on synthetic tokens until model.data.data_prefix, or --data, names a .bin/.idx "
            "set or a text."
        )
    if best and best.nodes == plan.request.verify_nodes:
        notes.append(f"Runs used {best.nodes} nodes already, so none had to be repeated at scale.")
    if plan.config.model.rampup_batch_size is not None:
        notes.append("Runs trained on the full global batch; hptool train ramps it up as model.rampup_batch_size says.")
    return notes


def _train_command(plan: Plan, results: ResultsDirectory) -> str:
    """The command that trains `optimal.yaml`, where the search measured."""
    cluster = plan.request.cluster if plan.cluster.scheduler == "slurm" else None
    return train.command(results.optimal, results.path / "training", cluster)
