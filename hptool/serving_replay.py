"""A serving search played against published tables: how many points each strategy would have measured.

Rows of one series, model, GPU and engine that answer the same lengths form a grid, a landscape whose best point under
any limit is known. A strategy, the same object as in a search, is asked for one run after the other; every point that
a run measures is counted, also one that is beyond the limits or out of memory.

Static grids, in which requests start and end together, are kept apart from serving ones, in which so many clients ask
again once they are answered (they have times of a token): the latter have more that no formula knows.
"""

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hptool import serving_strategy, serving_tables, tables
from hptool.candidates import BoolColumn, IntColumn
from hptool.errors import InputError
from hptool.facts import Engine
from hptool.predict.parts import Column
from hptool.serving import Objective, ServingPoints, Targets
from hptool.serving_strategy import (
    ServedTrial,
    ServingLandscape,
    ServingStrategy,
    Sitting,
    landscape_of,
    tokens_per_s_per_gpu,
    undominated,
)
from hptool.serving_tables import Scenario
from hptool.strategy import Ending

#: A point is as good as the best within this share, which is what a run has to be worth.
TOLERANCE = 0.01

#: Fewest points of a grid whose shares are reported with the others: with fewer one point is more than 6 %, and one for
#: each of four layouts is more than a quarter before anything is chosen.
LARGE = 16

#: Fewest measured points that make a grid.
MIN_MEASURED = 4

#: Limits of a grid, as quantiles of what was measured in it: of the latency, of the time of a token and to the first.
_LATENCY_QUANTILES = (0.1, 0.25, 0.5, 0.75)
_TPOT_QUANTILES = (0.25, 0.5)
_TTFT_QUANTILES = (0.5,)

#: Longest silence while grids are played.
_SAY_EVERY_S = 2.0

Kind = Literal["static", "serving"]

#: What a grid's rows agree in; the model by its dimensions too, since names repeat.
_GRID = ("series", "model", "hidden", "layers", "gpu", "engine", "input_len", "output_len")


# ---------------------------------------------------------------- results


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """How a strategy did in one grid with one objective and limit.

    `runs_to_best` counts the points that were measured until one within 1 % of the best, or all of the frontier, and is
    None where it stopped before. `regret` is what the best point of all is short of at the stop, as a share; of the
    frontier the share of its points that are missing. `runs` are all points that were measured, in `sittings` jobs.
    """

    grid: str
    kind: Kind
    points: int
    objective: Objective
    limit: str
    runs_to_best: int | None
    runs: int
    sittings: int
    regret: float
    why: str

    @property
    def share_to_best(self) -> float:
        """Of the grid's points; infinite where it stopped before."""
        return np.inf if self.runs_to_best is None else self.runs_to_best / self.points

    @property
    def share(self) -> float:
        """Of the grid's points until it stopped."""
        return self.runs / self.points


@dataclass(frozen=True, slots=True, kw_only=True)
class KindSummary:
    """The cases of one objective in all static or serving grids, those with few points apart.

    Shares of the grid's points: until the best was found, as median and worst (None: not in every case), and until the
    stop. `found` is in which share of the cases the best was found, `regret` the worst at the stop.
    """

    kind: Kind
    large: bool
    objective: Objective
    grids: int
    cases: int
    to_best_median: float | None
    to_best_worst: float | None
    stop_median: float
    stop_worst: float
    sittings: float
    found: float
    regret: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingReplay:
    """How a strategy did in each grid, in the order of the table.

    Rows are left out that cannot be predicted, that say nothing of a latency, or that repeat another.
    """

    strategy: str
    cases: Sequence[CaseResult]
    unpredicted_rows: int
    untimed_rows: int
    repeated_rows: int
    skipped: int

    @property
    def summary(self) -> Sequence[KindSummary]:
        """One entry a kind, size and objective: static before serving, large before small."""
        keys = sorted({_place(c) for c in self.cases})
        return [_summary([c for c in self.cases if _place(c) == key]) for key in keys]


