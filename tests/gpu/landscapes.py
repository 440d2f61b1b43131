"""Whole grids, measured once: every micro batch and every way to recompute, by `hptool search-train --strategy grid`.

    python -m tests.gpu.landscapes --output DIR --device cuda

One lane (`--submit packed`) loads torch and Megatron-core once and forks each run. What earlier calls measured, here
or on another machine (`previous.jsonl`), is not measured again.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from hptool import files
from hptool.measurement import FailureKind
from hptool.results import OutcomeRecord, ResultsDirectory
from hptool.units import SECONDS_PER_HOUR
from tests.gpu.command import Given, command
from tests.gpu.device import one_gpu, profile_text
from tests.gpu.models import LANDSCAPES, MAX_MINUTES, TINY_LANDSCAPES, Model, plan_of
from tests.gpu.record import Record
from tests.gpu.runs import last_lines

#: Steps of a run. Of six, at most three are warm-up (hptool.timing), and three or more say how steady it is; the large
#: models' steps take seconds, which hardly scatter.
_STEPS = {"gpt3-1.3b": 4, "gpt3-2.7b": 4}
_USUAL_STEPS, _TINY_STEPS = 6, 3

#: What a search takes besides its runs: the start of the command and of its lane, the report, the end of the lane.
_SEARCH_S = 25.0

#: What is kept of it at the end, for the report.
_REPORT_S = 10.0

#: What earlier calls measured: one JSON object a line, `landscape` and `record`.
PREVIOUS = "previous.jsonl"

#: The searches, a directory each.
SEARCHES = "searches"

_DRY_RUN_S = 120.0

#: Exit codes of `hptool search-train`: the request or its directory are not right, and nothing was measured, for which
#: a few seconds may not suffice.
_REFUSED, _NOTHING_MEASURED = 2, 4


def measure(given: Given, record: Record) -> None:
    """Measure what no earlier call has, the quick models first."""
    profile = given.output / "one-gpu.yaml"
    cluster = one_gpu(given.device)
    files.write_text(profile, profile_text(cluster))
    earlier = read_previous(given.output / PREVIOUS)
    for model in TINY_LANDSCAPES if given.tiny else LANDSCAPES:
        directory = given.output / SEARCHES / model.name
        log = given.output / f"{model.name}.log"
        steps = _TINY_STEPS if given.tiny else _STEPS.get(model.name, _USUAL_STEPS)
        words = search_words(model, profile, directory, steps)
        wanted = {layout.name for layout in plan_of(model, cluster).candidates.layouts.rows()}
        if earlier.get(model.name) and not directory.exists():
            _restore(words, directory, earlier[model.name], log)
        if wanted - measured_names(directory) and (given.tiny or given.clock.has(_SEARCH_S)):
            words += ["--max-hours", _hours(given.clock.left_s - _REPORT_S)]
            code = _search(given, words, log)
            if code == _REFUSED and directory.exists():
                # The facts of the GPU have changed since, and so has the plan; what was measured has not.
                records = [json.loads(files.json_text(x)) for x in outcomes_of(directory)]
                shutil.move(directory, given.output / f"{model.name}-{time.time_ns()}")
                _restore(words, directory, records, log)
                code = _search(given, words, log)
            if code not in {0, _NOTHING_MEASURED}:
                record.complain(f"{model.name}: hptool search-train: exit code {code}: {last_lines(log)}")
        left = wanted - measured_names(directory)
        record.find(model.name, {"layouts": len(wanted), "measured": len(wanted) - len(left)})
        click.echo(f"{model.name}: {len(wanted) - len(left)} of {len(wanted)} layouts measured")
        if left:
            record.leave(f"{model.name}: {len(left)} of {len(wanted)} layouts")


def search_words(model: Model, profile: Path, directory: Path, steps: int) -> list[str]:
    """The command of the search for one landscape."""
    space = [*(f"--{axis}=1" for axis in ("tp", "pp", "vpp", "cp", "ep")), f"--mbs={','.join(map(str, model.mbs))}"]
    if model.recompute is not None:
        space.append(f"--recompute={','.join(mode.name.lower() for mode, _ in model.recompute)}")
    else:
        space.append("--recompute=none,selective,uniform,block")
    return [
        *(sys.executable, "-m", "hptool", "search-train", "--model", model.preset, "--cluster", str(profile)),
        *("--strategy", "grid", "--limit-search-runs", "10000", "--submit", "packed", "--yes", "--resume"),
        *("--stages", str(steps), "--max-steps-per-run", str(steps), "--max-minutes-per-run", f"{MAX_MINUTES:g}"),
        *("--results", str(directory), *space, *model.overrides),
    ]


def _hours(seconds: float) -> str:
    return f"{max(seconds, 1.0) / SECONDS_PER_HOUR:.6f}"


def _search(given: Given, words: list[str], log: Path) -> int:
    """The exit code; that of a search that was ended is 0, for what it measured is on disk, and the rest is left."""
    limit_s = max(given.clock.left_s + _REPORT_S, 60.0 if given.tiny else 1.0)
    with log.open("ab") as output:
        try:
            done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            return 0
    return done.returncode


def _restore(words: list[str], directory: Path, records: Iterable[Mapping[str, Any]], log: Path) -> None:
    """Makes the directory of a search that has these outcomes, as if it had been measured here."""
    with log.open("ab") as output:
        subprocess.run([*words, "--dry-run"], stdout=output, stderr=subprocess.STDOUT, timeout=_DRY_RUN_S, check=True)
    lines = (json.dumps(record) for record in records)
    files.write_text(directory / "outcomes.jsonl", "".join(f"{line}\n" for line in lines))


def outcomes_of(directory: Path) -> list[OutcomeRecord]:
    """What came of each run in the directory of a search that says something about its layout."""
    found = ResultsDirectory(directory).outcomes().values()
    return [x for x in found if x.failure is None or x.failure.kind is not FailureKind.LOST]


def measured_names(directory: Path) -> set[str]:
    """The layouts of these runs."""
    return {record.name for record in outcomes_of(directory)}


def read_previous(path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """The records of earlier calls by landscape; lines that cannot be read are passed over."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            found.setdefault(entry["landscape"], []).append(entry["record"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def all_records(directory: Path) -> dict[str, list[Mapping[str, Any]]]:
    """What was measured in all, by landscape: in the searches below this stage's directory, and before them."""
    found = read_previous(directory / PREVIOUS)
    for search in sorted((directory / SEARCHES).glob("*/outcomes.jsonl")):
        found[search.parent.name] = [json.loads(files.json_text(x)) for x in outcomes_of(search.parent)]
    return found


main = command(measure)

if __name__ == "__main__":
    main()
