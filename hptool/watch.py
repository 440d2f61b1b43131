"""A search as those see it who watch: what each run does, what it has cost, the best so far. From its files alone."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.prompt import Confirm
from rich.table import Table
from rich.text import Text

from hptool.errors import InputError
from hptool.measurement import Failure, Measurement, PointFailure, ServedPoint
from hptool.results import OutcomeRecord, ResultsDirectory, Status, Submission
from hptool.units import MINUTES_PER_HOUR, SECONDS_PER_MINUTE

#: What a search does while it has runs under way, and after somebody ended it.
MEASURING = "measuring"
INTERRUPTED = "interrupted; --resume goes on"

#: How often the live table is drawn anew.
_REDRAW_S = 0.5

#: Lines of a terminal that the live table leaves for what stands around its runs.
_AROUND = 10


class RunState(StrEnum):
    """Where a run stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    GONE = "interrupted"  # its search ended before it did


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One run. Of `of` steps `step` are done; the times and rates are there once something was timed."""

    run: str
    state: RunState
    detail: str
    nodes: int
    step: int
    of: int
    tokens_per_s: float | None
    predicted_step_time_s: float
    step_time_s: float | None
    spread: float | None  # half the interval of the step time, as a fraction of it
    gpu_hours: float
    point: ServedPoint | None = None  # of a run that serves the one with the highest rate


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBest:
    """The best point so far for requests of such lengths; None where none keeps the limits yet."""

    lengths: str
    layout: str | None
    point: ServedPoint | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A search at one moment: its runs in the order of their submission.

    The best has the highest tokens/s per GPU in its longest timing, or at scale where runs were made there.
    """

    doing: str
    elapsed_s: float | None  # None where the search has not said so
    gpu_hours: float
    lines: tuple[Line, ...]
    best: str | None
    best_step_time_s: float | None
    best_predicted_step_time_s: float | None
    best_model_tflops_per_gpu: float | None
    #: A search for the fastest way to serve, whose steps are points; it has a best for each kind of request.
    serves: bool = False
    served: tuple[ServedBest, ...] = ()


def snapshot(
    results: ResultsDirectory,
    submissions: Mapping[str, Submission],
    outcomes: Mapping[str, OutcomeRecord],
    status: Status,
    *,
    at_work: bool,
) -> Snapshot:
    """What the search's records and its running jobs say; `at_work` is whether a process still looks after it."""
    lines = []
    known = [i for i, run in enumerate(submissions) if run in outcomes or run in status.states]
    for i, (run, submission) in enumerate(submissions.items()):
        record, word = outcomes.get(run), status.states.get(run)
        if record is None and word is None and submission.job_id is None:
            continue  # was never taken
        # The scheduler has forgotten a run of which the search says nothing, though it knows of a later one.
        is_forgotten = word is None and i < max(known, default=0)
        lines.append(_line(results, submission, record, word, is_gone=is_forgotten or not at_work))
    serves = any(submission.parts for submission in submissions.values())
    best = None if serves else _best(outcomes.values())
    found = best.measurement if best else None
    return Snapshot(
        doing=status.doing,
        elapsed_s=None if math.isnan(status.elapsed_s) else status.elapsed_s,
        gpu_hours=max(status.gpu_hours, sum(record.gpu_hours for record in outcomes.values())),
        lines=tuple(lines),
        best=best.name if best else None,
        best_step_time_s=found.step_time_s if found else None,
        best_predicted_step_time_s=submissions[best.run].predicted_step_time_s
        if best and best.run in submissions
        else None,
        best_model_tflops_per_gpu=found.model_tflops_per_gpu if found else None,
        serves=serves,
        served=tuple(_served_bests(results, outcomes.values())) if serves else (),
    )


