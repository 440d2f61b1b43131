"""The path, once, in order: plan, write, say what it costs, measure, report."""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from hptool import catalogue, cost, files, launch, report
from hptool.campaign import planned_run
from hptool.conduct import Confirm, Venture, asked_lines, conduct
from hptool.cost import Dispatch, Estimate
from hptool.course import Course
from hptool.findings import Search, make_report
from hptool.plan import Plan, SearchRequest, facts_remark, make_plan, read_plan, with_facts_of
from hptool.results import ResultsDirectory
from hptool.timed_runs import timed_run
from hptool.training_agenda import TrainingAgenda
from hptool.watch import MEASURING, Screen, duration, of_directory
from hptool.worker.refusals import refuse_missing_framework, refuse_missing_kernels


def search_train(request: SearchRequest, screen: Screen, confirm: Confirm) -> tuple[report.Report, Path]:
    """Run the search; its report (also written) and its directory.

    Raises InputError, NoFeasibleLayout or LaunchError; a failed run is no error but a row of the report.
    """
    plan = _planned(request, screen)
    course = plan.course
    dispatch, estimate = _cost(plan, course)

    def conclude(results: ResultsDirectory, ended: str | None, notes: Sequence[str]) -> report.Report:
        found = Search(plan=plan, course=course, estimate=estimate, results=results, ended=ended)
        made = make_report(found, notes)
        _write_report(plan, made)
        return made

    venture = Venture(
        directory=plan.directory,
        document=plan.document(),
        agenda=TrainingAgenda(plan, course),
        dispatch=dispatch,
        cost_lines=_cost_lines(plan, dispatch, estimate),
        resume=request.resume,
        dry_run=request.dry_run,
        write=lambda results: _write_plan(plan, course, results, screen),
        conclude=conclude,
    )
    return conduct(venture, screen, confirm), plan.directory


def _planned(request: SearchRequest, screen: Screen) -> Plan:
    """What is to be searched, with remarks on what it rests on; InputError where its runs could not start."""
    plan = make_plan(request)
    if request.resume:
        begun = with_facts_of(plan, plan.directory)
        if begun is not plan:
            screen.say(
                f"the facts of {plan.cluster.gpu.name} have changed: this search goes on with those it began with"
            )
            plan = begun
    for remark in (facts_remark(plan.cluster), catalogue.remark(request.model)):
        if remark is not None:
            screen.say(remark)
    if not request.dry_run:
        refuse_missing_framework()
        if plan.cluster.scheduler == "local":  # elsewhere the nodes may have what this machine has not
            refuse_missing_kernels(plan.config)
    return plan


def scripts(directory: Path, made: report.Report) -> list[Path]:
    """The batch scripts that run the best predicted layouts by hand, best first; none where there is no Slurm."""
    paths = (directory / "scripts" / expected.layout.name / "run.sh" for expected in made.expected)
    return [path for path in paths if path.is_file()]


def read_report(directory: Path) -> report.Report:
    """The report of the search in a directory, made anew from its records, whether or not it is at work.

    It is also written, where it can be.
    """
    plan = read_plan(directory)
    course = plan.course
    _, estimate = _cost(plan, course)
    results = ResultsDirectory(directory)
    doing = of_directory(results).doing
    ended = "still measuring; the winner may change" if doing == MEASURING else doing
    made = make_report(Search(plan=plan, course=course, estimate=estimate, results=results, ended=ended))
    with contextlib.suppress(OSError):  # somebody else's search, or an archived one
        _write_report(plan, made)
    return made


def _write_report(plan: Plan, made: report.Report) -> None:
    """`report.html`, `report.csv`, and `optimal.yaml` where something was measured."""
    if made.winner is not None:
        config = plan.config.with_layout(made.winner.layout)
        files.write_text(ResultsDirectory(plan.directory).optimal, files.yaml_text(config.document()))
    report.write(made, plan.directory)


def _cost(plan: Plan, course: Course) -> tuple[Dispatch, Estimate]:
    request = plan.request
    return cost.choose(
        course,
        plan.predictions.ranking(),
        plan.cluster,
        submit=request.submit,
        parallel=request.parallel,
        minutes=request.max_minutes_per_run,
    )


def _cost_lines(plan: Plan, dispatch: Dispatch, estimate: Estimate) -> list[str]:
    """What the search may cost, and what the scheduler will be asked for, before the first job."""
    request = plan.request
    if request.strategy == "adaptive":
        layouts = f"up to {estimate.layouts} of {estimate.grid_layouts} layouts, as many as pay"
    else:
        layouts = f"{estimate.layouts} of {estimate.grid_layouts} layouts"
    budget = (
        f"; no more than {request.budget_gpu_hours:g} by your budget" if request.budget_gpu_hours is not None else ""
    )
    cost_line = (
        f"cost: {layouts}: if predictions hold, some {estimate.usual_gpu_hours:.2g} and at most "
        f"{estimate.gpu_hours:.2g} GPU hours{budget}, and {duration(estimate.wall_s)} at most without queueing. "
        f"Timing all {estimate.grid_layouts} would take {estimate.grid_gpu_hours:.3g} GPU hours"
    )
    return [cost_line, *(asked_lines(dispatch, estimate) if plan.cluster.scheduler == "slurm" else [])]


def _write_plan(plan: Plan, course: Course, results: ResultsDirectory, screen: Screen) -> None:
    total = len(plan.candidates.layouts)
    screen.say(
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
        for row in plan.predictions.ranking()[: plan.planned_runs].tolist():
            layout, nodes = plan.predictions.layouts.row(row), int(course.nodes[row])
            # Everything for this run in one folder, which is there before Slurm opens its log in it.
            folder = results.path / "scripts" / layout.name
            timed = timed_run(
                plan.config,
                layout,
                nodes=nodes,
                steps=course.stages[-1],
                max_minutes=plan.request.max_minutes_per_run,
            )
            files.write_text(folder / "config.yaml", files.yaml_text(timed.document()))
            run = planned_run(results, layout.name, nodes=nodes, max_minutes=plan.request.max_minutes_per_run)
            parameters = launch.run_parameters(run, plan.cluster)
            files.write_text(folder / "run.sh", launch.batch_script(parameters, folder / "config.yaml", folder))
