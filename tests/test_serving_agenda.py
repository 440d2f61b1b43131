"""The agenda of a serving search: what its runs say of each point, what is next, and whole campaigns of it."""

import itertools
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import files, launch
from hptool.agenda import Task
from hptool.campaign import Campaign, Work
from hptool.cost import Dispatch
from hptool.launch import JobState, JobStatus, Run
from hptool.measurement import FailureKind, PointFailure, ServedPoint
from hptool.results import OutcomeRecord, ResultsDirectory, Submission
from hptool.serving import Lengths, ServingLayout, Targets
from hptool.serving_agenda import ServingAgenda, rows_of, trials_of
from hptool.serving_candidates import ServingSpace
from hptool.serving_orders import ServingOrders
from hptool.serving_plan import ServingPlan, ServingRequest, make_serving_plan
from hptool.serving_search import read_serving_report
from hptool.serving_strategy import ServedTrial, standing
from hptool.strategy import Ending, Stop, Wait
from tests import samples
from tests.serving_samples import measurement, served
from tests.test_campaign import Listener, Scheduler, later

SHORT, LONG = Lengths(input_len=16, output_len=4), Lengths(input_len=32, output_len=8)
ONE, TWO = ServingLayout(precision="fp32"), ServingLayout(tp=2, precision="fp32")
BATCHES = (1, 2, 4)


def plan_of(results: Path, **asked: Any) -> ServingPlan:
    given: dict[str, Any] = {
        "model": "gpt3/tiny",
        "cluster": "local",
        "workload": (SHORT,),
        "space": ServingSpace(tp=(1, 2), pp=(1,), batch_sizes=BATCHES),
        "strategy": "grid",
        "max_minutes_per_run": 1,
    }
    return make_serving_plan(ServingRequest(results=results, **given | asked))


@pytest.fixture
def plan(tmp_path: Path) -> ServingPlan:
    return plan_of(tmp_path / "run")


def point(batch: int, latency_ms: float = 100.0, layout: ServingLayout = ONE, lengths: Lengths = SHORT) -> ServedPoint:
    return served(layout, batch, latency_ms, lengths)


def record(*points: ServedPoint, parts: Sequence[str] = ("16:4/1", "16:4/2", "16:4/4"), **others: Any) -> OutcomeRecord:
    """What came of a run of the first layout that was asked for these parts."""
    layout, run = others.pop("layout", ONE), others.pop("run", None)
    failure = others.pop("failure", None)
    made = samples.record(layout.name, failure or samples.failure(), run=run)
    if failure is None:
        # A run that says nothing of some points has measured one or seen one fail.
        other = PointFailure(name="8:8/8", kind=FailureKind.CRASH, message="another")
        told = {name: others.pop(name, default) for name, default in (("failures", (other,)), ("skipped", ()))}
        serving = replace(measurement(layout, point(1)), points=points, failures=told["failures"])
        made = replace(made, failure=None, serving=replace(serving, skipped=told["skipped"]))
    return replace(made, parts=tuple(parts), steps=len(parts), **others)


def endings(plan: ServingPlan, *records: OutcomeRecord) -> dict[str, Ending]:
    """What is known of each point of the first layout, by its name."""
    trials = trials_of(plan, rows_of(plan), records)
    assert len({trial.row for trial in trials}) == len(trials), "one trial each"
    assert all(plan.layout(trial.row) == ONE for trial in trials)
    return {plan.points.row(trial.row).name: trial.ending for trial in trials}


# ---------------------------------------------------------------- what runs say


def test_what_was_measured_counts_at_the_percentile_of_the_limits(tmp_path: Path) -> None:
    percentiles: list[tuple[Literal[50, 95, 99], float]] = [(50, 1.0), (95, 1.05), (99, 1.1)]
    for percentile, factor in percentiles:
        plan = plan_of(tmp_path / "run", targets=Targets(percentile=percentile))
        (trial,) = trials_of(plan, rows_of(plan), [record(point(2, 200.0), parts=["16:4/2"])])
        assert plan.points.row(trial.row).name == "16:4/2"
        assert trial.ending is Ending.MEASURED
        assert trial.latency_ms == pytest.approx(200 * factor)
        assert trial.ttft_ms == pytest.approx(20 * factor)
        assert trial.tpot_ms == pytest.approx(60 * factor)


