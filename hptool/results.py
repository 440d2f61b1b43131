"""A search's directory: the truth about it. Any process may die at any moment and `--resume` goes on from here.

plan.json            what was asked for, resolved
base_config.yaml     the config that every candidate is cut from
candidates/*.yaml    every legal layout, for the whole cluster
predictions.csv      what is expected of each
submissions.jsonl    which job runs which layout; written before the job is submitted, and again with its id
outcomes.jsonl       what came of each run
runs/<run>/          config.yaml, measurement.json or failure-rankN.json, logs/; a run is called after its layout,
                     and layout.2, layout.3 where the layout is run again
status.json          the runs under way as the scheduler sees them, for those who watch
report.html, report.csv, optimal.yaml
"""

import fcntl
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from hptool import files
from hptool.errors import InputError, LaunchError
from hptool.measurement import AnyOutcome, Failure, FailureKind, Measurement, ServingMeasurement
from hptool.serving import Targets
from hptool.units import SECONDS_PER_HOUR

#: Held by the process that works in a results directory.
LOCK = ".lock"

#: In the directory of a run that serves: what it is asked.
SERVING = "serving.json"

#: For how long somebody who only looks whether the directory is held may keep others from holding it.
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The run `run` of the layout `name`, handed to the scheduler as a job that carries `token`.

    Without a job id it was about to be. `predicted_step_time_s` is of this run, before the search has learnt anything.
    A run that serves has `parts`, the points that it measures, and its `steps` are those.
    """

    name: str
    run: str
    token: str
    nodes: int
    gpus: int
    steps: int
    predicted_step_time_s: float
    job_id: str | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeRecord:
    """What came of one run of a layout, and what it cost: a training's `measurement`, a `serving` one, or a `failure`.

    `ran_s` is how long the run held its GPUs. The layout may be run again after a failure that was none of its own.
    """

    name: str
    run: str
    job_id: str | None
    nodes: int
    gpus: int
    steps: int
    ran_s: float
    measurement: Measurement | None = None
    serving: ServingMeasurement | None = None
    failure: Failure | None = None
    may_run_again: bool = False
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.measurement, self.serving, self.failure)) != 1:
            raise ValueError("measurement, serving, failure: several or none given, allowed is one of them")

    @property
    def gpu_hours(self) -> float:
        """What the run cost."""
        return self.gpus * self.ran_s / SECONDS_PER_HOUR


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run says that it is."""

    step: int
    of: int
    tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A search at work, as it last said: what it does, for how long, and the scheduler's word on each run under way.

    `gpu_hours` is what its jobs have held, those of allocations between two runs too.
    """

    doing: str
    elapsed_s: float
    gpu_hours: float = 0.0
    states: Mapping[str, str] = field(default_factory=dict)


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
        self._status = path / "status.json"
        self._held: TextIO | None = None

    def close(self) -> None:
        """Let other processes have the directory."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def is_there(self) -> bool:
        """A search was begun in the directory."""
        return self._plan.is_file()

    def kind(self) -> str:
        """What the search in the directory is for: "training" or "serving"; InputError where there is none."""
        if not self.is_there():
            raise InputError(f"{self.path}: holds no search (there is no plan.json)")
        plan = files.read_yaml(self._plan)  # JSON is YAML
        search = plan.get("search") if isinstance(plan, Mapping) else None
        return str(search.get("kind", "training")) if isinstance(search, Mapping) else "training"

    def wanted(self) -> tuple[Targets, bool]:
        """The limits of a serving search, and whether it wants latency most; no limits where that cannot be read."""
        try:
            asked = files.read_yaml(self._plan)["asked"]  # JSON is YAML
            targets: Targets = files.parse(asked["targets"], Targets, f"{self._plan}: asked.targets")
        except (InputError, KeyError, TypeError):
            return Targets(), False
        return targets, asked.get("objective") == "latency"

    def is_held(self) -> bool:
        """Some process works in the directory, this one or another."""
        if self._held is not None:
            return True
        try:
            with (self.path / LOCK).open(encoding="utf-8") as file:
                _lock(file, fcntl.LOCK_SH)
        except BlockingIOError:
            return True
        except OSError:
            return False  # there is no such file: nobody ever worked here
        return False

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
        if held.get("asked") != plan.get("asked"):  # limits and wishes are those of who goes on; a report is of them
            files.write_text(self._plan, files.json_text({**held, "asked": plan.get("asked")}))

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

    def run_directory(self, run: str) -> Path:
        """Where a run lives."""
        return self.path / "runs" / run

    def prepare_run(self, name: str, texts: Mapping[str, str], under_way: Collection[str] = ()) -> str:
        """A fresh directory with these files, by name, for a run of the layout `name`; what the run is called.

        Runs `under_way` keep theirs, though they may have left nothing there yet.
        """
        tries = itertools.count(1)
        runs = (name if k == 1 else f"{name}.{k}" for k in tries)
        run = next(run for run in runs if run not in under_way and not _was_tried(self.run_directory(run), texts))
        for file_name, text in texts.items():
            files.write_text(self.run_directory(run) / file_name, text)
        return run

    def record_submission(self, submission: Submission) -> None:
        """Remember which job runs a layout, so that a later process finds it."""
        self._append(self._submissions, submission)

    def record_outcome(self, record: OutcomeRecord) -> None:
        """Remember what came of a run, for good."""
        self._append(self._outcomes, record)

    def _append(self, path: Path, record: Any) -> None:
        try:
            files.append_line(path, files.json_text(record, indent=None))
        except OSError as error:
            raise LaunchError(
                f"{path}: cannot be written: {error.strerror}. Make room and go on with --resume; "
                "what the jobs leave behind is not lost"
            ) from error

    def submissions(self) -> dict[str, Submission]:
        """Every run that was submitted, by its name, as it was last noted."""
        return {x.run: x for x in _read_lines(self._submissions, Submission)}

    def outcomes(self) -> dict[str, OutcomeRecord]:
        """What came of every run that ended, by its name; the first record of a run stands."""
        found: dict[str, OutcomeRecord] = {}
        for record in _read_lines(self._outcomes, OutcomeRecord):
            found.setdefault(record.run, record)
        return found

    def write_status(self, status: "Status") -> None:
        """Let those see who watch from elsewhere; nobody relies on it, so it is not forced to disk."""
        aside = self.path / ".status.json"
        aside.write_text(files.json_text(status), encoding="utf-8")
        aside.replace(self._status)

    def read_status(self) -> "Status | None":
        """What the search last said of itself; None where it has said nothing that can be read."""
        try:
            found = files.parse_json(files.read_text(self._status), Status, str(self._status))
        except InputError:
            return None
        assert isinstance(found, Status)  # noqa: S101 (what was asked for)
        return found

    def read_outcome(self, run: str) -> AnyOutcome | None:
        """What the job itself left behind: a measurement before any failure, None while there is neither."""
        directory = self.run_directory(run)
        measurement = directory / "measurement.json"
        try:
            if measurement.is_file():
                serves = (directory / SERVING).is_file()
                kind = ServingMeasurement if serves else Measurement
                found = files.parse_json(files.read_text(measurement), kind, str(measurement))
                assert isinstance(found, (Measurement, ServingMeasurement))  # noqa: S101 (what was asked for)
                return found
            for path in sorted(directory.glob("failure-rank*.json")):
                failure = files.parse_json(files.read_text(path), Failure, str(path))
                assert isinstance(failure, Failure)  # noqa: S101 (what was asked for)
                return failure
        except InputError as error:
            return Failure(kind=FailureKind.CRASH, message=f"left an unreadable result: {error}")
        return None

    def read_progress(self, run: str) -> Progress | None:
        """What the job says of itself while it runs; None where it has said nothing yet."""
        path = self.run_directory(run) / "progress.json"
        try:
            found = files.parse_json(files.read_text(path), Progress, str(path))
        except InputError:
            return None
        assert isinstance(found, Progress)  # noqa: S101 (what was asked for)
        return found


