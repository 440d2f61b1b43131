"""Predictions for tables of published runs: one a row, or the reason why there is none; and how good they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table as TextTable

from hptool import tables
from hptool.candidates import IntColumn
from hptool.predict import Predictions, conclude, predict
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

#: A layout that fits with a higher probability is called one that fits.
EVEN = 0.5

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

    def table(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The table with the predicted columns beside its own; rows without a prediction have a `rejection`."""
        best_s, worst_s = step_time_bounds(Table.of(self.predictions.layouts, self.setting))
        columns = self.predictions.columns() | {
            "predicted_memory_gib": self.memory_gib,
            "predicted_device_memory_gib": self.predictions.memory_gib,
            "predicted_step_time_optimistic_s": np.minimum(best_s, self.predictions.step_time_s),
            "predicted_step_time_pessimistic_s": np.maximum(worst_s, self.predictions.step_time_s),
        }
        layouts = self.predictions.layouts
        columns |= {f"predicted_{axis}": getattr(layouts, axis) for axis in ("tp", "pp", "vpp", "cp", "ep", "mbs")}
        predicted = pd.DataFrame(columns, index=frame.index[self.row]).reindex(frame.index)
        predicted.insert(0, "rejection", list(self.rejection))
        return pd.concat([frame.drop(columns=[c for c in predicted if c in frame]), predicted], axis=1)


def forecast(frame: pd.DataFrame) -> Forecast:
    """What is expected of each row.

    Where a row leaves the layout open, the fastest stands for it that is more likely to fit than not: who published
    it had made it run.
    """
    rows = tables.resolve(frame)
    everything = predict(rows.layouts, rows.setting)
    fits = everything.p_fit >= EVEN
    worth = everything.tokens_per_s_per_gpu * np.where(fits, 1.0, everything.p_fit)
    order = np.lexsort((-worth, ~fits, rows.row))
    row, first = np.unique(rows.row[order], return_index=True)
    chosen = order[first]
    predictions, setting = everything.select(chosen), take(rows.setting, chosen)
    return Forecast(
        predictions=predictions,
        setting=setting,
        memory_gib=_comparable(predictions, setting, _kinds(frame, row)),
        row=row,
        stack=[rows.stack[i] for i in chosen],
        rejection=rows.rejection,
    )


def _kinds(frame: pd.DataFrame, row: IntColumn) -> Sequence[str]:
    if "mem_kind" not in frame:
        return [""] * len(row)
    return [str(kind).lower() for kind in frame.mem_kind.iloc[row].fillna("")]


def _comparable(predictions: Predictions, s: Setting, kinds: Sequence[str]) -> Column:
    """The memory that a tracker of this kind would report."""
    first, last = stage_memory(Table.of(predictions.layouts, s))
    memory = predictions.memory.allocated_gib.copy()
    on_device = predictions.memory_gib
    for i, kind in enumerate(kinds):
        if "nvidia-smi" in kind:
            memory[i] = on_device[i]
        elif "last rank" in kind:
            memory[i] = last.allocated_gib[i]
        elif "rank 0" in kind or "rank-0" in kind:
            memory[i] = first.allocated_gib[i]
    return memory


# ---------------------------------------------------------------- measurements