@pytest.mark.parametrize("kind", FailureKind)
def test_a_run_that_failed_says_the_same_of_all_its_points(kind: FailureKind, plan: ServingPlan) -> None:
    found = endings(plan, record(failure=samples.failure(kind)))
    ending = Ending.OOM if kind is FailureKind.OOM else Ending.FAILED
    assert found == dict.fromkeys(("16:4/1", "16:4/2", "16:4/4"), ending)


def test_a_point_that_failed_says_nothing_of_the_others(plan: ServingPlan) -> None:
    failures = tuple(
        PointFailure(name=name, kind=kind, message="as tested")
        for name, kind in (("16:4/2", FailureKind.CRASH), ("16:4/4", FailureKind.OOM))
    )
    found = endings(plan, record(point(1), failures=failures))
    assert found == {"16:4/1": Ending.MEASURED, "16:4/2": Ending.FAILED, "16:4/4": Ending.OOM}


def test_points_that_a_run_did_not_come_to_are_open_until_that_has_happened_too_often(plan: ServingPlan) -> None:
    left = record(point(1), parts=["16:4/1", "16:4/2"], skipped=("16:4/2",))
    for k in (1, 2):
        assert endings(plan, *[left] * k) == {"16:4/1": Ending.MEASURED}
    assert endings(plan, *[left] * 3) == {"16:4/1": Ending.MEASURED, "16:4/2": Ending.FAILED}


def test_a_run_that_was_cut_off_leaves_open_what_it_had_not_measured(plan: ServingPlan) -> None:
    # As Ctrl-C, a time limit or a lost node leaves it, none of which says anything about a point.
    cut = record(point(1))
    assert endings(plan, cut) == {"16:4/1": Ending.MEASURED}
    again = record(point(2), parts=["16:4/2", "16:4/4"])
    assert endings(plan, cut, again) == {"16:4/1": Ending.MEASURED, "16:4/2": Ending.MEASURED}
    thrice = [record(point(1)), record(point(2)), record(point(2))]
    assert endings(plan, *thrice)["16:4/4"] is Ending.FAILED


def test_a_run_that_was_lost_is_repeated_twice(plan: ServingPlan) -> None:
    lost = record(failure=samples.failure(FailureKind.LOST), may_run_again=True)
    assert endings(plan, lost, lost) == {}
    again = record(point(1), point(2), point(4), run="again")
    assert set(endings(plan, lost, lost, again).values()) == {Ending.MEASURED}
    assert set(endings(plan, lost, lost, lost).values()) == {Ending.FAILED}
    assert set(endings(plan, lost, lost, lost, again).values()) == {Ending.MEASURED}


def test_the_first_measurement_of_a_point_stands_and_outweighs_failures(plan: ServingPlan) -> None:
    first, second = record(point(1, 100.0), parts=["16:4/1"]), record(point(1, 900.0), parts=["16:4/1"])
    broken = record(failure=samples.failure(FailureKind.OOM), parts=["16:4/1"])
    for records in ([first, second, broken], [broken, first, second]):
        (trial,) = trials_of(plan, rows_of(plan), records)
        assert (trial.ending, trial.latency_ms) == (Ending.MEASURED, 100.0)


def test_records_of_other_points_and_layouts_are_passed_over(plan: ServingPlan) -> None:
    others = [
        record(point(1), layout=replace(ONE, pp=2)),
        record(point(512), parts=["16:4/512"]),
        record(failure=samples.failure(), parts=[]),
    ]
    assert endings(plan, *others) == {}
    assert not ServingAgenda(plan).knows("tp1-pp2-fp32")
    assert ServingAgenda(plan).knows("tp2-pp1-fp32")


# ---------------------------------------------------------------- what is next


def submission(task: Task) -> Submission:
    return replace(samples.submission(task.name), parts=task.parts, steps=task.steps)


def task_of(agenda: ServingAgenda, records: Sequence[OutcomeRecord] = (), under_way: Sequence[Any] = ()) -> Task:
    task = agenda.next(records, under_way)
    assert isinstance(task, Task)
    return task


