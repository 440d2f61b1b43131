"""The agenda of a search for the fastest way to serve: runs of one layout each, several of its points in a run."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from hptool import files, serving_strategy
from hptool.agenda import Task
from hptool.facts import Cluster
from hptool.measurement import FailureKind, Percentiles, ServedPoint
from hptool.results import SERVING, OutcomeRecord, Submission
from hptool.serving import ServingPoint, Targets
from hptool.serving_plan import ServingPlan, ServingRequest
from hptool.serving_strategy import ServedTrial, Sitting
from hptool.strategy import Ending, Stop, Wait
from hptool.units import MILLI

#: How often points are tried again whose run was lost through no fault of theirs, or did not come to them.
REPEATS = 2

#: Passes of a point that are not timed, as often as not.
_WARMUPS = 2


def rows_of(plan: ServingPlan) -> dict[tuple[str, str], int]:
    """The rows of the landscape by the names of their layouts and of the points within."""
    return {(point.layout.name, point.name): row for row, point in enumerate(plan.points.rows())}


def percentile(figure: Percentiles, targets: Targets) -> float:
    """What counts of a measured figure: the percentile that the targets are for."""
    return {50: figure.p50, 95: figure.p95, 99: figure.p99}[targets.percentile]


def measured_trial(row: int, served: ServedPoint, targets: Targets) -> ServedTrial:
    """A measured point as the strategy sees it."""
    return ServedTrial(
        row=row,
        ending=Ending.MEASURED,
        latency_ms=percentile(served.latency_ms, targets),
        ttft_ms=percentile(served.ttft_ms, targets),
        tpot_ms=percentile(served.tpot_ms, targets),
    )


def trials_of(
    plan: ServingPlan, rows: Mapping[tuple[str, str], int], records: Iterable[OutcomeRecord]
) -> list[ServedTrial]:
    """What the runs say of each point, one trial each: its first measurement, or what became of it.

    Points that their run did not come to are in no trial, unless that has happened to them too often.
    """
    found: dict[int, ServedTrial] = {}
    left = Counter[int]()
    for record in records:
        for row, trial in _of_run(plan, rows, record):
            if trial is None:
                left[row] += 1
                if left[row] > REPEATS:
                    found.setdefault(row, ServedTrial(row=row, ending=Ending.FAILED))
            elif row not in found or (trial.ending is Ending.MEASURED and found[row].ending is not Ending.MEASURED):
                found[row] = trial
    return list(found.values())


def _of_run(
    plan: ServingPlan, rows: Mapping[tuple[str, str], int], record: OutcomeRecord
) -> Iterator[tuple[int, ServedTrial | None]]:
    """Each row of a run with what became of it; None where the run did not come to it."""
    asked = [part for part in record.parts if (record.name, part) in rows]
    served = record.serving
    if served is None:
        assert record.failure  # noqa: S101 (a record has one of both)
        for part in asked:
            row = rows[record.name, part]
            ending = Ending.OOM if record.failure.kind is FailureKind.OOM else Ending.FAILED
            yield row, None if record.may_run_again else ServedTrial(row=row, ending=ending)
        return
    points = {point.name: point for point in served.points}
    failures = {failure.name: failure.kind for failure in served.failures}
    for part in asked:
        row = rows[record.name, part]
        if part in points:
            yield row, measured_trial(row, points[part], plan.request.targets)
        elif part in failures:
            ending = Ending.OOM if failures[part] is FailureKind.OOM else Ending.FAILED
            yield row, ServedTrial(row=row, ending=ending)
        else:  # it did not come to it, or was ended at work on it: by its search, its scheduler, or its node
            yield row, None


class ServingAgenda:
    """What the strategy of a plan asks for, as runs."""

    def __init__(self, plan: ServingPlan) -> None:
        self.plan = plan
        self.rows = rows_of(plan)
        self._names = {name for name, _ in self.rows}
        self._strategy = serving_strategy.make(plan.request.strategy, plan.landscape)

    @property
    def cluster(self) -> Cluster:
        """Where runs are started."""
        return self.plan.cluster

    @property
    def limits(self) -> ServingRequest:
        """How much they may cost."""
        return self.plan.request

    def knows(self, name: str) -> bool:
        """Records of a layout of this name belong to this search."""
        return name in self._names

    def next(self, records: Sequence[OutcomeRecord], under_way: Sequence[Task | Submission]) -> Task | Wait | Stop:
        """What the strategy asks for, given what ended and what has not."""
        trials = trials_of(self.plan, self.rows, records)
        tried = {trial.row for trial in trials}
        flying = [
            ServedTrial(row=self.rows[run.name, part], ending=Ending.UNDER_WAY)
            for run in under_way
            for part in run.parts
            if (run.name, part) in self.rows and self.rows[run.name, part] not in tried
        ]
        room = self.plan.request.limit_search_runs - len(trials) - len(flying)
        if room <= 0:
            limit = self.plan.request.limit_search_runs
            return Wait() if flying else Stop(why=f"{limit} points were measured, which is the limit")
        step = self._strategy.next([*trials, *flying])
        return self.task(step, room) if isinstance(step, Sitting) else step

    def task(self, sitting: Sitting, room: int | None = None) -> Task:
        """A sitting as a run; of its points the first `room`."""
        points = [self.plan.points.row(row) for row in sitting.rows[:room]]
        layout = points[0].layout
        nodes = self.plan.nodes_of(layout)
        seconds = self._seconds(sitting.rows[: len(points)])
        return Task(
            name=layout.name,
            nodes=nodes,
            gpus=nodes * self.plan.cluster.gpus_per_node,
            steps=len(points),
            predicted_step_time_s=seconds / len(points),
            what=_words(points),
            why=sitting.why,
            parts=tuple(point.name for point in points),
            stops_early=sitting.stops_early,
        )

    def texts(self, task: Task) -> Mapping[str, str]:
        """The config of the run and what it is asked."""
        points = [self.plan.points.row(self.rows[task.name, part]) for part in task.parts]
        orders = self.plan.orders_of(points, stops_early=task.stops_early)
        config = self.plan.config_of(points[0].layout)
        return {"config.yaml": files.yaml_text(config.document()), SERVING: files.json_text(orders)}

    def expected_s(self, run: Task | Submission) -> float:
        """All passes of its points, by what was predicted."""
        passes = self.plan.request.repeats + _WARMUPS
        return passes * self._seconds([self.rows[run.name, part] for part in run.parts])

    def _seconds(self, rows: Sequence[int]) -> float:
        return float(sum(self.plan.predictions.latency_ms[row] for row in rows)) * MILLI

    def own_s(self, record: OutcomeRecord) -> float:
        """Its start and its passes."""
        served = record.serving
        if served is None:
            return 0.0
        return served.startup_s + MILLI * sum((p.repeats + p.warmups) * p.latency_ms.p50 for p in served.points)

    def said(self, record: OutcomeRecord, submission: Submission) -> str:
        """What its points gave, shortest first."""
        served = record.serving
        assert served  # noqa: S101 (what is asked of measured runs alone)
        del submission
        words = [
            f"{p.name} in {percentile(p.latency_ms, self.plan.request.targets):.4g} ms, "
            f"{p.tokens_per_s_per_gpu:.4g} tokens/s/GPU"
            for p in served.points
        ]
        words += [f"{failure.name} {failure.kind.value}" for failure in served.failures]
        words += [f"{name} not tried" for name in served.skipped]
        return "; ".join(words)


def _words(points: Sequence[ServingPoint]) -> str:
    """Points of one layout in few words: `60:20 with batches 4, 8`."""
    batches: dict[str, list[str]] = {}
    for point in points:
        batches.setdefault(point.lengths.name, []).append(str(point.batch))
    return "; ".join(f"{name} with batch{'es' if len(b) > 1 else ''} {', '.join(b)}" for name, b in batches.items())