def _best(records: Iterable[OutcomeRecord]) -> OutcomeRecord | None:
    """The best run of all: layouts are compared as they ended last, so one that failed in the end is out."""
    small: dict[str, OutcomeRecord] = {}
    at_scale: dict[str, OutcomeRecord] = {}
    for record in records:
        if not record.may_run_again:
            is_small = record.name not in small or record.nodes == small[record.name].nodes
            (small if is_small else at_scale)[record.name] = record
    compared = [r for r in at_scale.values() if r.measurement]
    compared = compared or [r for r in small.values() if r.measurement and r.name not in at_scale]
    return max(compared, key=lambda r: r.measurement.tokens_per_s_per_gpu if r.measurement else 0.0, default=None)


def _best_point(record: OutcomeRecord) -> ServedPoint | None:
    """Of the points of a run the one with the highest rate."""
    points = record.serving.points if record.serving else ()
    return max(points, key=lambda point: point.tokens_per_s_per_gpu, default=None)


def _served_bests(results: ResultsDirectory, records: Iterable[OutcomeRecord]) -> Iterator[ServedBest]:
    """For each kind of request the best point within the limits of the search, by what the search wants most."""
    targets, wants_latency = results.wanted()
    found: dict[str, list[tuple[str, ServedPoint]]] = {}
    for record in records:
        for point in record.serving.points if record.serving else ():
            found.setdefault(f"{point.input_len}:{point.output_len}", []).append((record.name, point))

    def worth(entry: tuple[str, ServedPoint]) -> float:
        return -entry[1].latency_ms.p50 if wants_latency else entry[1].tokens_per_s_per_gpu

    for lengths, points in found.items():
        best = max((entry for entry in points if entry[1].keeps(targets)), key=worth, default=None)
        yield ServedBest(lengths=lengths, layout=best[0] if best else None, point=best[1] if best else None)


def _spread(measured: Measurement) -> float:
    """Half the interval of the step time, as a fraction of it."""
    return (measured.step_time_high_s - measured.step_time_low_s) / 2 / measured.step_time_s


def _tokens_per_s(record: OutcomeRecord) -> float | None:
    """Of all GPUs of the run."""
    if (measured := record.measurement) is not None:
        return measured.tokens_per_s_per_gpu * measured.gpus
    point = _best_point(record)
    return point.tokens_per_s if point else None


def _failure(record: OutcomeRecord) -> Failure | PointFailure | None:
    """Why a run gave nothing at all."""
    served = record.serving
    return record.failure or (served.failures[0] if served and not served.points else None)


def _line(
    results: ResultsDirectory, submission: Submission, record: OutcomeRecord | None, word: str | None, *, is_gone: bool
) -> Line:
    measured = record if record and not record.failure else None
    trained = record.measurement if record else None
    told = results.read_progress(submission.run) if record is None else None
    failure = _failure(record) if record else None
    if failure:
        state, detail = RunState.FAILED, f"{failure.kind.value}: {failure.message}"
    elif measured:
        state, detail = RunState.DONE, ""
    elif is_gone:
        state, detail = RunState.GONE, _left_behind(results, submission.run, is_known=told is not None)
    elif told:
        state, detail = RunState.RUNNING, ""
    else:
        state = RunState.RUNNING if word and word.startswith("running") else RunState.QUEUED
        detail = word or "submitting"
    return Line(
        run=submission.run,
        state=state,
        detail=detail,
        nodes=submission.nodes,
        step=_done(measured, submission) if measured else (told.step if told else 0),
        of=submission.steps,
        tokens_per_s=_tokens_per_s(measured) if measured else (told.tokens_per_s if told else None),
        predicted_step_time_s=submission.predicted_step_time_s,
        step_time_s=trained.step_time_s if trained else None,
        spread=_spread(trained) if trained else None,
        gpu_hours=record.gpu_hours if record else 0.0,
        point=_best_point(record) if record else None,
    )


def _done(record: OutcomeRecord, submission: Submission) -> int:
    """Steps that were made, or points that were measured."""
    return len(record.serving.points) if record.serving else submission.steps