def test_a_run_has_the_points_of_one_layout_and_what_it_needs_to_know(plan: ServingPlan) -> None:
    agenda = ServingAgenda(plan)
    task = task_of(agenda)
    assert (task.name, task.parts) == ("tp1-pp1-fp32", ("16:4/1", "16:4/2", "16:4/4"))
    assert (task.nodes, task.gpus, task.steps) == (1, 2, 3)
    assert task.what == "16:4 with batches 1, 2, 4"
    texts = agenda.texts(task)
    assert set(texts) == {"config.yaml", "serving.json"}
    orders = files.parse_json(texts["serving.json"], ServingOrders, "orders")
    assert tuple(p.name for p in orders.points) == task.parts
    assert orders.stops_early == task.stops_early
    assert agenda.expected_s(task) == pytest.approx(7 * 3 * task.predicted_step_time_s)
    assert agenda.expected_s(submission(task)) == agenda.expected_s(task)


@pytest.mark.parametrize("strategy", ["guided", "bisect", "ranked", "grid"])
def test_what_is_under_way_is_not_asked_for_again(strategy: str, tmp_path: Path) -> None:
    agenda = ServingAgenda(plan_of(tmp_path / "run", strategy=strategy, workload=(SHORT, LONG)))
    flying: list[Task | Submission] = []
    while isinstance(task := agenda.next((), flying), Task):
        asked = {(run.name, part) for run in flying for part in run.parts}
        assert not asked & {(task.name, part) for part in task.parts}
        flying.append(task if len(flying) % 2 else submission(task))
        assert len(flying) <= 12
    # All that is left is to wait for what flies.
    assert isinstance(task, Wait)


@pytest.mark.parametrize("strategy", ["guided", "bisect", "ranked", "grid"])
@pytest.mark.parametrize("limit", [1, 2, 4])
def test_no_more_points_than_the_limit_are_measured(strategy: str, limit: int, tmp_path: Path) -> None:
    agenda = ServingAgenda(plan_of(tmp_path / "run", strategy=strategy, limit_search_runs=limit))
    flying: list[Task] = []
    while isinstance(step := agenda.next((), flying), Task):
        flying.append(step)
    assert isinstance(step, Wait)
    assert 1 <= sum(len(task.parts) for task in flying) <= limit
    records = [
        record(failure=samples.failure(FailureKind.CRASH), parts=[f"16:4/{b}"], layout=layout)
        for layout, b in itertools.product((ONE, TWO), BATCHES)
    ]
    step = agenda.next(records[:limit], ())
    assert step == Stop(why=f"{limit} points were measured, which is the limit")


def test_a_point_that_ended_while_its_run_goes_on_counts_once(tmp_path: Path) -> None:
    agenda = ServingAgenda(plan_of(tmp_path / "run", limit_search_runs=4))
    task = task_of(agenda)
    again = task_of(agenda, [record(point(1), parts=["16:4/1"])], [submission(task)])
    assert (again.name, again.parts) == ("tp2-pp1-fp32", ("16:4/1",))


def test_what_a_run_said_fits_on_a_line(plan: ServingPlan) -> None:
    agenda = ServingAgenda(plan)
    failures = (PointFailure(name="16:4/2", kind=FailureKind.OOM, message="no"),)
    said = agenda.said(record(point(1, 50.0), failures=failures, skipped=("16:4/4",)), samples.submission(ONE.name))
    assert said == "16:4/1 in 50 ms, 80 tokens/s/GPU; 16:4/2 oom; 16:4/4 not tried"


# ---------------------------------------------------------------- whole campaigns


def latency_ms(layout: ServingLayout, batch: int, lengths: Lengths) -> float:
    """A machine on which two ranks are a bad bargain."""
    return (lengths.output_len * (10 + batch)) * (0.9 if layout.tp == 2 else 1.0)


