"""What a serving search found: its records, its plan and what was learnt, as the report's rows."""

import shlex
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hptool import files
from hptool.campaign import spent_gpu_hours
from hptool.cost import Estimate
from hptool.measurement import Failure, FailureKind, PointFailure, ServedPoint
from hptool.plan import facts_remark
from hptool.report import Spent
from hptool.results import SERVING, OutcomeRecord, ResultsDirectory
from hptool.serving import Lengths, ServingLayout
from hptool.serving_agenda import REPEATS, percentile, rows_of, trials_of
from hptool.serving_plan import ServingPlan, by_promise
from hptool.serving_report import (
    Answer,
    ExpectedPoint,
    PointPrediction,
    ServingReport,
    ServingRow,
    Trust,
)
from hptool.serving_strategy import ServedTrial, ServingView, Standing, standing
from hptool.strategy import Ending

#: The best point's own files: what to serve it with, and what to time it again with.
BEST = "best"

#: Points that are predicted from all others, to see how far predictions are off; evenly chosen where there are more.
_MOST_LEFT_OUT = 32

#: Predicted points that a report shows.
_EXPECTED = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingSearch:
    """A search as it stands: its plan, what it was to cost, its files, and why it ended."""

    plan: ServingPlan
    estimate: Estimate
    results: ResultsDirectory
    ended: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """What the runs say of a point: the run that measured it, or the last one that failed in it."""

    record: OutcomeRecord
    served: ServedPoint | None
    failure: Failure | PointFailure | None


def make_serving_report(search: ServingSearch, notes: Sequence[str] = ()) -> ServingReport:
    """Everything known about the search."""
    plan, results, estimate = search.plan, search.results, search.estimate
    records = [record for record in results.outcomes().values() if record.parts]
    rows = rows_of(plan)
    trials = trials_of(plan, rows, records)
    tried = _tried(rows, records)
    for row in {trial.row for trial in trials if trial.ending is Ending.FAILED} - tried.keys():
        tried[row] = _never_reached(plan, row, records)
    left_out = _each_from_the_others(plan, trials)
    place = {lengths: i for i, lengths in enumerate(plan.request.workload)}  # as they were asked for
    stands = sorted(standing(plan.landscape, trials), key=lambda one: place[one.lengths])
    pareto = {row for one in stands for row in one.pareto}
    within = {row for one in stands for row in one.ranking[: one.within]}
    measured = [row for one in stands for row in one.ranking if row in tried]
    failed = sorted(tried.keys() - set(measured))
    made = {
        row: _row(search, row, tried[row], left_out.get(row), is_within=row in within, is_pareto=row in pareto)
        for row in (*measured, *failed)
    }
    answers = [_answer(one, made) for one in stands]
    first = next((answer.best for answer in answers if answer.best), None)
    learned = plan.landscape.view(trials)
    return ServingReport(
        model=plan.config.run.name,
        num_parameters=plan.config.shape.num_parameters,
        cluster=plan.cluster,
        nodes=plan.nodes,
        engine=_engine(plan, records),
        objective=plan.request.objective,
        targets=plan.request.targets,
        layouts=len({point.layout for point in plan.candidates.points}),
        points=len(plan.candidates.points),
        rejections=plan.candidates.rejections,
        rows=list(made.values()),
        answers=answers,
        expected=_expected(plan, learned, tried),
        trust=_trust(plan, trials, left_out),
        skipped=_skipped(plan, made, learned) if search.ended else {},
        spent=Spent(
            gpu_hours=spent_gpu_hours(plan.cluster, results, records),
            runs=len(records),
            grid_layouts=estimate.grid_layouts,
            grid_gpu_hours=estimate.grid_gpu_hours,
            ended=search.ended,
        ),
        notes=[*notes, *_notes(plan)],
        best_path=str(results.path / "best.yaml") if first else None,
        serve_command=_command(results.path) if first else None,
    )


def _tried(rows: Mapping[tuple[str, str], int], records: Iterable[OutcomeRecord]) -> dict[int, _Tried]:
    found: dict[int, _Tried] = {}
    for record in records:
        served = {point.name: point for point in record.serving.points} if record.serving else {}
        failures = {failure.name: failure for failure in record.serving.failures} if record.serving else {}
        for part in record.parts:
            row = rows.get((record.name, part))
            failure = record.failure or failures.get(part)
            if row is None or (part not in served and failure is None):
                continue
            if row in found and found[row].served:
                continue
            found[row] = _Tried(record=record, served=served.get(part), failure=None if part in served else failure)
    return found


