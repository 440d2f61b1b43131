"""A search's directory: the truth about it. Any process may die at any moment and `--resume` goes on from here.

plan.json            what was asked for, resolved
base_config.yaml     the config that every candidate is cut from
candidates/*.yaml    every legal layout, for the whole cluster
predictions.csv      what is expected of each
submissions.jsonl    which job runs which layout
outcomes.jsonl       what came of it
runs/<layout>/       config.yaml, measurement.json or failure-rankN.json, logs/
report.html, report.csv, optimal.yaml
"""

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hptool import files
from hptool.errors import InputError
from hptool.measurement import Failure, FailureKind, Measurement, Outcome

#: Held by the process that works in a results directory.
LOCK = ".lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A layout that was handed to the scheduler as a job."""

    name: str
    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeRecord:
    """What came of one layout's run; exactly one of `measurement` and `failure` is there."""

    name: str
    job_id: str | None
    measurement: Measurement | None = None
    failure: Failure | None = None

    def __post_init__(self) -> None:
        if (self.measurement is None) == (self.failure is None):
            raise ValueError("measurement, failure: both or neither given, allowed is one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run says that it is."""

    step: int
    of: int


class ResultsDirectory:
    """The directory of one search. Opening it creates nothing; `begin` does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base_config = path / "base_config.yaml"
        self.candidates = path / "candidates"
        self.predictions = path / "predictions.csv"
        self.optimal = path / "optimal.yaml"
        self._plan = path / "plan.json"
        self._submissions = path / "submissions.jsonl"
        self._outcomes = path / "outcomes.jsonl"
        self._held: TextIO | None = None

    def close(self) -> None:
        """Let other processes have the directory."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def begin(self, plan: Mapping[str, Any], *, resume: bool) -> None:
        """Claim the directory for `plan`, or go on with the same plan.

        Raises InputError where it holds another search, the same search without `resume`, or other files.
        """
        plan = json.loads(files.json_text(plan))
        try:
            if not self._plan.exists() and self.path.exists():
                if not self.path.is_dir():
                    raise InputError(f"{self.path}: is a file; choose another --results")
                if any(x.name != LOCK for x in self.path.iterdir()):
                    raise InputError(f"{self.path}: is not empty and holds no search; choose another --results")
            self.path.mkdir(parents=True, exist_ok=True)
            self.close()
            self._held = hold(self.path)
            if not self._plan.exists():
                files.write_text(self._plan, files.json_text(plan))
                return
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from error
        held = files.read_yaml(self._plan)  # JSON is YAML
        differing = sorted(differences(held.get("search", {}), plan["search"]))
        if differing:
            raise InputError(
                f"{self.path}: holds another search; it differs in {', '.join(differing[:5])}"
                f"{' and more' if len(differing) > 5 else ''}. Choose another --results"  # noqa: PLR2004
            )
        # Nothing but a plan: a dry run, or a search that ended before its first job. There is nothing to lose.
        only_planned = not self._submissions.exists() and not self._outcomes.exists()
        if not resume and not only_planned:
            raise InputError(f"{self.path}: holds this search already; go on with --resume or choose another --results")

    def write_candidates(self, texts: Iterable[tuple[str, str]]) -> None:
        """`candidates/NAME.yaml` for every (name, text): all of them or none."""
        if self.candidates.is_dir():
            return
        aside = self.path / ".candidates"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, text in texts:
            (aside / f"{name}.yaml").write_text(text, encoding="utf-8")
        aside.rename(self.candidates)

    def run_directory(self, name: str) -> Path:
        """Where the run of a layout lives."""
        return self.path / "runs" / name

    def prepare_run(self, name: str, config_text: str) -> Path:
        """A fresh run directory with its config; what an earlier, interrupted try left is kept beside it."""
        directory = self.run_directory(name)
        if directory.exists() and any(x.name != "config.yaml" for x in directory.iterdir()):
            tries = sum(1 for _ in directory.parent.glob(f"{name}.interrupted-*"))
            directory.rename(directory.with_name(f"{name}.interrupted-{tries + 1}"))
        files.write_text(directory / "config.yaml", config_text)
        return directory

    def record_submission(self, submission: Submission) -> None:
        """Remember which job runs a layout, so that a later process finds it."""
        files.append_line(self._submissions, files.json_text(submission, indent=None))

    def record_outcome(self, record: OutcomeRecord) -> None:
        """Remember what came of a run, for good."""
        files.append_line(self._outcomes, files.json_text(record, indent=None))

    def submissions(self) -> dict[str, Submission]:
        """The latest submission of every layout."""
        return {x.name: x for x in _read_lines(self._submissions, Submission)}

    def outcomes(self) -> dict[str, OutcomeRecord]:
        """What came of every layout that ended; the first record of a layout stands."""
        found: dict[str, OutcomeRecord] = {}
        for record in _read_lines(self._outcomes, OutcomeRecord):
            found.setdefault(record.name, record)
        return found

    def read_outcome(self, name: str) -> Outcome | None:
        """What the job itself left behind: a measurement before any failure, None while there is neither."""
        directory = self.run_directory(name)
        measurement = directory / "measurement.json"
        try:
            if measurement.is_file():
                found = files.parse_json(files.read_text(measurement), Measurement, str(measurement))
                assert isinstance(found, Measurement)  # noqa: S101 (what was asked for)
                return found
            for path in sorted(directory.glob("failure-rank*.json")):
                failure = files.parse_json(files.read_text(path), Failure, str(path))
                assert isinstance(failure, Failure)  # noqa: S101 (what was asked for)
                return failure
        except InputError as error:
            return Failure(kind=FailureKind.CRASH, message=f"left an unreadable result: {error}")
        return None

    def read_progress(self, name: str) -> Progress | None:
        """What the job says of itself while it runs; None where it has said nothing yet."""
        path = self.run_directory(name) / "progress.json"
        try:
            found = files.parse_json(files.read_text(path), Progress, str(path))
        except InputError:
            return None
        assert isinstance(found, Progress)  # noqa: S101 (what was asked for)
        return found


def hold(directory: Path) -> TextIO:
    """Holds a directory for as long as the file is open; InputError where another process holds it."""
    held = (directory / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.seek(0)
        who = held.read().strip() or "another process"
        held.close()
        raise InputError(f"{directory}: hptool is at work in it already ({who})") from error
    held.truncate(0)
    held.write(f"process {os.getpid()} on {platform.node()}")
    held.flush()
    return held


def _read_lines(path: Path, kind: type[Any]) -> Iterator[Any]:
    """Every whole line of an append-only file; a line that a dying process left half-written is passed over."""
    if not path.exists():
        return
    for line in files.read_text(path).splitlines():
        try:
            yield files.parse_json(line, kind, str(path))
        except InputError:
            continue


def differences(held: Any, asked: Any, prefix: str = "") -> Iterator[str]:
    """Each key at which two nested mappings differ, with both values."""
    if isinstance(held, Mapping) and isinstance(asked, Mapping):
        for key in sorted({*held, *asked}):
            yield from differences(held.get(key), asked.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif held != asked:
        yield f"{prefix} ({_short(held)} there, {_short(asked)} asked for)"


def _short(value: Any, width: int = 40) -> str:
    text = str(value)
    return text if len(text) <= width else text[: width - 1] + "…"