@dataclass
class Servers(Scheduler):
    """Jobs that answer at once what they are asked, as `serve` says; they end one by one where they take turns."""

    serve: Callable[["Servers", Run, ServingOrders], None] | None = None
    takes_turns: bool = False
    open: list[str] = field(default_factory=list)
    most_at_once: int = 0

    def submit(self, runs: Sequence[Run], started: launch.Started) -> None:
        for run in runs:
            job_id = str(7 + len(self.taken))
            self.taken.append(run)
            self.marked[run.token] = job_id
            self.open.append(job_id)
            self.most_at_once = max(self.most_at_once, len(self.open))
            text = (run.directory / "serving.json").read_text()
            (self.serve or Servers.all_of_it)(self, run, files.parse_json(text, ServingOrders, "orders"))
            started(run, job_id)

    def status(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        oldest = next((job_id for job_id in self.open if job_id in job_ids), None)
        ended = {oldest} if self.takes_turns else set(job_ids)
        self.open = [job_id for job_id in self.open if job_id not in ended]
        state = {True: JobState.ENDED, False: JobState.RUNNING}
        return {job_id: JobStatus(state=state[job_id not in self.open]) for job_id in job_ids}

    def all_of_it(self, run: Run, orders: ServingOrders) -> None:
        """Every point."""
        self.leave(run, orders, len(orders.points))

    def leave(self, run: Run, orders: ServingOrders, count: int) -> None:
        """The first points of the run, as the worker leaves them."""
        tp = 2 if run.name.startswith("tp2") else 1
        layout = replace(ONE, tp=tp)
        points = [
            point(p.batch, latency_ms(layout, p.batch, p.lengths), layout, p.lengths) for p in orders.points[:count]
        ]
        path = run.directory / "measurement.json"
        path.write_text(files.json_text(measurement(layout, *points)))

    def fail(self, run: Run, kind: FailureKind) -> None:
        """The whole run."""
        (run.directory / "failure-rank0.json").write_text(files.json_text(samples.failure(kind)))


def started(plan: ServingPlan, launcher: Scheduler, listener: Listener, parallel: int | None = None) -> Campaign:
    """As `--resume` starts it, whether or not there was anything before."""
    results = ResultsDirectory(plan.directory)
    results.begin(plan.document(), resume=True)
    dispatch = Dispatch(submit="separate", parallel=parallel, overhead_s=8.0)
    return Campaign(ServingAgenda(plan), results, Work(dispatch=dispatch, launcher=launcher, screen=listener))


def searched(
    plan: ServingPlan, launcher: Scheduler, parallel: int | None = None
) -> tuple[str, dict[str, OutcomeRecord], Listener]:
    """Why such a search ended, what came of its runs, and what it said."""
    listener = Listener()
    campaign = started(plan, launcher, listener, parallel)
    why = campaign.run()
    campaign.results.close()
    return why, campaign.results.outcomes(), listener


def measured(records: dict[str, OutcomeRecord]) -> list[tuple[str, str]]:
    return [(x.name, p.name) for x in records.values() if x.serving for p in x.serving.points]


def test_a_search_of_all_measures_each_point_once_and_ends(plan: ServingPlan, tmp_path: Path) -> None:
    why, records, listener = searched(plan, Servers(tmp_path))
    assert why == "every point was tried"
    assert sorted(measured(records)) == sorted((p.layout.name, p.name) for p in plan.candidates.points)
    assert "job 7: tp1-pp1-fp32: 16:4 with batches 1, 2, 4 on 1 node, the next of all" in listener.said
    assert any(
        line.startswith("[1] tp1-pp1-fp32: 16:4/1 in 44 ms, 90.91 tokens/s/GPU; 16:4/2 in 48 ms, ")
        for line in listener.said
    )
    assert all(x.ran_s > 20 for x in records.values()), "by their own clocks they have at least been started"


@pytest.mark.parametrize("strategy", ["guided", "bisect", "ranked"])
@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("limit_ms", [None, 60.0, 1.0])
def test_every_strategy_finds_the_best_that_keeps_the_limit(
    strategy: str, parallel: int, limit_ms: float | None, tmp_path: Path
) -> None:
    targets = Targets(max_latency_ms=limit_ms)
    plan = plan_of(tmp_path / "run", strategy=strategy, targets=targets, workload=(SHORT, LONG))
    launcher = Servers(tmp_path, takes_turns=True)
    why, records, _ = searched(plan, launcher, parallel)
    assert why
    assert max(Counter(measured(records)).values()) == 1
    assert launcher.most_at_once <= parallel
    for stand in standing(plan.landscape, trials_of(plan, rows_of(plan), records.values())):
        rates = {
            p: p.batch * p.lengths.output_len / latency_ms(p.layout, p.batch, p.lengths) / p.layout.gpus
            for p in plan.candidates.points
            if p.lengths == stand.lengths
            and latency_ms(p.layout, p.batch, p.lengths) <= (limit_ms or 1e9)
        }  # fmt: skip
        best = None if stand.best is None else plan.points.row(stand.best)
        assert best == max(rates, key=lambda p: rates[p], default=None)


def test_two_runs_at_once_are_never_of_the_same_points(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", workload=(SHORT, LONG))
    launcher = Servers(tmp_path, takes_turns=True)
    _, records, _ = searched(plan, launcher, parallel=2)
    assert launcher.most_at_once == 2
    # Two of them are of the same layout, for other requests; each has its own directory all the same.
    for run in launcher.taken:
        orders = files.read(run.directory / "serving.json", ServingOrders)
        assert tuple(p.name for p in orders.points) == records[run.name].parts
    assert sorted(measured(records)) == sorted((p.layout.name, p.name) for p in plan.candidates.points)


def test_runs_that_are_lost_again_and_again_do_not_hold_a_search_up(plan: ServingPlan, tmp_path: Path) -> None:
    def lose(servers: Servers, run: Run, orders: ServingOrders) -> None:
        if run.name.startswith("tp2"):
            servers.fail(run, FailureKind.LOST)
        else:
            servers.all_of_it(run, orders)

    why, records, _ = searched(plan, Servers(tmp_path, serve=lose))
    assert why == "every point was tried"
    assert [run for run in records if run.startswith("tp2")] == [f"tp2-pp1-fp32{k}" for k in ("", ".2", ".3")]
    assert len(measured(records)) == 3
    # Whoever resumes knows that the trouble is over.
    _, records, _ = searched(plan, Servers(tmp_path))
    assert len(measured(records)) == 6
    assert "tp2-pp1-fp32.4" in records


def test_a_layout_whose_runs_fail_leaves_the_others_alone(plan: ServingPlan, tmp_path: Path) -> None:
    def crash(servers: Servers, run: Run, orders: ServingOrders) -> None:
        if run.name.startswith("tp1"):
            servers.fail(run, FailureKind.CRASH)
        else:
            servers.all_of_it(run, orders)

    _, records, listener = searched(plan, Servers(tmp_path, serve=crash))
    assert sorted(measured(records)) == [("tp2-pp1-fp32", f"16:4/{b}") for b in BATCHES]
    assert list(records) == ["tp1-pp1-fp32", "tp2-pp1-fp32"], "a crash is the layout's own, and not repeated"
    assert any("tp1-pp1-fp32: crash: out of memory" in line for line in listener.said)


def test_what_a_run_had_no_time_for_is_measured_by_another(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", space=ServingSpace(tp=(1,), pp=(1,), batch_sizes=BATCHES))

    def slow(servers: Servers, run: Run, orders: ServingOrders) -> None:
        servers.leave(run, orders, 1)
        path = run.directory / "measurement.json"
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "skipped": [p.name for p in orders.points[1:]]}))

    why, records, _ = searched(plan, Servers(tmp_path, serve=slow))
    assert why == "every point was tried"
    assert [x.parts for x in records.values()] == [
        ("16:4/1", "16:4/2", "16:4/4"), ("16:4/2", "16:4/4"), ("16:4/4",)
    ]  # fmt: skip
    assert measured(records) == [("tp1-pp1-fp32", f"16:4/{b}") for b in BATCHES]