def _never_reached(plan: ServingPlan, row: int, records: Sequence[OutcomeRecord]) -> _Tried:
    """A point that was given up because no run ever came to its end."""
    point = plan.points.row(row)
    last = [r for r in records if r.name == point.layout.name and point.name in r.parts][-1]
    message = f"{REPEATS + 1} runs ended before they had measured it"
    failure = PointFailure(name=point.name, kind=FailureKind.LOST, message=message)
    return _Tried(record=last, served=None, failure=failure)


def _row(
    search: ServingSearch,
    row: int,
    tried: _Tried,
    learned: PointPrediction | None,
    *,
    is_within: bool,
    is_pareto: bool,
) -> ServingRow:
    point = search.plan.points.row(row)
    directory = search.results.run_directory(tried.record.run)
    log = tried.failure.log_path if isinstance(tried.failure, Failure) else None
    return ServingRow(
        layout=point.layout,
        lengths=point.lengths,
        batch=point.batch,
        run=tried.record.run,
        log_path=log or str(directory / "logs"),
        predicted=_before(search.plan, row),
        learned=learned,
        measurement=tried.record.serving,
        served=tried.served,
        failure=tried.failure,
        meets_targets=is_within,
        is_pareto=is_pareto,
    )


def _before(plan: ServingPlan, row: int) -> PointPrediction:
    p = plan.predictions
    names = ("latency_ms", "ttft_ms", "tpot_ms", "memory_gib", "p_fit")
    return PointPrediction(**{name: float(getattr(p, name)[row]) for name in names})


def _after(plan: ServingPlan, view: ServingView, row: int) -> PointPrediction:
    """What the search has learnt of a point; its memory is as it was predicted."""
    return PointPrediction(
        latency_ms=float(view.latency_ms[row]),
        ttft_ms=float(view.ttft_ms[row]),
        tpot_ms=float(view.tpot_ms[row]),
        memory_gib=float(plan.predictions.memory_gib[row]),
        p_fit=float(view.p_fit[row]),
    )


def _each_from_the_others(plan: ServingPlan, trials: Sequence[ServedTrial]) -> dict[int, PointPrediction]:
    """Measured points as they are predicted from all others, some of them where there are many."""
    measured = [trial for trial in trials if trial.ending is Ending.MEASURED]
    if len(measured) < 2:  # noqa: PLR2004 (one, and another to learn from)
        return {}
    chosen = np.unique(np.linspace(0, len(measured) - 1, _MOST_LEFT_OUT).astype(int))
    found = {}
    for row in [measured[i].row for i in chosen]:
        view = plan.landscape.view([trial for trial in trials if trial.row != row])
        found[row] = _after(plan, view, row)
    return found


def _trust(plan: ServingPlan, trials: Sequence[ServedTrial], left_out: Mapping[int, PointPrediction]) -> Trust:
    measured = {t.row: t.latency_ms for t in trials if t.ending is Ending.MEASURED and t.latency_ms}
    before = [abs(float(plan.predictions.latency_ms[row]) / ms - 1) for row, ms in measured.items()]
    after = [abs(left_out[row].latency_ms / measured[row] - 1) for row in left_out]
    return Trust(
        points=len(measured), before=median(before) if before else None, after=median(after) if after else None
    )


def _answer(one: Standing, made: Mapping[int, ServingRow]) -> Answer:
    best, closest = one.best, one.closest
    return Answer(
        lengths=one.lengths,
        best=None if best is None else made[best],
        closest=None if closest is None else made[closest],
    )