def measured_step_time_s(frame: pd.DataFrame, expected: Forecast) -> Column:
    """Measured seconds of each predicted row, NaN where there are none: of runs that ended well.

    From the first that a row has of `tps_gpu_norm`, `iter_s`, `tokens_per_s_per_gpu`, and TFLOPS of the model's own.
    """
    cells = frame.iloc[expected.row]

    def numbers(name: str) -> Column:
        return pd.to_numeric(cells.get(name, pd.Series(np.nan, cells.index)), errors="coerce").to_numpy(float)

    s = expected.setting
    step_time_s = numbers("iter_s")
    for name in ("tps_gpu_norm", "tokens_per_s_per_gpu"):
        rate = numbers(name)
        from_rate = s.gbs * s.tokens_per_sequence / s.gpus / np.where(rate > 0, rate, np.nan)
        step_time_s = np.where(np.isfinite(from_rate) & (name == "tps_gpu_norm"), from_rate, step_time_s)
        step_time_s = np.where(np.isfinite(step_time_s), step_time_s, from_rate)
    if "tflops_kind" in cells:
        tflops = np.where((cells.tflops_kind == "model").to_numpy(), numbers("tflops_per_gpu"), np.nan)
        from_tflops = s.gbs * s.model_flops_per_sequence / TERA / s.gpus / np.where(tflops > 0, tflops, np.nan)
        step_time_s = np.where(np.isfinite(step_time_s), step_time_s, from_tflops)
    if "outcome" in cells:
        step_time_s = np.where((cells.outcome == "ok").to_numpy(), step_time_s, np.nan)
    return np.where(step_time_s > 0, step_time_s, np.nan)


def measured_memory_gib(frame: pd.DataFrame, expected: Forecast) -> Column:
    """Measured GiB of each predicted row, NaN where there are none."""
    cells = frame.iloc[expected.row]
    memory = pd.to_numeric(cells.get("mem_gb", pd.Series(np.nan, cells.index)), errors="coerce").to_numpy(float)
    if "outcome" in cells:
        memory = np.where((cells.outcome == "ok").to_numpy(), memory, np.nan)
    return np.where(memory > 0, memory, np.nan)


# ---------------------------------------------------------------- calibration


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learned:
    """What measurements taught of step time and memory: for each stack, and for each grid on it."""

    step_time: Mapping[tuple[str, str], Calibration]
    memory: Mapping[tuple[str, str], Calibration]


def learn(frame: pd.DataFrame) -> Learned:
    """Calibrations from a table of measured runs: one for each stack, and from it one for each grid."""
    expected = forecast(frame)
    grids = _grids(frame, expected)
    step_time_s, memory_gib = measured_step_time_s(frame, expected), measured_memory_gib(frame, expected)
    shares = step_time_shares(expected.predictions.step_time)
    memory = memory_shares(expected.predictions.memory, allocated=True)
    # A rank that is not the fullest takes less of everything.
    memory = memory * (expected.memory_gib / memory.sum(axis=1))[:, None]
    return Learned(
        step_time=_learn(expected, grids, shares, step_time_s, STEP_TIME_FACTORS, expected.setting.step_time_error),
        memory=_learn(expected, grids, memory, memory_gib, MEMORY_FACTORS, expected.setting.memory_error),
    )


def _learn(  # noqa: PLR0913 (one for step time, one for memory)
    expected: Forecast,
    grids: Sequence[str],
    shares: Column,
    measured: Column,
    factors: Mapping[str, tuple[tuple[str, ...], float]],
    error: Column,
) -> Mapping[tuple[str, str], Calibration]:
    known = np.isfinite(measured) & np.isfinite(shares).all(axis=1)
    calibrations: dict[tuple[str, str], Calibration] = {}
    stacks, names = np.array(expected.stack), np.array(grids)
    for stack in dict.fromkeys(expected.stack):
        of_stack = known & (stacks == stack)
        if not of_stack.any():
            continue
        prior = Calibration.prior(factors, float(error[np.argmax(of_stack)]))
        learned = prior.updated(shares[of_stack], measured[of_stack])
        calibrations[stack, ""] = learned
        for grid in dict.fromkeys(names[of_stack]):
            of_grid = of_stack & (names == grid)
            if grid and not np.array_equal(of_grid, of_stack):
                calibrations[stack, grid] = learned.widened(_GRID_DOUBT).updated(shares[of_grid], measured[of_grid])
    return calibrations


def _grids(frame: pd.DataFrame, expected: Forecast) -> Sequence[str]:
    if "grid_id" not in frame:
        return [""] * len(expected.row)
    return [str(name) for name in frame.grid_id.iloc[expected.row].fillna("")]