def _was_tried(directory: Path, given: Collection[str]) -> bool:
    """A run has left something there beside what it was given."""
    return directory.exists() and any(x.name not in given for x in directory.iterdir())


def hold(directory: Path) -> TextIO:
    """Holds a directory for as long as the file is open; InputError where another process holds it."""
    held = (directory / LOCK).open("a+", encoding="utf-8")
    try:
        _lock(held, fcntl.LOCK_EX)
    except BlockingIOError as error:
        held.seek(0)
        who = held.read().strip() or "another process"
        held.close()
        raise InputError(f"{directory}: hptool is at work in it already ({who})") from error
    held.truncate(0)
    held.write(f"process {os.getpid()} on {platform.node()}")
    held.flush()
    return held


def _lock(file: TextIO, kind: int) -> None:
    """BlockingIOError where somebody has it for longer than a look at it takes."""
    deadline = time.monotonic() + _LOOK_S
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_S / 10)


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
    elif isinstance(held, list) and isinstance(asked, list) and len(held) == len(asked):
        for i, (there, here) in enumerate(zip(held, asked, strict=True)):
            yield from differences(there, here, f"{prefix}[{i}]")
    elif held != asked:
        yield f"{prefix} ({_short(held)} there, {_short(asked)} asked for)"


def _short(value: Any, width: int = 40) -> str:
    text = str(value)
    return text if len(text) <= width else text[: width - 1] + "…"