def _left_behind(results: ResultsDirectory, run: str, *, is_known: bool) -> str:
    """What became of a run whose search is gone, as far as its own files say."""
    if results.read_outcome(run) is not None:
        return "has ended since; --resume collects it"
    return "at work when its search ended; a job on Slurm may go on, and --resume waits for it" if is_known else ""


def of_directory(results: ResultsDirectory) -> Snapshot:
    """The search in a directory as its files tell it, whoever works in it."""
    if not results.is_there():
        raise InputError(f"{results.path}: holds no search (there is no plan.json)")
    at_work = results.is_held()
    said, submissions, outcomes = results.read_status(), results.submissions(), results.outcomes()
    doing = said.doing if said else MEASURING if submissions else "nothing was launched"
    if at_work and doing == INTERRUPTED:
        doing = MEASURING  # goes on, and has not said so yet
    elif not at_work and doing == MEASURING:
        doing = INTERRUPTED
    status = replace(said, doing=doing) if said else Status(doing=doing, elapsed_s=math.nan)
    return snapshot(results, submissions, outcomes, status, at_work=at_work)


# ---------------------------------------------------------------- on a terminal

#: Runs that may still change.
_OPEN = (RunState.QUEUED, RunState.RUNNING)

#: Below the table stand the reasons of so many runs that wait or failed.
_MOST_SAID = 5

_STYLES = {
    RunState.QUEUED: "dim",
    RunState.RUNNING: "cyan",
    RunState.DONE: "green",
    RunState.FAILED: "red",
    RunState.GONE: "yellow",
}


def duration(seconds: float) -> str:
    """For people: 42 s, 7 min, 3 h 05 min."""
    if seconds < 2 * SECONDS_PER_MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / SECONDS_PER_MINUTE)
    if minutes < 2 * MINUTES_PER_HOUR:
        return f"{minutes} min"
    return f"{minutes // MINUTES_PER_HOUR} h {minutes % MINUTES_PER_HOUR:02d} min"


def _short(run: str) -> str:
    """Without what the layout does not use, for narrow tables."""
    layout, dot, attempt = run.partition(".")
    return "-".join(x for x in layout.split("-") if x not in ("vpp1", "cp1", "none")) + dot + attempt


def summary(now: Snapshot) -> str:
    """One line: what it does, for how long, what that has cost, and the best so far against its prediction."""
    parts = [now.doing, f"{now.gpu_hours:.3g} GPU hours spent"]
    if now.elapsed_s is not None:
        parts.insert(1, f"{duration(now.elapsed_s)} elapsed")
    if now.best is not None and now.best_step_time_s is not None:
        predicted = now.best_predicted_step_time_s
        beside = f", {predicted:.4g} s predicted" if predicted else ""
        parts.append(f"best {_short(now.best)}: {now.best_step_time_s:.4g} s a step{beside}")
    for best in now.served:
        found = "nothing measured keeps the limits"
        if best.point:
            rate, ms = best.point.tokens_per_s_per_gpu, best.point.latency_ms.p50
            found = f"{best.layout} with batch {best.point.batch}, {rate:,.0f} tokens/s/GPU in {ms:.4g} ms"
        parts.append(f"best of {best.lengths}: {found}")
    return "; ".join(parts)


