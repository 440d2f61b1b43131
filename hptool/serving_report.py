"""What a serving search found, as people read it: tables, a page, the files that other programs take."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from hptool import charts, files
from hptool.candidates import Rejection
from hptool.facts import Cluster
from hptool.measurement import Failure, Percentiles, PointFailure, ServedPoint, ServingMeasurement
from hptool.report import Spent, cost_words, count_kinds, device_memory_gib, figure, page, rejection_lines
from hptool.serving import Lengths, Objective, ServingLayout, Targets

#: Objectives in words.
WANTED: Mapping[Objective, str] = {
    "throughput-per-gpu": "most tokens/s per GPU",
    "latency": "shortest latency",
    "pareto": "the frontier of latency and tokens/s per GPU",
}

#: The columns of the predecessor's `final_output.csv`, in its order.
PREDECESSOR_COLUMNS = ("TP", "PP", "BS", "Latency [ms]", "Throughput per GPU [samples/sec/gpu]")


@dataclass(frozen=True, slots=True, kw_only=True)
class PointPrediction:
    """What was expected of a point; `p_fit` is the chance that it fits into memory."""

    latency_ms: float
    ttft_ms: float
    tpot_ms: float
    memory_gib: float
    p_fit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRow:
    """One point that was tried. `served` is what it gave, or `failure` why it gave nothing.

    `predicted` is from before the search, `learned` from its end, when the model knew the other runs (not this one).
    `run` is the run's name, and `measurement` all that this run measured.
    """

    layout: ServingLayout
    lengths: Lengths
    batch: int
    run: str
    log_path: str
    predicted: PointPrediction
    learned: PointPrediction | None = None
    measurement: ServingMeasurement | None = None
    served: ServedPoint | None = None
    failure: Failure | PointFailure | None = None
    meets_targets: bool = False
    is_pareto: bool = False

    @property
    def name(self) -> str:
        """Within its search: `tp2-pp1-bf16 60:20/8`."""
        return f"{self.layout.name} {self.lengths.name}/{self.batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The best point for one kind of request; where none keeps the targets, `closest` comes nearest to them."""

    lengths: Lengths
    best: ServingRow | None
    closest: ServingRow | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedPoint:
    """A point and what is expected of it at the end of the search."""

    layout: ServingLayout
    lengths: Lengths
    batch: int
    predicted: PointPrediction

    @property
    def name(self) -> str:
        """As that of a row: `tp2-pp1-bf16 60:20/8`."""
        return f"{self.layout.name} {self.lengths.name}/{self.batch}"

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens made, prompts not counted."""
        return 1000 * self.batch * self.lengths.output_len / self.predicted.latency_ms / self.layout.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """How far the predictions were off: medians of the relative error of the latency over the measured points.

    `before` the search; `after` it with each point predicted from the others. None where too little was measured.
    """

    points: int
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingReport:
    """Everything that the readers of a serving search see.

    `rows` are by lengths, the best first, failures last. `expected` are the best predicted points, measured or not.
    `layouts` and `points` could start; `skipped` counts points that nobody had to measure, by reason.
    """

    model: str
    num_parameters: int
    cluster: Cluster
    nodes: int
    engine: str
    objective: Objective
    targets: Targets
    layouts: int
    points: int
    rejections: Sequence[Rejection]
    rows: Sequence[ServingRow]
    answers: Sequence[Answer]
    expected: Sequence[ExpectedPoint]
    trust: Trust
    spent: Spent
    notes: Sequence[str]
    best_path: str | None
    serve_command: str | None
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def measured(self) -> Sequence[ServingRow]:
        """Rows that gave something, in their order."""
        return [row for row in self.rows if row.served]

    @property
    def failed(self) -> Sequence[ServingRow]:
        """Rows that gave nothing."""
        return [row for row in self.rows if not row.served]

    @property
    def lengths(self) -> Sequence[Lengths]:
        """The kinds of requests, in the order in which they were asked for."""
        return [answer.lengths for answer in self.answers]

    def measured_of(self, lengths: Lengths) -> Sequence[ServingRow]:
        """Measured rows of one kind of request, the best first."""
        return [row for row in self.measured if row.lengths == lengths]

    def pareto_of(self, lengths: Lengths) -> Sequence[ServingRow]:
        """The measured frontier of one kind of request, shortest latency first."""
        time_ms = partial(_percentile, percentile=self.targets.percentile)
        rows = [
            (time_ms(row.served.latency_ms), row) for row in self.measured_of(lengths) if row.served and row.is_pareto
        ]
        return [row for _, row in sorted(rows, key=lambda found: found[0])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """A limit that a measured point does not keep; what it gave is `over` times the limit."""

    name: str
    value_ms: float
    limit_ms: float

    @property
    def over(self) -> float:
        """More than 1."""
        return self.value_ms / self.limit_ms if self.limit_ms else math.inf

    def __str__(self) -> str:
        return f"{self.name} {figure(self.value_ms)} ms is {self.over:.2f} × its limit of {figure(self.limit_ms)} ms"


def misses(targets: Targets, served: ServedPoint) -> Sequence[Miss]:
    """The limits that a point does not keep, the worst first."""
    found = [
        Miss(name=name, value_ms=value_ms, limit_ms=limit_ms)
        for name, limit_ms, times in _limits(targets, served)
        if (value_ms := _percentile(times, targets.percentile)) > limit_ms
    ]
    return sorted(found, key=lambda miss: -miss.over)


def _limits(targets: Targets, served: ServedPoint) -> Iterator[tuple[str, float, Percentiles]]:
    """What is limited: its name, the limit and what a point gave."""
    at = f"p{targets.percentile}"
    for name, limit_ms, times in (
        (f"latency {at}", targets.max_latency_ms, served.latency_ms),
        (f"first token {at}", targets.max_ttft_ms, served.ttft_ms),
        (f"each token {at}", targets.max_tpot_ms, served.tpot_ms),
    ):
        if limit_ms is not None:
            yield name, limit_ms, times


def _percentile(times: Percentiles, percentile: int) -> float:
    return float(getattr(times, f"p{percentile}"))


def _error_pct(report: ServingReport, expected: PointPrediction | None, served: ServedPoint | None) -> float | None:
    """How much longer than it took an answer was expected to take, in percent, at the percentile that is to be kept."""
    if expected is None or served is None:
        return None
    took_ms = _percentile(served.latency_ms, report.targets.percentile)
    return 100 * (expected.latency_ms / took_ms - 1) if took_ms else None


def equals(report: ServingReport, answer: Answer) -> Sequence[ServingRow]:
    """Points within the limits that the timings do not tell from the best: the intervals of what is wanted overlap."""
    best = answer.best
    if best is None or best.served is None or report.objective == "pareto":
        return []
    others = [row for row in report.measured_of(answer.lengths) if row.meets_targets and row is not best]
    worst = _interval(report.objective, best.served)[0]
    return [row for row in others if row.served and _interval(report.objective, row.served)[1] >= worst]


def _interval(objective: Objective, served: ServedPoint) -> tuple[float, float]:
    """From the worst to the best of what is wanted, more being better: the median's interval."""
    low_ms, high_ms = served.latency_low_ms, served.latency_high_ms
    if objective == "latency":
        return -high_ms, -low_ms
    made = served.tokens_per_s_per_gpu * served.latency_ms.p50
    return (made / high_ms if high_ms else 0.0), (made / low_ms if low_ms else math.inf)