def test_what_is_left_of_a_run_that_was_ended_early_is_measured_by_another(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", space=ServingSpace(tp=(1,), pp=(1,), batch_sizes=BATCHES))
    _, records, _ = searched(plan, Servers(tmp_path, serve=lambda s, run, orders: s.leave(run, orders, 1)))
    assert measured(records) == [("tp1-pp1-fp32", f"16:4/{batch}") for batch in BATCHES]


def test_a_point_that_no_run_comes_to_is_given_up_and_reported(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", space=ServingSpace(tp=(1,), pp=(1,), batch_sizes=(1, 2, 4, 8)))
    results = ResultsDirectory(plan.directory)
    results.begin(plan.document(), resume=False)
    for k in (1, 2, 4):
        results.record_outcome(record(point(k), parts=[f"16:4/{k}", "16:4/8"], run=f"{ONE.name}.{k}"))
    assert endings(plan, *results.outcomes().values())["16:4/8"] is Ending.FAILED
    failed = [row for row in read_serving_report(plan.directory).rows if row.failure]
    assert [(row.batch, row.failure and row.failure.message) for row in failed] == [
        (8, "3 runs ended before they had measured it")
    ]


def test_a_measurement_of_a_training_in_its_place_is_a_crash(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", space=ServingSpace(tp=(1,), pp=(1,), batch_sizes=BATCHES))

    def train(servers: Servers, run: Run, orders: ServingOrders) -> None:
        del servers, orders
        (run.directory / "measurement.json").write_text(files.json_text(samples.measurement()))

    _, records, _ = searched(plan, Servers(tmp_path, serve=train))
    (only,) = records.values()
    assert only.failure is not None
    assert only.failure.kind is FailureKind.CRASH
    assert "unreadable result" in only.failure.message


def test_a_budget_ends_the_search_before_it_is_exceeded(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", strategy="ranked", budget_gpu_hours=0.012)
    campaign = started(plan, Scheduler(tmp_path), Listener())
    tasks, why = campaign.next_tasks()
    # Some eight seconds of start on two ranks are 0.0044 GPU hours a run.
    assert len(tasks) == 2
    assert why is not None
    assert why.startswith("another run would exceed --budget-gpu-hours 0.012: with it the search is expected to have")
    campaign.submit(tasks)
    assert campaign.next_tasks() == ([], why)


def test_no_run_is_started_that_the_time_for_the_search_is_too_short_for(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", max_hours=0.001)
    tasks, why = started(plan, Scheduler(tmp_path), Listener()).next_tasks()
    assert (tasks, why) == ([], "--max-hours 0.001 leaves no time for another run")


def test_the_time_for_a_search_ends_it_and_keeps_what_a_run_has_measured(
    plan: ServingPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path / "run", max_hours=0.05)
    launcher = Scheduler(tmp_path)
    campaign = started(plan, launcher, Listener(), parallel=1)
    campaign.submit([task_of(ServingAgenda(plan))])
    campaign.collect()
    # The worker writes after each point; the first of three is there.
    path = campaign.results.run_directory("tp1-pp1-fp32") / "measurement.json"
    path.write_text(files.json_text(measurement(ONE, point(1))))
    later(monkeypatch, 181)
    assert campaign.run() == "--max-hours 0.05 are over; --resume goes on"
    assert launcher.cancelled == ["7"]
    assert measured(campaign.outcomes) == [("tp1-pp1-fp32", "16:4/1")]


class KilledError(BaseException):
    """No clean-up hears of it."""


@dataclass
class Assassin:
    """Kills at the k-th write of a process, before it, in the midst of it or after it."""

    at: int
    when: str
    writes: int = 0

    def strike(self, write: Callable[..., None], path: Path, text: str) -> None:
        self.writes += 1
        if self.writes != self.at:
            write(path, text)
            return
        if self.when == "torn":
            path.parent.mkdir(parents=True, exist_ok=True)
            with (path if path.suffix == ".jsonl" else path.with_name(f".{path.name}.aside")).open("a") as file:
                file.write(text[: len(text) // 2])
        elif self.when == "after":
            write(path, text)
        raise KilledError


@pytest.mark.parametrize("when", ["before", "torn", "after"])
@pytest.mark.parametrize(("strategy", "parallel"), [("grid", 2), ("guided", 1)])
def test_killed_at_any_write_it_repeats_nothing_and_loses_nothing(
    when: str, strategy: str, parallel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"strategy": strategy, "workload": (SHORT, LONG) if strategy == "grid" else (SHORT,)}
    calm = plan_of(tmp_path / "calm", **asked)
    _, expected, _ = searched(calm, Servers(tmp_path), parallel)
    ended = kills = 0
    for at in itertools.count(1):
        plan = plan_of(tmp_path / f"run-{at}", **asked)
        launcher = Servers(tmp_path)
        campaign = started(plan, launcher, Listener(), parallel)
        assassin = Assassin(at=at, when=when)
        with monkeypatch.context() as patched:
            for name in ("append_line", "write_text"):
                write = getattr(files, name)
                patched.setattr(
                    files, name, lambda path, text, write=write, a=assassin: a.strike(write, path, text)
                )  # fmt: skip
            try:
                campaign.run()
                ended += 1
            except KilledError:
                kills += 1
        campaign.results.close()
        why, records, _ = searched(plan, launcher, parallel)
        assert why
        assert Counter(measured(records)) == Counter(measured(expected)), f"killed {when} write {at}"
        assert all(x.failure is None for x in records.values())
        runs = [run.name for run in launcher.taken]
        assert len(runs) == len(set(runs)) == len(records), f"killed {when} write {at}: {runs}"
        if strategy == "guided":
            assert [x.parts for x in records.values()] == [x.parts for x in expected.values()]
        if ended:
            break
    assert kills >= 5 * len(expected), "two files of a run, two notes of its job and one of its end"


def test_trials_are_what_the_strategy_sees(plan: ServingPlan) -> None:
    assert trials_of(plan, rows_of(plan), [record(failure=samples.failure(FailureKind.CRASH), parts=["16:4/1"])]) == [
        ServedTrial(row=rows_of(plan)["tp1-pp1-fp32", "16:4/1"], ending=Ending.FAILED)
    ]


#: What a run may come to.
FATES = ("all", "one", "skips", "point oom", "point crash", "oom", "crash", "lost", "timeout")


@given(
    seed=st.integers(0, 10**6),
    strategy=st.sampled_from(["guided", "bisect", "ranked", "grid"]),
    parallel=st.integers(1, 2),
    objective=st.sampled_from(["throughput-per-gpu", "latency", "pareto"]),
    limits=st.tuples(st.none() | st.integers(1, 8), st.sampled_from([None, 1.0, 60.0])),
)
@settings(max_examples=25, deadline=None)
def test_whatever_becomes_of_its_runs_a_search_ends_and_measures_nothing_twice(
    seed: int, strategy: str, parallel: int, objective: str, limits: tuple[int | None, float | None]
) -> None:
    chance = random.Random(seed)

    def serve(servers: Servers, run: Run, orders: ServingOrders) -> None:
        fate, path = chance.choice(FATES), run.directory / "measurement.json"
        if fate in {"oom", "crash", "lost", "timeout"}:
            return servers.fail(run, FailureKind(fate))
        servers.leave(run, orders, len(orders.points) if fate == "all" else 1)
        told = json.loads(path.read_text())
        others = [p.name for p in orders.points[1:]]
        if fate == "skips":
            told["skipped"] = others
        elif fate.startswith("point") and others:
            told["failures"] = [{"name": others[0], "kind": fate.split()[1], "message": "as tested"}]
            told["skipped"] = others[1:]
        path.write_text(json.dumps(told))
        return None

    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(
            Path(folder) / "run",
            strategy=strategy,
            objective=objective,
            workload=(SHORT, LONG),
            limit_search_runs=limits[0] or 50,
            targets=Targets(max_latency_ms=limits[1]),
        )
        launcher = Servers(Path(folder), serve=serve, takes_turns=True)
        why, records, _ = searched(plan, launcher, parallel)
        assert why
        assert launcher.most_at_once <= parallel
        found = measured(records)
        assert len(found) == len(set(found)) <= min(limits[0] or 50, len(plan.points))
        assert len(records) == len(launcher.taken) <= 4 * len(plan.points)
        # A process that comes later finds nothing more to do, unless runs were lost: those it tries again.
        if all(x.failure is None or x.failure.kind is not FailureKind.LOST for x in records.values()):
            again, after, _ = searched(plan, launcher, parallel)
            assert (again, after) == (why, records)
