"""Watching a search: what its files say of each run, in 80 columns, and nothing that a job said is obeyed."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from hptool import files, watch
from hptool.cli import main
from hptool.errors import InputError
from hptool.measurement import FailureKind
from hptool.results import OutcomeRecord, ResultsDirectory, Status, Submission
from hptool.watch import MEASURING, RunState, Snapshot, of_directory, snapshot, summary, table
from tests import samples

FAST, SLOW, LATE = (f"tp{tp}-pp1-vpp1-cp1-mbs1-none" for tp in (1, 2, 4))


def submission(
    name: str, run: str | None = None, job_id: str | None = "7", nodes: int = 1, steps: int = 8
) -> Submission:
    return Submission(
        name=name,
        run=run or name,
        token=run or name,
        nodes=nodes,
        gpus=2 * nodes,
        steps=steps,
        predicted_step_time_s=0.45,
        job_id=job_id,
    )


def ended(
    name: str,
    step_time_s: float | None,
    run: str | None = None,
    *,
    nodes: int = 1,
    steps: int = 8,
    message: str = "boom",
) -> OutcomeRecord:
    """A measured run, or one that crashed."""
    return OutcomeRecord(
        name=name,
        run=run or name,
        job_id="7",
        nodes=nodes,
        gpus=2 * nodes,
        steps=steps,
        ran_s=36.0,
        measurement=None if step_time_s is None else samples.measurement(step_time_s),
        failure=samples.failure(FailureKind.CRASH, message) if step_time_s is None else None,
    )


@pytest.fixture
def results(tmp_path: Path) -> Iterator[ResultsDirectory]:
    """A search at work."""
    made = ResultsDirectory(tmp_path / "run")
    made.begin({"search": {}}, resume=False)
    yield made
    made.close()


def tell(results: ResultsDirectory, states: Mapping[str, str], doing: str = MEASURING) -> None:
    results.write_status(Status(doing=doing, elapsed_s=200.0, states=states))


def progress(results: ResultsDirectory, run: str) -> None:
    directory = results.run_directory(run)
    directory.mkdir(parents=True)
    told = {"step": 3, "of": 8, "tokens_per_s": 12345.6, "loss": 6.1}
    (directory / "progress.json").write_text(json.dumps(told))


def states(now: Snapshot) -> dict[str, RunState]:
    return {line.run: line.state for line in now.lines}


def begun(results: ResultsDirectory) -> None:
    """One run of each kind."""
    for run in ("done", "failed", "queued", "starts", "runs"):
        results.record_submission(submission(run, job_id=None))
        results.record_submission(submission(run))
    results.record_submission(submission("refused", job_id=None))
    results.record_outcome(ended("done", 0.5))
    results.record_outcome(ended("failed", None))
    progress(results, "runs")
    tell(results, {"queued": "pending, Resources", "starts": "running", "runs": "running"})


def printed(now: Snapshot, width: int = 80, most_lines: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(table(now, most_lines))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---------------------------------------------------------------- what the files say


def test_each_run_stands_as_its_files_say(results: ResultsDirectory) -> None:
    begun(results)
    now = of_directory(ResultsDirectory(results.path))
    assert states(now) == {
        "done": RunState.DONE,
        "failed": RunState.FAILED,
        "queued": RunState.QUEUED,
        "starts": RunState.RUNNING,
        "runs": RunState.RUNNING,
    }  # and nothing of the one that was never taken
    lines = {line.run: line for line in now.lines}
    assert (lines["runs"].step, lines["runs"].of, lines["runs"].tokens_per_s) == (3, 8, 12345.6)
    assert (lines["done"].step, lines["done"].step_time_s) == (8, 0.5)
    assert lines["done"].tokens_per_s == pytest.approx(1024 / 0.5 * 2)  # of both GPUs
    assert lines["done"].spread == pytest.approx(0.1)
    assert lines["queued"].detail == "pending, Resources"
    assert lines["failed"].detail == "crash: boom"
    assert (now.doing, now.elapsed_s) == (MEASURING, 200.0)
    assert now.gpu_hours == pytest.approx(2 * 2 * 36 / 3600)


def test_runs_that_their_search_left_are_interrupted(results: ResultsDirectory) -> None:
    begun(results)
    results.close()
    now = of_directory(results)
    assert {states(now)[run] for run in ("queued", "starts", "runs")} == {RunState.GONE}
    assert states(now)["done"] is RunState.DONE
    assert now.doing == "interrupted; --resume goes on"
    details = {line.run: line.detail for line in now.lines}
    assert "a job on Slurm may go on" in details["runs"]
    assert details["queued"] == ""
    path = results.run_directory("runs") / "measurement.json"
    files.write_text(path, files.json_text(samples.measurement()))
    details = {line.run: line.detail for line in of_directory(results).lines}
    assert details["runs"] == "has ended since; --resume collects it"


def test_a_search_that_ended_says_why(results: ResultsDirectory) -> None:
    tell(results, {}, doing="done: every layout was run")
    results.close()
    assert of_directory(results).doing == "done: every layout was run"


def test_a_search_that_goes_on_after_an_interruption_is_measuring(results: ResultsDirectory) -> None:
    begun(results)
    tell(results, {}, doing=watch.INTERRUPTED)
    assert of_directory(results).doing == MEASURING


def test_a_run_that_the_scheduler_forgot_does_not_queue_for_ever(results: ResultsDirectory) -> None:
    for run in (FAST, f"{FAST}.2", SLOW):
        results.record_submission(submission(FAST, run))
    tell(results, {f"{FAST}.2": "running"})
    now = states(of_directory(results))
    assert now[FAST] is RunState.GONE
    # That one was submitted since the search last spoke.
    assert now[SLOW] is RunState.QUEUED


@pytest.mark.parametrize("text", ["", '{"doing": "measuring", "elap', "[]", "\0"])
def test_a_broken_status_hides_nothing_else(results: ResultsDirectory, text: str) -> None:
    begun(results)
    (results.path / "status.json").write_text(text)
    now = of_directory(results)
    assert (now.doing, now.elapsed_s) == (MEASURING, None)
    assert "elapsed" not in summary(now)
    assert states(now)["runs"] is RunState.RUNNING
    assert states(now)["failed"] is RunState.FAILED
    results.close()
    assert of_directory(results).doing == watch.INTERRUPTED


def test_a_broken_progress_file_is_no_progress(results: ResultsDirectory) -> None:
    begun(results)
    (results.run_directory("runs") / "progress.json").write_text('{"step": 3, "of"')
    line = next(line for line in of_directory(results).lines if line.run == "runs")
    assert (line.state, line.step) == (RunState.RUNNING, 0)


def test_a_search_before_its_first_run(results: ResultsDirectory) -> None:
    now = of_directory(results)
    assert (now.lines, now.best, now.gpu_hours) == ((), None, 0.0)
    assert "nothing was launched" in printed(now)


def test_a_directory_without_a_search_is_a_mistake(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="holds no search"):
            of_directory(ResultsDirectory(path))


def test_another_process_that_works_there_is_seen(tmp_path: Path) -> None:
    results = ResultsDirectory(tmp_path / "run")
    results.begin({"search": {}}, resume=False)
    begun(results)
    results.close()
    code = (
        "import sys\nfrom pathlib import Path\nfrom hptool.results import hold\n"
        f"held = hold(Path({str(results.path)!r}))\nprint('held', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert results.is_held()
    assert states(of_directory(results))["runs"] is RunState.RUNNING
    other.communicate()
    assert not results.is_held()
    assert states(of_directory(results))["runs"] is RunState.GONE


def test_ended_runs_are_told_by_their_records_alone(results: ResultsDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"run{i}" for i in range(3000)]
    submissions = {name: submission(name) for name in [*names, "runs"]}
    outcomes = {name: ended(name, 0.5) for name in names}
    read = []
    monkeypatch.setattr(ResultsDirectory, "read_progress", lambda _, run: read.append(run))
    status = Status(doing=MEASURING, elapsed_s=1.0, states={"runs": "running"})
    now = snapshot(results, submissions, outcomes, status, at_work=True)
    assert read == ["runs"]
    assert len(now.lines) == 3001


# ---------------------------------------------------------------- the best so far


def best(*records: OutcomeRecord) -> Snapshot:
    found = {record.run: record for record in records}
    given = {r.run: submission(r.name, r.run, nodes=r.nodes, steps=r.steps) for r in records}
    status = Status(doing=MEASURING, elapsed_s=1.0, states={})
    return snapshot(ResultsDirectory(Path("nowhere")), given, found, status, at_work=True)


def test_the_best_so_far_stands_against_its_prediction() -> None:
    now = best(ended(SLOW, 0.9), ended(FAST, 0.5), ended(LATE, None))
    assert (now.best, now.best_step_time_s, now.best_predicted_step_time_s) == (FAST, 0.5, 0.45)
    assert "best tp1-pp1-mbs1: 0.5 s a step, 0.45 s predicted" in summary(now)


def test_the_longest_timing_of_a_layout_decides() -> None:
    assert best(ended(FAST, 0.5), ended(SLOW, 0.6), ended(FAST, 0.7, f"{FAST}.2", steps=50)).best == SLOW
    assert best(ended(FAST, 0.5), ended(SLOW, 0.6), ended(FAST, None, f"{FAST}.2", steps=50)).best == SLOW
    lost = replace(ended(FAST, None, f"{FAST}.2", steps=50), may_run_again=True)
    assert best(ended(FAST, 0.5), ended(SLOW, 0.6), lost).best == FAST


def test_runs_at_scale_decide_among_themselves() -> None:
    both = (ended(FAST, 0.5), ended(SLOW, 0.6), ended(LATE, 0.4))
    scaled = (ended(FAST, 0.9, f"{FAST}.2", nodes=4), ended(SLOW, 0.8, f"{SLOW}.2", nodes=4))
    assert best(*both, *scaled).best == SLOW
    failed = ended(LATE, None, f"{LATE}.2", nodes=4)
    assert best(*both, failed).best == FAST


def test_nothing_measured_is_no_best() -> None:
    now = best(ended(FAST, None))
    assert (now.best, now.best_step_time_s, now.best_model_tflops_per_gpu) == (None, None, None)
    assert "best" not in summary(now)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (3600, "60 min"), (7200, "2 h 00 min"), (11_100, "3 h 05 min")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert watch.duration(seconds) == text


# ---------------------------------------------------------------- on a terminal

LONG = "tp16-pp16-vpp12-cp16-ep16-mbs16-selective"


def busy(results: ResultsDirectory) -> Snapshot:
    """Runs with the longest names and numbers that there are."""
    for run, name in ((LONG, LONG), (f"{LONG}.12", LONG), (FAST, FAST), (SLOW, SLOW)):
        results.record_submission(submission(name, run, nodes=1024, steps=100))
    results.record_outcome(ended(LONG, 123.4567, nodes=1024, steps=100))
    results.record_outcome(ended(FAST, None, nodes=1024))
    tell(results, {f"{LONG}.12": "running", SLOW: "pending, Resources"})
    return of_directory(results)


def test_the_table_has_80_columns(results: ResultsDirectory) -> None:
    text = printed(busy(results))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    # Every number is there in full, and the names are told apart by what they use.
    for word in ("100/100", "123.5", "10.0%", "0.45", "1024", "running", "queued", "failed", "tp1-pp1-mbs1"):
        assert word in text
    assert f"{FAST}: crash: boom" in text
    assert f"{SLOW}: pending, Resources" in text


@pytest.mark.parametrize("width", [60, 40, 20])
def test_a_narrow_terminal_loses_names_before_numbers(results: ResultsDirectory, width: int) -> None:
    text = printed(busy(results), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    if width == 60:
        assert "100/100" in text
        assert "123.5" in text


def test_of_many_runs_the_newest_and_those_under_way_are_shown(results: ResultsDirectory) -> None:
    names = [f"run{i}" for i in range(2000)]
    outcomes = {name: ended(name, None) for name in names if name != "run3"}
    status = Status(doing=MEASURING, elapsed_s=1.0, states={"run3": "pending, Resources"})
    now = snapshot(results, {name: submission(name) for name in names}, outcomes, status, at_work=True)
    text = printed(now, most_lines=4)
    rows = [line.split()[0] for line in text.splitlines()[1:5]]
    assert rows == ["run3", "run1997", "run1998", "run1999"]
    assert "and 1996 more runs" in text
    # However many there are, the live table leaves room for what is below.
    assert len(text.splitlines()) <= 4 + 9
    assert len(printed(now).splitlines()) > 2000


NASTY = "[bold]x[/bold] [/] \x1b[31mred\x1b]0;title\x07 \x9b2J \u202eabc\r\n\nsecond line\x00"


def test_what_a_job_said_is_shown_and_not_obeyed(results: ResultsDirectory) -> None:
    results.record_submission(submission(FAST))
    results.record_submission(submission(SLOW))
    results.record_outcome(ended(FAST, None, message=NASTY))
    tell(results, {SLOW: f"pending, {NASTY}"}, doing=f"done: {NASTY}")
    for most_lines in (None, 5):
        text = printed(of_directory(results), 300, most_lines)
        assert text.count("[bold]x[/bold] [/]") == 3
        assert "second line" in text
        assert all(c.isprintable() for c in text.replace("\n", ""))


def test_a_long_message_takes_one_line_of_the_live_table(results: ResultsDirectory) -> None:
    results.record_submission(submission(FAST))
    results.record_outcome(ended(FAST, None, message="word " * 200))
    live, whole = printed(of_directory(results), most_lines=5), printed(of_directory(results))
    assert len(live.splitlines()) <= 5
    assert whole.count("word") == 200


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_lines_stay_above_a_table_that_goes(results: ResultsDirectory) -> None:
    begun(results)
    console = Console(file=Terminal(), width=80, height=24, force_terminal=True, _environ={"TERM": "xterm"})
    with watch.screen(console, lambda _: pytest.fail("a plain line")) as screen:
        screen.say(f"first {NASTY}")
        screen.show(lambda: of_directory(results))
        screen.show(lambda: pytest.fail("drawn too often"))
    assert isinstance(console.file, Terminal)
    text = console.file.getvalue()
    assert "hptool: first [bold]x[/bold] [/]" in text
    assert "pending, Resources" in text
    assert not any(bad in text for bad in ("\x1b[31mred", "\x1b]0;", "\x07", "\x9b", "\u202e", "\x00"))


@pytest.mark.parametrize(("typed", "answer"), [("y\n", True), ("\n", True), ("n\n", False), ("", False)])
def test_the_answer_of_a_user_who_is_asked(typed: str, answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001 (of a table)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))  # nothing: Ctrl-D
    console = Console(file=Terminal(), width=80, force_terminal=True, _environ={"TERM": "xterm"})
    with watch.screen(console, lambda _: None) as screen:
        assert screen.confirm("Launch?") is answer
        screen.say("the table goes on")


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_elsewhere_there_are_plain_lines_only(environment: dict[str, str]) -> None:
    console = Console(file=io.StringIO(), _environ=environment)
    said: list[str] = []
    with watch.screen(console, said.append) as screen:
        screen.say("a line")
        screen.show(lambda: pytest.fail("nobody sees it"))
        assert screen.confirm("Launch?")
    assert said == ["a line"]
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


# ---------------------------------------------------------------- hptool status


def test_status_shows_a_search_from_another_shell(results: ResultsDirectory) -> None:
    begun(results)
    done = CliRunner().invoke(main, ["status", str(results.path)], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    rows = {
        line.split()[0]: line.split()[1:] for line in done.output.splitlines() if line.startswith(("runs", "done "))
    }
    assert rows["runs"] == ["running", "1", "3/8", "12,346", "0.45"]
    assert rows["done"] == ["done", "1", "8/8", "4,096", "0.5", "10.0%", "0.45"]
    assert "200 s elapsed" not in done.output  # for people: 3 min
    assert "measuring; 3 min elapsed; 0.04 GPU hours spent" in done.output
    assert "\x1b" not in done.output


def test_status_says_the_same_to_programs(results: ResultsDirectory) -> None:
    begun(results)
    done = CliRunner().invoke(main, ["status", "--json", str(results.path)])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    assert {line["run"]: line["state"] for line in answer["lines"]}["starts"] == "running"
    assert (answer["best"], answer["best_step_time_s"], answer["gpu_hours"]) == ("done", 0.5, 0.04)


def test_status_of_no_search_is_one_clear_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["status", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no search (there is no plan.json)" in done.output
    assert not list(tmp_path.iterdir())  # a look leaves nothing behind