def why_nothing(report: ServingReport) -> str | None:
    """The reason for which there is no answer at all; None where any kind of request has one."""
    if any(answer.best for answer in report.answers):
        return None
    if not report.rows:
        return "No point was measured; what is shown is predicted."
    if not report.measured:
        kinds = count_kinds(row.failure.kind for row in report.rows if row.failure)
        return f"No point that was tried gave anything: {kinds}."
    return f"No point that was measured keeps the limits: {targets_words(report.targets)}."


def targets_words(targets: Targets) -> str:
    """`latency ≤ 500 ms, first token ≤ 100 ms at p95`, or that there is no limit."""
    limits = (
        ("latency", targets.max_latency_ms),
        ("first token", targets.max_ttft_ms),
        ("each token", targets.max_tpot_ms),
    )
    given = [f"{name} ≤ {figure(limit)} ms" for name, limit in limits if limit is not None]
    return f"{', '.join(given)} at p{targets.percentile}" if given else "no limits"


# ---------------------------------------------------------------- tables


def table_rows(report: ServingReport) -> list[dict[str, Any]]:
    """One mapping a point that was tried, keyed by field name with units: the content of results.csv and of --json.

    Ranks count the measured points of the same lengths.
    """
    ranks: dict[Lengths, int] = {}
    same = {id(row) for answer in report.answers for row in equals(report, answer)}
    found = []
    for row in report.rows:
        if row.served:
            ranks[row.lengths] = ranks.get(row.lengths, 0) + 1
        found.append(_cells(report, row, ranks[row.lengths] if row.served else None, is_equal=id(row) in same))
    return found


