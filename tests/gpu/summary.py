"""What was asked and what was found: a table of at most 60 lines of 100 columns, and the same as JSON."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks import gpu_serving
from tests.benchmarks.gpu_speed import ratio
from tests.gpu.device import Device
from tests.gpu.models import GPT2, LANDSCAPES, TINY_GPT2, TINY_LANDSCAPES, TINY_UTILISED, UTILISED
from tests.gpu.score import Score
from tests.gpu.stages import State

#: Asked of the worker: as many tokens a second as plain PyTorch, so much of the data sheet's peak, and a GPU that is
#: idle in less than this part of a step.
ASKED_RATIO = 1.0
ASKED_MFU = 0.45
ASKED_IDLE = 0.05

#: And of CUDA graphs that they pay, for one request at a time.
ASKED_SPEEDUP = 1.0

MOST_LINES = 60
WIDTH = 100

#: Problems that the table has room for.
_PROBLEMS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One asked figure, what was measured, and whether that is enough; None where it was not measured."""

    stage: str
    what: str
    asked: str
    measured: str
    met: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """How a stage stands: `seconds` in this call; its problems, and what is left for the next call."""

    name: str
    state: State
    seconds: float
    detail: str
    problems: Sequence[str]
    left: Sequence[str]


def verdicts(findings: Mapping[str, Mapping[str, Any]], scores: Iterable[Score], *, tiny: bool) -> list[Verdict]:
    """Every asked figure; `findings` are the stages' records."""
    found = [_numerics(findings.get("numerics", {}))]
    speed, gaps = findings.get("speed", {}), findings.get("gaps", {})
    gpt2, utilised = (TINY_GPT2, TINY_UTILISED) if tiny else (GPT2, UTILISED)
    compared = ratio(speed, gpt2.name)
    measured = ""
    if compared is not None:
        rates = [speed[key]["tokens_per_s"] for key in compared[1:]]
        sizes = [key.rpartition(" ")[2] for key in compared[1:]]
        measured = f"{compared[0]:.3f}: {rates[0]:,.0f} ({sizes[0]}) to {rates[1]:,.0f} ({sizes[1]})"
    met = None if compared is None else compared[0] >= ASKED_RATIO
    found.append(_verdict("speed", f"{gpt2.name}: tokens/s to plain PyTorch", f">= {ASKED_RATIO:g}", measured, met=met))
    for model in utilised:
        final = (speed.get(f"utilisation {model.name}") or {}).get("final") or {}
        ok = final.get("outcome") == "ok"
        measured = f"{final['mfu']:.1%} with {_short(final['layout'])}" if ok else ""
        met = final["mfu"] >= ASKED_MFU if ok else None
        found.append(_verdict("speed", f"{model.name}: of the peak", f">= {ASKED_MFU:.0%}", measured, met=met))
    for model in (gpt2, *(() if tiny else utilised)):
        gap = gaps.get(model.name, {})
        ok = gap.get("outcome") == "ok"
        measured = f"{gap['idle_share']:.1%}, {gap['kernels_a_step']:,.0f} kernels a step" if ok else ""
        met = gap["idle_share"] < ASKED_IDLE if ok else None
        found.append(_verdict("gaps", f"{model.name}: idle", f"< {ASKED_IDLE:.0%}", measured, met=met))
    outcome = findings.get("calibrate", {}).get("outcome")
    found.append(
        _verdict(
            "calibrate",
            "hptool calibrate",
            "runs",
            "its options are there; not run with --tiny" if tiny and outcome == "ok" else str(outcome or ""),
            met=None if outcome is None or (tiny and outcome == "ok") else outcome == "ok",
        )
    )
    found += _serving(findings.get("serving", {}), tiny=tiny)
    landscapes = findings.get("landscapes", {})
    for landscape in TINY_LANDSCAPES if tiny else LANDSCAPES:
        counts = landscapes.get(landscape.name)
        measured = f"{counts['measured']} of {counts['layouts']}" if counts else ""
        met = counts["measured"] == counts["layouts"] if counts else None
        found.append(_verdict("landscapes", f"{landscape.name}: layouts measured", "all", measured, met=met))
    for one in scores:
        name = one.name.removeprefix("hptool-").partition("-1g-")[0]
        found += [
            _verdict("score", f"{name}: {what}", asked, measured, met=met)
            for what, asked, measured, met in one.verdicts()
        ]
    return found