def _printable(text: str) -> str:
    """On one line, and without what a terminal would obey: anything may stand in what a job said."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def _step_cells(line: Line) -> Sequence[str]:
    return (
        "" if line.tokens_per_s is None else f"{line.tokens_per_s:,.0f}",
        "" if line.step_time_s is None else f"{line.step_time_s:.4g}",
        "" if line.spread is None else f"{line.spread:.1%}",
        f"{line.predicted_step_time_s:.4g}",
    )


def _served_cells(line: Line) -> Sequence[str]:
    if (point := line.point) is None:
        return "", "", ""
    return point.name, f"{point.tokens_per_s_per_gpu:,.0f}", f"{point.latency_ms.p50:.4g}"


def table(now: Snapshot, most_lines: int | None = None) -> RenderableType:
    """The runs in 80 columns and the summary below; the newest, and those under way, where there are too many.

    With `most_lines` nothing takes more than one line, but the summary.
    """
    made = Table(box=None, pad_edge=False)
    made.add_column("run")
    made.add_column("")
    own = ("points", "fastest", "tok/s/GPU", "ms") if now.serves else ("steps", "tokens/s", "step s", "±", "pred. s")
    for heading in ("nodes", *own):
        made.add_column(heading, justify="right", no_wrap=True)
    count = len(now.lines) if most_lines is None else most_lines
    by_news = sorted(range(len(now.lines)), key=lambda i: (now.lines[i].state in _OPEN, i))
    shown = [now.lines[i] for i in sorted(by_news[max(0, len(now.lines) - count) :])]
    for line in shown:
        made.add_row(
            # Where the terminal is narrow a name is cut, and no number.
            Text(_printable(_short(line.run)), no_wrap=True, overflow="ellipsis"),
            Text(line.state.value, style=_STYLES[line.state], no_wrap=True, overflow="ellipsis"),
            str(line.nodes),
            f"{line.step}/{line.of}",
            *(_served_cells(line) if now.serves else _step_cells(line)),
        )
    said = [
        f"{x.run}: {x.detail}"
        for x in shown
        if x.detail and x.state in (RunState.QUEUED, RunState.FAILED, RunState.GONE)
    ]
    hidden = len(now.lines) - len(shown)
    return Group(
        made,
        *([Text(f"and {hidden} more runs", style="dim")] if hidden else []),
        *(
            Text(_printable(text), style="dim", no_wrap=most_lines is not None, overflow="ellipsis")
            for text in said[-_MOST_SAID:]
        ),
        Text(_printable(summary(now))),
    )


class Screen(Protocol):
    """Where a search says what it does."""

    def say(self, message: str) -> None:
        """A line that stays."""

    def show(self, now: Callable[[], Snapshot]) -> None:
        """How things stand; made only where somebody sees it."""

    def confirm(self, question: str) -> bool:
        """Ask the user."""


class _Lines:
    """Plain lines, for what is no terminal."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def show(self, now: Callable[[], Snapshot]) -> None:
        """As `Screen.show`: lines say it as it happens."""

    def confirm(self, question: str) -> bool:
        """As `Screen.confirm`; nobody can answer."""
        del question
        return True


class _Live:
    """A table that is drawn anew, below the lines that stay."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._drawn_at = 0.0

    def say(self, message: str) -> None:
        """As `Screen.say`."""
        lines = "\n".join(map(_printable, message.splitlines()))
        self._live.console.print(f"hptool: {lines}", markup=False, highlight=False, soft_wrap=True)

    def show(self, now: Callable[[], Snapshot]) -> None:
        """As `Screen.show`."""
        if time.monotonic() - self._drawn_at > _REDRAW_S:
            self._drawn_at = time.monotonic()
            self._live.update(table(now(), most_lines=max(3, self._live.console.height - _AROUND)), refresh=True)

    def confirm(self, question: str) -> bool:
        """As `Screen.confirm`."""
        self._live.stop()
        try:
            return Confirm.ask(question, console=self._live.console, default=True)
        except EOFError:  # Ctrl-D
            return False
        finally:
            self._live.start()


@contextmanager
def screen(console: Console, say: Callable[[str], None]) -> Iterator[Screen]:
    """A live table on a terminal, and what `say` does with lines elsewhere."""
    # Rich takes a file for a terminal where FORCE_COLOR is set, as in many CI systems.
    if not (console.is_interactive and console.file.isatty()):
        yield _Lines(say)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield _Live(live)


def as_json(now: Snapshot) -> Mapping[str, Any]:
    """The same for programs."""
    return asdict(now)
