"""Predictions for tables of served points, or why there are none; what measured rows teach; how good they are.

What is measured is read by `learn` and `accuracy` alone, and no row is predicted from its own.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hptool import serving_tables, tables
from hptool.candidates import BoolColumn, IntColumn
from hptool.facts import Engine
from hptool.predict import INTERVAL_DEVIATIONS
from hptool.predict.inference import Served, calibrate_engine, predict_serving
from hptool.predict.inference_case import constants_of
from hptool.predict.parts import Column
from hptool.serving_tables import Scenario
from hptool.units import GB, GIB, MILLI

T = TypeVar("T", bound=Hashable)

#: A point that can run with a higher probability is called one that can.
EVEN = 0.5

#: How much of the doubt about an engine is left for one series of measurements of it (another version, another
#: benchmark, another host), and for one GPU in that: constants of an engine differ most between benchmarks of it.
_SERIES_DOUBT = 1.0
_GPU_DOUBT = 0.3

#: Lines of a printed table, the JSON having all of it.
_MOST_LINES = 200

#: The predicted columns that stand in a table.
COLUMNS = (
    *("predicted_latency_ms", "predicted_ttft_ms", "predicted_tpot_ms", "predicted_memory_gib", "predicted_p_fit"),
    *("predicted_tokens_per_s", "predicted_latency_error", "predicted_batch", "rejection"),
)

#: Engine, series and GPU; or the first, or the first two of them.
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingForecast:
    """Predictions of the rows of a table that can be predicted.

    Entry i of the columns stands for the row number `rows.row[i]` of the table.
    """

    rows: serving_tables.ServedRows
    series: Sequence[str]
    latency_ms: Column
    ttft_ms: Column
    tpot_ms: Column
    memory_gib: Column
    p_fit: Column
    latency_error: Column

    @property
    def tokens_per_s(self) -> Column:
        """Tokens of the outputs in a second, of all requests."""
        return np.asarray(self.rows.points.batch * self.rows.points.output_len / self.latency_ms / MILLI)

    def columns(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The predicted columns, a row for each of the table; rows without a prediction have a `rejection`."""
        known = {name: getattr(self, name.removeprefix("predicted_"), None) for name in COLUMNS}
        known["predicted_batch"] = self.rows.points.batch
        found: dict[str, object] = {}
        for name, column in known.items():
            if column is not None:
                whole = np.full(len(frame), np.nan)
                whole[self.rows.row] = column
                found[name] = whole
        return pd.DataFrame({**found, "rejection": list(self.rows.rejection)}, index=frame.index)

    def key(self, i: int) -> Key:
        """What calibrations of entry `i` are learned for."""
        scenario = self.rows.scenarios[int(self.rows.scenario[i])]
        return scenario.engine.name, self.series[i], scenario.cluster.gpu.name


def forecast(frame: pd.DataFrame, engines: Mapping[Key, Engine] | None = None) -> ServingForecast:
    """Predict every row that can be predicted, by what was learned of its engine, series and GPU."""
    rows = serving_tables.resolve(frame)
    words = tables.texts(frame, "series")
    found = ServingForecast(
        rows=rows,
        series=[words[i] for i in rows.row],
        **{name: np.empty(len(rows.row)) for name in _PREDICTED},
    )
    keys = [found.key(i) for i in range(len(rows.row))]
    for (scenario, key), members in _members(list(zip(rows.scenario.tolist(), keys, strict=True))).items():
        engine = _learned(engines or {}, key) or rows.scenarios[scenario].engine
        own = rows.scenarios[scenario]
        p = predict_serving(rows.points.select(members), own.shape, own.cluster, engine)
        for name in _PREDICTED:
            getattr(found, name)[members] = getattr(p, name)
    return found


_PREDICTED = ("latency_ms", "ttft_ms", "tpot_ms", "memory_gib", "p_fit", "latency_error")


def _learned(engines: Mapping[Key, Engine], key: Key) -> Engine | None:
    """What is known of the nearest: of this GPU in this series, of the series, of the engine."""
    return next((engines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in engines), None)