def _numerics(findings: Mapping[str, Any]) -> Verdict:
    passed = sum(bool(finding["ok"]) for finding in findings.values())
    measured = f"{passed} of {len(findings)}" if findings else ""
    met = passed == len(findings) if findings else None
    return _verdict("numerics", "checks passed", "all", measured, met=met)


def _serving(findings: Mapping[str, Any], *, tiny: bool) -> list[Verdict]:
    """That all points were measured, and that CUDA graphs make a single request faster."""
    models, found = gpu_serving.TINY if tiny else gpu_serving.MODELS, []
    for name, (measured, asked) in gpu_serving.told(findings, models).items():
        text, met = (f"{measured} of {asked}", measured == asked) if asked else ("", None)
        found.append(_verdict("serving", f"{name}: points measured", "all", text, met=met))
    for model in () if tiny else models:
        times = gpu_serving.speedup(findings, model)
        text, met = ("", None) if times is None else (f"{times:.2f}", times > ASKED_SPEEDUP)
        found.append(_verdict("serving", f"{model.name}: eager to CUDA graphs", f"> {ASKED_SPEEDUP:g}", text, met=met))
    return found


def _verdict(stage: str, what: str, asked: str, measured: str, *, met: bool | None) -> Verdict:
    return Verdict(stage=stage, what=what, asked=asked, measured=measured, met=met)


def _short(layout: str) -> str:
    return "-".join(word for word in layout.split("-") if word not in ("tp1", "pp1", "vpp1", "cp1"))


def table(
    device: Device,
    date: str,
    found: Sequence[Verdict],
    stages: Sequence[StageReport],
    others: Sequence[str] = (),
    *,
    wall_s: float,
    tiny: bool = False,
) -> str:
    """All of it for a reader, in `MOST_LINES` lines of `WIDTH` columns; what was met is left out first.

    `others` are problems of no stage.
    """
    torch, driver = device.versions.get("torch", "no torch"), f", driver {device.driver}" if device.driver else ""
    lines = [f"{device.name}, {device.memory_gib:g} GiB{driver}, torch {torch}; {date}; {wall_s:.0f} s"]
    if tiny:
        lines.append("toy models: what counts is that every stage runs; no figure below means anything")
    for stage in stages:
        took = f" in {stage.seconds:.0f} s" if stage.seconds else ""
        lines.append(f"{stage.name}: {stage.state.value}{took}{f'; {stage.detail}' if stage.detail else ''}")
    problems = [f"problem: {stage.name}: {problem}" for stage in stages for problem in stage.problems]
    problems += [f"problem: {problem}" for problem in others]
    left = [f"left: {stage.name}: {', '.join(stage.left)}" for stage in stages if stage.left]
    if len(problems) > _PROBLEMS:
        problems = [*problems[:_PROBLEMS], f"and {len(problems) - _PROBLEMS} more: summary.json"]
    room = MOST_LINES - len(lines) - len(problems) - len(left) - 2
    shown = list(found)
    while len(shown) > room:
        met = next((x for x in reversed(shown) if x.met and x.stage == "score"), None)
        shown.remove(met or next((x for x in reversed(shown) if x.met is None), shown[-1]))
    words = {True: "met", False: "NOT MET", None: "-"}
    rows = [(x.stage, words[x.met], x.what, x.asked, x.measured or "not measured") for x in shown]
    rows = [("stage", "", "what", "asked", "measured"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(shown) < len(found):
        lines.append(f"and {len(found) - len(shown)} more: summary.json")
    return "\n".join(_cut(line) for line in [*lines, *problems, *left])


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def document(
    device: Device, date: str, found: Sequence[Verdict], stages: Sequence[StageReport], more: Mapping[str, Any]
) -> dict[str, Any]:
    """All of it for programs. `more` are the records and scores behind the verdicts."""
    return {
        "device": dataclasses.asdict(device),
        "date": date,
        "verdicts": [dataclasses.asdict(x) for x in found],
        "stages": [dataclasses.asdict(x) for x in stages],
        **more,
    }