def _cells(report: ServingReport, row: ServingRow, rank: int | None, *, is_equal: bool) -> dict[str, Any]:
    m, s = row.measurement, row.served
    return {
        "rank": rank,
        "name": row.name,
        "outcome": "measured" if s else (row.failure.kind.value if row.failure else None),
        "tp": row.layout.tp,
        "pp": row.layout.pp,
        "precision": row.layout.precision,
        "cuda_graphs": m.cuda_graphs if m else row.layout.cuda_graphs,
        "engine": m.engine if m else report.engine,
        "gpus": row.layout.gpus,
        "batch": row.batch,
        "input_len": row.lengths.input_len,
        "output_len": row.lengths.output_len,
        **_times("ttft", s.ttft_ms if s else None),
        **_times("tpot", s.tpot_ms if s else None),
        **_times("latency", s.latency_ms if s else None),
        "latency_low_ms": s.latency_low_ms if s else None,
        "latency_high_ms": s.latency_high_ms if s else None,
        "tokens_per_s": s.tokens_per_s if s else None,
        "tokens_per_s_per_gpu": s.tokens_per_s_per_gpu if s else None,
        "tokens_per_s_per_user": s.tokens_per_s_per_user if s else None,
        "requests_per_s_per_gpu": _requests_per_s_per_gpu(row),
        "peak_memory_gib": s.peak_memory_gib if s else None,
        "memory_kind": m.memory_kind if m else None,
        "headroom_gib": _headroom_gib(report, m, s) if m and s else None,
        **_expected("predicted", row.predicted),
        "error_pct": _error_pct(report, row.predicted, s),
        **_expected("learned", row.learned),
        "learned_error_pct": _error_pct(report, row.learned, s),
        "meets_targets": row.meets_targets,
        "is_pareto": row.is_pareto,
        "is_equal_to_best": is_equal,
        "repeats": s.repeats if s else None,
        "warmups": s.warmups if s else None,
        "is_steady": s.is_steady if s else None,
        "run": row.run,
        "message": row.failure.message if row.failure else None,
        "log_path": _log_path(row),
    }


def _times(name: str, times: Percentiles | None) -> dict[str, float | None]:
    return {f"{name}_p{p}_ms": None if times is None else _percentile(times, p) for p in (50, 95, 99)}


def _expected(when: str, expected: PointPrediction | None) -> dict[str, float | None]:
    names = [f.name for f in dataclasses.fields(PointPrediction)]
    return {f"{when}_{name}": None if expected is None else getattr(expected, name) for name in names}


def _log_path(row: ServingRow) -> str:
    return (row.failure.log_path if isinstance(row.failure, Failure) else None) or row.log_path


def _headroom_gib(report: ServingReport, measurement: ServingMeasurement, served: ServedPoint) -> float:
    """What the fullest rank left of its device: neither the point's peak nor held by its run outside the allocator."""
    used, reserved = measurement.device_used_gib, measurement.max_reserved_gib
    beside = max(0.0, used - reserved) if used is not None and reserved is not None else 0.0
    return device_memory_gib(report.cluster, measurement) - served.peak_memory_gib - beside


def _requests_per_s_per_gpu(row: ServingRow) -> float | None:
    if row.served is None or not row.served.latency_ms.p50:
        return None
    return row.batch * 1000 / row.served.latency_ms.p50 / row.layout.gpus


def predecessor_row(*, tp: int, pp: int, batch: int, latency_ms: float) -> dict[str, float]:
    """A line of the predecessor's `final_output.csv`; requests/s for each GPU with three digits after the point."""
    rate = round(batch * 1000 / latency_ms / tp / pp, 3)
    return dict(zip(PREDECESSOR_COLUMNS, (tp, pp, batch, latency_ms, rate), strict=True))