def _members(names: Sequence[T]) -> Mapping[T, IntColumn]:
    """Where each name is, in the order of their first places."""
    places: dict[T, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    return {name: np.array(found, dtype=np.int64) for name, found in places.items()}


# ---------------------------------------------------------------- measurements


def measured_latency_ms(frame: pd.DataFrame, expected: ServingForecast) -> Column:
    """Measured milliseconds of each predicted row, from its latency or else its tokens a second; NaN without."""
    points = expected.rows.points
    latency_ms = _measured(frame, expected, "latency_ms")
    rate = _measured(frame, expected, "tokens_per_s")
    return np.where(np.isfinite(latency_ms), latency_ms, points.batch * points.output_len / rate / MILLI)


def _measured(frame: pd.DataFrame, expected: ServingForecast, name: str) -> Column:
    """A column's figures above 0 of the predicted rows, NaN elsewhere."""
    cells = tables.numbers(frame, name)[expected.rows.row]
    return np.where((cells > 0) & np.isfinite(cells), cells, np.nan)


def _ran_out(frame: pd.DataFrame, expected: ServingForecast) -> BoolColumn:
    """Rows that are said to have run out of memory."""
    words = tables.texts(frame, "notes")
    said = np.array(["OOM" in text.split() for text in words], dtype=np.bool_)
    return np.asarray((said | (tables.numbers(frame, "oom") == 1))[expected.rows.row])


# ---------------------------------------------------------------- calibration


def learn(
    frame: pd.DataFrame, say: Callable[[str], None] = lambda _: None, shipped: Mapping[str, Engine] | None = None
) -> Mapping[Key, Engine]:
    """Engines as a table of measured rows has them: each one, then each in its series, then on each GPU of that.

    Every next one starts from the one before it, so that what is measured once counts for all that are alike; the first
    from what `shipped` has by its name, or else from its file.
    """
    expected = forecast(frame)
    times, known = _known(frame, expected)
    if len(known) < len(frame):
        say(f"{len(frame) - len(known)} rows have nothing to learn from")
    keys = [expected.key(i) for i in known.tolist()]
    engines: dict[Key, Engine] = {}
    for length, doubt in ((1, 1.0), (2, _SERIES_DOUBT), (3, _GPU_DOUBT)):
        for key, places in _members([key[:length] for key in keys]).items():
            among = sum(other[: length - 1] == key[:-1] for other in keys)
            if length > 1 and (len(places) == among or not key[-1]):
                continue  # nothing but these: known already
            first = (shipped or {}).get(key[0]) or _shipped(expected, int(known[places[0]]))
            prior = _learned(engines, key) or first
            engines[key] = calibrate_engine(prior, _served(expected, times, known[places]), doubt=doubt)
    return engines


def learn_engine(frame: pd.DataFrame, engine: Engine) -> Engine:
    """What the measured rows of a table teach of this engine, whatever engine they name."""
    expected = forecast(frame)
    times, known = _known(frame, expected)
    return calibrate_engine(engine, _served(expected, times, known))


def _known(frame: pd.DataFrame, expected: ServingForecast) -> tuple[Mapping[str, Column], IntColumn]:
    """Measured times of the predicted rows, and which of these rows have one."""
    times = {
        "latency_ms": measured_latency_ms(frame, expected),
        "ttft_ms": _measured(frame, expected, "ttft_ms"),
        "tpot_ms": _measured(frame, expected, "tpot_ms"),
    }
    return times, np.flatnonzero(np.any([np.isfinite(column) for column in times.values()], axis=0))


def _shipped(expected: ServingForecast, i: int) -> Engine:
    return expected.rows.scenarios[int(expected.rows.scenario[i])].engine


def _served(expected: ServingForecast, times: Mapping[str, Column], known: IntColumn) -> Sequence[Served]:
    served = []
    for scenario, places in _members(expected.rows.scenario[known].tolist()).items():
        index, own = known[places], expected.rows.scenarios[scenario]
        measured = {name: column[index] for name, column in times.items()}
        points = expected.rows.points.select(index)
        served.append(Served(points=points, shape=own.shape, cluster=own.cluster, **measured))
    return served


def factors(scenarios: Sequence[Scenario], engines: Mapping[Key, Engine]) -> Mapping[str, Mapping[str, float]]:
    """By how much what was learned of each engine, in each series, differs from its file, the largest first."""
    shipped = {scenario.engine.name: constants_of(scenario.engine) for scenario in scenarios}
    found = {}
    for key, engine in engines.items():
        base = shipped.get(key[0])
        if base is None:
            continue
        own = {name: value / base[name] for name, value in constants_of(engine).items() if base[name] > 0}
        moved = sorted(own, key=lambda name: -abs(np.log(own[name])))
        found[" ".join(word for word in key if word)] = {name: own[name] for name in moved}
    return found


# ---------------------------------------------------------------- how good it is


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingAccuracy:
    """Predicted against measured over some rows; None where nothing was measured. Errors are relative.

    `bias` is the median of predicted over measured latency, less one; `covered` the share of measured latencies inside
    their 80 % interval; `oom_foreseen` and `oom_false` are the shares of the rows that ran out of memory, and of those
    that were measured, with a `p_fit` below one half.
    """

    name: str
    rows: int
    measured: int
    median_error: float | None
    p90_error: float | None
    bias: float | None
    covered: float | None
    ttft_median_error: float | None
    tpot_median_error: float | None
    memory_median_error: float | None
    oom_rows: int
    oom_foreseen: float | None
    oom_false: float | None


def accuracy(frame: pd.DataFrame, expected: ServingForecast) -> list[ServingAccuracy]:
    """Errors over the rows of each series (of each engine, where there are none); empty where nothing was measured."""
    latency_ms, oom = measured_latency_ms(frame, expected), _ran_out(frame, expected)
    error = expected.latency_ms / latency_ms - 1
    inside = np.abs(np.log(expected.latency_ms / latency_ms)) <= INTERVAL_DEVIATIONS * expected.latency_error
    ttft = expected.ttft_ms / _measured(frame, expected, "ttft_ms") - 1
    tpot = expected.tpot_ms / _measured(frame, expected, "tpot_ms") - 1
    memory = expected.memory_gib / (_measured(frame, expected, "memory_gb") * GB / GIB) - 1
    names = [series or expected.key(i)[0] for i, series in enumerate(expected.series)]
    found = []
    for name, own in sorted(_members(names).items()):
        ran, failed = own[np.isfinite(error[own])], own[oom[own]]
        if not (len(ran) or len(failed) or np.any(np.isfinite([ttft[own], tpot[own], memory[own]]))):
            continue
        found.append(
            ServingAccuracy(
                name=name,
                rows=len(own),
                measured=len(ran),
                median_error=_percentile(np.abs(error[own]), 50),
                p90_error=_percentile(np.abs(error[own]), 90),
                bias=_percentile(error[own], 50),
                covered=float(inside[ran].mean()) if len(ran) else None,
                ttft_median_error=_percentile(np.abs(ttft[own]), 50),
                tpot_median_error=_percentile(np.abs(tpot[own]), 50),
                memory_median_error=_percentile(np.abs(memory[own]), 50),
                oom_rows=len(failed),
                oom_foreseen=float((expected.p_fit[failed] < EVEN).mean()) if len(failed) else None,
                oom_false=float((expected.p_fit[ran] < EVEN).mean()) if len(ran) else None,
            )
        )
    return found


def _percentile(values: Column, percent: float) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.percentile(known, percent)) if len(known) else None


#: Headings of the printed errors.
_HEADINGS = {
    "measured": "points",
    "median_error": "median",
    "p90_error": "p90",
    "bias": "bias",
    "covered": "in 80%",
    "ttft_median_error": "TTFT",
    "tpot_median_error": "TPOT",
    "oom_foreseen": "OOM",
    "oom_false": "false",
}

LEGEND = (
    "median, p90: of the error of the latency; bias: the median of predicted over measured, less one; in 80%: measured "
    "inside their interval; TTFT, TPOT: the median errors of the time to the first token and of each token after it; "
    "OOM, false: called unlikely to fit of those that ran out of memory, and of those that ran."
)


def print_accuracy(rows: Sequence[ServingAccuracy], console: Console) -> None:
    """The errors in 80 columns, a line each."""
    table = Table(title="Predicted against measured, by series", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True, overflow="ellipsis")
    for heading in _HEADINGS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows[:_MOST_LINES]:
        cells = [getattr(row, name) for name in _HEADINGS]
        table.add_row(Text(row.name), str(cells[0]), *(_percent(cell) for cell in cells[1:]))
    console.print(table)
    if len(rows) > _MOST_LINES:
        console.print(f"and {len(rows) - _MOST_LINES} more")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"
