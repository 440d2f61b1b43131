"""`hptool predict`: the ranked layouts of a model, one of them explained or traced, or a table of runs predicted."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from rich.console import Console
from rich.table import Table

from hptool import catalogue, explain, files, forecast, serving_forecast, serving_tables, tables
from hptool.candidates import Layout
from hptool.errors import InputError
from hptool.facts import Engine
from hptool.forecast import Accuracy
from hptool.plan import Plan, SearchRequest, facts_remark, make_plan
from hptool.serving_forecast import ServingAccuracy

Say = Callable[[str], None]


class Result(Protocol):
    """What a prediction came to: for people and for programs."""

    def show(self, console: Console) -> None:
        """Print it."""

    def document(self) -> Mapping[str, Any]:
        """Plain values for JSON."""


# ---------------------------------------------------------------- a model on a cluster


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranked:
    """The best predicted layouts of a plan."""

    plan: Plan
    top: int

    def show(self, console: Console) -> None:
        """Print it in 80 columns."""
        plan, p = self.plan, self.plan.predictions
        table = Table(title=f"{plan.config.run.name} on {plan.nodes} × {plan.cluster.name}, predicted", box=None)
        table.title_justify, table.pad_edge, table.padding = "left", False, (0, 1, 0, 0)
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column("layout", no_wrap=True)
        for heading in ("step s", "80 % between", "TFLOPS/GPU", "GiB", "fits"):
            table.add_column(heading, justify="right", no_wrap=True)
        low_s, high_s = p.step_time_interval_s
        for rank, i in enumerate(p.ranking()[: self.top], start=1):
            table.add_row(
                str(rank),
                p.layouts.row(int(i)).name,
                f"{p.step_time_s[i]:.4g}",
                f"{low_s[i]:.3g}-{high_s[i]:.3g}",
                f"{p.model_tflops_per_gpu[i]:.4g}",
                f"{p.memory_gib[i]:.1f}",
                f"{p.p_fit[i]:.0%}",
            )
        console.print(table)
        rejected = sum(r.count for r in plan.candidates.rejections)
        if not p.likely_to_fit:
            console.print("No layout is expected to fit: more nodes would help, or a smaller model.", style="bold")
        console.print(
            f"{len(p)} layouts can start, {p.likely_to_fit} of them are expected to fit into "
            f"{plan.cluster.gpu.memory_gib:g} GiB; {rejected} cannot start:"
        )
        for rejection in plan.candidates.rejections:
            console.print(f"  {rejection.count:>6} {rejection.reason}")

    def document(self) -> Mapping[str, Any]:
        """The best layouts with every figure and part."""
        p = self.plan.predictions
        best = p.ranking()[: self.top]
        columns = p.select(best).columns()
        return {
            "model": self.plan.config.run.name,
            "cluster": self.plan.cluster.name,
            "nodes": self.plan.nodes,
            "framework": self.plan.framework.name,
            "candidates": len(p),
            "likely_to_fit": p.likely_to_fit,
            "rejections": [dataclasses.asdict(r) for r in self.plan.candidates.rejections],
            "layouts": [
                {"layout": p.layouts.row(int(row)).name, **{name: float(column[i]) for name, column in columns.items()}}
                for i, row in enumerate(best)
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explained:
    """One layout beside another."""

    explanation: explain.Explanation

    def show(self, console: Console) -> None:
        """Print it in 80 columns."""
        explain.print_explanation(self.explanation, console)

    def document(self) -> Mapping[str, Any]:
        """Every figure and part of both."""
        return explain.as_json(self.explanation)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traced:
    """What a dry run of the worker's own model held, beside what was predicted."""

    layout: Layout
    traces: Sequence[Mapping[str, Any]]
    predicted: Mapping[str, float]

    def show(self, console: Console) -> None:
        """Print it in 80 columns."""
        table = Table(title=f"{self.layout.name}: tensors of a rank, GiB", title_justify="left", box=None)
        table.add_column("")
        for trace in self.traces:
            table.add_column(f"stage {trace['pp_rank']} traced", justify="right")
        table.add_column("fullest predicted", justify="right")
        for name in _TRACED:
            cells = [f"{trace[name]:.3f}" for trace in self.traces]
            table.add_row(name.removesuffix("_gib").replace("_", " "), *cells, f"{self.predicted[name]:.3f}")
        table.add_row("parameters", *(f"{trace['parameters']:,}" for trace in self.traces), "")
        console.print(table)
        console.print("Device context, communication library and fragments of the allocator come on top.")

    def document(self) -> Mapping[str, Any]:
        """Both as they are."""
        return {"layout": self.layout.name, "traced": list(self.traces), "predicted": dict(self.predicted)}


