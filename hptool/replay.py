"""A search played against recorded results: how many runs each strategy would have needed, and how many had failed.

Recorded runs of one model on one cluster form a grid, a landscape whose best layout is known. A strategy, the same
object as in a search, is asked for one row after the other; each try costs a run, a failure too.
"""

import difflib
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hptool import files, serving_replay, serving_strategy, serving_tables, tables
from hptool import strategy as strategies
from hptool.candidates import BoolColumn, IntColumn, Recompute
from hptool.errors import InputError
from hptool.forecast import forecast
from hptool.predict.parts import Column
from hptool.strategy import Ending, InOrder, Landscape, Stop, Strategy, Trial
from hptool.units import GIB

#: A layout is good once its throughput is within this share of the best one's.
TOLERANCE = 0.02

#: The layout that a strategy ends with is as good as the best within this share, which is what a run has to be worth.
FINAL_TOLERANCE = 0.01

#: Numbers of runs after which the regret is taken.
CHECKPOINTS = (1, 3, 5, 10)

#: Those of them that the summary shows.
SUMMARY_CHECKPOINTS = (1, 3)

#: Orders that `random` is the expectation over.
PERMUTATIONS = 200

#: Fewest measured rows that make a grid.
MIN_MEASURED = 2

#: Longest silence while grids are played.
SAY_EVERY_S = 2.0

_MODEL = ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "seq", "gbs")
_CUT = ("nodes", "gpus", "tp", "pp", "vpp", "cp", "ep", "dp", "mbs")
_RATES = ("tps_gpu_norm", "tokens_per_s_per_gpu", "iter_s")
_NUMBERS = (*_MODEL, *_CUT, *_RATES)

#: Columns that say how a run went, which no strategy gets to see.
_RESULTS = ("outcome", *_RATES, "tflops_per_gpu", "mfu_pct", "mem_gb", "oom")

#: What the axes of `grid` are nested by, outermost first.
_NESTING = ("tp", "pp", "cp", "ep", "vpp", "mbs")


# ---------------------------------------------------------------- strategies


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choices:
    """What a strategy knows of a grid before the first run: its rows without their results.

    Row i of `landscape` stands for row `predicted[i]`; rows that cannot be predicted are not in it, and come last.
    For a strategy that does not predict there is no landscape, and `predicted` are all rows.
    """

    rows: pd.DataFrame
    landscape: Landscape | None
    predicted: IntColumn


def _searching(name: str) -> Callable[[Choices, np.random.Generator], Sequence[Strategy]]:
    """The strategy of this name as a search has it."""

    def made(choices: Choices, generator: np.random.Generator) -> Sequence[Strategy]:
        assert choices.landscape is not None  # noqa: S101 (`predicts` says so)
        strategy = strategies.make(name, choices.landscape, seed=int(generator.integers(2**31)))
        # Nobody here asks what a run in a fixed order is believed to gain, and to know it takes long.
        return [replace(strategy, landscape=None) if isinstance(strategy, InOrder) else strategy]

    return made


def _in_order(order: NDArray[Any]) -> Strategy:
    return InOrder(order=order.tolist(), why="its turn")


def _random(choices: Choices, generator: np.random.Generator) -> Sequence[Strategy]:
    return [_in_order(generator.permutation(len(choices.rows))) for _ in range(PERMUTATIONS)]


def _grid(choices: Choices, _: np.random.Generator) -> Sequence[Strategy]:
    loops = [*(_axis(choices.rows, axis) for axis in _NESTING), _recompute(choices.rows)]
    return [_in_order(np.lexsort(loops[::-1]))]


def _naive(choices: Choices, _: np.random.Generator) -> Sequence[Strategy]:
    tp, pp, cp, ep = (_axis(choices.rows, axis) for axis in ("tp", "pp", "cp", "ep"))
    return [_in_order(np.lexsort([-_axis(choices.rows, "mbs"), tp * pp * cp * ep]))]


