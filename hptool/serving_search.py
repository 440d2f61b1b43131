"""The path of a search for the fastest way to serve: plan, write, say what it costs, measure, report."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from hptool import catalogue, files, launch, serving_report, serving_strategy
from hptool.campaign import planned_run
from hptool.conduct import Confirm, Venture, asked_lines, conduct
from hptool.cost import LOCAL_OVERHEAD_S, Asked, Dispatch, Estimate, worth_packing
from hptool.errors import InputError
from hptool.facts import Cluster, Submit
from hptool.launch.jobs import IDLE_S
from hptool.plan import facts_remark
from hptool.results import ResultsDirectory
from hptool.serving_agenda import ServingAgenda
from hptool.serving_findings import ServingSearch, make_serving_report, write_best
from hptool.serving_plan import (
    ServingPlan,
    ServingRequest,
    by_promise,
    make_serving_plan,
    read_serving_plan,
    with_facts_of,
)
from hptool.serving_strategy import ServedTrial, ServingView, Sitting
from hptool.strategy import Ending
from hptool.units import SECONDS_PER_HOUR, SECONDS_PER_MINUTE
from hptool.watch import MEASURING, Screen, duration, of_directory
from hptool.worker.refusals import refuse_missing_framework

#: Sittings that are played before a search to see what it may cost; a search that needs more is dearer than any.
_MOST_SITTINGS = 500


def search_inference(
    request: ServingRequest, screen: Screen, confirm: Confirm
) -> tuple[serving_report.ServingReport, Path]:
    """Run the search; its report (also written) and its directory.

    Raises InputError, NoFeasibleLayout or LaunchError; a failed run is no error but a row of the report.
    """
    plan = make_serving_plan(request)
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
        _refuse_missing(request, plan.cluster)
    dispatch, estimate = _cost(plan)

    def conclude(results: ResultsDirectory, ended: str | None, notes: Sequence[str]) -> serving_report.ServingReport:
        return _conclude(ServingSearch(plan=plan, estimate=estimate, results=results, ended=ended), notes)

    venture = Venture(
        directory=plan.directory,
        document=plan.document(),
        agenda=ServingAgenda(plan),
        dispatch=dispatch,
        cost_lines=_cost_lines(plan, dispatch, estimate),
        resume=request.resume,
        dry_run=request.dry_run,
        write=lambda results: _write_plan(plan, results, screen),
        conclude=conclude,
    )
    return conduct(venture, screen, confirm), plan.directory


def _refuse_missing(request: ServingRequest, cluster: Cluster) -> None:
    """InputError where what every run needs is not there, as far as that can be seen from here."""
    if request.engine == "megatron":
        refuse_missing_framework()
    elif cluster.scheduler == "local" and shutil.which(request.command[0]) is None:
        raise InputError(f"--command: {request.command[0]!r} given, allowed is a program that is found on this machine")


def _conclude(search: ServingSearch, notes: Sequence[str] = ()) -> serving_report.ServingReport:
    made = make_serving_report(search, notes)
    write_best(search, made)
    serving_report.write(made, search.results.path)
    return made


def read_serving_report(directory: Path) -> serving_report.ServingReport:
    """The report of the serving search in a directory, made anew from its records, whether or not it is at work.

    It is also written, where it can be.
    """
    plan = read_serving_plan(directory)
    _, estimate = _cost(plan)
    results = ResultsDirectory(directory)
    doing = of_directory(results).doing
    ended = "still measuring; the best may change" if doing == MEASURING else doing
    search = ServingSearch(plan=plan, estimate=estimate, results=results, ended=ended)
    made = make_serving_report(search)
    with contextlib.suppress(OSError):  # somebody else's search, or an archived one
        write_best(search, made)
        serving_report.write(made, directory)
    return made


def scripts(directory: Path) -> list[Path]:
    """The batch scripts that time the first layout by hand; none where there is no Slurm."""
    return sorted((directory / "scripts").glob("*/run.sh"))


# ---------------------------------------------------------------- what it costs


def _sittings(plan: ServingPlan) -> list[Sitting]:
    """The runs that the search makes if all predictions hold."""
    p = plan.predictions
    told = ServingView(
        latency_ms=p.latency_ms,
        ttft_ms=p.ttft_ms,
        tpot_ms=p.tpot_ms,
        error=p.latency_error,
        p_fit=p.p_fit,
    )
    strategy = serving_strategy.make(plan.request.strategy, replace(plan.landscape, view=lambda _: told))
    trials: list[ServedTrial] = []
    found: list[Sitting] = []
    while len(found) < _MOST_SITTINGS:
        room = plan.request.limit_search_runs - len(trials)
        step = strategy.next(trials) if room > 0 else None
        if not isinstance(step, Sitting):
            break
        found.append(replace(step, rows=step.rows[:room]))
        trials += [
            ServedTrial(
                row=row,
                ending=Ending.MEASURED if p.p_fit[row] >= 0.5 else Ending.OOM,  # noqa: PLR2004 (more likely than not)
                latency_ms=float(p.latency_ms[row]),
                ttft_ms=float(p.ttft_ms[row]),
                tpot_ms=float(p.tpot_ms[row]),
            )
            for row in found[-1].rows
        ]
    return found


def _cost(plan: ServingPlan) -> tuple[Dispatch, Estimate]:
    """How to submit, and what the search costs if predictions hold."""
    request, cluster = plan.request, plan.cluster
    slurm = cluster.scheduler == "slurm"
    overhead_s = cluster.slurm.job_overhead_s if slurm else LOCAL_OVERHEAD_S
    agenda = ServingAgenda(plan)
    most_s = request.max_minutes_per_run * SECONDS_PER_MINUTE
    sittings = _sittings(plan)
    tasks = [agenda.task(sitting) for sitting in sittings]
    every: dict[str, list[int]] = {}
    for (name, _), row in agenda.rows.items():
        every.setdefault(name, []).append(row)
    grid = [agenda.task(Sitting(layout=0, rows=tuple(rows), stops_early=False, why="")) for rows in every.values()]
    sizes: dict[int, int] = {}
    for task in tasks:
        sizes[task.nodes] = sizes.get(task.nodes, 0) + 1

    def estimate(way: Submit) -> Estimate:
        packed = way in ("packed", "hyperqueue")
        starts_s = [overhead_s if not packed else 0.0 for _ in tasks]
        node_s = sum((s + min(most_s, agenda.expected_s(t))) * t.nodes for s, t in zip(starts_s, tasks, strict=True))
        wall_s = sum(s + min(most_s, agenda.expected_s(t)) for s, t in zip(starts_s, tasks, strict=True))
        if packed:
            waits_s = IDLE_S if slurm and len(sizes) > 1 else 0.0
            node_s += sum(nodes * (overhead_s + waits_s) for nodes in sizes)
            wall_s += overhead_s
        per_node = cluster.gpus_per_node / SECONDS_PER_HOUR
        grid_node_s = sum((overhead_s + min(most_s, agenda.expected_s(t))) * t.nodes for t in grid)
        return Estimate(
            layouts=sum(len(sitting.rows) for sitting in sittings),
            gpu_hours=node_s * per_node,
            usual_gpu_hours=node_s * per_node,
            wall_s=wall_s,
            grid_layouts=len(plan.candidates.points),
            grid_gpu_hours=grid_node_s * per_node,
            asked=[
                Asked(
                    jobs=1 if packed else count,
                    nodes=nodes,
                    gpus=nodes * cluster.gpus_per_node,
                    minutes=request.max_minutes_per_run,
                )
                for nodes, count in sorted(sizes.items())
            ],
        )

    single: Submit = "array" if slurm else "separate"
    way = request.submit
    if way is None:
        way = "packed" if worth_packing(estimate(single), estimate("packed")) else single
    parallel = request.parallel if request.parallel is not None or not slurm or way == "packed" else 2
    return Dispatch(submit=way, parallel=parallel, overhead_s=overhead_s), estimate(way)


def _cost_lines(plan: ServingPlan, dispatch: Dispatch, estimate: Estimate) -> list[str]:
    """What the search may cost, and what the scheduler will be asked for, before the first job."""
    request = plan.request
    budget = (
        f"; no more than {request.budget_gpu_hours:g} by your budget" if request.budget_gpu_hours is not None else ""
    )
    line = (
        f"cost: {estimate.layouts} of {estimate.grid_layouts} points if predictions hold, and at most "
        f"{min(request.limit_search_runs, estimate.grid_layouts)}: some {estimate.usual_gpu_hours:.2g} GPU "
        f"hours{budget}, and {duration(estimate.wall_s)} without queueing. Timing all {estimate.grid_layouts} would "
        f"take {estimate.grid_gpu_hours:.3g} GPU hours"
    )
    return [line, *(asked_lines(dispatch, estimate) if plan.cluster.scheduler == "slurm" else [])]


# ---------------------------------------------------------------- what is written before the first job


def _write_plan(plan: ServingPlan, results: ResultsDirectory, screen: Screen) -> None:
    points = plan.candidates.points
    layouts = {point.layout for point in points}
    fitting = int(np.sum(plan.predictions.p_fit >= 0.5))  # noqa: PLR2004 (more likely than not)
    screen.say(
        f"{len(points)} points of {len(layouts)} layouts can start, {sum(r.count for r in plan.candidates.rejections)} "
        f"cannot; {fitting} are expected to fit into memory"
    )
    files.write_text(results.base_config, files.yaml_text(plan.config.document()))
    files.write_text(results.predictions, predictions_csv(plan))
    if plan.cluster.scheduler != "slurm":
        return
    shutil.rmtree(results.path / "scripts", ignore_errors=True)  # of an earlier plan
    agenda = ServingAgenda(plan)
    for sitting in _sittings(plan)[:1]:
        task = agenda.task(sitting)
        folder = results.path / "scripts" / task.name
        for name, text in agenda.texts(task).items():
            files.write_text(folder / name, text)
        run = planned_run(results, task.name, nodes=task.nodes, max_minutes=plan.request.max_minutes_per_run)
        parameters = launch.run_parameters(run, plan.cluster)
        files.write_text(folder / "run.sh", launch.batch_script(parameters, folder / "config.yaml", folder))


def predictions_csv(plan: ServingPlan) -> str:
    """Every point with its prediction and the parts of it, the most promising first."""
    points = plan.points.rows()
    columns = {
        "name": [point.name for point in points],
        "layout": [point.layout.name for point in points],
        **{axis: getattr(plan.points, axis) for axis in ("tp", "pp", "precision", "cuda_graphs")},
        **{axis: getattr(plan.points, axis) for axis in ("batch", "input_len", "output_len")},
        **plan.predictions.columns(),
    }
    return str(pd.DataFrame(columns).iloc[by_promise(plan)].to_csv(index=False, float_format="%.6g"))
