"""How good predictions and searches are against measured landscapes.

    python -m tests.gpu.score FILE.csv [--calibrated GPU.yaml]

Each landscape of the table (tests/gpu/collect.py) is planned again as a search would, and judged: after how many runs
`adaptive` has a layout within 2 % of the best, as `hptool replay` plays it; how far memory and step time are off; and
which runs out of memory were foreseen. Step times are also judged with the facts that `hptool calibrate` measured, and
after learning: of every other row of the landscape, for the rows between, and the other way round. Exit code 1 where a
landscape is not as good as is asked.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from hptool import files, tables
from hptool import strategy as strategies
from hptool.candidates import SearchSpace
from hptool.errors import HptoolError, InputError
from hptool.facts import GpuSpec
from hptool.forecast import EVEN
from hptool.plan import Plan, SearchRequest, make_plan
from hptool.predict import Predictions
from hptool.predict.calibration import STEP_TIME_FACTORS, Calibration, step_time_shares
from hptool.predict.parts import Column
from hptool.replay import TOLERANCE, play
from hptool.strategy import Ending, Landscape, Trial
from tests.gpu import collect
from tests.gpu.device import Device, one_gpu

#: What is asked of every landscape: the winner (within `TOLERANCE` of the best) among so many runs; memory of every run
#: and the median step time, before and after learning, off by at most so much.
ASKED_RUNS = 3
ASKED_MEMORY_ERROR = 0.03
ASKED_STEP_ERROR = 0.07
ASKED_LEARNED_ERROR = 0.03

#: Runs without which learning from one half says nothing of the other.
_FEWEST_TO_LEARN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One landscape: its runs, and how well they were foreseen. Errors are relative; None where nothing tells.

    `runs_to_winner` is None where `adaptive` stops before. Memory is what tensors take at the peak ("max allocated").
    """

    name: str
    rows: int
    measured: int
    out_of_memory: int
    other_failures: int
    best: str | None
    runs_to_winner: int | None
    runs_to_stop: int
    memory_error_median: float | None
    memory_error_max: float | None
    worst_memory: str | None
    oom_foreseen: int
    oom_false: int
    step_error: float | None
    step_bias: float | None
    calibrated_step_error: float | None
    learned_step_error: float | None

    def verdicts(self) -> list[tuple[str, str, str, bool | None]]:
        """What is asked, the figure asked for, the measured one, and whether it is met; None where nothing tells."""
        runs = "never" if self.runs_to_winner is None else str(self.runs_to_winner)
        has_winner = self.measured > 1
        return [
            (
                "runs to the winner",
                f"<= {ASKED_RUNS}",
                runs if has_winner else "",
                (self.runs_to_winner or np.inf) <= ASKED_RUNS if has_winner else None,
            ),
            (
                "memory error, worst",
                f"<= {ASKED_MEMORY_ERROR:.0%}",
                *_at_most(self.memory_error_max, ASKED_MEMORY_ERROR),
            ),
            (
                "out of memory foreseen",
                "all",
                f"{self.oom_foreseen} of {self.out_of_memory}",
                self.oom_foreseen == self.out_of_memory if self.out_of_memory else None,
            ),
            ("wrongly called so", "0", str(self.oom_false), self.oom_false == 0 if self.measured else None),
            ("step time error", f"<= {ASKED_STEP_ERROR:.0%}", *_at_most(self.step_error, ASKED_STEP_ERROR)),
            *(
                (f"step time error, {how}", f"<= {ASKED_LEARNED_ERROR:.0%}", *_at_most(error, ASKED_LEARNED_ERROR))
                for how, error in (("calibrated", self.calibrated_step_error), ("learned", self.learned_step_error))
            ),
        ]


def _at_most(value: float | None, limit: float) -> tuple[str, bool | None]:
    return ("", None) if value is None else (f"{value:.1%}", value <= limit)