#: The objectives that are played, in the order of the summary.
_OBJECTIVES: tuple[Objective, ...] = ("throughput-per-gpu", "latency", "pareto")


def _place(case: CaseResult) -> tuple[bool, bool, int]:
    return case.kind != "static", case.points < LARGE, _OBJECTIVES.index(case.objective)


def _summary(cases: Sequence[CaseResult]) -> KindSummary:
    to_best = np.array([c.share_to_best for c in cases])
    stop = np.array([c.share for c in cases])
    middle = float(np.quantile(to_best, 0.5, method="higher"))
    return KindSummary(
        kind=cases[0].kind,
        large=cases[0].points >= LARGE,
        objective=cases[0].objective,
        grids=len({c.grid for c in cases}),
        cases=len(cases),
        to_best_median=middle if np.isfinite(middle) else None,
        to_best_worst=float(to_best.max()) if np.isfinite(to_best).all() else None,
        stop_median=float(np.median(stop)),
        stop_worst=float(stop.max()),
        sittings=float(np.mean([c.sittings for c in cases])),
        found=float(np.mean(np.isfinite(to_best))),
        regret=max(c.regret for c in cases),
    )


# ---------------------------------------------------------------- grids


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """Points of one scenario and how each ended, in the order of the table."""

    name: str
    kind: Kind
    scenario: Scenario
    points: ServingPoints
    endings: Sequence[ServedTrial]

    def landscape(self, objective: Objective, targets: Targets) -> ServingLandscape:
        """What a search would know of it before the first run."""
        s = self.scenario
        return landscape_of(self.points, s.shape, s.cluster, s.engine, objective, targets)

    def cases(self) -> Sequence[tuple[Objective, str, Targets]]:
        """What is asked of it: the objective, the limit in words, and the limit."""
        limits = [("none", Targets())]
        options: list[tuple[str, str, Sequence[float]]] = [("latency", "latency_ms", _LATENCY_QUANTILES)]
        if self.kind == "serving":
            options += [("tpot", "tpot_ms", _TPOT_QUANTILES), ("ttft", "ttft_ms", _TTFT_QUANTILES)]
        for word, name, quantiles in options:
            times = [time for time in (getattr(t, name) for t in self.endings) if time is not None]
            for share in quantiles if times else ():
                limit: Any = {f"max_{name}": float(np.quantile(times, share))}
                limits.append((f"{word} {share:.0%}", Targets(**limit)))
        best: list[tuple[Objective, str, Targets]] = [("throughput-per-gpu", *limit) for limit in limits]
        return [*best, ("latency", "none", Targets()), ("pareto", "none", Targets())]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    unpredicted: int
    untimed: int
    repeated: int
    skipped: int


def grids_of(frame: pd.DataFrame, source: str, engine: Engine | None = None) -> tuple[Sequence[Grid], _Counts]:
    """The grids of a table, in the order of their first rows, and what was left out; `engine` stands for all."""
    frame = _checked(frame, source)
    trials = _endings(frame)
    rows = serving_tables.resolve(frame)
    number, _ = tables.alike(frame, _GRID)
    at: dict[int, list[int]] = {}
    seen: set[tuple[Any, ...]] = set()
    untimed = repeated = 0
    for i, row in enumerate(rows.row.tolist()):
        if trials[row] is None:
            untimed += 1
        elif (key := (int(number[row]), rows.points.row(i))) in seen:
            repeated += 1
        else:
            seen.add(key)
            at.setdefault(int(number[row]), []).append(i)
    grids, skipped = [], 0
    for members in at.values():
        endings = [trials[int(rows.row[i])] for i in members]
        known = [replace(t, row=k) for k, t in enumerate(endings) if t is not None]
        measured = [t for t in known if t.ending is Ending.MEASURED]
        if len(measured) < MIN_MEASURED or len({t.latency_ms for t in measured}) == 1:
            skipped += 1
            continue
        scenario = rows.scenarios[rows.scenario[members[0]]]
        first = int(rows.row[members[0]])
        grids.append(
            Grid(
                name=_name(frame, first),
                kind="serving" if all(t.tpot_ms is not None for t in measured) else "static",
                scenario=replace(scenario, engine=engine) if engine else scenario,
                points=rows.points.select(np.array(members)),
                endings=known,
            )
        )
    unpredicted = sum(bool(reason) for reason in rows.rejection)
    return grids, _Counts(unpredicted=unpredicted, untimed=untimed, repeated=repeated, skipped=skipped)


