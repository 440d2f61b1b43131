"""`python -m tests.gpu --output results/gpu`: all stages within ten minutes, and a summary; see docs/gpu.md.

Called again it goes on: with what it had no time for, with what failed, and not with what it has.
"""

import datetime as dt
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from hptool import files
from hptool.errors import InputError
from hptool.facts import GpuSpec
from tests.benchmarks import gpu_serving
from tests.gpu import stages, summary
from tests.gpu.command import detect
from tests.gpu.device import Device, one_gpu, profile_text
from tests.gpu.landscapes import PREVIOUS, all_records
from tests.gpu.record import RECORD, Clock, read_record
from tests.gpu.score import Score
from tests.gpu.stages import GRACE_S, STAGES, Stage, StageEnd, State

#: What is brought home: few files, none of them large.
KEEP = "keep"
SUMMARY = "summary.json"
CALIBRATION = "calibrated.yaml"
LANDSCAPES = "landscapes.jsonl"

#: What is kept of the time for ending a stage that does not end by itself, and for the tables at the end.
_RESERVE_S = GRACE_S + 8.0 + 15.0

#: Of the logs, whose every part is for a reader.
_LOG_LINES = 15
_MOST_LOG_BYTES = 4 * 2**20

_SECONDS_PER_MINUTE = 60.0


@dataclass(slots=True, kw_only=True)
class Suite:
    """One call: the device, what earlier calls left, and how the stages have ended so far."""

    output: Path
    device: Device
    tiny: bool
    clock: Clock
    before: Mapping[str, str]
    ends: dict[str, StageEnd] = field(default_factory=dict)

    def run(self, names: list[str]) -> None:
        """Runs the stages of these names that are not done, one after the other, while there is time."""
        open_stages = [s.name for s in STAGES if s.name in names and self.before.get(s.name) != State.DONE]
        for stage in STAGES:
            if stage.name not in open_stages:
                if stage.name in names:
                    click.echo(f"{stage.name}: done by an earlier call")
                continue
            left_s = self.clock.left_s - _RESERVE_S
            share_s = stages.share_s(stage, open_stages, left_s)
            if not self.tiny and share_s < stage.least_s:
                share_s = min(left_s, stage.least_s)  # rather one stage less than one that cannot do anything
            if not self.tiny and share_s < stage.least_s:
                click.echo(f"{stage.name}: no time is left for it; the next call goes on")
                continue
            self._run(stage, share_s)
            self.conclude()

    def _run(self, stage: Stage, share_s: float) -> None:
        click.echo(f"{stage.name}: {stage.asks}; up to {share_s:.0f} s")
        words = stages.command_of(stage, self.output, self.output / "device.json", share_s, tiny=self.tiny)
        end = stages.run(words, log=self.output / f"{stage.name}.log", seconds=share_s, environment={})
        self.ends[stage.name] = end
        click.echo(f"{stage.name}: {end.state.value} after {end.seconds:.0f} s")
        if end.state is State.FAILED:
            for line in end.tail[-_LOG_LINES:]:
                click.echo(f"  | {line[:200]}")

    def reports(self) -> list[summary.StageReport]:
        """How every stage stands."""
        found = []
        for stage in STAGES:
            record, end = read_record(self.output / stage.name), self.ends.get(stage.name)
            found.append(
                summary.StageReport(
                    name=stage.name,
                    state=stages.state_of(stage, self.output, self.ends, self.before),
                    seconds=end.seconds if end else 0.0,
                    detail=end.detail if end else "",
                    problems=record.get("problems", []),
                    left=record.get("left", []),
                )
            )
        return found

    def conclude(self) -> str:
        """Writes all that is kept, from what there is; the table. What fails here costs its own file and no other."""
        keep = self.output / KEEP
        keep.mkdir(parents=True, exist_ok=True)
        date = dt.datetime.now(tz=dt.UTC).date().isoformat()
        findings = {s.name: read_record(self.output / s.name).get("findings", {}) for s in STAGES}
        problems: list[str] = []
        scores: list[Score] = []

        def attempt(what: str, act: Callable[[], None]) -> None:
            try:
                act()
            except Exception as error:  # noqa: BLE001 (the other files matter as much)
                problems.append(f"{what}: {type(error).__name__}: {error}"[:300])

        attempt("landscapes", lambda: _keep_landscapes(self.output, keep))
        attempt("table", lambda: scores.extend(_keep_table(self.output, keep, self.device, date)))
        attempt("serving", lambda: _keep_serving(self.output, keep, self.device, date))
        attempt("calibration", lambda: _keep_calibration(self.output, keep))
        attempt("profile", lambda: files.write_text(keep / "one-gpu.yaml", profile_text(one_gpu(self.device))))
        attempt("logs", lambda: files.write_text(keep / "logs.txt", logs_text(self.output)))
        found, reports = summary.verdicts(findings, scores, tiny=self.tiny), self.reports()
        more = {
            "tiny": self.tiny,
            "records": {s.name: read_record(self.output / s.name) for s in STAGES},
            "scores": [_plain(x) for x in scores],
            "problems": problems,
        }
        document = summary.document(self.device, date, found, reports, more)
        files.write_text(keep / SUMMARY, files.json_text(document))
        wall_s = self.clock.seconds - self.clock.left_s
        text = summary.table(self.device, date, found, reports, problems, wall_s=wall_s, tiny=self.tiny)
        files.write_text(keep / "summary.txt", f"{text}\n")
        return text


def _plain(one: Score) -> Any:
    return json.loads(files.json_text(one))


