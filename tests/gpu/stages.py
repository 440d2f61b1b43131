"""The stages of the suite: what each is, its share of the time, and how it is run and ended.

A stage is a process of its own, so that one that crashes, hangs or has no memory does not take the others along. It
is told how many seconds it has and ends by itself; one that does not is ended a little later.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.gpu.record import UNFINISHED, read_record

#: How long a stage may take beyond its share to end by itself, and then to end after SIGTERM.
GRACE_S = 12.0
_TERM_S = 8.0

_POLL_S = 0.1

#: Lines of a stage's log that are kept.
TAIL_LINES = 40


class State(StrEnum):
    """How a stage stands."""

    DONE = "done"
    UNFINISHED = "unfinished"  # no time for the rest; the next call goes on
    FAILED = "failed"
    NOT_BEGUN = "not begun"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage: the module that is run, its weight when time is shared out, and the least it can begin with."""

    name: str
    module: str
    weight: float
    least_s: float
    asks: str


#: In the order of importance. The weights follow what each takes on an H100 by docs/gpu.md, and the last takes whatever
#: is left, in as many calls as it needs.
STAGES = (
    Stage(name="numerics", module="tests.gpu.numerics", weight=3.0, least_s=40.0, asks="is what it computes right"),
    Stage(name="speed", module="tests.benchmarks.gpu_speed", weight=5.5, least_s=40.0, asks="how fast it trains"),
    Stage(name="gaps", module="tests.benchmarks.gpu_gaps", weight=2.0, least_s=50.0, asks="when the GPU idles"),
    Stage(name="calibrate", module="tests.gpu.calibrate", weight=1.5, least_s=60.0, asks="what the device reaches"),
    Stage(name="serving", module="tests.benchmarks.gpu_serving", weight=2.5, least_s=80.0, asks="how fast it serves"),
    Stage(name="landscapes", module="tests.gpu.landscapes", weight=3.0, least_s=40.0, asks="are predictions right"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEnd:
    """How a stage ended in this call, after how long, with the last lines of its log."""

    state: State
    seconds: float
    detail: str
    tail: Sequence[str]


def share_s(stage: Stage, open_stages: Collection[str], left_s: float) -> float:
    """The stage's part of the time that is left, among those that are still to come; the last one takes all of it.

    What a stage does not use goes to the later ones.
    """
    coming = STAGES[STAGES.index(stage) :]
    weights = sum(other.weight for other in coming if other.name in open_stages)
    return max(0.0, left_s) * stage.weight / weights if weights else 0.0


def command_of(stage: Stage, output: Path, device_file: Path, seconds: float, *, tiny: bool) -> list[str]:
    """What is run."""
    options = ["--output", str(output / stage.name), "--device-file", str(device_file), "--seconds", f"{seconds:.1f}"]
    return [sys.executable, "-m", stage.module, *options, *(["--tiny"] if tiny else [])]


def run(command: Sequence[str], *, log: Path, seconds: float, environment: Mapping[str, str]) -> StageEnd:
    """Runs a stage to its end, or ends it with all that it has started when its time is over."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        try:
            code = _wait(process, seconds + GRACE_S)
        finally:  # also where somebody interrupts this
            _end(process)
    took_s = time.monotonic() - started
    tail = tail_of(log)
    if code is None:
        return StageEnd(
            state=State.FAILED, seconds=took_s, detail=f"ended after {took_s:.0f} s, its share is over", tail=tail
        )
    if code in (0, UNFINISHED):
        state = State.DONE if code == 0 else State.UNFINISHED
        return StageEnd(state=state, seconds=took_s, detail="", tail=tail)
    last = tail[-1] if tail else "it said nothing"
    return StageEnd(state=State.FAILED, seconds=took_s, detail=f"exit code {code}: {last}", tail=tail)


def _wait(process: "subprocess.Popen[bytes]", limit_s: float) -> int | None:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if (code := process.poll()) is not None:
            return code
        time.sleep(_POLL_S)
    return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process's session. What has left it (a lane, a run) ends with the process that started it."""
    for signum, patience_s in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, _TERM_S)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        if process.poll() is not None:
            break
        _wait(process, patience_s)
    with suppress(ProcessLookupError):  # what a stage that is gone has left in its session
        os.killpg(process.pid, signal.SIGKILL)


def tail_of(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rstrip().splitlines()[-lines:]


def state_of(stage: Stage, output: Path, ends: Mapping[str, StageEnd], before: Mapping[str, str]) -> State:
    """How the stage stands after this call and the calls `before`."""
    if stage.name in ends:
        return ends[stage.name].state
    if before.get(stage.name) in set(State):
        return State(before[stage.name])
    return State.UNFINISHED if read_record(output / stage.name) else State.NOT_BEGUN