_TRACED = ("weights_gib", "gradients_gib", "optimizer_gib", "peak_gib")


def of_model(words: Sequence[str], options: Mapping[str, Any], say: Say) -> Result:
    """Rank, explain or trace the layouts of `--model` on `--cluster`."""
    for name in ("model", "cluster"):
        if options[name] is None:
            raise InputError(f"--{name}: is needed beside --{'cluster' if name == 'model' else 'model'}")
    for name in ("output", "calibrate"):
        if options[name] is not None:
            raise InputError(f"--{name}: is for a table of runs, not for --model")
    if options["explain"] is not None and options["dry_run_memory"] is not None:
        raise InputError("--explain: is for another run than --dry-run-memory")
    request = SearchRequest(
        model=options["model"], cluster=options["cluster"], nodes=options["nodes"], overrides=tuple(words)
    )
    plan = make_plan(request, options["framework"])
    if (remark := facts_remark(plan.cluster)) is not None:
        say(remark)
    if (remark := catalogue.remark(request.model)) is not None:
        say(remark)
    if options["dry_run_memory"] is not None:
        return _traced(plan, options["dry_run_memory"], say)
    if options["explain"] is not None:
        return Explained(explanation=explain.explain(plan, options["explain"]))
    return Ranked(plan=plan, top=options["top"])