def _keep_landscapes(output: Path, keep: Path) -> None:
    lines = [
        json.dumps({"landscape": name, "record": record})
        for name, records in all_records(output / "landscapes").items()
        for record in records
    ]
    if lines:
        files.write_text(keep / LANDSCAPES, "".join(f"{line}\n" for line in lines))


def _keep_table(output: Path, keep: Path, device: Device, date: str) -> list[Score]:
    """The table of all measured runs, and its scores."""
    from tests.gpu import collect, score  # noqa: PLC0415 (pandas takes a second, which stages can use)

    frame = collect.collect(output / "landscapes", device)
    if frame.empty:
        return []
    path = keep / f"measured-{device.slug}-{date}.csv"
    for older in keep.glob("measured-*.csv"):
        older.unlink()
    files.write_text(path, frame.to_csv(index=False))
    return score.score(collect.read(path), _calibrated(output / "calibrate" / CALIBRATION))


def _keep_serving(output: Path, keep: Path, device: Device, date: str) -> None:
    written = gpu_serving.table_of(output / "serving")
    if written is not None:
        for older in keep.glob("serving-*.csv"):
            older.unlink()
        shutil.copyfile(written, keep / f"serving-{device.slug}-{date}.csv")


def _calibrated(path: Path) -> GpuSpec | None:
    """The facts as they were measured; None where they were not, or where what was written cannot be read."""
    from tests.gpu import score  # noqa: PLC0415 (as above)

    try:
        return score.read_gpu(path) if path.is_file() else None
    except InputError as error:
        click.echo(f"calibration: {error}", err=True)
        return None


def _keep_calibration(output: Path, keep: Path) -> None:
    written = output / "calibrate" / CALIBRATION
    if written.is_file():
        shutil.copyfile(written, keep / CALIBRATION)


def logs_text(output: Path) -> str:
    """The ends of the stages' logs, and of every log below them that speaks of an error."""
    pieces, size = [], 0
    own = [output / f"{stage.name}.log" for stage in STAGES]
    inner = sorted(path for path in output.rglob("*.log") if path not in own)
    for path in [*own, *inner]:
        tail = stages.tail_of(path, stages.TAIL_LINES if path in own else _LOG_LINES)
        text = "\n".join(line[:500] for line in tail)
        if not text or (path not in own and "Error" not in text and "error" not in text):
            continue
        piece = f"==== {path.relative_to(output)}\n{text}\n"
        size += len(piece.encode())
        if size > _MOST_LOG_BYTES:
            break
        pieces.append(piece)
    return "".join(pieces)


def restore(output: Path, previous: Path, device: Device, *, tiny: bool, again: list[str]) -> dict[str, str]:
    """Brings back what an earlier call kept; the states of its stages. Nothing where it was of another device."""
    keep = previous / KEEP if (previous / KEEP / SUMMARY).is_file() else previous
    try:
        document = json.loads((keep / SUMMARY).read_text(encoding="utf-8"))
        states = {stage["name"]: stage["state"] for stage in document["stages"]}
        records, kept = document["records"], document["device"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if kept.get("gpu") != device.gpu or document.get("tiny") != tiny:
        click.echo(f"{keep}: is of another device ({kept.get('name')}) or size: it is left alone")
        return {}
    for stage in STAGES:
        place = output / stage.name
        if stage.name in again:
            shutil.rmtree(place, ignore_errors=True)
            states.pop(stage.name, None)
        elif records.get(stage.name) and not (place / RECORD).exists():
            files.write_text(place / RECORD, files.json_text(records[stage.name]))
    for name, place in (
        (CALIBRATION, output / "calibrate" / CALIBRATION),
        (LANDSCAPES, output / "landscapes" / PREVIOUS),
    ):
        if (keep / name).is_file() and place.parent.name not in again and not place.exists():
            files.write_text(place, (keep / name).read_text(encoding="utf-8"))
    return states


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="results/gpu", show_default=True)
@click.option("--minutes", type=float, default=10.0, show_default=True, help="Wall time of this call, all in all.")
@click.option("--device", "kind", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Toy models: whether the suite works, and not how fast anything is.")
@click.option("--previous", type=click.Path(path_type=Path), help="The output of an earlier call to go on from.")
@click.option("--only", multiple=True, type=click.Choice([s.name for s in STAGES]), help="Run these stages alone.")
@click.option("--again", multiple=True, type=click.Choice([s.name for s in STAGES]), help="Forget these stages first.")
def main(  # noqa: PLR0917 (click passes by name)
    output: Path,
    minutes: float,
    kind: str,
    tiny: bool,  # noqa: FBT001 (as above)
    previous: Path | None,
    only: tuple[str, ...],
    again: tuple[str, ...],
) -> None:
    """Measure on one GPU what can be measured nowhere else."""
    clock, output = Clock(seconds=_SECONDS_PER_MINUTE * minutes), output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    device = detect(output / "device.json", kind)
    if device is None:
        sys.exit(1)
    before = restore(output, (previous or output).absolute(), device, tiny=tiny, again=list(again))
    suite = Suite(output=output, device=device, tiny=tiny, clock=clock, before=before)
    click.echo(f"{device.name}: {minutes:g} minutes; results in {output / KEEP}")
    try:
        suite.run(list(only) or [stage.name for stage in STAGES])
    finally:
        click.echo(suite.conclude())
    sys.exit(1 if any(end.state is State.FAILED for end in suite.ends.values()) else 0)


if __name__ == "__main__":
    main()
