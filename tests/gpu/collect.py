"""What the landscapes measured as a table: one row a run, in the columns that `hptool predict` and `replay` read.

Beside those columns (of published runs; see hptool/tables.py) a row says which search it is of (`preset`,
`overrides`, `layout`), so that `tests.gpu.score` can plan the same search again.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hptool import files
from hptool.candidates import Layout, Recompute
from hptool.errors import InputError
from hptool.measurement import Measurement
from hptool.plan import Plan
from hptool.results import OutcomeRecord
from tests.gpu.device import Device, one_gpu
from tests.gpu.landscapes import all_records
from tests.gpu.models import LANDSCAPES, TINY_LANDSCAPES, Model, plan_of

#: What `hptool replay` calls the data set, by its kind.
DATASET = "hptool_gpu"


def collect(directory: Path, device: Device) -> pd.DataFrame:
    """The table of all runs that the stage in `directory` has, the fastest of each layout; it may be empty."""
    known = {model.name: model for model in (*LANDSCAPES, *TINY_LANDSCAPES)}
    rows: list[Mapping[str, Any]] = []
    for name, records in all_records(directory).items():
        if name in known:
            plan = plan_of(known[name], one_gpu(device))
            read = [files.parse_json(files.json_text(record), OutcomeRecord, name) for record in records]
            rows += [row_of(known[name], plan, device, record) for record in fastest(read)]
    return pd.DataFrame(rows)


def fastest(records: Iterable[OutcomeRecord]) -> list[OutcomeRecord]:
    """One record a layout: its fastest measurement, as a search counts it, or else its first failure."""
    best: dict[str, OutcomeRecord] = {}
    for record in records:
        known = best.setdefault(record.name, record)
        if _seconds(record) < _seconds(known):
            best[record.name] = record
    return list(best.values())


def _seconds(record: OutcomeRecord) -> float:
    return record.measurement.step_time_s if record.measurement else float("inf")


def row_of(model: Model, plan: Plan, device: Device, record: OutcomeRecord) -> dict[str, Any]:
    """The row of one run."""
    config, shape = plan.config, plan.config.shape
    layout, length = Layout.parse(record.name), shape.encoder_seq_length or shape.seq_length
    row: dict[str, Any] = {
        "id": f"{model.name}-{layout.short_name}",
        "source": "measured by hptool (make gpu)",
        "family": model.preset.partition("/")[0],
        "model": model.name,
        "params_b": round(shape.num_parameters / 1e9, 4),
        "hidden": shape.hidden_size,
        "layers": shape.num_layers,
        "heads": shape.num_attention_heads,
        "kv_heads": shape.num_query_groups,
        "ffn": shape.ffn_hidden_size,
        "gated_mlp": int(shape.gated_mlp),
        "vocab": shape.vocab_size,
        "seq": length,
        "gpu": device.gpu,
        "nodes": 1,
        "gpus": 1,
        **{axis: getattr(layout, axis) for axis in ("tp", "pp", "vpp", "cp", "ep")},
        "dp": 1,
        "mbs": layout.mbs,
        "gbs": config.model.global_batch_size,
        "sequence_parallel": 0,
        "recompute": _word(layout),
        "precision": config.precision,
        "zero_stage_or_dist_opt": "distributed_optimizer",
        "flash_attention": int(config.model.use_flash_attention),
        "framework": "hptool-worker",
        "notes": _notes(plan),
        "grid_id": f"hptool-{model.name}-{device.gpu}-1g-seq{length}-gbs{config.model.global_batch_size}",
        "grid_use": "primary",
        "dataset": DATASET,
        "layout": record.name,
        "preset": model.preset,
        "overrides": " ".join(model.overrides),
        "device": device.name,
        "device_memory_gib": device.memory_gib,
        "driver": device.driver,
        "steps": record.steps,
        "ran_s": round(record.ran_s, 1),
    }
    return row | (_measured(record.measurement) if record.measurement else _failed(record))


def _measured(measured: Measurement) -> dict[str, Any]:
    return {
        "outcome": "ok",
        "oom": 0,
        "iter_s": measured.step_time_s,
        "iter_low_s": measured.step_time_low_s,
        "iter_high_s": measured.step_time_high_s,
        "timed_steps": len(measured.step_times_s),
        "steady": int(measured.is_steady),
        "tokens_per_s_per_gpu": measured.tokens_per_s_per_gpu,
        "tflops_per_gpu": measured.model_tflops_per_gpu,
        "tflops_kind": "model",
        "mem_gb": measured.peak_memory_gib,
        "mem_kind": f"GiB {measured.memory_kind}",
        "max_reserved_gib": measured.max_reserved_gib,
        "device_used_gib": measured.device_used_gib,
        "kernels": "; ".join(f"{part}={kernel}" for part, kernel in sorted(measured.kernels.items())),
        "versions": "; ".join(f"{name} {version}" for name, version in sorted(measured.versions.items())),
        "message": "",
    }


def _failed(record: OutcomeRecord) -> dict[str, Any]:
    assert record.failure is not None  # a record has one of both
    kind = record.failure.kind.value
    return {"outcome": kind, "oom": int(kind == "oom"), "message": " ".join(record.failure.message.split())[:200]}


def _word(layout: Layout) -> str:
    """As tables say it: `full` is uniform recomputation of every layer on its own."""
    is_full = (layout.recompute, layout.recompute_num_layers) == (Recompute.UNIFORM, 1)
    return "full" if is_full else layout.recompute_label


def _notes(plan: Plan) -> str:
    shape = plan.config.shape
    if not shape.encoder_num_layers:
        return ""
    # As hptool/tables.py reads it.
    return (
        f"encoder layers {shape.encoder_num_layers}, decoder layers {shape.num_layers}, decoder seq {shape.seq_length}"
    )


def read(path: Path) -> pd.DataFrame:
    """A table that `collect` made. InputError where it is none."""
    from hptool import tables  # noqa: PLC0415 (imports rich and more)

    frame = tables.read_table(path, required=("grid_id", "layout", "preset", "overrides", "gpu", "outcome"))
    if frame["layout"].isna().any():
        raise InputError(f"{path}: layout: empty in some rows")
    return frame
