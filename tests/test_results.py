"""The results directory: holds one search, survives what dying processes leave, never mixes tries."""

from pathlib import Path

import pytest

from hptool import files
from hptool.errors import InputError, LaunchError
from hptool.measurement import Failure, FailureKind
from hptool.results import Progress, ResultsDirectory, Status
from tests import samples

PLAN = {"search": {"model": "gpt3/tiny", "space": {"tp": [1, 2]}}, "limit_search_runs": 4}


@pytest.fixture
def results(tmp_path: Path) -> ResultsDirectory:
    found = ResultsDirectory(tmp_path / "run")
    found.begin(PLAN, resume=False)
    return found


def test_a_second_search_is_refused_unless_it_resumes(results: ResultsDirectory) -> None:
    results.begin(PLAN, resume=False)  # only planned so far: nothing to lose
    results.record_submission(samples.submission("a", job_id="1"))
    with pytest.raises(InputError, match="--resume"):
        results.begin(PLAN, resume=False)
    results.begin(PLAN, resume=True)
    results.begin(PLAN | {"limit_search_runs": 9}, resume=True)  # more runs of the same search


@pytest.mark.parametrize("resume", [False, True])
def test_another_search_is_told_what_differs(results: ResultsDirectory, *, resume: bool) -> None:
    other = {"search": {"model": "gpt3/tiny", "space": {"tp": [1]}}, "limit_search_runs": 4}
    with pytest.raises(InputError, match=r"holds another search; it differs in space.tp \(\[1, 2\] there, \[1\] asked"):
        results.begin(other, resume=resume)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty and holds no search"):
        ResultsDirectory(tmp_path).begin(PLAN, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_starts_where_there_is_nothing(tmp_path: Path) -> None:
    ResultsDirectory(tmp_path / "new").begin(PLAN, resume=True)
    assert (tmp_path / "new" / "plan.json").is_file()


def test_outcomes_come_back_as_they_were(results: ResultsDirectory) -> None:
    for name, outcome in (("a", samples.measurement()), ("b", samples.failure())):
        results.record_outcome(samples.record(name, outcome))
    found = results.outcomes()
    assert found["a"].measurement == samples.measurement()
    assert found["b"].failure == samples.failure()


def test_the_first_outcome_of_a_run_stands(results: ResultsDirectory) -> None:
    results.record_outcome(samples.record("a", samples.measurement(0.5), job_id="1"))
    results.record_outcome(samples.record("a", samples.failure(), job_id="2"))
    assert results.outcomes()["a"].job_id == "1"


@pytest.mark.parametrize("rubbish", ['{"name": "b", "job', "\x00\x00\x00", "[]", '{"name": "b"}'])
def test_a_line_that_a_dying_process_left_costs_that_line_only(results: ResultsDirectory, rubbish: str) -> None:
    results.record_outcome(samples.record("a", samples.measurement()))
    path = results.path / "outcomes.jsonl"
    path.write_text(path.read_text() + rubbish)
    results.record_outcome(samples.record("c", samples.failure()))
    assert set(results.outcomes()) == {"a", "c"}


def test_a_submission_is_noted_before_its_job_has_an_id(results: ResultsDirectory) -> None:
    results.record_submission(samples.submission("a"))
    assert results.submissions()["a"].job_id is None
    results.record_submission(samples.submission("a", job_id="2"))
    results.record_submission(samples.submission("a", run="a.2", job_id="3"))
    assert {run: s.job_id for run, s in results.submissions().items()} == {"a": "2", "a.2": "3"}


def test_a_measurement_outweighs_a_failure(results: ResultsDirectory) -> None:
    directory = results.run_directory(results.prepare_run("a", {"config.yaml": "run: {}"}))
    assert results.read_outcome("a") is None
    files.write_text(directory / "failure-rank1.json", files.json_text(samples.failure()))
    assert results.read_outcome("a") == samples.failure()
    files.write_text(directory / "measurement.json", files.json_text(samples.measurement()))
    assert results.read_outcome("a") == samples.measurement()


def test_an_unreadable_measurement_is_a_failure_and_no_traceback(results: ResultsDirectory) -> None:
    directory = results.run_directory(results.prepare_run("a", {"config.yaml": "run: {}"}))
    (directory / "measurement.json").write_text('{"step_times_s": []}')
    found = results.read_outcome("a")
    assert isinstance(found, Failure)
    assert found.kind is FailureKind.CRASH
    assert "measurement.json" in found.message


def test_a_new_try_never_sees_the_files_of_the_last(results: ResultsDirectory) -> None:
    assert results.prepare_run("a", {"config.yaml": "try: 1"}) == "a"
    assert results.prepare_run("a", {"config.yaml": "try: 1"}) == "a"  # nothing was there but the config
    files.write_text(results.run_directory("a") / "failure-rank0.json", files.json_text(samples.failure()))
    assert results.prepare_run("a", {"config.yaml": "try: 2"}) == "a.2"
    assert results.read_outcome("a.2") is None
    assert results.read_outcome("a") == samples.failure()
    (results.run_directory("a.2") / "logs").mkdir()
    assert results.prepare_run("a", {"config.yaml": "try: 3"}) == "a.3"


def test_progress_is_what_the_job_last_said(results: ResultsDirectory) -> None:
    directory = results.run_directory(results.prepare_run("a", {"config.yaml": "run: {}"}))
    assert results.read_progress("a") is None
    (directory / "progress.json").write_text('{"step": 3, "of": 20, "tokens_per_s": 1.5}')
    assert results.read_progress("a") == Progress(step=3, of=20, tokens_per_s=1.5)
    (directory / "progress.json").write_text('{"step": 4, "o')
    assert results.read_progress("a") is None


def test_candidates_are_written_whole_or_not_at_all(results: ResultsDirectory) -> None:
    def texts() -> object:
        yield "a", "x"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.write_candidates(texts())  # type: ignore[arg-type]
    assert not results.candidates.exists()
    results.write_candidates([("a", "x"), ("b", "y")])
    assert sorted(p.name for p in results.candidates.iterdir()) == ["a.yaml", "b.yaml"]


def test_the_status_is_what_was_said_last(results: ResultsDirectory) -> None:
    assert results.read_status() is None
    results.write_status(Status(doing="measuring", elapsed_s=1.5, gpu_hours=0.25, states={"a": "running"}))
    assert results.read_status() == Status(doing="measuring", elapsed_s=1.5, gpu_hours=0.25, states={"a": "running"})
    (results.path / "status.json").write_text('{"doing": "mea')
    assert results.read_status() is None


def test_looking_whether_it_is_held_keeps_nobody_out(results: ResultsDirectory) -> None:
    other = ResultsDirectory(results.path)
    assert results.is_held()
    assert other.is_held()
    results.close()
    assert not other.is_held()
    other.begin(PLAN, resume=True)
    other.close()


def test_a_record_that_cannot_be_written_is_one_clear_error(results: ResultsDirectory) -> None:
    (results.path / "outcomes.jsonl").symlink_to("/dev/full")
    with pytest.raises(LaunchError, match=r"outcomes.jsonl: cannot be written: No space left on device. Make room"):
        results.record_outcome(samples.record("a", samples.failure()))
