"""How fast hptool's worker serves on one GPU: GPT-3 126M, 1.3B and 2.7B over batches, with CUDA graphs and without.

    python -m tests.benchmarks.gpu_serving --output results/gpu-serving

Each model is a run with graphs and one without, of random weights, by the worker's own supervisor. What they measured
is in `record.json`, and as `serving.csv` in the columns that `hptool predict` reads of served points.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hptool import files
from hptool.base_config import BaseConfig
from hptool.candidates import Layout
from hptool.measurement import Failure, FailureKind, ServingMeasurement
from hptool.serving_orders import PointOrder, ServingOrders
from hptool.units import GB, GIB
from tests.gpu import runs
from tests.gpu.command import Given, command
from tests.gpu.device import Device, one_gpu
from tests.gpu.models import LANDSCAPES, TINY_GPT2, Model, named, plan_of
from tests.gpu.record import Record

#: The table of all that was measured, in the stage's directory.
TABLE = "serving.csv"

#: What is served. 60:20 are the lengths of the published tables of this tool's predecessor, 512:64 a longer prompt.
MODELS = tuple(named(LANDSCAPES, name) for name in ("gpt3-126m", "gpt3-1.3b", "gpt3-2.7b"))
_LENGTHS = ((60, 20), (512, 64))
_BATCHES = (1, 8, 64)

#: What stands for it where the suite itself is tried.
TINY = (TINY_GPT2,)
_TINY_LENGTHS = ((8, 4),)
_TINY_BATCHES = (1, 2)

#: What a run takes at most: a fork, the device's context, weights, and about seven passes a point, of which a long one
#: without graphs takes a second and a half (64 tokens at 24 ms each).
_RUN_S = 75.0

_COLUMNS = (
    *("series", "model", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "gated", "vocab", "gpu", "engine"),
    *("tp", "pp", "precision", "cuda_graphs", "batch", "input_len", "output_len", "oom", "latency_ms"),
    *("latency_low_ms", "latency_high_ms", "latency_p95_ms", "latency_p99_ms", "ttft_ms", "tpot_ms", "tokens_per_s"),
    *("memory_gb", "repeats", "warmups", "is_steady", "notes"),
)


def key_of(model: Model, *, graphs: bool) -> str:
    """A run's name in the record."""
    return f"{model.name} {'graphs' if graphs else 'eager'}"


def measure(given: Given, record: Record) -> None:
    """Times what has not been timed yet."""
    runs.load(given.device.accelerator)
    for model in TINY if given.tiny else MODELS:
        for graphs in (False, True):
            key = key_of(model, graphs=graphs)
            if record.findings.get(key, {}).get("outcome") == "ok" or (graphs and given.device.kind == "cpu"):
                continue
            if not given.tiny and not given.clock.has(_RUN_S):
                record.leave(key)
                continue
            _serve(given, record, model, graphs=graphs)
            _tabulate(given, record)
    _tabulate(given, record)


def config_of(model: Model, device: Device) -> BaseConfig:
    """The model on one device."""
    config = plan_of(model, one_gpu(device)).config.with_layout(Layout())
    return replace(config, trainer=replace(config.trainer, num_nodes=1, devices=1))


def orders_of(*, graphs: bool, tiny: bool) -> ServingOrders:
    """The points of a run: for each pair of lengths all batches, the small ones first."""
    lengths, batches = (_TINY_LENGTHS, _TINY_BATCHES) if tiny else (_LENGTHS, _BATCHES)
    points = [PointOrder(batch=batch, input_len=i, output_len=o) for i, o in lengths for batch in batches]
    return ServingOrders(points=tuple(points), cuda_graphs=graphs)


def _serve(given: Given, record: Record, model: Model, *, graphs: bool) -> None:
    key = key_of(model, graphs=graphs)
    orders = orders_of(graphs=graphs, tiny=given.tiny)
    place = given.output / "runs" / f"{key.replace(' ', '-')}-{os.getpid()}"
    outcome = runs.serve(config_of(model, given.device), orders, place=place, limit_s=max(given.clock.left_s, 1.0))
    found = finding_of(outcome, orders)
    if found["outcome"] == FailureKind.TIMEOUT and not given.clock.has(1.0):
        record.leave(key)
        return
    record.find(key, found)
    if found["outcome"] != "ok":
        record.complain(f"{key}: {found['outcome']}: {found.get('message', '')}")
    elif graphs and not found["cuda_graphs"]:
        record.complain(f"{key}: CUDA graphs could not be recorded: {runs.last_lines(place / 'logs' / 'rank-0.log')}")


