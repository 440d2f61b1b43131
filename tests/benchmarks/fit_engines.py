"""Fit the constants of `cluster/engines/` to published points; print what would change, and the errors.

    python -m tests.benchmarks.fit_engines ../shared/truth/inference.csv [ENGINE ...]

Each engine is fitted on all rows whose `engine` is one of its aliases, from what `other` and `PRIORS` believe (with the
deviations of `inference_case.CONSTANTS`), so that a constant that no row tells of stays where nothing is known. What
decides on memory, and how an engine runs (static or in flight, paged or not), is written by hand.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hptool import files, serving_forecast, tables
from hptool.predict.inference_case import CONSTANTS, constants_of
from hptool.serving_tables import REQUIRED

#: What is known of an engine beside its rows: 2022's attention had no flash kernel for long prompts, and kernels that
#: were launched one by one from Python; Megatron-core's eager engine in CI runs deterministic kernels.
PRIORS: Mapping[str, Mapping[str, float]] = {
    "fastertransformer": {"attention_speed": 0.2, "hidden_passes": 20, "collective_hops": 3},
    "megatron-torch-2022": {
        "attention_speed": 0.2,
        "hidden_passes": 20,
        "collective_hops": 3,
        "host_layer_us": 800,
        "step_us": 1000,
        "request_ms": 60,
    },
    "tensorrt-llm-0.5": {"query_speed": 0.02},
    "tensorrt-llm-0.9": {"query_speed": 0.02},
    "tensorrt-llm": {"request_ms": 30},
    "megatron-core-eager": {"host_layer_us": 3300},
    "megatron-core-graphs": {"step_us": 3000, "request_ms": 2},
    "sglang": {"step_us": 2000, "request_ms": 50},
    "trtllm-serve": {"step_us": 2000, "request_ms": 50},
    "vllm": {"step_us": 2000, "request_ms": 50},
    "nim": {"request_ms": 30},
}


def main(path: Path, names: Sequence[str]) -> None:
    """Fit each engine and print its constants, those of its file, and its errors before and after."""
    frame = tables.read_table(path, REQUIRED)
    shipped, nothing = files.read_engines(), constants_of(files.read_engine("other"))
    expected = serving_forecast.forecast(frame)
    engines = np.array([expected.key(i)[0] for i in range(len(expected.rows.row))])
    for name in names or sorted(set(engines) & set(shipped) - {"other"}):
        rows = frame.iloc[expected.rows.row[engines == name]]
        known: dict[str, Any] = {**nothing, **PRIORS.get(name, {})}
        fitted = serving_forecast.learn_engine(rows, replace(shipped[name], **known, fitted=True))
        print(f"\n{name}: {len(rows)} rows, error {fitted.latency_error:.3f}")
        for constant in CONSTANTS:
            print(f"  {constant}: {getattr(fitted, constant):.3g}  # {getattr(shipped[name], constant):.3g}")
        for label, engine in (("shipped", shipped[name]), ("fitted", fitted)):
            for row in serving_forecast.accuracy(rows, serving_forecast.forecast(rows, {(name,): engine})):
                error, bias = row.median_error or 0.0, row.bias or 0.0
                print(f"  {label} {row.name}: {row.measured} points, {error:.1%}, bias {bias:+.1%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
