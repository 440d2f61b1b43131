"""Outcomes and predictions as what people read: a terminal table, an HTML page, a CSV, and the winning config."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from rich.console import Console
from rich.table import Table

from hptool import __version__, files
from hptool.candidates import Layout, Rejection
from hptool.facts import Cluster
from hptool.measurement import Failure, FailureKind, Measurement, ServingMeasurement
from hptool.predict import Predictions
from hptool.predict.flops import MODEL_FLOPS_CONVENTION

#: What is said beside a share of used memory. Filling the device so far is common advice (NeMo's guide to performance
#: tuning among others), and no sign of speed: of the best layouts of 22 models on H100s that Hugging Face's
#: ultrascale playbook measured none used 85 %.
USUAL_BAND = "85 to 90 % is often aimed at, but no score: the fastest on published H100s used less"

#: Standard deviations on either side between which 95 % lie, as in the interval of a median.
_SURE = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """What a measured layout comes to on all nodes: its timing and, on top, what fewer nodes leave out.

    `predicted_step_time_s` is what was expected before the search; `error` a relative standard deviation. `at_scale`
    is the run on `at_scale_nodes` nodes, where there was one.
    """

    step_time_s: float
    error: float
    model_tflops_per_gpu: float
    predicted_step_time_s: float
    at_scale_nodes: int | None = None
    at_scale: Measurement | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One layout that ran: what was expected of its longest run, what came of it, and what it means on all nodes.

    `runs` and `gpu_hours` count all its runs. It is equal to the best where the timings do not tell them apart.
    `disagreeing_s` are its step times where they contradict each other.
    """

    layout: Layout
    nodes: int
    gpus: int
    gbs: int
    predicted_step_time_s: float
    predicted_model_tflops_per_gpu: float
    predicted_memory_gib: float
    log_path: str
    measurement: Measurement | None = None
    failure: Failure | None = None
    full: Full | None = None
    runs: int = 1
    gpu_hours: float = 0.0
    is_equal_to_best: bool = False
    disagreeing_s: tuple[float, ...] = ()

    @property
    def spread_pct(self) -> float | None:
        """Half the interval of the measured step time, in percent of it."""
        if (m := self.measurement) is None:
            return None
        return 50 * (m.step_time_high_s - m.step_time_low_s) / m.step_time_s

    @property
    def error_pct(self) -> float | None:
        """How much longer the step was expected to take than it took, in percent of what it took."""
        if self.measurement is None:
            return None
        return 100 * (self.predicted_step_time_s / self.measurement.step_time_s - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What the search cost, and what timing each of the `grid_layouts` would have; `ended` says why it ended."""

    gpu_hours: float
    runs: int
    grid_layouts: int
    grid_gpu_hours: float
    ended: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The days that the `steps` steps of the full training take.

    Predicted for the best layout before the search, and as its winner was measured, with the relative standard
    deviation of that.
    """

    steps: int
    predicted_days: float
    days: float | None
    days_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is predicted of one layout on the whole cluster."""

    layout: Layout
    step_time_s: float
    model_tflops_per_gpu: float
    memory_gib: float
    p_fit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that the readers of a search see. `rows` are the measured ones, the best first, then the failures."""

    model: str
    num_parameters: int
    cluster: Cluster
    nodes: int
    gbs: int
    seq_length: int
    precision: str
    peak_tflops: float
    candidates: int
    rejections: Sequence[Rejection]
    rows: Sequence[Row]
    planned_runs: int
    predictions: Predictions
    spent: Spent
    training: Training
    notes: Sequence[str]
    optimal_path: str | None
    train_command: str | None

    @property
    def measured(self) -> Sequence[Row]:
        """Rows with a measurement, fastest first."""
        return [row for row in self.rows if row.measurement]

    @property
    def failed(self) -> Sequence[Row]:
        """Rows that gave none."""
        return [row for row in self.rows if row.failure]

    @property
    def expected(self) -> Sequence[Expected]:
        """The best predicted layouts for the whole cluster, best first; those that were or would be run."""
        p = self.predictions
        return [
            Expected(
                layout=p.layouts.row(int(i)),
                step_time_s=float(p.step_time_s[i]),
                model_tflops_per_gpu=float(p.model_tflops_per_gpu[i]),
                memory_gib=float(p.memory_gib[i]),
                p_fit=float(p.p_fit[i]),
            )
            for i in p.ranking()[: self.planned_runs]
        ]

    @property
    def winner(self) -> Row | None:
        """The measured row with the highest throughput."""
        return next(iter(self.measured), None)


def why_nothing_ran(report: Report) -> str | None:
    """The reason for which there is no winner; None where there is one."""
    if report.winner:
        return None
    if not report.rows:
        return "No layout was run; the ranking is by predicted throughput times the chance of fitting."
    return f"All {len(report.rows)} runs failed: {count_kinds(row.failure.kind for row in report.rows if row.failure)}."


# ---------------------------------------------------------------- words of both kinds of search


def count_kinds(kinds: Iterable[FailureKind]) -> str:
    """`1 × hang, 2 × oom`."""
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(Counter(kind.value for kind in kinds).items()))


