"""Predictions for tables of published runs: one a row, or the reason why there is none; and how good they are."""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table as TextTable
from rich.text import Text

from hptool import tables
from hptool.candidates import BoolColumn, IntColumn, Recompute
from hptool.predict import BLOCK_ROWS, Predictions, conclude, predict
from hptool.predict.calibration import (
    MEMORY_FACTORS,
    STEP_TIME_FACTORS,
    Calibration,
    memory_shares,
    step_time_shares,
    stretched_memory,
    stretched_step_time,
)
from hptool.predict.memory import stage_memory
from hptool.predict.parallel import Table
from hptool.predict.parts import Column, join, take
from hptool.predict.setting import Setting
from hptool.predict.step_time import step_time_bounds
from hptool.units import TERA

T = TypeVar("T")

#: A layout that fits with a higher probability is called one that fits.
EVEN = 0.5

#: Lines of a printed table, the JSON having all of it, and characters of a name at least.
_MOST_LINES = 1000
_NARROWEST = 12

#: A relative error from which on its power of ten is enough.
_ABSURD = 1000

#: Seconds after which a long forecast says how far it is.
SAY_EVERY_S = 2.0

#: Rows of a table that are resolved at once: a row that leaves its layout open stands for some hundred layouts.
_BLOCK = 4096