def write(report: ServingReport, directory: Path) -> None:
    """What was found, in the search's directory.

    `results.csv` has all points that were tried, and `pareto.csv` those of the frontier, lengths by lengths;
    `report.html` is for people. `final_output.csv` is what the predecessor's users read: its columns, measured points
    only, highest throughput first. It has the first lengths; of several each has its own, as `final_output_60_20.csv`.
    """
    table = pd.DataFrame(table_rows(report), columns=list(_cells(report, _NO_POINT, None, is_equal=False)))
    position = {id(row): i for i, row in enumerate(report.rows)}
    frontier = [position[id(row)] for lengths in report.lengths for row in report.pareto_of(lengths)]
    for name, part in (("results.csv", table), ("pareto.csv", table.iloc[frontier])):
        files.write_text(directory / name, part.to_csv(index=False, float_format="%.6g"))
    for i, lengths in enumerate(report.lengths):
        text = _final_output(report, lengths)
        if i == 0:
            files.write_text(directory / "final_output.csv", text)
        if len(report.lengths) > 1:
            files.write_text(directory / f"final_output_{lengths.input_len}_{lengths.output_len}.csv", text)
    files.write_text(directory / "report.html", html(report))


def _final_output(report: ServingReport, lengths: Lengths) -> str:
    rows = [
        predecessor_row(tp=row.layout.tp, pp=row.layout.pp, batch=row.batch, latency_ms=row.served.latency_ms.p50)
        for row in report.measured_of(lengths)
        if row.served and row.served.latency_ms.p50
    ]
    rate = PREDECESSOR_COLUMNS[-1]
    rows.sort(key=lambda row: -row[rate])
    frame = pd.DataFrame(rows, columns=list(PREDECESSOR_COLUMNS))
    return str(frame.to_csv(index=False))


#: Tells the names of the columns where there is no row.
_NO_POINT = ServingRow(
    layout=ServingLayout(),
    lengths=Lengths(input_len=1, output_len=1),
    batch=1,
    run="",
    log_path="",
    predicted=PointPrediction(latency_ms=0.0, ttft_ms=0.0, tpot_ms=0.0, memory_gib=0.0, p_fit=0.0),
)


# ---------------------------------------------------------------- words


def answer_heading(answer: Answer) -> str:
    """The answer for one kind of request, in a line."""
    if answer.best:
        return f"{answer.best.layout.name}, batch {answer.best.batch}"
    if answer.closest:
        return (
            f"no measured point keeps the limits; closest: {answer.closest.layout.name}, batch {answer.closest.batch}"
        )
    return "nothing measured"


