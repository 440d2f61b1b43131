"""How far predictions of serving are off on published points, series by series.

    python -m tests.benchmarks.serving_errors ../shared/truth/inference.csv

Median absolute relative errors of the latency, each of points that the fit had not seen, pooled over the splits:

shipped  as hptool ships its engines, whose constants were fitted to these points too
half     half of each series is measured (`--calibrate`), the other half predicted
anew     the same, had the engines constants that nobody knows (those of `other`): fitted to no point before
eight    as anew, after eight measured points of an engine in a series and nothing else
new      the same, with nothing known of how it runs either: a name that no file has

And by series and GPU: after all points of the series on other GPUs, and eight on this one.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hptool import files, serving_forecast, tables
from hptool.facts import Engine
from hptool.predict.inference_case import constants_of
from hptool.predict.parts import Column
from hptool.serving_forecast import Key
from hptool.serving_tables import REQUIRED, engine_of

SPLITS = 6
RUNS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Relative errors of the latencies of one series."""

    shipped: Column
    half: Column
    anew: Column
    eight: Column
    new: Column

    def medians(self) -> dict[str, float]:
        """Of their absolute values."""
        return {name: float(np.median(np.abs(getattr(self, name)))) for name in self.__dataclass_fields__}


def errors_of(frame: pd.DataFrame, splits: int = SPLITS) -> Mapping[str, Errors]:
    """By series; of those that have enough points."""
    found: dict[str, dict[str, list[Column]]] = defaultdict(lambda: defaultdict(list))
    unknown = frame.assign(engine=["new " + str(name) for name in frame.engine])
    _note(found, "shipped", frame, {})
    for seed in range(splits):
        chance = np.random.default_rng(seed)
        half = chance.random(len(frame)) < 1 / 2
        _note(found, "half", frame[~half], serving_forecast.learn(frame[half]))
        _note(found, "anew", frame[~half], serving_forecast.learn(frame[half], shipped=_blank()))
        eight = _eight(frame, chance)
        _note(found, "eight", frame[~eight], _each_series(frame[eight]))
        _note(found, "new", unknown[~eight], serving_forecast.learn(unknown[eight]))
    parts = Errors.__dataclass_fields__
    return {
        name: Errors(**{part: np.concatenate(errors[part]) for part in parts})
        for name, errors in sorted(found.items())
        if all(any(len(some) for some in errors[part]) for part in parts)
    }


def new_gpus(frame: pd.DataFrame, splits: int = SPLITS) -> Mapping[tuple[str, str], float]:
    """Median errors of the latencies on each GPU of a series that has several, after eight points on it."""
    found: dict[tuple[str, str], list[Column]] = defaultdict(list)
    for seed in range(splits):
        chance = np.random.default_rng(seed)
        for series, rows in frame.groupby("series"):
            for gpu in rows.gpu.unique():
                is_own = (rows.gpu == gpu).to_numpy()
                if is_own.all() or is_own.sum() < 2 * RUNS:
                    continue
                measured = ~is_own
                measured[is_own] = _eight(rows[is_own], chance)
                found[str(series), str(gpu)].append(_errors(rows[~measured], serving_forecast.learn(rows[measured])))
    return {key: float(np.median(np.abs(np.concatenate(several)))) for key, several in found.items()}


def _errors(frame: pd.DataFrame, engines: Mapping[Key, Engine]) -> Column:
    expected = serving_forecast.forecast(frame, engines)
    error = expected.latency_ms / serving_forecast.measured_latency_ms(frame, expected) - 1
    return error[np.isfinite(error)]


def _eight(frame: pd.DataFrame, chance: np.random.Generator) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Eight rows, drawn by chance, of each engine in each series."""
    chosen = np.zeros(len(frame), dtype=np.bool_)
    names = [engine_of(str(name)).name for name in frame.engine]
    for places in frame.groupby([frame.series.to_numpy(), np.array(names)]).indices.values():
        chosen[chance.permutation(places)[:RUNS]] = True
    return chosen


def _blank() -> Mapping[str, Engine]:
    """The engines, which run as they do, with constants that nobody knows: those of `other`."""
    nothing: Any = constants_of(files.read_engine("other"))
    return {name: replace(engine, **nothing, fitted=False) for name, engine in files.read_engines().items()}


def _each_series(frame: pd.DataFrame) -> Mapping[Key, Engine]:
    """What the rows of a series alone teach about the engines in it."""
    engines: dict[Key, Engine] = {}
    for series in frame.series.unique():
        learned = serving_forecast.learn(frame[frame.series == series], shipped=_blank())
        engines |= {(key[0], str(series)): engine for key, engine in learned.items() if len(key) == 1}
    return engines


def _note(
    found: dict[str, dict[str, list[Column]]], part: str, frame: pd.DataFrame, engines: Mapping[Key, Engine]
) -> None:
    expected = serving_forecast.forecast(frame, engines)
    error = expected.latency_ms / serving_forecast.measured_latency_ms(frame, expected) - 1
    for name in set(expected.series):
        own = error[[series == name for series in expected.series]]
        found[name][part].append(own[np.isfinite(own)])


def main(path: Path) -> None:
    """Print the errors of every series."""
    frame = tables.read_table(path, REQUIRED)
    start = time.perf_counter()
    print(f"{'':18s}{'points':>8s}" + "".join(f"{part:>9s}" for part in Errors.__dataclass_fields__))
    for name, errors in errors_of(frame).items():
        print(f"{name:18s}{len(errors.shipped):8d}" + "".join(f"{value:9.1%}" for value in errors.medians().values()))
    print("\neight points on another GPU:")
    for (series, gpu), error in new_gpus(frame).items():
        print(f"  {series} on {gpu}: {error:.1%}")
    print("\nwithout calibration:")
    for row in serving_forecast.accuracy(frame, serving_forecast.forecast(frame)):
        foreseen = "" if row.oom_foreseen is None else f", {row.oom_foreseen:.0%} of {row.oom_rows} OOMs foreseen"
        others = {"TTFT": row.ttft_median_error, "TPOT": row.tpot_median_error, "memory": row.memory_median_error}
        told = "".join(f", {what} {error:.1%}" for what, error in others.items() if error is not None)
        print(
            f"  {row.name}: bias {row.bias or 0:+.1%}{told}{foreseen}, {row.oom_false or 0:.0%} of the others called so"
        )
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