def finding_of(outcome: ServingMeasurement | Failure, orders: ServingOrders) -> dict[str, Any]:
    """What a run comes to, for the record: ok where each point was measured, or is out of memory with those beyond."""
    if isinstance(outcome, Failure):
        return {"outcome": outcome.kind.value, "message": outcome.message[:300]}
    told = len(outcome.points) + len(outcome.failures) + len(outcome.skipped)
    bad = [failure for failure in outcome.failures if failure.kind is not FailureKind.OOM]
    message = "; ".join(f"{failure.name}: {failure.kind}: {failure.message}" for failure in bad)
    whole = told == len(orders.points) and not bad
    return {
        "outcome": "ok" if whole else bad[0].kind.value if bad else FailureKind.TIMEOUT.value,
        "message": message[:300],
        "engine": outcome.engine,
        "cuda_graphs": outcome.cuda_graphs,
        "precision": outcome.precision,
        "kernels": dict(outcome.kernels),
        "asked": len(orders.points),
        "points": [asdict(point) for point in outcome.points],
        "out_of_memory": [failure.name for failure in outcome.failures if failure.kind is FailureKind.OOM],
        "skipped": list(outcome.skipped),
        "startup_s": outcome.startup_s,
    }


def speedup(findings: Mapping[str, Any], model: Model) -> float | None:
    """Of CUDA graphs at the first point, by its latency; None where one of the two was not measured."""
    eager, recorded = (findings.get(key_of(model, graphs=graphs), {}) for graphs in (False, True))
    if not eager.get("points") or not recorded.get("points") or not recorded["cuda_graphs"]:
        return None
    one, other = (found["points"][0]["latency_ms"]["p50"] for found in (eager, recorded))
    return float(one / other)


def _tabulate(given: Given, record: Record) -> None:
    """Writes all points of the record as a table, a row each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for model in TINY if given.tiny else MODELS:
        for graphs in (False, True):
            found = record.findings.get(key_of(model, graphs=graphs), {})
            writer.writerows(rows(found, model.name, config_of(model, given.device), given.device))
    files.write_text(given.output / TABLE, text.getvalue())


def rows(found: Mapping[str, Any], name: str, config: BaseConfig, device: Device) -> Iterable[dict[str, Any]]:
    """A run's points as rows of `_COLUMNS`."""
    if "points" not in found:
        return
    shape = config.shape
    common = {
        "series": f"hptool {device.slug}",
        "model": name,
        "hidden": shape.hidden_size,
        "layers": shape.num_layers,
        "heads": shape.num_attention_heads,
        "kv_heads": shape.num_query_groups,
        "head_dim": shape.kv_channels,
        "ffn": shape.ffn_hidden_size,
        "gated": int(shape.gated_mlp),
        "vocab": shape.vocab_size,
        "gpu": device.gpu,
        "engine": found["engine"],
        "tp": 1,
        "pp": 1,
        "precision": found["precision"],
        "cuda_graphs": int(found["cuda_graphs"]),
    }
    for point in found["points"]:
        latency = point["latency_ms"]
        yield common | {
            "batch": point["batch"],
            "input_len": point["input_len"],
            "output_len": point["output_len"],
            "oom": 0,
            "latency_ms": latency["p50"],
            "latency_low_ms": point["latency_low_ms"],
            "latency_high_ms": point["latency_high_ms"],
            "latency_p95_ms": latency["p95"],
            "latency_p99_ms": latency["p99"],
            "ttft_ms": point["ttft_ms"]["p50"],
            "tpot_ms": point["tpot_ms"]["p50"],
            "tokens_per_s": point["tokens_per_s"],
            "memory_gb": point["peak_memory_gib"] * GIB / GB,
            "repeats": point["repeats"],
            "warmups": point["warmups"],
            "is_steady": int(point["is_steady"]),
            "notes": "random weights and tokens",
        }
    for name_of_point in found["out_of_memory"]:
        lengths, batch = name_of_point.split("/")
        read, written = lengths.split(":")
        yield common | {"batch": batch, "input_len": read, "output_len": written, "oom": 1}


def told(findings: Mapping[str, Any], models: Sequence[Model]) -> dict[str, tuple[int, int]]:
    """For each model how many points were measured of how many."""
    counts = {}
    for model in models:
        found = [findings.get(key_of(model, graphs=graphs), {}) for graphs in (False, True)]
        counts[model.name] = (sum(len(x.get("points", [])) for x in found), sum(x.get("asked", 0) for x in found))
    return counts


def table_of(directory: Path) -> Path | None:
    """The table of a stage's directory, where it has a row."""
    path = directory / TABLE
    return path if path.is_file() and len(files.read_text(path).splitlines()) > 1 else None


main = command(measure)

if __name__ == "__main__":
    main()