def answer_lines(report: ServingReport, answer: Answer) -> list[str]:
    """What the best point, or else the closest, gives, what it misses, and how sure that is."""
    row = answer.best or answer.closest
    if row is None or row.served is None:
        return []
    s, lines = row.served, []
    if answer.best is None:
        lines += [f"misses: {miss}" for miss in misses(report.targets, s)]
    lines.append(
        f"speed:  {figure(s.tokens_per_s_per_gpu)} tokens/s/GPU, {figure(_requests_per_s_per_gpu(row) or 0)} "
        f"requests/s/GPU, {figure(s.tokens_per_s_per_user)} tokens/s for each user"
    )
    spread = 50 * (s.latency_high_ms - s.latency_low_ms) / s.latency_ms.p50 if s.latency_ms.p50 else 0.0
    lines.append(f"times:  {_trio(s.latency_ms)} ms latency (p50 ±{spread:.1f}%, p95 and p99 of {s.repeats} repeats)")
    lines.append(f"tokens: the first after {_trio(s.ttft_ms)} ms, then {_trio(s.tpot_ms)} ms each")
    if row.measurement:
        whole = device_memory_gib(report.cluster, row.measurement)
        left = _headroom_gib(report, row.measurement, s)
        lines.append(
            f"memory: {s.peak_memory_gib:.2f} GiB {row.measurement.memory_kind}; {left:.2f} of {whole:.4g} GiB free "
            f"({'the fullest of ' if row.layout.gpus > 1 else ''}{_count(row.layout.gpus, 'GPU')})"
        )
    if (error := _error_pct(report, row.predicted, s)) is not None:
        at = f"p{report.targets.percentile}"
        lines.append(f"before: {figure(row.predicted.latency_ms)} ms latency predicted, {error:+.0f}% off that {at}")
    if report.objective == "pareto" and (ends := report.pareto_of(answer.lengths)):
        first, last = _place(report, ends[0]), _place(report, ends[-1])
        lines.append(
            f"range:  {_count(len(ends), 'point')} on the frontier, from {figure(first[0])} ms with "
            f"{figure(first[1])} tokens/s/GPU to {figure(last[0])} ms with {figure(last[1])}"
        )
    if same := [f"{other.layout.name}, batch {other.batch}" for other in equals(report, answer)]:
        lines.append(f"equal:  {'; '.join(same)} (their intervals overlap: the timings do not tell them apart)")
    if not s.is_steady:
        lines.append("beware: its passes had not settled when they ended")
    elif spread > _SCATTERED:
        lines.append("beware: its passes scatter: something else may have run there, and another run may differ")
    measured = report.measured_of(answer.lengths)
    keeping = sum(other.meets_targets for other in measured)
    if report.targets != Targets(percentile=report.targets.percentile) and keeping:
        lines.append(f"limits: {keeping} of {len(measured)} measured points keep them")
    return lines


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'s' if number != 1 else ''}"


def _trio(times: Percentiles) -> str:
    return " / ".join(figure(_percentile(times, p)) for p in (50, 95, 99))


def trust_words(trust: Trust) -> str | None:
    """How far the predictions were off; None where too little was measured to say."""
    if trust.before is None:
        return None
    said = f"predicted latencies were {trust.before:.0%} off before the search (median of {trust.points} points)"
    return said if trust.after is None else f"{said}, {trust.after:.0%} with each predicted from the others"


def space_words(report: ServingReport) -> str:
    """How much could start, how much of that was tried, and how much could not."""
    rejected = sum(rejection.count for rejection in report.rejections)
    return (
        f"{_count(report.points, 'point')} of {_count(report.layouts, 'layout')} could start, {len(report.rows)} "
        f"were tried; {_count(rejected, 'point')} could not start"
    )


def skipped_lines(report: ServingReport) -> list[str]:
    """How many points nobody had to measure, and why."""
    return [f"{_count(count, 'point')} not measured: {reason}" for reason, count in report.skipped.items()]


def grid_words(report: ServingReport) -> str:
    """What the search cost, and what measuring everything would have."""
    grid = f"measuring all {report.points} points" if len(report.rows) < report.points else None
    return cost_words(report.spent, grid)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedTogether:
    """Points of a run that one mishap cost."""

    names: Sequence[str]
    kind: str
    message: str
    log_path: str