def score(frame: pd.DataFrame, calibrated: GpuSpec | None = None) -> list[Score]:
    """The scores of a table's landscapes, in their order; `calibrated` are the measured facts of its GPU."""
    return [_score(str(name), rows, calibrated) for name, rows in frame.groupby("grid_id", sort=False)]


def _plan(rows: pd.DataFrame, gpu: GpuSpec | None) -> Plan:
    """The search that measured these rows; with `gpu` in the place of the facts that they name."""
    first = rows.iloc[0]
    device = Device(kind="cuda", name="", gpu=str(first["gpu"]), memory_gib=float(first["device_memory_gib"]))
    cluster = one_gpu(device)
    if gpu is not None:
        cluster = replace(cluster, gpu=replace(gpu, memory_gib=device.memory_gib))
    mbs = tuple(sorted({int(size) for size in rows["mbs"]}))
    request = SearchRequest(
        model=str(first["preset"]),
        cluster=cluster.name,
        overrides=tuple(str(first["overrides"]).split()),
        space=SearchSpace(tp=(1,), pp=(1,), vpp=(1,), cp=(1,), ep=(1,), mbs=mbs),
    )
    return make_plan(request, cluster=cluster)


def _score(name: str, rows: pd.DataFrame, calibrated: GpuSpec | None) -> Score:
    plan = _plan(rows, None)
    known = {layout.name: row for row, layout in enumerate(plan.candidates.layouts.rows())}
    rows = rows[[layout in known for layout in rows["layout"]]]
    if rows.empty:
        raise InputError(f"{name}: none of its layouts is one that a search would try")
    chosen = np.array([known[layout] for layout in rows["layout"]], dtype=np.int64)
    expected = plan.predictions.select(chosen)
    words = rows["outcome"].to_numpy(dtype=str)
    ok, oom = words == "ok", words == "oom"
    step_time_s = np.where(ok, tables.numbers(rows, "iter_s"), np.nan)
    memory_gib = np.where(ok, tables.numbers(rows, "mem_gb"), np.nan)
    # Of a process all of it is measured, of a device its allocator's tensors.
    is_resident = np.array(["resident" in kind for kind in tables.texts(rows, "mem_kind")])
    likewise_gib = np.where(is_resident, expected.memory.total_gib, expected.memory.allocated_gib)
    memory_error = likewise_gib / memory_gib - 1
    step_error, calibrated_error = expected.step_time_s / step_time_s - 1, None
    if calibrated is not None:
        calibrated_s = _plan(rows, calibrated).predictions.select(chosen).step_time_s
        calibrated_error = _median(np.abs(calibrated_s / step_time_s - 1))
    to_winner, to_stop = _play(expected, plan.cluster.gpu.memory_gib, step_time_s, oom)
    sized = np.flatnonzero(np.isfinite(memory_error))
    worst = sized[np.argmax(np.abs(memory_error[sized]))] if len(sized) else None
    return Score(
        name=name,
        rows=len(rows),
        measured=int(ok.sum()),
        out_of_memory=int(oom.sum()),
        other_failures=int((~ok & ~oom).sum()),
        best=str(rows["layout"].iloc[int(np.nanargmin(step_time_s))]) if ok.any() else None,
        runs_to_winner=to_winner,
        runs_to_stop=to_stop,
        memory_error_median=_median(np.abs(memory_error)),
        memory_error_max=float(np.abs(memory_error[worst])) if worst is not None else None,
        worst_memory=str(rows["layout"].iloc[int(worst)]) if worst is not None else None,
        oom_foreseen=int((expected.p_fit[oom] < EVEN).sum()),
        oom_false=int((expected.p_fit[ok] < EVEN).sum()),
        step_error=_median(np.abs(step_error)),
        step_bias=_median(step_error),
        calibrated_step_error=calibrated_error,
        learned_step_error=_learned_error(plan, expected, step_time_s),
    )


