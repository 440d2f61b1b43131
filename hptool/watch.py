"""A search as those see it who watch: what each run does, what it has cost, the best so far. From its files alone."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.prompt import Confirm
from rich.table import Table
from rich.text import Text

from hptool.errors import InputError
from hptool.results import OutcomeRecord, ResultsDirectory, Status, Submission
from hptool.units import MINUTES_PER_HOUR, SECONDS_PER_MINUTE

#: How often the live table is drawn anew.
_REDRAW_S = 0.5


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A search at one moment: its runs in the order of their submission. The best has the highest tokens/s per GPU."""

    doing: str
    elapsed_s: float
    gpu_hours: float
    lines: tuple[Line, ...]
    best: str | None
    best_step_time_s: float | None
    best_predicted_step_time_s: float | None
    best_model_tflops_per_gpu: float | None


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
    for run, submission in submissions.items():
        record = outcomes.get(run)
        if record is None and submission.job_id is None and run not in status.states:
            continue  # was never taken
        lines.append(_line(results, submission, record, status.states.get(run), at_work=at_work))
    measured = [r for r in outcomes.values() if r.measurement]
    best = max(measured, key=lambda r: r.measurement.tokens_per_s_per_gpu if r.measurement else 0.0, default=None)
    found = best.measurement if best else None
    return Snapshot(
        doing=status.doing,
        elapsed_s=status.elapsed_s,
        gpu_hours=sum(record.gpu_hours for record in outcomes.values()),
        lines=tuple(lines),
        best=best.name if best else None,
        best_step_time_s=found.step_time_s if found else None,
        best_predicted_step_time_s=submissions[best.run].predicted_step_time_s
        if best and best.run in submissions
        else None,
        best_model_tflops_per_gpu=found.model_tflops_per_gpu if found else None,
    )


def _line(
    results: ResultsDirectory, submission: Submission, record: OutcomeRecord | None, word: str | None, *, at_work: bool
) -> Line:
    measured = record.measurement if record else None
    told = results.read_progress(submission.run) if record is None and at_work else None
    if measured:
        state, detail = RunState.DONE, ""
    elif record:
        assert record.failure  # noqa: S101 (a record has one of both)
        state, detail = RunState.FAILED, f"{record.failure.kind.value}: {record.failure.message}"
    elif not at_work:
        state, detail = RunState.GONE, ""
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
        step=submission.steps if measured else (told.step if told else 0),
        of=submission.steps,
        tokens_per_s=measured.tokens_per_s_per_gpu * measured.gpus
        if measured
        else (told.tokens_per_s if told else None),
        predicted_step_time_s=submission.predicted_step_time_s,
        step_time_s=measured.step_time_s if measured else None,
        spread=(measured.step_time_high_s - measured.step_time_low_s) / 2 / measured.step_time_s if measured else None,
        gpu_hours=record.gpu_hours if record else 0.0,
    )


def of_directory(results: ResultsDirectory) -> Snapshot:
    """The search in a directory as its files tell it, whoever works in it."""
    if not results.is_there():
        raise InputError(f"{results.path}: holds no search (there is no plan.json)")
    at_work = results.is_held()
    said = results.read_status()
    status = said or Status(doing="nothing was launched", elapsed_s=0.0, states={})
    if not at_work and said and said.doing == MEASURING:
        status = Status(doing="interrupted; --resume goes on", elapsed_s=said.elapsed_s, states={})
    return snapshot(results, results.submissions(), results.outcomes(), status, at_work=at_work)


#: What a search does while it has runs under way.
MEASURING = "measuring"


# ---------------------------------------------------------------- on a terminal

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


def summary(now: Snapshot) -> str:
    """One line: what it does, for how long, what that has cost, and the best so far against its prediction."""
    parts = [now.doing, f"{duration(now.elapsed_s)} elapsed", f"{now.gpu_hours:.3g} GPU hours spent"]
    if now.best is not None and now.best_step_time_s is not None:
        predicted = now.best_predicted_step_time_s
        beside = f", {predicted:.4g} s predicted" if predicted else ""
        parts.append(f"best {now.best}: {now.best_step_time_s:.4g} s a step{beside}")
    return "; ".join(parts)


def table(now: Snapshot, most_lines: int | None = None) -> RenderableType:
    """The runs in 80 columns, the newest where there are too many, and the summary below."""
    made = Table(box=None, pad_edge=False)
    made.add_column("run", overflow="ellipsis", no_wrap=True, max_width=34)
    made.add_column("", no_wrap=True)
    for heading in ("steps", "tokens/s", "step s", "±", "pred. s"):
        made.add_column(heading, justify="right", no_wrap=True)
    shown = now.lines if most_lines is None else now.lines[-most_lines:]
    for line in shown:
        made.add_row(
            line.run,
            Text(line.state.value, style=_STYLES[line.state]),
            f"{line.step}/{line.of}",
            "" if line.tokens_per_s is None else f"{line.tokens_per_s:,.0f}",
            "" if line.step_time_s is None else f"{line.step_time_s:.4g}",
            "" if line.spread is None else f"{line.spread:.1%}",
            f"{line.predicted_step_time_s:.4g}",
        )
    waits = [f"{x.run}: {x.detail}" for x in shown if x.detail and x.state in (RunState.QUEUED, RunState.FAILED)]
    hidden = len(now.lines) - len(shown)
    return Group(
        made,
        *([Text(f"and {hidden} earlier runs", style="dim")] if hidden else []),
        *(Text(text, style="dim") for text in waits[-5:]),
        Text(summary(now)),
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
        self._live.console.print(f"hptool: {message}", markup=False, highlight=False, soft_wrap=True)

    def show(self, now: Callable[[], Snapshot]) -> None:
        """As `Screen.show`."""
        if time.monotonic() - self._drawn_at > _REDRAW_S:
            self._drawn_at = time.monotonic()
            self._live.update(table(now(), most_lines=max(3, self._live.console.height - 10)), refresh=True)

    def confirm(self, question: str) -> bool:
        """As `Screen.confirm`."""
        self._live.stop()
        answer = Confirm.ask(question, console=self._live.console, default=True)
        self._live.start()
        return answer


@contextmanager
def screen(console: Console, say: Callable[[str], None]) -> Iterator[Screen]:
    """A live table on a terminal, and what `say` does with lines elsewhere."""
    if not console.is_terminal:
        yield _Lines(say)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield _Live(live)


def as_json(now: Snapshot) -> Mapping[str, Any]:
    """The same for programs."""
    return asdict(now)