def failed_together(report: ServingReport) -> Sequence[FailedTogether]:
    """Failures, those of one run with the same message as one."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for row in report.failed:
        kind, message = (row.failure.kind.value, row.failure.message) if row.failure else ("lost", "nothing came of it")
        found.setdefault((row.run, kind, message, _log_path(row)), []).append(row.name)
    return [
        FailedTogether(names=names, kind=kind, message=message, log_path=log_path)
        for (_, kind, message, log_path), names in found.items()
    ]


# ---------------------------------------------------------------- the page


def html(report: ServingReport) -> str:
    """A self-contained page."""
    rows = table_rows(report)
    return page(
        "serving.html.j2",
        report=report,
        rows=rows,
        nothing=why_nothing(report),
        wanted=f"{WANTED[report.objective]}, {targets_words(report.targets)}",
        answers=[
            (answer, answer_heading(answer), answer_lines(report, answer), chart(report, answer.lengths))
            for answer in report.answers
        ],
        trust=trust_words(report.trust),
        space=space_words(report),
        skipped=skipped_lines(report),
        cost=grid_words(report),
        memory_kinds=" or ".join(sorted({row.measurement.memory_kind for row in report.rows if row.measurement})),
    )


def chart(report: ServingReport, lengths: Lengths) -> Markup:
    """Latency against throughput per GPU of all measured points of one kind of request, beside what was predicted."""
    at = f"p{report.targets.percentile}"
    measured = report.measured_of(lengths)
    layouts = sorted({row.layout for row in measured})
    points: dict[ServingLayout, list[charts.Point]] = {layout: [] for layout in layouts}
    for row in sorted(measured, key=lambda row: row.batch):
        points[row.layout].append(_point(report, row))
    frontier = [_place(report, row) for row in report.pareto_of(lengths)]
    limit = report.targets.max_latency_ms
    return charts.svg(
        charts.Chart(
            name=f"served-{lengths.input_len}-{lengths.output_len}",
            alt=(
                f"Latency ({at}) against throughput per GPU for requests of {lengths.name} tokens: {len(measured)} "
                f"measured points of {len(layouts)} layouts, {len(frontier)} on the frontier. All are in the table."
            ),
            x_label=f"latency of an answer, ms ({at})",
            y_label="tokens/s per GPU",
            series=[charts.Series(name=layout.name, points=points[layout]) for layout in layouts],
            frontier=frontier,
            limits=[] if limit is None else [charts.Limit(x=limit, name=f"limit: {figure(limit)} ms")],
            log_x=True,
            faint_label="outside the limits",
        )
    )


def _place(report: ServingReport, row: ServingRow) -> tuple[float, float]:
    assert row.served  # noqa: S101 (only measured rows are drawn)
    return _percentile(row.served.latency_ms, report.targets.percentile), row.served.tokens_per_s_per_gpu


def _point(report: ServingReport, row: ServingRow) -> charts.Point:
    """A measured row, and where it was predicted."""
    x, y = _place(report, row)
    expected_ms = row.predicted.latency_ms
    expected = None
    if expected_ms > 0:
        expected = expected_ms, 1000 * row.batch * row.lengths.output_len / expected_ms / row.layout.gpus
    assert row.served  # noqa: S101 (as above)
    said = [
        f"{row.layout.name}, batch {row.batch}: {figure(x)} ms, {figure(y)} tokens/s per GPU",
        f"first token after {figure(row.served.ttft_ms.p50)} ms, then {figure(row.served.tpot_ms.p50)} ms each",
    ]
    if expected:
        said.append(f"predicted {figure(expected[0])} ms, {figure(expected[1])} tokens/s per GPU")
    said += [str(miss) for miss in misses(report.targets, row.served)]
    if row.is_pareto:
        said.append("on the frontier")
    return charts.Point(x=x, y=y, title="; ".join(said), expected=expected, faint=not row.meets_targets)


# ---------------------------------------------------------------- the terminal


def print_table(report: ServingReport, console: Console, top: int) -> None:
    """The answers in 80 columns, then the best `top` points of each kind of request, failures, and what to do next."""
    say = partial(console.print, soft_wrap=True, markup=False)
    say(f"{report.model} served on {report.nodes} × {report.cluster.name} by {report.engine}", style="bold")
    say(f"wanted: {WANTED[report.objective]}, {targets_words(report.targets)}")
    if nothing := why_nothing(report):
        say(nothing, style="bold")
    for answer in report.answers:
        say()
        say(f"{answer.lengths.name}: {answer_heading(answer)}", style="bold")
        for line in answer_lines(report, answer):
            say(f"  {line}")
        if report.measured_of(answer.lengths):
            console.print(_measured_table(report, answer, top))
    if any(row.is_pareto for row in report.rows) or any(not row.meets_targets for row in report.measured):
        say("* on the frontier: none is better in latency and throughput   ! outside the limits")
    if not report.rows:
        console.print(_expected_table(report, top))
    say()
    _print_below(report, say)


def _print_below(report: ServingReport, say: Callable[[str], None]) -> None:
    """What stands below the tables: failures, rejections, notes, what it cost, and what to do with the answer."""
    for failed in failed_together(report):
        first, *others = failed.names
        more = f" and {len(others)} more of its points" if others else ""
        say(f"failed: {first}{more}: {failed.kind}: {failed.message}")
        say(f"  log: {failed.log_path}")
    say(f"{space_words(report)}{':' if report.rejections else '.'}")
    for line in rejection_lines(report.rejections):
        say(line)
    for line in skipped_lines(report):
        say(line)
    for note in report.notes:
        say(f"note: {note}")
    if trust := trust_words(report.trust):
        say(f"trust:  {trust}")
    if report.spent.ended:
        say(f"search: {report.spent.ended}")
    say(f"cost:   {grid_words(report)}")
    if report.best_path:
        say(f"config: {report.best_path}")
    if report.serve_command:
        say(f"run it: {report.serve_command}")


#: Of a percentile.
_MEDIAN = 50

#: Half an interval of the median latency, in percent of it, above which it is said that a point is not well known.
_SCATTERED = 20


def _measured_table(report: ServingReport, answer: Answer, top: int) -> Table:
    tail = report.targets.percentile if report.targets.percentile > _MEDIAN else 99
    table = _table("#", "layout", "batch", "p50 ms", f"p{tail} ms", "ttft", "tpot", "tok/s/GPU", "pred.")
    same = equals(report, answer)
    for rank, row in enumerate(report.measured_of(answer.lengths)[:top], start=1):
        s = row.served
        assert s  # noqa: S101 (what `measured_of` means)
        marks = f"{'=' if row in same else ''}{'*' if row.is_pareto else ''}{'' if row.meets_targets else '!'}"
        table.add_row(
            f"{rank}{marks}",
            row.layout.name,
            str(row.batch),
            figure(s.latency_ms.p50),
            figure(_percentile(s.latency_ms, tail)),
            figure(s.ttft_ms.p50),
            figure(s.tpot_ms.p50),
            figure(s.tokens_per_s_per_gpu),
            figure(row.predicted.latency_ms),
        )
    return table


def _expected_table(report: ServingReport, top: int) -> Table:
    table = _table("#", "layout", "lengths", "batch", "ms", "tok/s/GPU", "GiB", "fits")
    for rank, point in enumerate(report.expected[:top], start=1):
        expected = point.predicted
        table.add_row(
            str(rank),
            point.layout.name,
            point.lengths.name,
            str(point.batch),
            figure(expected.latency_ms),
            figure(point.tokens_per_s_per_gpu),
            f"{expected.memory_gib:.2f}",
            f"{expected.p_fit:.0%}",
        )
    return table


def _table(*headings: str) -> Table:
    """Columns a blank apart, text to the left and figures to the right."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "layout" else "right", no_wrap=True)
    return table