def cost_words(spent: Spent, grid: str | None) -> str:
    """What a search cost, and what `grid` (`timing all 4 layouts once`) would have, where there is more of it."""
    runs = f"{spent.gpu_hours:.3g} GPU hours in {spent.runs} run{'s' if spent.runs != 1 else ''}"
    return runs if grid is None else f"{runs}; {grid} would have taken {spent.grid_gpu_hours:.3g}"


def rejection_lines(rejections: Sequence[Rejection]) -> list[str]:
    """Reasons for which layouts could not start, with their counts."""
    return [f"  {rejection.count:>6} {rejection.reason}" for rejection in rejections]


def figure(value: float) -> str:
    """Four digits, or all before the point: 0.01234, 98.76, 12,346."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"  # noqa: PLR2004 (four digits)


def device_memory_gib(cluster: Cluster, measurement: Measurement | ServingMeasurement) -> float:
    """All that there is for a rank: of the device it ran on, or where that is unknown by the cluster's facts."""
    return measurement.device_memory_gib or cluster.gpu.memory_gib


# ---------------------------------------------------------------- tables


def table_rows(report: Report) -> list[dict[str, Any]]:
    """One mapping a run, keyed by field name with units: the content of report.csv and of --json."""
    found = []
    for rank, row in enumerate(report.rows, start=1):
        m, layout = row.measurement, row.layout
        found.append(
            {
                "rank": rank if m else None,
                "name": layout.name,
                "outcome": "measured" if m else (row.failure.kind.value if row.failure else None),
                "tp": layout.tp,
                "pp": layout.pp,
                "vpp": layout.vpp,
                "cp": layout.cp,
                "dp": row.gpus // layout.gpus_per_replica,
                "mbs": layout.mbs,
                "recompute": layout.recompute_label,
                "nodes": row.nodes,
                "gpus": row.gpus,
                "gbs": row.gbs,
                "step_time_s": m.step_time_s if m else None,
                "step_time_low_s": m.step_time_low_s if m else None,
                "step_time_high_s": m.step_time_high_s if m else None,
                "is_equal_to_best": row.is_equal_to_best,
                "predicted_step_time_s": row.predicted_step_time_s,
                "error_pct": row.error_pct,
                "model_tflops_per_gpu": m.model_tflops_per_gpu if m else None,
                "predicted_model_tflops_per_gpu": row.predicted_model_tflops_per_gpu,
                "mfu": m.model_tflops_per_gpu / report.peak_tflops if m else None,
                "tokens_per_s_per_gpu": m.tokens_per_s_per_gpu if m else None,
                "peak_memory_gib": m.peak_memory_gib if m else None,
                "memory_kind": m.memory_kind if m else None,
                "max_reserved_gib": m.max_reserved_gib if m else None,
                "device_used_gib": m.device_used_gib if m else None,
                "headroom_gib": _headroom_gib(report, m) if m else None,
                "predicted_memory_gib": row.predicted_memory_gib,
                "full_step_time_s": row.full.step_time_s if row.full else None,
                "full_error": row.full.error if row.full else None,
                "full_predicted_step_time_s": row.full.predicted_step_time_s if row.full else None,
                "full_model_tflops_per_gpu": row.full.model_tflops_per_gpu if row.full else None,
                "at_scale_nodes": row.full.at_scale_nodes if row.full else None,
                "at_scale_step_time_s": row.full.at_scale.step_time_s if row.full and row.full.at_scale else None,
                "steps": len(m.step_times_s) if m else None,
                "warmup_steps": m.warmup_steps if m else None,
                "is_steady": m.is_steady if m else None,
                "runs": row.runs,
                "gpu_hours": row.gpu_hours,
                "message": row.failure.message if row.failure else None,
                "log_path": row.log_path,
            }
        )
    return found


