"""Searches started as a user starts them, and what they leave behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

#: All layouts that a test names are run, each once.
TINY = (
    "--model", "gpt3/tiny", "--max-steps-per-run", "6", "--vpp", "1", "--recompute", "none", "--strategy", "ranked",
)  # fmt: skip


def start(results: Path, *words: str, cluster: str = "local") -> subprocess.Popen[str]:
    """A search as a user starts it: its own process, its own session as in a terminal."""
    return _start("search-train", "--cluster", cluster, "--results", str(results), *TINY, *words)


def start_serving(results: Path, *words: str) -> subprocess.Popen[str]:
    """As `start`, of a search for the fastest way to serve: short requests, and pipelines of one stage."""
    search = ("search-inference", "--model", "gpt3/tiny", "--cluster", "local", "--workload", "16:4")
    return _start(*search, "--pp", "1", "--results", str(results), *words)


def _start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hptool", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 240) -> tuple[str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return out, err


def processes_of(results: Path) -> list[str]:
    """Command lines of all processes that mention this results directory, and of their children."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            words = (proc / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if str(results) in words and int(proc.name) != os.getpid():
            found.append(words)
    return found


def wait_for(
    condition: Callable[[], object], timeout_s: float = 60, otherwise: Callable[[], str] | None = None
) -> None:
    """Until it holds; a failure says what `otherwise` finds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain\n{otherwise() if otherwise else ''}"
        time.sleep(0.05)


def outcome_lines(results: Path) -> list[dict[str, Any]]:
    path = results / "outcomes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