def _traced(plan: Plan, text: str, say: Say) -> Traced:
    layout = explain.named_layout(plan, text, "--dry-run-memory")
    say(f"tracing the first and the last stage of {layout.name}")
    with tempfile.TemporaryDirectory(prefix="hptool-") as directory:
        config = Path(directory) / "config.yaml"
        files.write_text(config, files.yaml_text(plan.config.with_layout(layout).document()))
        stages = ",".join(str(stage) for stage in sorted({0, layout.pp - 1}))
        done = subprocess.run(  # noqa: S603 (our own module)
            [sys.executable, "-m", "hptool.worker.dry_run", str(config), "--pp-rank", stages],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        said = last.removeprefix("hptool: error: ").replace(f"{config}: ", "")
        raise InputError(f"--dry-run-memory: {layout.name}: {said}")
    traces = [json.loads(line) for line in done.stdout.splitlines()]
    explanation = explain.explain(plan, layout.name)
    memory = explanation.predictions.memory
    predicted = {name: float(getattr(memory, name)[0]) for name in _TRACED if hasattr(memory, name)}
    tensors = memory.allocated_gib - memory.framework_gib
    return Traced(layout=layout, traces=traces, predicted=predicted | {"peak_gib": float(tensors[0])})


# ---------------------------------------------------------------- a table of runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What a table of runs has to say, and what its empty cells stand for."""

    def show(self, console: Console) -> None:
        """Print it in 80 columns."""
        console.print(f"needed: {', '.join(tables.REQUIRED)}")
        console.print("otherwise, where a cell is empty or its column is not there:")
        table = Table(box=None, show_header=False)
        for name, meaning in tables.DEFAULTS.items():
            table.add_row(f"  {name}", meaning)
        console.print(table)
        console.print(
            "Measured, for the errors that are printed and for --calibrate: tps_gpu_norm (tokens/s/GPU) or iter_s, "
            "mem_gb with mem_kind, oom; outcome is ok for runs that ended well. dataset and grid_id group the errors."
        )
        console.print(f"\nOf served points, which are told by {', '.join(serving_tables.MARKS)}, needed: ", end="")
        console.print(", ".join(serving_tables.REQUIRED))
        table = Table(box=None, show_header=False)
        for name, meaning in serving_tables.DEFAULTS.items():
            table.add_row(f"  {name}", meaning)
        console.print(table)
        console.print(
            "Measured: latency_ms or tokens_per_s, ttft_ms, tpot_ms, memory_gb, oom. series groups the errors."
        )

    def document(self) -> Mapping[str, Any]:
        """The same."""
        return {
            "needed": list(tables.REQUIRED),
            "defaults": dict(tables.DEFAULTS),
            "serving": {"needed": list(serving_tables.REQUIRED), "defaults": dict(serving_tables.DEFAULTS)},
        }


#: Reasons and rows of a table that are printed; the JSON has them all.
_MOST_REASONS = 30

#: Constants of an engine that are printed, those that moved most; the JSON has them all.
_MOST_FACTORS = 4

#: Bytes of a table that take a second to read, and rows that take one to write.
_LARGE, _MANY = 10**7, 20_000


_LEGEND = (
    "median, p90: of the error of tokens/s/GPU; bias: the median of predicted over measured, less one; in 80%: "
    "measured inside their interval; memory: the median error; OOM, false: called unlikely to fit of those that ran "
    "out of memory, and of those that ran."
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predicted:
    """A table of runs with its predictions, and how good they are where something was measured."""

    rows: int
    rejections: Mapping[str, int]
    output: Path | None
    datasets: Sequence[Accuracy]
    grids: Sequence[Accuracy]
    factors: Mapping[str, Mapping[str, float]]

    def show(self, console: Console) -> None:
        """Print it in 80 columns."""
        _show_rejections(self.rows, self.rejections, console)
        for stack, factors in self.factors.items():
            learned = ", ".join(f"{name} ×{factor:.2f}" for name, factor in factors.items())
            console.print(f"learned for {stack}: {learned}", soft_wrap=True, markup=False)
        if self.datasets:
            forecast.print_accuracy("Predicted against measured, by dataset", self.datasets, console)
        if self.grids:
            forecast.print_accuracy("Predicted against measured, by grid", self.grids, console)
        if self.datasets:
            console.print(_LEGEND)
        if self.output is not None:
            console.print(f"written: {self.output}", soft_wrap=True, markup=False)

    def document(self) -> Mapping[str, Any]:
        """The same."""
        return {
            "rows": self.rows,
            "predicted": self.rows - sum(self.rejections.values()),
            "rejections": dict(self.rejections),
            "output": str(self.output) if self.output else None,
            "datasets": [dataclasses.asdict(row) for row in self.datasets],
            "grids": [dataclasses.asdict(row) for row in self.grids],
            "learned": {stack: dict(factors) for stack, factors in self.factors.items()},
        }


def of_table(words: Sequence[str], options: Mapping[str, Any], say: Say) -> Result:
    """Predict each row of the CSV that `words` names."""
    _check_table(words, options)
    if serving_tables.is_serving(Path(words[0])):
        return _of_serving(Path(words[0]), options, say)
    frame = _read(Path(words[0]), say)
    say(f"{len(frame)} rows of {words[0]}")
    expected = forecast.forecast(frame, say)
    factors: Mapping[str, Mapping[str, float]] = {}
    if options["calibrate"] is not None:
        measured = _read(options["calibrate"], say)
        say(f"{len(measured)} rows of {options['calibrate']} to learn from")
        learned = forecast.learn(measured, say)
        if not learned.step_time and not learned.memory:
            raise InputError(f"{options['calibrate']}: no row has a measured step time, throughput or memory")
        for stack in sorted({stack for stack, _ in learned.step_time} - set(expected.stack)):
            say(f"{stack}: learned, but {words[0]} has no row of it")
        expected = forecast.calibrated(frame, expected, learned)
        factors = {stack: c.factors for (stack, grid), c in learned.step_time.items() if not grid}
    if options["output"] is not None:
        _write(options["output"], frame, expected.columns(frame), say)
    if len(frame) > _MANY:
        say("comparing with what was measured")
    return Predicted(
        rows=len(frame),
        rejections=_counted(expected.rejection),
        output=options["output"],
        datasets=forecast.accuracy(frame, expected, "dataset"),
        grids=forecast.accuracy(frame, expected, "grid_id") if "grid_id" in frame else [],
        factors=factors,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictedServing:
    """A table of served points with its predictions, and how good they are where something was measured."""

    rows: int
    rejections: Mapping[str, int]
    output: Path | None
    series: Sequence[ServingAccuracy]
    factors: Mapping[str, Mapping[str, float]]

    def show(self, console: Console) -> None:
        """Print it in 80 columns."""
        _show_rejections(self.rows, self.rejections, console)
        for engine, factors in self.factors.items():
            most = [f"{name} ×{factor:.2f}" for name, factor in factors.items()][:_MOST_FACTORS]
            console.print(f"learned for {engine}: {', '.join(most)}", soft_wrap=True, markup=False)
        if self.series:
            serving_forecast.print_accuracy(self.series, console)
            console.print(serving_forecast.LEGEND)
        if self.output is not None:
            console.print(f"written: {self.output}", soft_wrap=True, markup=False)

    def document(self) -> Mapping[str, Any]:
        """The same."""
        return {
            "rows": self.rows,
            "predicted": self.rows - sum(self.rejections.values()),
            "rejections": dict(self.rejections),
            "output": str(self.output) if self.output else None,
            "series": [dataclasses.asdict(row) for row in self.series],
            "learned": {engine: dict(factors) for engine, factors in self.factors.items()},
        }


def _of_serving(path: Path, options: Mapping[str, Any], say: Say) -> Result:
    """As `of_table`, of served points."""
    frame = tables.read_table(path, serving_tables.REQUIRED)
    say(f"{len(frame)} rows of {path}, served points")
    engines: Mapping[serving_forecast.Key, Engine] = {}
    if (measured_at := options["calibrate"]) is not None:
        measured = tables.read_table(measured_at, serving_tables.REQUIRED)
        say(f"{len(measured)} rows of {measured_at} to learn from")
        engines = serving_forecast.learn(measured, say)
        if not engines:
            raise InputError(f"{measured_at}: no row has a measured latency, rate, or time to or of a token")
    expected = serving_forecast.forecast(frame, engines)
    if options["output"] is not None:
        _write(options["output"], frame, expected.columns(frame), say)
    return PredictedServing(
        rows=len(frame),
        rejections=_counted(expected.rows.rejection),
        output=options["output"],
        series=serving_forecast.accuracy(frame, expected),
        factors=serving_forecast.factors(expected.rows.scenarios, engines),
    )


def _counted(rejection: Sequence[str]) -> Mapping[str, int]:
    counts = pd.Series(list(rejection), dtype=object).value_counts()
    return {str(reason): int(count) for reason, count in counts.items() if reason != ""}


def _show_rejections(rows: int, rejections: Mapping[str, int], console: Console) -> None:
    rejected = sum(rejections.values())
    console.print(f"{rows - rejected} of {rows} rows predicted" + (":" if rejected else "."))
    reasons = sorted(rejections.items(), key=lambda item: -item[1])
    for reason, count in reasons[:_MOST_REASONS]:
        console.print(f"  {count:>6} not: {reason}", soft_wrap=True, markup=False)
    if rest := reasons[_MOST_REASONS:]:
        console.print(f"  {sum(count for _, count in rest):>6} not, for {len(rest)} more reasons")


def _check_table(words: Sequence[str], options: Mapping[str, Any]) -> None:
    if len(words) != 1 or "=" in words[0]:
        given = " ".join(words) or "nothing"
        raise InputError(f"predict: {given!r} given, allowed is the path of one CSV table, or --model and --cluster")
    for name in ("explain", "dry_run_memory", "nodes", "framework"):
        if options[name] is not None:
            raise InputError(f"--{name.replace('_', '-')}: is for --model and --cluster, not for a table of runs")
    output: Path | None = options["output"]
    for given in (words[0], options["calibrate"]):
        if output is not None and given is not None and output.resolve() == Path(given).resolve():
            raise InputError(f"--output: {output} given, allowed is another file than {given}, which would be lost")


def _read(path: Path, say: Say) -> pd.DataFrame:
    try:
        large = path.stat().st_size > _LARGE
    except OSError:  # as `read_table` will say
        large = False
    if large:
        say(f"reading {path}")
    return tables.read_table(path)


def _write(path: Path, frame: pd.DataFrame, predicted: pd.DataFrame, say: Say) -> None:
    if len(frame) > _MANY:
        say(f"writing {path}")
    try:
        files.write_text(path, tables.csv_text(frame, predicted))
    except OSError as error:
        raise InputError(f"--output: {path}: cannot be written: {error.strerror or error}") from error
