"""The path, once, in order: plan, write, measure, report."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from hptool import catalogue, files, launch, report, strategy, train
from hptool.campaign import Say, measure, planned_run
from hptool.candidates import Layouts
from hptool.plan import Plan, SearchRequest, make_plan, run_config
from hptool.predict import predict, stack
from hptool.results import ResultsDirectory
from hptool.worker.refusals import refuse_missing_framework


def search_train(request: SearchRequest, say: Say) -> tuple[report.Report, Path]:
    """Run the search; its report (also written) and its directory.

    Raises InputError, NoFeasibleLayout or LaunchError; a failed run is no error but a row of the report.
    """
    plan = make_plan(request)
    if (remark := catalogue.remark(request.model)) is not None:
        say(remark)
    if not request.dry_run:
        refuse_missing_framework()
    results = ResultsDirectory(plan.directory)
    try:
        results.begin(plan.document(), resume=request.resume)
        _write_plan(plan, results, say)
        notes: list[str] = []
        if request.dry_run:
            notes.append("Dry run: everything was written, nothing was launched.")
        else:
            measure(plan, results, say)
        made = make_report(plan, results, notes)
        report.write(made, plan.directory)
    finally:
        results.close()
    return made, plan.directory


def _write_plan(plan: Plan, results: ResultsDirectory, say: Say) -> None:
    total = len(plan.candidates.layouts)
    say(
        f"{total} layouts can start, {sum(r.count for r in plan.candidates.rejections)} cannot; "
        f"{plan.predictions.likely_to_fit} are expected to fit into memory"
    )
    files.write_text(results.base_config, files.yaml_text(plan.config.document()))
    results.write_candidates(
        (layout.name, files.yaml_text(plan.config.with_layout(layout).document()))
        for layout in plan.candidates.layouts.rows()
    )
    files.write_text(results.predictions, report.predictions_csv(plan.predictions))
    if plan.cluster.scheduler == "slurm":
        shutil.rmtree(results.path / "scripts", ignore_errors=True)  # of an earlier limit
        for row in strategy.propose(plan.predictions, (), plan.request.limit_search_runs):
            layout = plan.predictions.layouts.row(row)
            # Everything for this run in one folder, which is there before Slurm opens its log in it.
            folder = results.path / "scripts" / layout.name
            timed = run_config(plan.config, layout, plan.request)
            files.write_text(folder / "config.yaml", files.yaml_text(timed.document()))
            parameters = launch.run_parameters(planned_run(plan, results, layout), plan.cluster)
            files.write_text(folder / "run.sh", launch.batch_script(parameters, folder / "config.yaml", folder))


def make_report(plan: Plan, results: ResultsDirectory, notes: Sequence[str]) -> report.Report:
    """Everything known about the search, and `optimal.yaml` where something was measured."""
    rows = []
    layouts = {layout.name: layout for layout in plan.predictions.layouts.rows()}
    notes = list(notes)
    for name, record in results.outcomes().items():
        if name not in layouts:
            continue
        layout = layouts[name]
        config = run_config(plan.config, layout, plan.request)
        expected = predict(Layouts.of([layout]), stack([(config.workload, plan.cluster, plan.framework)]))
        rows.append(
            report.Row(
                layout=layout,
                nodes=config.trainer.num_nodes,
                gpus=config.gpus,
                gbs=config.model.global_batch_size,
                predicted_step_time_s=float(expected.step_time_s[0]),
                predicted_model_tflops_per_gpu=float(expected.model_tflops_per_gpu[0]),
                predicted_memory_gib=float(expected.memory_gib[0]),
                log_path=(record.failure and record.failure.log_path) or str(results.run_directory(name) / "logs"),
                measurement=record.measurement,
                failure=record.failure,
            )
        )
    rows = report.ranked(rows)
    if any(row.gbs != plan.config.model.global_batch_size for row in rows):
        notes.append(
            f"Runs used the fewest nodes for their layout instead of {plan.nodes}; each replica worked through the "
            f"same microbatches as in the full training with its global batch of "
            f"{plan.config.model.global_batch_size}, so the batch of a run is smaller by its missing replicas. "
            "Communication between the missing replicas is not in the measured times."
        )
    if not plan.config.model.data.data_prefix:
        notes.append(
            "The winning config trains on synthetic tokens until model.data.data_prefix, or --data, names a .bin/.idx "
            "set or a text."
        )
    if plan.config.model.rampup_batch_size is not None:
        notes.append("Runs trained on the full global batch; hptool train ramps it up as model.rampup_batch_size says.")
    best = next((row.layout for row in rows if row.measurement), None)
    if best is not None:
        files.write_text(results.optimal, files.yaml_text(plan.config.with_layout(best).document()))
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
        notes=notes,
        optimal_path=str(results.optimal) if best is not None else None,
        train_command=_train_command(plan, results) if best is not None else None,
    )


def _train_command(plan: Plan, results: ResultsDirectory) -> str:
    """The command that trains `optimal.yaml`, where the search measured."""
    cluster = plan.request.cluster if plan.cluster.scheduler == "slurm" else None
    return train.command(results.optimal, results.path / "training", cluster)