def _median(values: Column) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _play(expected: Predictions, memory_gib: float, step_time_s: Column, oom: Any) -> tuple[int | None, int]:
    """Runs of `adaptive` until a layout within `TOLERANCE` of the best, and until it stops."""
    if not np.isfinite(step_time_s).any():
        return None, 0
    landscape = Landscape(target=expected, run=expected, memory_gib=memory_gib)
    endings = [
        Trial(row=row, ending=Ending.MEASURED, step_time_s=float(seconds))
        if np.isfinite(seconds)
        else Trial(row=row, ending=Ending.OOM if oom[row] else Ending.FAILED)
        for row, seconds in enumerate(step_time_s)
    ]
    tried, _ = play(strategies.make("adaptive", landscape), endings)
    good = np.nanmin(step_time_s) / (1 - TOLERANCE)
    at = next((number for number, row in enumerate(tried, start=1) if step_time_s[row] <= good), None)
    return at, len(tried)


def _learned_error(plan: Plan, expected: Predictions, step_time_s: Column) -> float | None:
    """The median error of each half's rows after learning from the other half."""
    known = np.flatnonzero(np.isfinite(step_time_s))
    if len(known) < _FEWEST_TO_LEARN:
        return None
    shares, framework = step_time_shares(expected.step_time), plan.framework
    errors = []
    for first in (0, 1):
        taught, asked = known[first::2], known[1 - first :: 2]
        prior = Calibration.prior(STEP_TIME_FACTORS, framework.step_time_error, fitted=framework.fitted)
        learned = prior.updated(shares[taught], step_time_s[taught])
        errors.append(np.abs(learned.total(shares[asked]) / step_time_s[asked] - 1))
    return _median(np.concatenate(errors))


def read_gpu(path: Path) -> GpuSpec:
    """The GPU of a calibration, or of a profile. InputError where the file holds neither."""
    document = files.read_yaml(path)
    inner = document.get("gpu", document) if isinstance(document, dict) else document
    found: GpuSpec = (
        files.read_gpu(inner, str(path)) if isinstance(inner, str) else files.parse(inner, GpuSpec, str(path))
    )
    return found


def lines(scores: Sequence[Score]) -> list[str]:
    """The scores as a table, a line each."""
    heads = [
        *("landscape", "rows", "ok", "oom", "winner", "stop", "mem med", "mem max", "oom seen", "false"),
        *("step", "calib", "learnt"),
    ]
    table = [heads]
    for x in scores:
        seen = f"{x.oom_foreseen}/{x.out_of_memory}"
        winner = "never" if x.runs_to_winner is None else str(x.runs_to_winner)
        table.append(
            [
                *(x.name, str(x.rows), str(x.measured), str(x.out_of_memory), winner, str(x.runs_to_stop)),
                *(_percent(x.memory_error_median), _percent(x.memory_error_max), seen, str(x.oom_false)),
                *(_percent(x.step_error), _percent(x.calibrated_step_error), _percent(x.learned_step_error)),
            ]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


@click.command()
@click.argument("table", type=click.Path(path_type=Path), metavar="FILE.csv")
@click.option("--calibrated", type=click.Path(path_type=Path), help="What hptool calibrate wrote on the same GPU.")
def main(table: Path, calibrated: Path | None) -> None:
    """Score predictions and searches against a table that make gpu measured."""
    try:
        scores = score(collect.read(table), read_gpu(calibrated) if calibrated else None)
    except HptoolError as error:
        click.echo(f"{error}", err=True)
        sys.exit(error.exit_code)
    for line in lines(scores):
        click.echo(line)
    unmet = [
        f"{x.name}: {what}: {found}, asked is {asked}"
        for x in scores
        for what, asked, found, met in x.verdicts()
        if met is False
    ]
    for line in unmet:
        click.echo(f"not met: {line}")
    sys.exit(1 if unmet else 0)


def documents(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """For a JSON file."""
    return [dataclasses.asdict(x) for x in scores]


if __name__ == "__main__":
    main()