def _expected(plan: ServingPlan, view: ServingView, tried: Collection[int]) -> list[ExpectedPoint]:
    """The points that promise most of those that nobody tried; by lengths equally many."""
    found: list[ExpectedPoint] = []
    each = max(1, _EXPECTED // len(plan.request.workload))
    counts: dict[str, int] = {}
    for row in by_promise(plan, view).tolist():
        point = plan.points.row(row)
        if row in tried:
            continue
        if counts.get(point.lengths.name, 0) < each:
            counts[point.lengths.name] = counts.get(point.lengths.name, 0) + 1
            predicted = _after(plan, view, row)
            found.append(
                ExpectedPoint(layout=point.layout, lengths=point.lengths, batch=point.batch, predicted=predicted)
            )
    return found


def _skipped(plan: ServingPlan, made: Mapping[int, ServingRow], view: ServingView) -> dict[str, int]:
    """Points that were not tried, by the reason."""
    least: dict[tuple[ServingLayout, Lengths], int] = {}  # the smallest batch that was too much
    for one in made.values():
        if not one.meets_targets:
            key = one.layout, one.lengths
            least[key] = min(one.batch, least.get(key, one.batch))
    counts = Counter[str]()
    for row, point in enumerate(plan.points.rows()):
        if row in made:
            continue
        if point.batch > least.get((point.layout, point.lengths), point.batch):
            counts["a smaller batch failed, or was beyond the limits"] += 1
        elif view.p_fit[row] < 0.5:  # noqa: PLR2004 (more likely than not)
            counts["not expected to fit into memory"] += 1
        else:
            counts["not expected to gain enough, or more than the search was to spend"] += 1
    return dict(counts)


def _engine(plan: ServingPlan, records: Iterable[OutcomeRecord]) -> str:
    """The engines that ran, by their own words; the one that is predicted where none did."""
    ran = sorted({record.serving.engine for record in records if record.serving})
    return ", ".join(ran) or plan.engine.name


def _notes(plan: ServingPlan) -> list[str]:
    notes = [] if (remark := facts_remark(plan.cluster)) is None else [f"Predictions use {remark}."]
    if not plan.engine.fitted:
        notes.append(
            f"Nothing was ever fitted to measurements of the engine that is predicted ({plan.engine.name}): its "
            "predictions are physics and guesses until runs teach them."
        )
    if plan.request.checkpoint is None and plan.request.engine == "megatron":
        notes.append("Weights were random: they take as long as trained ones.")
    return notes


def write_best(search: ServingSearch, made: ServingReport) -> None:
    """`best.yaml`, and in `best/` what times it again; nothing where no point kept the targets."""
    plan, path = search.plan, search.results.path
    chosen = [answer.best for answer in made.answers if answer.best]
    if not chosen:
        return
    first = chosen[0]
    points = {point.name: point for point in plan.points.rows() if point.layout == first.layout}
    names = [f"{row.lengths.name}/{row.batch}" for row in chosen if row.layout == first.layout]
    orders = plan.orders_of([points[name] for name in names], stops_early=False)
    config = plan.config_of(first.layout)
    files.write_text(path / BEST / "config.yaml", files.yaml_text(config.document()))
    files.write_text(path / BEST / SERVING, files.json_text(orders))
    document: dict[str, Any] = {
        "model": plan.request.model,
        "command": _command(path),
        "config": str(path / BEST / "config.yaml"),
        "best": [_best_entry(plan, row) for row in chosen],
    }
    files.write_text(path / "best.yaml", files.yaml_text(document))


def _best_entry(plan: ServingPlan, row: ServingRow) -> dict[str, Any]:
    served, targets = row.served, plan.request.targets
    assert served  # noqa: S101 (the best are measured)
    return {
        "workload": row.lengths.name,
        "layout": row.layout.name,
        "tensor_model_parallel_size": row.layout.tp,
        "pipeline_model_parallel_size": row.layout.pp,
        "precision": str(row.layout.precision),
        "cuda_graphs": row.layout.cuda_graphs,
        "gpus": row.layout.gpus,
        "batch": row.batch,
        "percentile": targets.percentile,
        "latency_ms": round(percentile(served.latency_ms, targets), 4),
        "ttft_ms": round(percentile(served.ttft_ms, targets), 4),
        "tpot_ms": round(percentile(served.tpot_ms, targets), 4),
        "tokens_per_s_per_gpu": round(served.tokens_per_s_per_gpu, 4),
        "tokens_per_s_per_user": round(served.tokens_per_s_per_user, 4),
        "peak_memory_gib": round(served.peak_memory_gib, 4),
    }


def _command(path: Path) -> str:
    """What times the best again."""
    words = [sys.executable, "-m", "hptool.worker", path / BEST / "config.yaml", "--output", path / BEST / "again"]
    return shlex.join(map(str, words))
