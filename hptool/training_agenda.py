"""The agenda of a search for the fastest layout to train with: timed trainings, as the course orders them."""

from collections.abc import Iterable, Mapping, Sequence

from hptool import cost, files
from hptool.agenda import Task
from hptool.course import Course, Order, Timing, next_order
from hptool.facts import Cluster
from hptool.measurement import FailureKind
from hptool.plan import Plan, SearchRequest
from hptool.results import OutcomeRecord, Submission
from hptool.strategy import Ending, Stop, Wait
from hptool.timed_runs import timed_run

#: A run that was not steady when it ended is known to this, whatever its interval says.
_UNSTEADY = 0.05


def rows_of(course: Course) -> dict[str, int]:
    """The rows of the landscape by the names of their layouts."""
    return {layout.name: row for row, layout in enumerate(course.landscape.target.layouts.rows())}


def timings_of(course: Course, rows: Mapping[str, int], records: Iterable[OutcomeRecord]) -> list[Timing]:
    """Records as the course sees them."""
    return [_timing(course, rows[record.name], record) for record in records if record.name in rows]


def _timing(course: Course, row: int, record: OutcomeRecord) -> Timing:
    measured = record.measurement
    if measured is None:
        assert record.failure  # noqa: S101 (a record has one of both)
        return Timing(
            row=row,
            nodes=record.nodes,
            steps=record.steps,
            ending=Ending.OOM if record.failure.kind is FailureKind.OOM else Ending.FAILED,
            may_run_again=record.may_run_again,
        )
    memory_gib = measured.peak_memory_gib
    if measured.memory_kind == "max allocated":  # what lies outside the allocator's tensors comes on top
        memory = course.landscape.run.memory
        memory_gib += float(memory.slack_gib[row] + memory.reserved_gib[row])
    return Timing(
        row=row,
        nodes=record.nodes,
        steps=record.steps,
        ending=Ending.MEASURED,
        step_time_s=measured.step_time_s,
        low_s=measured.step_time_low_s,
        high_s=measured.step_time_high_s,
        error=max(measured.relative_error, 0.0 if measured.is_steady else _UNSTEADY),
        memory_gib=memory_gib,
    )


class TrainingAgenda:
    """What the course of a plan orders, as runs."""

    def __init__(self, plan: Plan, course: Course) -> None:
        self.plan = plan
        self.course = course
        self._rows = rows_of(course)

    @property
    def cluster(self) -> Cluster:
        """Where runs are started."""
        return self.plan.cluster

    @property
    def limits(self) -> SearchRequest:
        """How much they may cost."""
        return self.plan.request

    def knows(self, name: str) -> bool:
        """Records of a layout of this name belong to this search."""
        return name in self._rows

    def next(self, records: Sequence[OutcomeRecord], under_way: Sequence[Task | Submission]) -> Task | Wait | Stop:
        """What the course orders, given what ended and what has not."""
        step = next_order(self.course, self.timings(records, under_way))
        return self.task(step) if isinstance(step, Order) else step

    def timings(self, records: Sequence[OutcomeRecord], under_way: Sequence[Task | Submission]) -> list[Timing]:
        """Every run, ended or under way, as the course sees it."""
        flying = (
            Timing(row=self._rows[run.name], nodes=run.nodes, steps=run.steps, ending=Ending.UNDER_WAY)
            for run in under_way
        )
        return [*timings_of(self.course, self._rows, records), *flying]

    def task(self, order: Order) -> Task:
        """An order of the course as a run."""
        layout = self.course.landscape.target.layouts.row(order.row)
        return Task(
            name=layout.name,
            nodes=order.nodes,
            gpus=order.nodes * self.plan.config.trainer.devices,
            steps=order.steps,
            predicted_step_time_s=cost.step_time_s(self.course, order.row, order.nodes),
            what=f"{order.steps} steps",
            why=order.why,
        )

    def texts(self, task: Task) -> Mapping[str, str]:
        """The config of the run."""
        config = timed_run(
            self.plan.config,
            self.course.landscape.target.layouts.row(self._rows[task.name]),
            nodes=task.nodes,
            steps=task.steps,
            max_minutes=self.plan.request.max_minutes_per_run,
        )
        return {"config.yaml": files.yaml_text(config.document())}

    def expected_s(self, run: Task | Submission) -> float:
        """Its steps, by what was predicted."""
        return cost.run_s(self.course, self._rows[run.name], run.steps, run.nodes, 0.0)

    def own_s(self, record: OutcomeRecord) -> float:
        """Its start and its steps."""
        measured = record.measurement
        return measured.startup_s + record.steps * measured.step_time_s if measured else 0.0

    def said(self, record: OutcomeRecord, submission: Submission) -> str:
        """Its rate and its step time beside the predicted one."""
        measured = record.measurement
        assert measured  # noqa: S101 (what is asked of measured runs alone)
        spread = (measured.step_time_high_s - measured.step_time_low_s) / 2 / measured.step_time_s
        return (
            f"{measured.model_tflops_per_gpu:.4g} TFLOPS/GPU, {measured.step_time_s:.4g} s a step ±{spread:.1%}, "
            f"{submission.predicted_step_time_s:.4g} s predicted"
        )