def _headroom_gib(report: Report, measurement: Measurement) -> float:
    """What the fullest rank left of it."""
    used = measurement.peak_memory_gib if measurement.device_used_gib is None else measurement.device_used_gib
    return device_memory_gib(report.cluster, measurement) - used


def predictions_csv(predictions: Predictions) -> str:
    """Every candidate with its prediction and the parts of it, best first."""
    layouts = predictions.layouts.rows()
    columns: dict[str, Any] = {
        "name": [x.name for x in layouts],
        **{axis: [getattr(x, axis) for x in layouts] for axis in ("tp", "pp", "vpp", "cp", "ep", "mbs")},
        "recompute": [x.recompute_label for x in layouts],
        **predictions.columns(),
    }
    return str(pd.DataFrame(columns).iloc[predictions.ranking()].to_csv(index=False, float_format="%.6g"))


def write(report: Report, directory: Path) -> None:
    """`report.html` and `report.csv` in the search's directory."""
    frame = pd.DataFrame(table_rows(report))
    files.write_text(directory / "report.csv", frame.to_csv(index=False, float_format="%.6g"))
    files.write_text(directory / "report.html", html(report))


def html(report: Report) -> str:
    """A self-contained page."""
    return page(
        "report.html.j2",
        report=report,
        rows=table_rows(report),
        nothing=why_nothing_ran(report),
        answer=answer_lines(report),
        convention=MODEL_FLOPS_CONVENTION,
        memory_kinds=" or ".join(sorted({row.measurement.memory_kind for row in report.measured if row.measurement})),
        usual_band=USUAL_BAND,
    )


def page(template: str, **values: Any) -> str:
    """A self-contained page from one of the templates; whatever comes from outside is escaped."""
    loader = jinja2.PackageLoader("hptool")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = figure
    return environment.get_template(template).render(version=__version__, **values)