def calibrated(frame: pd.DataFrame, expected: Forecast, learned: Learned) -> Forecast:
    """The forecast of `frame` after what was learned: of its grid, or else of its stack; the rest stays."""
    keys = list(zip(expected.stack, _grids(frame, expected), strict=True))
    pieces, order = [], []
    memory_gib = expected.memory_gib.copy()
    for key in dict.fromkeys(keys):
        index = np.array([i for i, k in enumerate(keys) if k == key])
        own = expected.predictions.select(index)
        time = learned.step_time.get(key) or learned.step_time.get((key[0], ""))
        memory = learned.memory.get(key) or learned.memory.get((key[0], ""))
        setting = take(expected.setting, index)
        step_time_error, memory_error = own.step_time_error, setting.memory_error
        if time is not None:
            step_time_error = time.error(step_time_shares(own.step_time))
            own = replace(own, step_time=stretched_step_time(own.step_time, time))
        if memory is not None:
            memory_error = memory.error(memory_shares(own.memory, allocated=False))
            before = own.memory.allocated_gib
            own = replace(own, memory=stretched_memory(own.memory, memory))
            memory_gib[index] *= own.memory.allocated_gib / before
        pieces.append(conclude(own.layouts, setting, own.memory, own.step_time, step_time_error, memory_error))
        order.append(index)
    if not pieces:
        return expected
    back = np.argsort(np.concatenate(order))
    return replace(expected, predictions=join(pieces).select(back), memory_gib=memory_gib)


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
    step_time_s = measured_step_time_s(frame, expected)
    memory_gib = measured_memory_gib(frame, expected)
    cells = frame.iloc[expected.row]
    p = expected.predictions
    rate = step_time_s / p.step_time_s - 1
    low_s, high_s = p.step_time_interval_s
    inside = (step_time_s >= low_s) & (step_time_s <= high_s)
    memory = expected.memory_gib / memory_gib - 1
    oom = pd.to_numeric(cells.get("oom", pd.Series(np.nan, cells.index)), errors="coerce").to_numpy(float) == 1
    ran = np.isfinite(step_time_s)
    groups = cells[by].fillna("").astype(str).to_numpy() if by in cells else np.full(len(cells), "")
    found = []
    for name in sorted({str(group) for group in groups}):
        own = groups == name
        timed, sized = own & ran, own & np.isfinite(memory)
        if not (timed | sized | (own & oom)).any() or (by == "grid_id" and not name):
            continue
        found.append(
            Accuracy(
                name=name,
                rows=int(own.sum()),
                measured=int(timed.sum()),
                median_error=_figure(np.abs(rate[timed]), 50),
                p90_error=_figure(np.abs(rate[timed]), 90),
                bias=_figure(rate[timed], 50),
                covered=float(inside[timed].mean()) if timed.any() else None,
                memory_measured=int(sized.sum()),
                memory_median_error=_figure(np.abs(memory[sized]), 50),
                oom_rows=int((own & oom).sum()),
                oom_foreseen=float((p.p_fit[own & oom] < EVEN).mean()) if (own & oom).any() else None,
                oom_false=float((p.p_fit[timed] < EVEN).mean()) if (own & oom).any() and timed.any() else None,
            )
        )
    return found


def _figure(values: Column, percentile: float) -> float | None:
    return float(np.percentile(values, percentile)) if len(values) else None


def print_accuracy(title: str, rows: Sequence[Accuracy], console: Console) -> None:
    """The errors in 80 columns."""
    table = TextTable(title=title, title_justify="left", box=None)
    table.add_column("", overflow="fold")
    for heading in ("runs", "median", "p90", "bias", "in 80 %", "memory", "OOM seen", "false"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name or "all",
            str(row.measured or row.memory_measured),
            _percent(row.median_error),
            _percent(row.p90_error),
            _percent(row.bias, sign=True),
            _percent(row.covered),
            _percent(row.memory_median_error),
            _percent(row.oom_foreseen),
            _percent(row.oom_false),
        )
    console.print(table)


def _percent(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    return f"{100 * value:{'+' if sign else ''}.{0 if abs(value) >= 1 else 1}f}%"
