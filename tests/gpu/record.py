"""What a stage has found so far, on disk after each finding, and the time that it has left."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hptool import files

#: The file of a stage in its directory.
RECORD = "record.json"

#: The exit code of a stage that had no time for all of its work: the next call goes on with it.
UNFINISHED = os.EX_TEMPFAIL


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """The time that a stage has, from when it was made."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Seconds until the stage should have ended; below zero where it should have."""
        return self.seconds - (time.monotonic() - self.started)

    def has(self, expected_s: float) -> bool:
        """There is time for what is expected to take so long."""
        return self.left_s >= expected_s


class Record:
    """The findings of one stage by name, its problems, and what it left undone; every change is on disk at once.

    Problems and what is left are those of the last call: opening a record forgets both, and keeps the findings.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / RECORD
        before = read_record(directory)
        self.findings: dict[str, Any] = dict(before.get("findings", {}))
        self.problems: list[str] = []
        self.left: list[str] = []
        self.save()

    def find(self, name: str, value: Any) -> None:
        """Keeps a finding; an earlier one of this name is replaced."""
        self.findings[name] = value
        self.save()

    def complain(self, problem: str) -> None:
        """Keeps what went wrong, in one line."""
        self.problems.append(" ".join(problem.split()))
        self.save()

    def leave(self, work: str) -> None:
        """Keeps what there was no time for."""
        self.left.append(work)
        self.save()

    def save(self) -> None:
        """Writes all of it, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(".aside")
        aside.write_text(files.json_text(self.document()), encoding="utf-8")
        aside.replace(self._path)

    def document(self) -> Mapping[str, Any]:
        """What the file holds."""
        return {"findings": self.findings, "problems": self.problems, "left": self.left}

    @property
    def exit_code(self) -> int:
        """1 where something went wrong, `UNFINISHED` where only time was short, else 0."""
        return 1 if self.problems else UNFINISHED if self.left else 0


def read_record(directory: Path) -> dict[str, Any]:
    """The document of a stage's record; empty where there is none that can be read."""
    try:
        document = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