def _name(frame: pd.DataFrame, row: int) -> str:
    words = [tables.texts(frame, column)[row] for column in ("series", "model", "gpu", "engine")]
    asked = ":".join(tables.texts(frame, column)[row] for column in ("input_len", "output_len"))
    return ", ".join(w for w in (*words, asked) if w)


def _checked(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """The table, if it has what predictions and grids need; InputError with one line a missing column."""
    if frame.empty:
        raise InputError(f"{source}: no rows")
    needed = (*serving_tables.REQUIRED, "latency_ms")
    missing = [f"{source}: {column}: the column is missing" for column in needed if column not in frame]
    if missing:
        raise InputError(*missing)
    return frame.reset_index(drop=True)


def _endings(frame: pd.DataFrame) -> Sequence[ServedTrial | None]:
    """How each row ended, numbered by its row; None where the table does not say how long it took."""
    times = {name: tables.numbers(frame, name) for name in ("latency_ms", "ttft_ms", "tpot_ms")}
    told = {name: np.isfinite(column) & (column > 0) for name, column in times.items()}
    words = np.array([word.lower() for word in tables.texts(frame, "outcome")])
    notes = np.array([note.upper() for note in tables.texts(frame, "notes")])
    oom = (tables.numbers(frame, "oom") == 1) | (words == "oom") | (~told["latency_ms"] & np.isin(notes, ["OOM"]))
    failed = ~np.isin(words, ["", "ok", "oom"])
    batch = tables.numbers(frame, "batch")
    found: list[ServedTrial | None] = []
    for i in range(len(frame)):
        if oom[i] or failed[i]:
            found.append(ServedTrial(row=i, ending=Ending.OOM if oom[i] else Ending.FAILED))
        elif told["latency_ms"][i] and np.isfinite(batch[i]):
            known: Any = {name: float(times[name][i]) for name in times if told[name][i]}
            found.append(ServedTrial(row=i, ending=Ending.MEASURED, **known))
        else:
            found.append(None)
    return found


# ---------------------------------------------------------------- playing


def play(
    strategy: ServingStrategy, landscape: ServingLandscape, endings: Sequence[ServedTrial]
) -> tuple[Sequence[int], int, str]:
    """The rows that a strategy measures, in its order, in how many sittings, and why it stopped."""
    trials: list[ServedTrial] = []
    tried: set[int] = set()
    sittings = 0
    while isinstance(answer := strategy.next(trials), Sitting):
        sittings += 1
        ended: set[tuple[int, int]] = set()
        for row in answer.rows:
            if row in tried:
                raise ValueError(f"row {row}: measured before")
            asked = int(landscape.points.input_len[row]), int(landscape.points.output_len[row])
            if asked in ended:
                continue
            tried.add(row)
            trials.append(endings[row])
            if answer.stops_early and _leaves(landscape.targets, endings[row]):
                ended.add(asked)
    return [t.row for t in trials], sittings, getattr(answer, "why", "")


def _leaves(targets: Targets, trial: ServedTrial) -> bool:
    """Whether a point ends those of its lengths that come after it, as in a job."""
    if trial.ending is Ending.MEASURED:
        return serving_strategy.excess(targets, trial) > 1
    return trial.ending is Ending.OOM


def _judge(grid: Grid, name: str, objective: Objective, limit: str, targets: Targets) -> CaseResult | None:
    """None where no point of the grid keeps the limit."""
    landscape = grid.landscape(objective, targets)
    latency_ms = np.array([t.latency_ms or np.nan for t in grid.endings])
    good = np.array([t.ending is Ending.MEASURED and not _leaves(targets, t) for t in grid.endings])
    if not good.any():
        return None
    rows, sittings, why = play(serving_strategy.make(name, landscape), landscape, grid.endings)
    throughput = tokens_per_s_per_gpu(grid.points, latency_ms)
    if objective == "pareto":
        until, regret = _until_frontier(latency_ms, throughput, good, rows)
    else:
        wanted = np.where(good, 1 / latency_ms if objective == "latency" else throughput, 0.0)
        so_far = np.maximum.accumulate(wanted[list(rows)])
        enough = np.flatnonzero(so_far >= (1 - TOLERANCE) * wanted.max())
        until = int(enough[0]) + 1 if len(enough) else None
        regret = float(1 - so_far[-1] / wanted.max())
    return CaseResult(
        grid=grid.name,
        kind=grid.kind,
        points=len(grid.points),
        objective=objective,
        limit=limit,
        runs_to_best=until,
        runs=len(rows),
        sittings=sittings,
        regret=regret,
        why=why,
    )


def _until_frontier(
    latency_ms: Column, throughput: Column, good: BoolColumn, rows: Sequence[int]
) -> tuple[int | None, float]:
    """After how many runs all of the frontier was measured, or points within 1 % of it; the share that is missing."""
    at = np.flatnonzero(good)
    front: IntColumn = at[undominated(latency_ms[at], throughput[at])]
    order = np.array([row for row in rows if good[row]], dtype=np.int64)
    place = np.array([i + 1 for i, row in enumerate(rows) if good[row]], dtype=np.int64)
    near = (latency_ms[order][:, None] <= latency_ms[front][None, :] * (1 + TOLERANCE)) & (
        throughput[order][:, None] >= throughput[front][None, :] * (1 - TOLERANCE)
    )
    found = near.any(axis=0)
    missing = float(np.mean(~found))
    return (int(place[near.argmax(axis=0)].max()) if found.all() else None), missing


def replay(
    frame: pd.DataFrame,
    strategy: str = "guided",
    *,
    source: str = "results",
    grid_id: str | None = None,
    engine: Engine | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ServingReplay:
    """Plays `strategy` in each grid of the table, or in the one called `grid_id`, with every objective and limit.

    `source` names the table in errors; `engine` stands for those of the table, to see what an unknown one costs. `say`
    gets a line every two seconds.
    """
    known = serving_strategy.STRATEGIES
    if strategy not in known:
        raise InputError(f"--strategy: {strategy!r} is not for tables of serving; allowed are {', '.join(known)}")
    grids, counts = grids_of(frame, source, engine)
    if grid_id is not None:
        grids = [_named(grids, grid_id, source)]
    since = time.monotonic()
    cases: list[CaseResult] = []
    for i, grid in enumerate(grids):
        found = (_judge(grid, strategy, *case) for case in grid.cases())
        cases += [case for case in found if case is not None]
        if time.monotonic() - since > _SAY_EVERY_S:
            since = time.monotonic()
            say(f"{i + 1} of {len(grids)} grids played")
    return ServingReplay(
        strategy=strategy,
        cases=cases,
        unpredicted_rows=counts.unpredicted,
        untimed_rows=counts.untimed,
        repeated_rows=counts.repeated,
        skipped=counts.skipped,
    )


def _named(grids: Sequence[Grid], name: str, source: str) -> Grid:
    found = next((grid for grid in grids if grid.name == name), None)
    if found is None:
        close = difflib.get_close_matches(name, [grid.name for grid in grids], n=1, cutoff=0)
        hint = f"the nearest of {len(grids)} is {close[0]!r}" if close else "the table has none"
        raise InputError(f"{source}: --grid: unknown grid {name!r}; {hint}")
    return found


# ---------------------------------------------------------------- output


def as_json(made: ServingReplay) -> Mapping[str, Any]:
    """The whole result for programs."""
    return {
        "cases": [
            {
                "grid": c.grid,
                "kind": c.kind,
                "points": c.points,
                "objective": c.objective,
                "limit": c.limit,
                "runs_to_best": c.runs_to_best,
                "runs": c.runs,
                "sittings": c.sittings,
                "regret": c.regret,
                "stopped": c.why,
            }
            for c in made.cases
        ],
        "summary": {
            "strategy": made.strategy,
            "grids": len({c.grid for c in made.cases}),
            "left_out": {
                "unpredicted_rows": made.unpredicted_rows,
                "untimed_rows": made.untimed_rows,
                "repeated_rows": made.repeated_rows,
                "grids": made.skipped,
            },
            "kinds": [
                {
                    "kind": s.kind,
                    "large": s.large,
                    "objective": s.objective,
                    "grids": s.grids,
                    "cases": s.cases,
                    "share_to_best": {"median": s.to_best_median, "worst": s.to_best_worst},
                    "share_to_stop": {"median": s.stop_median, "worst": s.stop_worst},
                    "sittings": s.sittings,
                    "found": s.found,
                    "worst_regret": s.regret,
                }
                for s in made.summary
            ],
        },
    }


def print_replay(made: ServingReplay, console: Console, *, each_grid: bool = False) -> None:
    """The summary in 80 columns, and before it every case where that is asked for."""
    if each_grid and made.cases:
        console.print(_case_table(made))
        console.print()
    if made.cases:
        console.print(_summary_table(made))
        console.print(
            f"best: points until one within {TOLERANCE:.0%} of the best (pareto: until the whole frontier),\n"
            "of the grid's points: the median, and the worst (– where one was not found)\n"
            "stop: points until it stopped; jobs: in how many runs; found: in how many cases\n"
            f"regret: the worst at the stop (pareto: points missing); few: below {LARGE} points",
            style="dim",
        )
    else:
        console.print("No grid was played.")
    left_out = [
        (made.unpredicted_rows, "cannot be predicted"),
        (made.untimed_rows, "say no latency and no batch"),
        (made.repeated_rows, "repeat another"),
    ]
    if any(count for count, _ in left_out):
        said = ", ".join(f"{count} {what}" for count, what in left_out if count)
        console.print(f"Rows left out: {said}.", soft_wrap=True)
    if made.skipped:
        console.print(f"{made.skipped} grids skipped with fewer than {MIN_MEASURED} measured points.", soft_wrap=True)


#: Objectives as the tables print them.
_SHORT: Mapping[Objective, str] = {"throughput-per-gpu": "throughput", "latency": "latency", "pareto": "pareto"}


def _summary_table(made: ServingReplay) -> Table:
    grids = len({c.grid for c in made.cases})
    table = Table(title=f"{made.strategy}, {grids} published serving grids", title_justify="left", box=None)
    table.add_column("grids", no_wrap=True)
    table.add_column("objective", no_wrap=True)
    for heading in ("cases", "best", "worst", "stop", "worst", "jobs", "found", "regret"):
        table.add_column(heading, justify="right")
    for s in made.summary:
        table.add_row(
            s.kind if s.large else f"{s.kind}, few",
            _SHORT[s.objective],
            str(s.cases),
            _share(s.to_best_median),
            _share(s.to_best_worst),
            _share(s.stop_median),
            _share(s.stop_worst),
            f"{s.sittings:.1f}",
            _share(s.found),
            f"{s.regret:.1%}",
        )
    return table


def _case_table(made: ServingReplay) -> Table:
    table = Table(title=f"{made.strategy}, case by case", title_justify="left", box=None)
    table.add_column("grid", overflow="fold")
    table.add_column("objective")
    table.add_column("limit")
    for heading in ("points", "best", "stop", "jobs", "regret"):
        table.add_column(heading, justify="right", no_wrap=True)
    for c in made.cases:
        best = "–" if c.runs_to_best is None else str(c.runs_to_best)
        row = (escape(c.grid), _SHORT[c.objective], c.limit, str(c.points), best, str(c.runs), str(c.sittings))
        table.add_row(*row, f"{c.regret:.1%}")
    return table


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