#: What a grid shares with others on the same hardware and software, for its own calibration: most of it.
_GRID_DOUBT = 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecast:
    """Predictions of the rows of a table that can be predicted.

    Entry i of `predictions` stands for the row number `row[i]` of the table; `rejection` has an entry for every row,
    empty where the row is predicted. `memory_gib` is comparable with what the row says was measured (`mem_kind`):
    what tensors take on the fullest rank where it does not say.
    """

    predictions: Predictions
    setting: Setting
    memory_gib: Column
    row: IntColumn
    stack: Sequence[str]
    rejection: Sequence[str]

    def columns(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The predicted columns, a row for each of the table; rows without a prediction have a `rejection`."""
        best_s, worst_s = step_time_bounds(Table.of(self.predictions.layouts, self.setting))
        columns = self.predictions.columns() | {
            "predicted_memory_gib": self.memory_gib,
            "predicted_device_memory_gib": self.predictions.memory_gib,
            "predicted_step_time_optimistic_s": np.minimum(best_s, self.predictions.step_time_s),
            "predicted_step_time_pessimistic_s": np.maximum(worst_s, self.predictions.step_time_s),
        }
        known = np.zeros(len(frame), dtype=np.bool_)
        known[self.row] = True
        spread: dict[str, Any] = {"rejection": list(self.rejection)}
        for name, column in columns.items():
            spread[name] = np.full(len(frame), np.nan)
            spread[name][self.row] = column
        layouts = self.predictions.layouts
        for axis in ("tp", "pp", "vpp", "cp", "ep", "mbs"):
            sizes = np.ones(len(frame), dtype=np.int64)
            sizes[self.row] = getattr(layouts, axis)
            spread[f"predicted_{axis}"] = pd.arrays.IntegerArray(sizes, ~known)
        modes = zip(layouts.recompute.tolist(), layouts.recompute_num_layers.tolist(), strict=True)
        labels = np.full(len(frame), None, dtype=np.object_)
        labels[self.row] = [_label(mode, count) for mode, count in modes]
        spread["predicted_recompute"] = labels
        return pd.DataFrame(spread, index=frame.index)

    def table(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The table with the predicted columns beside its own, in the place of any of the same name."""
        predicted = self.columns(frame)
        return pd.concat([frame.drop(columns=[c for c in predicted if c in frame]), predicted], axis=1)


@functools.cache
def _label(mode: int, count: int) -> str:
    return Recompute(mode).label(count)


def forecast(frame: pd.DataFrame, say: Callable[[str], None] = lambda _: None) -> Forecast:
    """What is expected of each row; `say` gets a line every two seconds.

    Where a row leaves the layout open, the fastest stands for it that is more likely to fit than not: who published
    it had made it run.
    """
    same, first = tables.alike(frame)
    pieces: list[Forecast] = []
    since = time.monotonic()
    for start in range(0, max(1, len(first)), _BLOCK):
        pieces.append(_forecast(frame.iloc[first[start : start + _BLOCK]], start))
        if time.monotonic() - since > SAY_EVERY_S:
            since = time.monotonic()
            say(f"{min(start + _BLOCK, len(first))} of {len(first)} different rows predicted")
    stack = [stack for piece in pieces for stack in piece.stack]
    rejection = [reason for piece in pieces for reason in piece.rejection]
    pieces.reverse()
    # Each piece is let go of before the next is copied: a setting of its own for each row takes some memory.
    different = join((pieces.pop() for _ in range(len(pieces))), len(stack), stack=stack, rejection=rejection)
    return different if len(first) == len(frame) else _spread(different, same)


def _spread(different: Forecast, same: IntColumn) -> Forecast:
    """The forecast of a table of which row i says the same as row `same[i]` of another."""
    entry = np.full(len(different.rejection), -1)
    entry[different.row] = np.arange(len(different.row))
    row = np.flatnonzero(entry[same] >= 0)
    chosen = entry[same[row]]
    return Forecast(
        predictions=different.predictions.select(chosen),
        setting=take(different.setting, chosen),
        memory_gib=different.memory_gib[chosen],
        row=row,
        stack=[different.stack[i] for i in chosen],
        rejection=[different.rejection[i] for i in same],
    )


def _forecast(frame: pd.DataFrame, start: int) -> Forecast:
    """The forecast of some rows of a table, the first of which has the number `start`."""
    rows = tables.resolve(frame)
    best = _best(rows)
    layouts, row, scenario = take(rows.layouts, best), rows.row[best], rows.scenario[best]
    setting = take(rows.setting, scenario)
    predictions = predict(layouts, setting)
    kinds = [kind.lower() for kind in tables.texts(frame.iloc[row], "mem_kind")]
    return Forecast(
        predictions=predictions,
        setting=setting,
        memory_gib=_comparable(predictions, setting, kinds),
        row=start + row,
        stack=[rows.stack[i] for i in scenario],
        rejection=rows.rejection,
    )


def _best(rows: tables.Rows) -> IntColumn:
    """The layout that stands for each row that has one."""
    if len(np.unique(rows.row)) == len(rows.row):
        return np.arange(len(rows.row))
    p_fit, rate = np.empty(len(rows.row)), np.empty(len(rows.row))
    for at in range(0, len(rows.row), BLOCK_ROWS):
        some = slice(at, at + BLOCK_ROWS)
        p = predict(take(rows.layouts, some), take(rows.setting, rows.scenario[some]))
        p_fit[some], rate[some] = p.p_fit, p.tokens_per_s_per_gpu
    fits = p_fit >= EVEN
    order = np.lexsort((-rate * np.where(fits, 1.0, p_fit), ~fits, rows.row))
    _, first = np.unique(rows.row[order], return_index=True)
    return np.asarray(order[first], dtype=np.int64)


def _comparable(predictions: Predictions, s: Setting, kinds: Sequence[str]) -> Column:
    """The memory that a tracker of this kind would report."""
    first, last = stage_memory(Table.of(predictions.layouts, s))
    memory = predictions.memory.allocated_gib
    for words, reported in (
        (("rank 0", "rank-0"), first.allocated_gib),
        (("last rank",), last.allocated_gib),
        (("nvidia-smi",), predictions.memory_gib),
    ):
        named = np.array([any(word in kind for word in words) for kind in kinds], dtype=np.bool_)
        memory = np.where(named, reported, memory)
    return memory


# ---------------------------------------------------------------- measurements


def measured_step_time_s(frame: pd.DataFrame, expected: Forecast) -> Column:
    """Measured seconds of each predicted row, NaN where there are none: of runs that ended well.

    From the first that a row has of `tps_gpu_norm`, `iter_s`, `tokens_per_s_per_gpu`, and TFLOPS of the model's own.
    """
    s = expected.setting
    step_time_s = _measured(frame, expected, "iter_s")
    for name in ("tps_gpu_norm", "tokens_per_s_per_gpu"):
        from_rate = s.gbs * s.tokens_per_sequence / s.gpus / _measured(frame, expected, name)
        step_time_s = np.where(np.isfinite(from_rate) & (name == "tps_gpu_norm"), from_rate, step_time_s)
        step_time_s = np.where(np.isfinite(step_time_s), step_time_s, from_rate)
    own = np.array([kind == "model" for kind in tables.texts(frame, "tflops_kind")], dtype=np.bool_)[expected.row]
    tflops = _measured(frame, expected, "tflops_per_gpu")
    from_tflops = s.gbs * s.model_flops_per_sequence / TERA / s.gpus / np.where(own, tflops, np.nan)
    return np.where(np.isfinite(step_time_s), step_time_s, from_tflops)


def measured_memory_gib(frame: pd.DataFrame, expected: Forecast) -> Column:
    """Measured GiB of each predicted row, NaN where there are none."""
    return _measured(frame, expected, "mem_gb")


def _measured(frame: pd.DataFrame, expected: Forecast, name: str) -> Column:
    """A column's figures above 0 of the predicted rows whose runs ended well, NaN elsewhere."""
    cells = tables.numbers(frame, name)[expected.row]
    ended_well = np.array([outcome in ("ok", "") for outcome in tables.texts(frame, "outcome")], dtype=np.bool_)
    return np.where(ended_well[expected.row] & (cells > 0) & np.isfinite(cells), cells, np.nan)


# ---------------------------------------------------------------- calibration


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learned:
    """What measurements taught of step time and memory: for each stack, and for each grid on it."""

    step_time: Mapping[tuple[str, str], Calibration]
    memory: Mapping[tuple[str, str], Calibration]


def learn(frame: pd.DataFrame, say: Callable[[str], None] = lambda _: None) -> Learned:
    """Calibrations from a table of measured runs: one for each stack, and from it one for each grid."""
    expected = forecast(frame, say)
    grids = _grids(frame, expected)
    step_time_s, memory_gib = measured_step_time_s(frame, expected), measured_memory_gib(frame, expected)
    shares = step_time_shares(expected.predictions.step_time)
    memory = memory_shares(expected.predictions.memory, allocated=True)
    # A rank that is not the fullest takes less of everything.
    memory = memory * (expected.memory_gib / memory.sum(axis=1))[:, None]
    return Learned(
        step_time=_learn(
            expected,
            grids,
            shares=shares,
            measured=step_time_s,
            factors=STEP_TIME_FACTORS,
            error=expected.setting.step_time_error,
        ),
        memory=_learn(
            expected,
            grids,
            shares=memory,
            measured=memory_gib,
            factors=MEMORY_FACTORS,
            error=expected.setting.memory_error,
        ),
    )


def _learn(
    expected: Forecast,
    grids: Sequence[str],
    *,
    shares: Column,
    measured: Column,
    factors: Mapping[str, tuple[tuple[str, ...], float]],
    error: Column,
) -> Mapping[tuple[str, str], Calibration]:
    known = np.flatnonzero(np.isfinite(measured) & np.isfinite(shares).all(axis=1))
    calibrations: dict[tuple[str, str], Calibration] = {}
    for stack, among in _members([expected.stack[i] for i in known.tolist()]).items():
        of_stack = known[among]
        fitted = bool(expected.setting.fitted[of_stack[0]])
        prior = Calibration.prior(factors, float(error[of_stack[0]]), fitted=fitted)
        learned = prior.updated(shares[of_stack], measured[of_stack])
        calibrations[stack, ""] = learned
        for grid, inside in _members([grids[i] for i in of_stack.tolist()]).items():
            of_grid = of_stack[inside]
            if grid and len(of_grid) < len(of_stack):
                calibrations[stack, grid] = learned.widened(_GRID_DOUBT).updated(shares[of_grid], measured[of_grid])
    return calibrations


def _members(names: Sequence[T]) -> Mapping[T, IntColumn]:
    """Where each name is, in the order of their first places."""
    members: dict[T, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    return {name: np.array(places, dtype=np.int64) for name, places in members.items()}


def _grids(frame: pd.DataFrame, expected: Forecast) -> Sequence[str]:
    names = tables.texts(frame, "grid_id")
    return [names[i] for i in expected.row]


def calibrated(frame: pd.DataFrame, expected: Forecast, learned: Learned) -> Forecast:
    """The forecast of `frame` after what was learned: of its grid, or else of its stack; the rest stays."""
    known = {*learned.step_time, *learned.memory}
    keys = [
        (stack, grid if (stack, grid) in known else "")
        for stack, grid in zip(expected.stack, _grids(frame, expected), strict=True)
    ]
    pieces, order = [], []
    memory_gib = expected.memory_gib.copy()
    for key, index in _members(keys).items():
        own = expected.predictions.select(index)
        step_time = learned.step_time.get(key) or learned.step_time.get((key[0], ""))
        memory = learned.memory.get(key) or learned.memory.get((key[0], ""))
        setting = take(expected.setting, index)
        step_time_error, memory_error = own.step_time_error, setting.memory_error
        if step_time is not None:
            step_time_error = step_time.error(step_time_shares(own.step_time))
            own = replace(own, step_time=stretched_step_time(own.step_time, step_time))
        if memory is not None:
            memory_error = memory.error(memory_shares(own.memory, allocated=False))
            before = own.memory.allocated_gib
            own = replace(own, memory=stretched_memory(own.memory, memory))
            memory_gib[index] *= own.memory.allocated_gib / before
        setting = replace(setting, step_time_error=step_time_error, memory_error=memory_error)
        pieces.append(conclude(own.layouts, setting, memory=own.memory, step_time=own.step_time))
        order.append(index)
    if not pieces:
        return expected
    back = np.argsort(np.concatenate(order))
    return replace(expected, predictions=join(pieces, len(keys)).select(back), memory_gib=memory_gib)


# ---------------------------------------------------------------- how good it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Predicted against measured over some rows; None where nothing was measured. Errors are relative.

    `bias` is the median of predicted over measured throughput, less one; `covered` the share of measured step times
    inside their 80 % interval; `oom_foreseen` and `oom_false` are the shares of the runs that went out of memory,
    and of those that did not, with a `p_fit` below one half.
    """

    name: str
    rows: int
    measured: int
    median_error: float | None
    p90_error: float | None
    bias: float | None
    covered: float | None
    memory_measured: int
    memory_median_error: float | None
    oom_rows: int
    oom_foreseen: float | None
    oom_false: float | None


def accuracy(frame: pd.DataFrame, expected: Forecast, by: str) -> list[Accuracy]:
    """Errors over the rows of each value of the column `by`; empty where nothing was measured."""
    p = expected.predictions
    low_s, high_s = p.step_time_interval_s
    step_time_s, memory_gib = measured_step_time_s(frame, expected), measured_memory_gib(frame, expected)
    rate, memory = step_time_s / p.step_time_s - 1, expected.memory_gib / memory_gib - 1
    timed, sized = np.isfinite(step_time_s), np.isfinite(memory_gib)
    oom = tables.numbers(frame, "oom")[expected.row] == 1
    words = tables.texts(frame, by)
    members = _members([words[i] for i in expected.row])
    found = []
    for name in sorted(members):
        own = members[name]
        ran, filled, failed = own[timed[own]], own[sized[own]], own[oom[own]]
        if not (len(ran) or len(filled) or len(failed)) or (by == "grid_id" and not name):
            continue
        found.append(
            Accuracy(
                name=name,
                rows=len(own),
                measured=len(ran),
                median_error=_figure(np.abs(rate[ran]), 50),
                p90_error=_figure(np.abs(rate[ran]), 90),
                bias=_figure(rate[ran], 50),
                covered=_share((step_time_s[ran] >= low_s[ran]) & (step_time_s[ran] <= high_s[ran])),
                memory_measured=len(filled),
                memory_median_error=_figure(np.abs(memory[filled]), 50),
                oom_rows=len(failed),
                oom_foreseen=_share(p.p_fit[failed] < EVEN),
                oom_false=_share(p.p_fit[ran] < EVEN) if len(failed) else None,
            )
        )
    return found


def _figure(values: Column, percentile: float) -> float | None:
    """As `np.percentile`, which takes ten times as long for the few runs of a grid."""
    if not len(values):
        return None
    ordered = np.sort(values)
    at = (len(values) - 1) * percentile / 100
    below, above = ordered[math.floor(at)], ordered[math.ceil(at)]
    return float(below + (above - below) * (at % 1))


def _share(conditions: BoolColumn) -> float | None:
    return float(conditions.mean()) if len(conditions) else None


def print_accuracy(title: str, rows: Sequence[Accuracy], console: Console) -> None:
    """The errors in 80 columns, or as many as the console has: a line each, long names shortened in the middle."""
    table = TextTable(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    headings = {"runs": 4, "median": 6, "p90": 5, "bias": 6, "in 80%": 6, "memory": 6, "OOM": 5, "false": 5}
    for heading, width in headings.items():
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    width = max(_NARROWEST, console.width - sum(headings.values()) - len(headings) - 1)
    shown = rows[:_MOST_LINES]
    for name, row in zip(_shortened([row.name or "all" for row in shown], width), shown, strict=True):
        table.add_row(
            Text(name),
            str(row.measured or row.memory_measured or row.oom_rows),
            _percent(row.median_error),
            _percent(row.p90_error),
            _percent(row.bias, sign=True),
            _percent(row.covered),
            _percent(row.memory_median_error),
            _percent(row.oom_foreseen),
            _percent(row.oom_false),
        )
    console.print(table)
    if len(rows) > _MOST_LINES:
        console.print(f"and {len(rows) - _MOST_LINES} more")


def _shortened(names: Sequence[str], width: int) -> Sequence[str]:
    """In one line of `width` characters: long ones without a part near their middle that leaves them distinct."""
    names = ["".join(c if c.isprintable() else " " for c in name) for name in names]
    heads = sorted(range(1, width - 1), key=lambda head: abs(2 * head - width))
    short = [[n if len(n) <= width else f"{n[:h]}…{n[len(n) - width + h + 1 :]}" for n in names] for h in heads]
    times = [Counter(several) for several in short]
    return [
        next((several[i] for several, n in zip(short, times, strict=True) if n[several[i]] == 1), short[0][i])
        for i in range(len(names))
    ]


def _percent(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    digits = ".1f" if abs(value) < 1 else ".0f" if abs(value) < _ABSURD else ".0e"
    return f"{100 * value:{'+' if sign else ''}{digits}}%"