# ---------------------------------------------------------------- for programs


def as_json(report: ServingReport, directory: Path) -> Mapping[str, Any]:
    """The same answer for programs."""
    return {
        "model": report.model,
        "cluster": report.cluster.name,
        "nodes": report.nodes,
        "gpus": report.nodes * report.cluster.gpus_per_node,
        "num_parameters": report.num_parameters,
        "engine": report.engine,
        "objective": report.objective,
        "targets": dataclasses.asdict(report.targets),
        "answers": [_answer_json(report, answer) for answer in report.answers],
        "best_config": report.best_path,
        "serve_command": report.serve_command,
        "reason": why_nothing(report),
        "runs": table_rows(report),
        "predicted": [
            {"name": x.name, **dataclasses.asdict(x.predicted), "tokens_per_s_per_gpu": x.tokens_per_s_per_gpu}
            for x in report.expected
        ],
        "layouts": report.layouts,
        "points": report.points,
        "rejections": [dataclasses.asdict(rejection) for rejection in report.rejections],
        "skipped": dict(report.skipped),
        "notes": list(report.notes),
        "trust": dataclasses.asdict(report.trust),
        "spent": dataclasses.asdict(report.spent),
        "results": str(directory),
        "report": str(directory / "report.html"),
    }


def _answer_json(report: ServingReport, answer: Answer) -> dict[str, Any]:
    """Names as in `runs`; `misses` are the limits that the closest point does not keep."""
    closest = answer.closest.served if answer.closest else None
    return {
        "lengths": answer.lengths.name,
        "best": answer.best.name if answer.best else None,
        "closest": answer.closest.name if answer.closest else None,
        "misses": [
            {**dataclasses.asdict(miss), "over": miss.over}
            for miss in (misses(report.targets, closest) if closest else [])
        ],
        "equal_to_best": [row.name for row in equals(report, answer)],
        "pareto": [row.name for row in report.pareto_of(answer.lengths)],
    }