def _axis(rows: pd.DataFrame, axis: str) -> Column:
    """The sizes of an axis; a missing one is 1."""
    return rows[axis].fillna(1).to_numpy(float) if axis in rows else np.ones(len(rows))


def _recompute(rows: pd.DataFrame) -> IntColumn:
    known = {mode.name.lower(): mode for mode in Recompute} | {"full": Recompute.UNIFORM}
    modes = [next((mode for word, mode in known.items() if x.startswith(word)), 9) for x in _words(rows, "recompute")]
    return np.array(modes, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """How to get the strategies (several, where chance has a part) for a grid; whether they predict, and ever stop."""

    make: Callable[[Choices, np.random.Generator], Sequence[Strategy]]
    predicts: bool = False
    stops: bool = False


#: Strategies by the name that users give. Those that look at no prediction take tables that cannot be predicted.
STRATEGIES: Mapping[str, _Kind] = {
    "ranked": _Kind(make=_searching("ranked"), predicts=True),
    "adaptive": _Kind(make=_searching("adaptive"), predicts=True, stops=True),
    "optuna": _Kind(make=_searching("optuna"), predicts=True),
    "random": _Kind(make=_random),
    "grid": _Kind(make=_grid),
    "naive": _Kind(make=_naive),
}


# ---------------------------------------------------------------- results


@dataclass(frozen=True, slots=True, kw_only=True)
class GridResult:
    """How a strategy did in one grid. Where chance has a part: medians of numbers of runs, means of the rest.

    `runs_to_2pct` counts the runs until a good layout was tried, and is None where the strategy stopped before.
    `failed_runs` of the `runs` up to then (or to the stop) failed. `regret` is what the best layout so far is short
    of the best one, by number of runs. The last three are at the stop, and None for a strategy that does not stop.
    """

    grid_id: str
    dataset: str
    primary: bool
    strategy: str
    rows: int
    runs_to_2pct: float | None
    regret: Mapping[int, float]
    failed_runs: float
    runs: float
    runs_to_stop: float | None
    failed_to_stop: float | None
    final_regret: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """The grids of one dataset that are `primary`, or those that are not, taken together.

    A quantile is None where so many grids were left before a good layout was tried. `stopped` says how a strategy
    stopped that does.
    """

    dataset: str
    primary: bool
    grids: int
    rows: int
    runs_to_2pct_median: float | None
    runs_to_2pct_p90: float | None
    regret: Mapping[int, float]
    failed_share: float
    stopped: "StopSummary | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopSummary:
    """Where a strategy stopped: the runs until then, and the share of them that failed.

    `good_share` is in which share of the grids it had by then found the best layout, or one within 1 % of it.
    """

    runs_median: float
    runs_p90: float
    failed_share: float
    good_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """How a strategy did in each grid, in the order of the table; skipped are the grids that tell nothing.

    `unpredicted_rows` of the played grids could not be predicted, by a strategy that predicts.
    """

    strategy: str
    grids: Sequence[GridResult]
    unpredicted_rows: int
    skipped_too_few_measured: int
    skipped_no_variation: int

    @property
    def summary(self) -> Sequence[DatasetSummary]:
        """One entry a dataset and use, primary ones first, then by name."""
        keys = sorted({(not g.primary, g.dataset) for g in self.grids})
        return [_summary([g for g in self.grids if (not g.primary, g.dataset) == key]) for key in keys]


def _summary(grids: Sequence[GridResult]) -> DatasetSummary:
    runs = [np.inf if g.runs_to_2pct is None else g.runs_to_2pct for g in grids]
    return DatasetSummary(
        dataset=grids[0].dataset,
        primary=grids[0].primary,
        grids=len(grids),
        rows=sum(g.rows for g in grids),
        runs_to_2pct_median=quantile(runs, 0.5),
        runs_to_2pct_p90=quantile(runs, 0.9),
        regret={k: float(np.mean([g.regret[k] for g in grids])) for k in SUMMARY_CHECKPOINTS},
        failed_share=sum(g.failed_runs for g in grids) / max(1.0, sum(g.runs for g in grids)),
        stopped=_stop_summary(grids),
    )


def _stop_summary(grids: Sequence[GridResult]) -> StopSummary | None:
    runs = np.array([g.runs_to_stop for g in grids if g.runs_to_stop is not None])
    if not len(runs):
        return None
    final = np.array([g.final_regret for g in grids if g.final_regret is not None])
    return StopSummary(
        runs_median=float(np.median(runs)),
        runs_p90=float(np.quantile(runs, 0.9)),
        failed_share=sum(g.failed_to_stop or 0.0 for g in grids) / float(runs.sum()),
        good_share=float(np.mean(final <= FINAL_TOLERANCE)),
    )


def quantile(values: Iterable[float], share: float) -> float | None:
    """NumPy's default quantile of numbers of runs, in which infinity is never; None where the answer is never."""
    array = np.array(list(values))
    above = np.quantile(array, share, method="higher")
    # Infinities beyond the answer are clipped: they do not count, but interpolating would make them NaN.
    return float(np.quantile(np.minimum(array, above), share)) if np.isfinite(above) else None


# ---------------------------------------------------------------- playing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Grid:
    """Rows `at` of a table; a failed one has NaN for a throughput, and is `oom` where that is proven."""

    grid_id: str
    dataset: str
    primary: bool
    at: IntColumn
    tokens_per_s_per_gpu: Column
    oom: BoolColumn


def play(strategy: Strategy, endings: Sequence[Trial]) -> tuple[Sequence[int], bool]:
    """The rows that a strategy runs, in its order, and whether it left some; `endings` says how each row ends."""
    trials: list[Trial] = []
    left = set(range(len(endings)))
    while left:
        answer = strategy.next(trials)
        if isinstance(answer, Stop):
            break
        if answer.row not in left:
            raise ValueError(f"row {answer.row}: not one of the {len(endings)} rows, or tried before")
        left.remove(answer.row)
        trials.append(endings[answer.row])
    return [t.row for t in trials], bool(left)


def _endings(grid: _Grid, choices: Choices) -> Sequence[Trial]:
    """How a run of each row of the landscape ends, or of each row of the grid where there is no landscape."""
    rates, oom = grid.tokens_per_s_per_gpu[choices.predicted], grid.oom[choices.predicted]
    target = choices.landscape and choices.landscape.target
    tokens_per_gpu = target.tokens_per_s_per_gpu * target.step_time_s if target else np.ones(len(rates))
    endings = []
    for row, rate in enumerate(rates.tolist()):
        if np.isnan(rate):
            endings.append(Trial(row=row, ending=Ending.OOM if oom[row] else Ending.FAILED))
        else:
            # Nobody published what the timers were worth, or memory that compares with what a rank takes in all.
            seconds = float(tokens_per_gpu[row]) / rate
            endings.append(Trial(row=row, ending=Ending.MEASURED, step_time_s=seconds))
    return endings


def _judge(grid: _Grid, choices: Choices, name: str, kind: _Kind, generator: np.random.Generator) -> GridResult:
    best = float(np.nanmax(grid.tokens_per_s_per_gpu))
    endings = _endings(grid, choices)
    unpredicted = np.setdiff1d(np.arange(len(grid.at)), choices.predicted).tolist()
    to_good: list[float] = []
    counted: list[int] = []
    failed: list[int] = []
    regrets: list[list[float]] = []
    stops: list[tuple[int, int, float]] = []
    for strategy in kind.make(choices, generator):
        tried, stopped = play(strategy, endings)
        rows = [*choices.predicted[tried].tolist(), *([] if stopped else unpredicted)]
        rates = np.nan_to_num(grid.tokens_per_s_per_gpu[rows])
        so_far = np.maximum.accumulate(rates)
        good = np.flatnonzero(so_far >= (1 - TOLERANCE) * best)
        to_good.append(float(good[0] + 1) if len(good) else np.inf)
        counted.append(int(good[0] + 1) if len(good) else len(rows))
        failed.append(int(np.sum(rates[: counted[-1]] == 0.0)))
        regret = 1 - np.concatenate([[0.0], so_far]) / best
        regrets.append([float(regret[min(k, len(rows))]) for k in CHECKPOINTS])
        if kind.stops:
            stops.append((len(rows), int(np.sum(rates == 0.0)), float(regret[-1])))
    return GridResult(
        grid_id=grid.grid_id,
        dataset=grid.dataset,
        primary=grid.primary,
        strategy=name,
        rows=len(grid.at),
        runs_to_2pct=quantile(to_good, 0.5),
        regret=dict(zip(CHECKPOINTS, np.mean(regrets, axis=0).tolist(), strict=True)),
        failed_runs=float(np.mean(failed)),
        runs=float(np.mean(counted)),
        runs_to_stop=float(np.median([n for n, _, _ in stops])) if stops else None,
        failed_to_stop=float(np.mean([n for _, n, _ in stops])) if stops else None,
        final_regret=float(np.mean([r for _, _, r in stops])) if stops else None,
    )


def replay(
    frame: pd.DataFrame,
    strategy: str = "ranked",
    *,
    source: str = "results",
    grid_id: str | None = None,
    primary_only: bool = False,
    max_tp: int | None = None,
    max_nodes: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Replay:
    """Plays `strategy` in each grid of the table, or in the one called `grid_id`; `source` names the table in errors.

    Rows beyond `max_tp` or `max_nodes` are taken out before grids are formed. `say` gets a line every two seconds.
    """
    if strategy not in STRATEGIES:
        if strategy in serving_strategy.STRATEGIES:
            allowed = ", ".join(STRATEGIES)
            raise InputError(f"--strategy: {strategy!r} is not for tables of training runs; allowed are {allowed}")
        raise InputError(f"--strategy: unknown strategy {strategy!r}; {files.nearest(strategy, list(STRATEGIES))}")
    kind = STRATEGIES[strategy]
    frame = _within(_checked(frame, source, tables.REQUIRED if kind.predicts else ()), source, max_tp, max_nodes)
    grids = _grids(frame, source)
    if grid_id is not None:
        grids = [_named(grids, grid_id, source)]
    elif primary_only:
        grids = [g for g in grids if g.primary]
    told = [g for g in grids if _measured(g) >= MIN_MEASURED and _varies(g)]
    results = []
    unpredicted = 0
    since = time.monotonic()
    for grid, choices in zip(told, _choices(frame, told, predicts=kind.predicts), strict=True):
        # Of its own for each grid, so that a grid played alone gives what it gives among others.
        generator = np.random.default_rng([seed, zlib.crc32(grid.grid_id.encode())])
        results.append(_judge(grid, choices, strategy, kind, generator))
        unpredicted += len(grid.at) - len(choices.predicted) if kind.predicts else 0
        if time.monotonic() - since > SAY_EVERY_S:
            since = time.monotonic()
            say(f"{len(results)} of {len(told)} grids played")
    few = sum(_measured(g) < MIN_MEASURED for g in grids)
    return Replay(
        strategy=strategy,
        grids=results,
        unpredicted_rows=unpredicted,
        skipped_too_few_measured=few,
        skipped_no_variation=len(grids) - len(told) - few,
    )


def _measured(grid: _Grid) -> int:
    return int(np.sum(np.isfinite(grid.tokens_per_s_per_gpu)))


def _varies(grid: _Grid) -> bool:
    return bool(np.nanmin(grid.tokens_per_s_per_gpu) < np.nanmax(grid.tokens_per_s_per_gpu))


def _named(grids: Sequence[_Grid], grid_id: str, source: str) -> _Grid:
    found = next((g for g in grids if g.grid_id == grid_id), None)
    if found is None:
        known = [g.grid_id for g in grids]
        close = difflib.get_close_matches(grid_id, known, n=1, cutoff=0)[0]
        raise InputError(f"{source}: grid_id: unknown grid {grid_id!r}; the nearest of {len(known)} is {close!r}")
    if _measured(found) < MIN_MEASURED or not _varies(found):
        raise InputError(
            f"{source}: grid_id: {grid_id!r} has {_measured(found)} measured runs,"
            f" needed are {MIN_MEASURED} or more that differ in throughput"
        )
    return found


def _choices(frame: pd.DataFrame, grids: Sequence[_Grid], *, predicts: bool) -> Iterable[Choices]:
    """What is known of each grid; all of them are predicted at once."""
    shown = frame.drop(columns=[c for c in _RESULTS if c in frame])
    if not predicts or not grids:
        for grid in grids:
            yield Choices(rows=shown.iloc[grid.at], landscape=None, predicted=np.arange(len(grid.at)))
        return
    expected = forecast(shown.iloc[np.concatenate([g.at for g in grids])].reset_index(drop=True))
    start = 0
    for grid in grids:
        end = start + len(grid.at)
        entries = np.arange(*np.searchsorted(expected.row, [start, end]))
        predictions = expected.predictions.select(entries)
        # Recorded runs are what is wanted: nothing stands for anything larger. Rows of a grid share their GPU.
        limit_gib = float(np.median(expected.setting.memory_bytes[entries])) / GIB if len(entries) else 0.0
        yield Choices(
            rows=shown.iloc[grid.at],
            landscape=Landscape(target=predictions, run=predictions, memory_gib=limit_gib),
            predicted=expected.row[entries] - start,
        )
        start = end


def replay_table(
    path: Path, strategy: str | None = None, *, say: Callable[[str], None] = lambda _: None, **options: Any
) -> "Replay | serving_replay.ServingReplay":
    """Plays `strategy`, or the usual one, in the grids of a CSV file, of training runs or of served points.

    `options` are those of `replay`. Of those that are given, tables of served points take `grid_id` alone.
    """
    if not serving_tables.is_serving(path):
        frame = tables.read_table(path, required=("grid_id",))
        return replay(frame, strategy or "ranked", source=str(path), say=say, **options)
    flags = {"primary_only": "--primary", "max_tp": "--max-tp", "max_nodes": "--max-nodes", "seed": "--seed"}
    if given := [flag for name, flag in flags.items() if options.get(name)]:
        raise InputError(*(f"{flag}: given, but {path} is a table of serving; allowed is --grid" for flag in given))
    frame = tables.read_table(path, serving_tables.REQUIRED)
    return serving_replay.replay(frame, strategy or "guided", source=str(path), grid_id=options.get("grid_id"), say=say)


# ---------------------------------------------------------------- tables of results


def _checked(frame: pd.DataFrame, source: str, required: Sequence[str]) -> pd.DataFrame:
    """The table with its number columns as numbers; InputError with one line a column that will not do."""
    if frame.empty:
        raise InputError(f"{source}: no rows")
    problems = [f"{source}: {c}: the column is missing" for c in ("grid_id", *required) if c not in frame]
    numbers: dict[str, pd.Series[Any]] = {}
    for column in (c for c in _NUMBERS if c in frame):
        numbers[column] = pd.to_numeric(frame[column], errors="coerce").astype(float)
        wrong = np.flatnonzero((numbers[column].isna() & frame[column].notna()).to_numpy())
        if len(wrong):
            given = str(frame[column].iloc[int(wrong[0])])
            problems.append(f"{source}: {column}: {given!r} given in row {wrong[0] + 1}, allowed is a number")
    if problems:
        raise InputError(*problems)
    return frame.assign(**numbers).reset_index(drop=True)


def _within(frame: pd.DataFrame, source: str, max_tp: int | None, max_nodes: int | None) -> pd.DataFrame:
    """The rows within these limits; a row that does not give the number is within."""
    for column, option, limit in (("tp", "--max-tp", max_tp), ("nodes", "--max-nodes", max_nodes)):
        if limit is None:
            continue
        if column not in frame:
            raise InputError(f"{source}: {column}: the column is missing, and {option} needs it")
        frame = frame[~(frame[column] > limit)]
        if frame.empty:
            raise InputError(f"{source}: no row has {column} {limit} or less, as {option} demands")
    return frame.reset_index(drop=True)


def _grids(frame: pd.DataFrame, source: str) -> Sequence[_Grid]:
    """The grids in the order of their first rows."""
    rates, oom, counts = _outcomes(frame)
    ids, datasets, uses = (_words(frame, column) for column in ("grid_id", "dataset", "grid_use"))
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(ids):
        if name:
            rows.setdefault(name, []).append(i)
    if not rows:
        raise InputError(f"{source}: grid_id: empty in every row")
    grids = []
    for name, members in rows.items():
        at = np.array([i for i in members if counts[i]], dtype=np.int64)
        grids.append(
            _Grid(
                grid_id=name,
                dataset=datasets[members[0]],
                primary=uses[members[0]] == "primary",
                at=at,
                tokens_per_s_per_gpu=rates[at],
                oom=oom[at],
            )
        )
    return grids


def _outcomes(frame: pd.DataFrame) -> tuple[Column, BoolColumn, BoolColumn]:
    """Each row's throughput, NaN for a failure, whether it is proven out of memory, and whether the row counts.

    It does not if it went well and nobody knows how well.
    """
    empty = pd.Series(np.nan, index=frame.index)
    gbs, seq, iter_s, gpus = (frame.get(c, empty) for c in ("gbs", "seq", "iter_s", "gpus"))
    rate = frame.get("tps_gpu_norm", empty).fillna(frame.get("tokens_per_s_per_gpu", empty))
    rates = rate.fillna(gbs * seq / iter_s / gpus).to_numpy(float)
    known = np.isfinite(rates) & (rates > 0)
    words = np.array(_words(frame, "outcome"), dtype=np.str_)
    ok = (words == "ok") | ((words == "") & known)
    oom = (words == "oom") | (tables.numbers(frame, "oom") == 1)
    return np.where(ok & known, rates, np.nan), oom & ~ok, known | ~ok


def _words(frame: pd.DataFrame, column: str) -> list[str]:
    """A column as text, empty where a cell or the column is missing; numbers that name something have no point."""
    if column not in frame:
        return [""] * len(frame)
    whole = (int(v) if isinstance(v, float) and v.is_integer() else v for v in frame[column])
    return ["" if pd.isna(value) else str(value).strip() for value in whole]


# ---------------------------------------------------------------- output


def as_json(made: Replay | serving_replay.ServingReplay) -> Mapping[str, Any]:
    """The whole result for programs."""
    if isinstance(made, serving_replay.ServingReplay):
        return serving_replay.as_json(made)
    return {
        "grids": [
            {
                "grid_id": g.grid_id,
                "dataset": g.dataset,
                "strategy": g.strategy,
                "rows": g.rows,
                "runs_to_2pct": _number(g.runs_to_2pct),
                "regret": {str(k): v for k, v in g.regret.items()},
                "failed_runs": _number(g.failed_runs),
                "runs_to_stop": _number(g.runs_to_stop),
                "failed_to_stop": _number(g.failed_to_stop),
                "final_regret": g.final_regret,
            }
            for g in made.grids
        ],
        "summary": {
            "strategy": made.strategy,
            "grids": len(made.grids),
            "unpredicted_rows": made.unpredicted_rows,
            "skipped": {
                "too_few_measured": made.skipped_too_few_measured,
                "no_variation": made.skipped_no_variation,
            },
            "datasets": [
                {
                    "dataset": s.dataset,
                    "primary": s.primary,
                    "grids": s.grids,
                    "rows": s.rows,
                    "runs_to_2pct": {"median": _number(s.runs_to_2pct_median), "p90": _number(s.runs_to_2pct_p90)},
                    "regret": {str(k): v for k, v in s.regret.items()},
                    "failed_share": s.failed_share,
                    "stopped": s.stopped
                    and {
                        "runs": {"median": _number(s.stopped.runs_median), "p90": _number(s.stopped.runs_p90)},
                        "failed_share": s.stopped.failed_share,
                        "within_1pct_share": s.stopped.good_share,
                    },
                }
                for s in made.summary
            ],
        },
    }


def _number(value: float | None) -> float | None:
    """Whole numbers without a point."""
    return int(value) if value is not None and value.is_integer() else value


def print_replay(made: Replay | serving_replay.ServingReplay, console: Console, *, each_grid: bool = False) -> None:
    """The summary in 80 columns, and before it every grid where that is asked for."""
    if isinstance(made, serving_replay.ServingReplay):
        serving_replay.print_replay(made, console, each_grid=each_grid)
        return
    if each_grid and made.grids:
        console.print(_grid_table(made))
        console.print()
    if made.grids:
        console.print(_summary_table(made))
        console.print(
            f"runs: until a layout within {TOLERANCE:.0%} of the best was tried\n"
            "failed: how many of those runs failed\n"
            "@n: how far the best layout after n runs is short of the best of all",
            style="dim",
        )
        if any(s.stopped for s in made.summary):
            console.print()
            console.print(_stop_table(made))
            console.print(
                "runs: until it stopped\n"
                "failed: how many of those runs failed\n"
                f"good: in how many grids it had a layout within {FINAL_TOLERANCE:.0%} of the best by then",
                style="dim",
            )
    else:
        console.print("No grid was played.")
    if made.unpredicted_rows:
        console.print(f"{made.unpredicted_rows} rows could not be predicted and came last.")
    skipped = made.skipped_too_few_measured + made.skipped_no_variation
    if skipped:
        console.print(
            f"{skipped} grids skipped: {made.skipped_too_few_measured} with fewer than {MIN_MEASURED} measured runs,"
            f" {made.skipped_no_variation} without variation.",
            soft_wrap=True,
        )


def _summary_table(made: Replay) -> Table:
    table = Table(title=f"{made.strategy}, {len(made.grids)} recorded grids", title_justify="left", box=None)
    table.add_column("dataset", overflow="fold")
    table.add_column("use")
    for heading in ("grids", "median runs", "90 % runs", *(f"@{k}" for k in SUMMARY_CHECKPOINTS), "failed"):
        table.add_column(heading, justify="right")
    for s in made.summary:
        table.add_row(
            escape(s.dataset) or "–",
            "primary" if s.primary else "other",
            str(s.grids),
            _shown(s.runs_to_2pct_median),
            _shown(s.runs_to_2pct_p90),
            *(f"{s.regret[k]:.1%}" for k in SUMMARY_CHECKPOINTS),
            f"{s.failed_share:.0%}",
        )
    return table


def _stop_table(made: Replay) -> Table:
    table = Table(title=f"Where {made.strategy} stopped", title_justify="left", box=None)
    table.add_column("dataset", overflow="fold")
    table.add_column("use")
    for heading in ("grids", "median runs", "90 % runs", "failed", "good"):
        table.add_column(heading, justify="right")
    for s in made.summary:
        if s.stopped is not None:
            table.add_row(
                escape(s.dataset) or "–",
                "primary" if s.primary else "other",
                str(s.grids),
                _shown(s.stopped.runs_median),
                _shown(s.stopped.runs_p90),
                f"{s.stopped.failed_share:.0%}",
                f"{s.stopped.good_share:.0%}",
            )
    return table


def _grid_table(made: Replay) -> Table:
    stops = any(g.runs_to_stop is not None for g in made.grids)
    table = Table(title=f"{made.strategy}, grid by grid", title_justify="left", box=None)
    table.add_column("grid", overflow="fold")
    for heading in ("rows", "runs", "failed", *(f"@{k}" for k in CHECKPOINTS), *(("stop", "@stop") if stops else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for g in made.grids:
        final = "–" if g.final_regret is None else f"{g.final_regret:.1%}"
        table.add_row(
            escape(g.grid_id),
            str(g.rows),
            _shown(g.runs_to_2pct),
            _shown(g.failed_runs),
            *(f"{g.regret[k]:.1%}" for k in CHECKPOINTS),
            *((_shown(g.runs_to_stop), final) if stops else ()),
        )
    return table


def _shown(runs: float | None) -> str:
    return "–" if runs is None else f"{runs:.4g}"