def print_table(report: Report, console: Console, top: int) -> None:
    """The answer in 80 columns: the best `top` layouts, failures, rejections, and what to do with the winner."""
    table = Table(title=f"{report.model} on {report.nodes} × {report.cluster.name}", title_justify="left", box=None)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column("#", justify="right")
    table.add_column("layout", no_wrap=True)
    scaled = any(row.full and row.nodes != report.nodes for row in report.measured)
    full = (f"on {report.nodes}",) if scaled else ()
    for heading in ("step s", "±", "pred. s", *full, "TFLOPS", "MFU", "GiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank, row in enumerate(report.measured[:top], start=1):
        m = row.measurement
        assert m  # noqa: S101 (what `measured` means)
        table.add_row(
            f"{rank}{'=' if row.is_equal_to_best else ''}",
            row.layout.short_name,
            f"{m.step_time_s:.4g}",
            f"{row.spread_pct:.1f}%",
            f"{row.predicted_step_time_s:.4g}",
            *((f"{row.full.step_time_s:.4g}" if row.full else "",) if scaled else ()),
            f"{m.model_tflops_per_gpu:.4g}",
            f"{m.model_tflops_per_gpu / report.peak_tflops:.0%}",
            f"{m.peak_memory_gib:.2f}",
        )
    if report.measured:
        console.print(table)
    elif not report.rows:
        console.print(_expected_table(report, top))
    _print_below(report, console)


def _print_below(report: Report, console: Console) -> None:
    """What stands below the table: failures, rejections, notes and the winner."""
    say = partial(console.print, soft_wrap=True, markup=False)
    for row in report.failed:
        assert row.failure  # noqa: S101 (what `failed` means)
        say(f"failed: {row.layout.name}: {row.failure.kind.value}: {row.failure.message}")
        say(f"  log: {row.log_path}")
    rejected = sum(r.count for r in report.rejections)
    fitting = report.predictions.likely_to_fit
    end = "could not:" if rejected else "could not."
    say(f"{report.candidates} layouts could start ({fitting} of them expected to fit into memory), {rejected} {end}")
    for line in rejection_lines(report.rejections):
        say(line)
    for note in report.notes:
        say(f"note: {note}")
    if nothing := why_nothing_ran(report):
        say(nothing)
    elif report.winner:
        say(f"winner: {report.winner.layout.name}", style="bold")
        for line in answer_lines(report):
            say(f"  {line}")
        say(f"  config: {report.optimal_path}")
        say(f"  train:  {report.train_command}")


def answer_lines(report: Report) -> list[str]:
    """How sure the winner is, what the training takes with it, and what finding it cost."""
    spent, training, best = report.spent, report.training, report.winner
    lines = [f"search: {spent.ended}"] if spent.ended else []
    equals = [row.layout.name for row in report.measured if row.is_equal_to_best and row is not best]
    if equals:
        lines.append(f"equal:  {', '.join(equals)} (their intervals overlap: the timings do not tell them apart)")
    if best and best.disagreeing_s:
        seen = f"{min(best.disagreeing_s):.4g} to {max(best.disagreeing_s):.4g} s"
        lines.append(f"beware: runs of the winner disagree, {seen} a step: nodes differ, or something else ran there")
    if best and best.measurement and not best.measurement.is_steady:
        lines.append("beware: the winner's steps had not settled when its run ended")
    if best and best.full:
        at = f"{best.full.step_time_s:.4g} s ±{_SURE * best.full.error:.1%} a step on {_nodes(report.nodes)}"
        if (scaled := best.full.at_scale) is not None:
            at += f", measured {scaled.step_time_s:.4g} s on {_nodes(best.full.at_scale_nodes or 0)}"
        lines.append(f"step:   {at}, {best.full.predicted_step_time_s:.4g} s predicted before the search")
    if best and best.measurement:
        lines.append(f"memory: {_memory_words(report, best.measurement)}")
    if training.days is not None:
        lines.append(
            f"days:   {training.days:.3g} ±{_SURE * (training.days_error or 0):.1%} for {training.steps:,} steps; "
            f"{training.predicted_days:.3g} predicted for the best layout before the search"
        )
    grid = f"timing all {spent.grid_layouts} layouts once" if len(report.rows) < spent.grid_layouts else None
    lines.append(f"cost:   {cost_words(spent, grid)}")
    return lines


def _memory_words(report: Report, m: Measurement) -> str:
    """What the fullest rank of a run took, what it left, and what that says."""
    parts = [f"{m.peak_memory_gib:.2f} GiB {m.memory_kind}"]
    if m.max_reserved_gib is not None:
        parts.append(f"{m.max_reserved_gib:.2f} reserved")
    if m.device_used_gib is not None:
        parts.append(f"{m.device_used_gib:.2f} taken of the device")
    whole, left = device_memory_gib(report.cluster, m), _headroom_gib(report, m)
    band = f" ({USUAL_BAND})" if m.device_used_gib is not None else ""
    return f"{', '.join(parts)}; {left:.2f} of {whole:.4g} GiB free, {1 - left / whole:.0%} used{band}"


def _nodes(count: int) -> str:
    return f"{count} node{'s' if count != 1 else ''}"


def _expected_table(report: Report, top: int) -> Table:
    table = Table(title=f"{report.model} on {report.nodes} × {report.cluster.name}, predicted", title_justify="left")
    table.box = None
    table.add_column("#", justify="right")
    table.add_column("layout", no_wrap=True)
    for heading in ("step s", "TFLOPS/GPU", "GiB", "fits"):
        table.add_column(heading, justify="right")
    for rank, row in enumerate(report.expected[:top], start=1):
        values = (
            f"{row.step_time_s:.4g}",
            f"{row.model_tflops_per_gpu:.4g}",
            f"{row.memory_gib:.2f}",
            f"{row.p_fit:.0%}",
        )
        table.add_row(str(rank), row.layout.name, *values)
    return table


def as_json(report: Report, directory: Path) -> Mapping[str, Any]:
    """The same answer for programs."""
    return {
        "model": report.model,
        "cluster": report.cluster.name,
        "nodes": report.nodes,
        "gpus": report.nodes * report.cluster.gpus_per_node,
        "num_parameters": report.num_parameters,
        "model_flops_convention": MODEL_FLOPS_CONVENTION,
        "winner": report.winner.layout.name if report.winner else None,
        "optimal_config": report.optimal_path,
        "train_command": report.train_command,
        "reason": why_nothing_ran(report),
        "runs": table_rows(report),
        "predicted": [{"name": x.layout.name, **_without_layout(x)} for x in report.expected],
        "candidates": report.candidates,
        "rejections": [dataclasses.asdict(r) for r in report.rejections],
        "notes": list(report.notes),
        "likely_to_fit": report.predictions.likely_to_fit,
        "spent": dataclasses.asdict(report.spent),
        "training": dataclasses.asdict(report.training),
        "results": str(directory),
        "report": str(directory / "report.html"),
    }


def _without_layout(expected: Expected) -> dict[str, Any]:
    return {f.name: getattr(expected, f.name) for f in fields(expected) if f.name != "layout"}
