"""Why a layout is predicted to be as fast and as large as it is: each second and each GiB, beside another layout's."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from hptool.candidates import Layout, Layouts, refusal
from hptool.errors import InputError
from hptool.plan import Plan
from hptool.predict import Predictions, predict, stack
from hptool.predict.parallel import Table as PredictionTable
from hptool.predict.step_time import step_time_bounds

#: Parts smaller than this share of the whole are left out of the terminal's table, not of --json.
_SMALL = 0.001


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explanation:
    """A layout and the one that it is compared with: predictions of two rows, and the bounds of the first."""

    predictions: Predictions
    optimistic_s: float
    pessimistic_s: float
    memory_limit_gib: float

    @property
    def names(self) -> tuple[str, str]:
        """Of the two layouts."""
        return self.predictions.layouts.row(0).name, self.predictions.layouts.row(1).name


def named_layout(plan: Plan, text: str, option: str) -> Layout:
    """The layout that an option names; InputError where it names none, or one that cannot start."""
    try:
        layout = Layout.parse(text)
    except ValueError as error:
        raise InputError(f"{option}: {error}") from error
    if reason := refusal(layout, plan.config.workload):
        raise InputError(f"{option}: {layout.name} cannot start: {reason}")
    return layout


def explain(plan: Plan, text: str) -> Explanation:
    """The layout that `text` names beside its rival: the best predicted, or the second where it is that one itself."""
    layout = named_layout(plan, text, "--explain")
    ranked = [plan.predictions.layouts.row(int(row)) for row in plan.predictions.ranking()[:2]]
    rival = next((other for other in ranked if other != layout), layout)
    setting = stack([(plan.config.workload, plan.cluster, plan.framework)])
    both = Layouts.of([layout, rival])
    best_s, worst_s = step_time_bounds(PredictionTable.of(both, setting))
    return Explanation(
        predictions=predict(both, setting),
        optimistic_s=float(best_s[0]),
        pessimistic_s=float(worst_s[0]),
        memory_limit_gib=plan.cluster.gpu.memory_gib,
    )


def as_json(explanation: Explanation) -> Mapping[str, Any]:
    """For programs: every figure and part of both layouts by the names of the tables' columns."""
    columns = explanation.predictions.columns()
    return {
        "layout": explanation.names[0],
        "rival": explanation.names[1],
        "optimistic_step_time_s": explanation.optimistic_s,
        "pessimistic_step_time_s": explanation.pessimistic_s,
        "memory_limit_gib": explanation.memory_limit_gib,
        "parts": {name: [float(column[0]), float(column[1])] for name, column in columns.items()},
    }


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Where each second and each GiB goes, in 80 columns."""
    p = explanation.predictions
    low_s, high_s = p.step_time_interval_s
    first, second = explanation.names
    console.print(f"A: {first}", style="bold", highlight=False)
    console.print(f"B: {second}", highlight=False)
    for unit, total, parts in (("s", p.step_time_s, p.step_time), ("GiB", p.memory_gib, p.memory)):
        table = Table(box=None)
        table.add_column("where it goes" if unit == "s" else "what it holds")
        for heading in (f"A {unit}", "share", f"B {unit}", "share", "A - B"):
            table.add_column(heading, justify="right")
        for field in fields(parts):
            mine, other = (float(getattr(parts, field.name)[i]) for i in (0, 1))
            if max(mine / total[0], other / total[1]) >= _SMALL:
                table.add_row(_word(field.name), *_cells(mine, total[0], other, total[1]))
        table.add_row("all", *_cells(total[0], total[0], total[1], total[1]), style="bold")
        console.print(table)
    first_tflops, second_tflops = p.model_tflops_per_gpu
    console.print(
        f"A takes {p.step_time_s[0]:.4g} s a step, with 80 % between {low_s[0]:.4g} and {high_s[0]:.4g}: "
        f"{explanation.optimistic_s:.4g} s if all that can overlap did, "
        f"{explanation.pessimistic_s:.4g} s if nothing did.",
        highlight=False,
    )
    console.print(
        f"It runs at {first_tflops:.4g} TFLOPS/GPU and fits into {explanation.memory_limit_gib:g} GiB "
        f"with a probability of {p.p_fit[0]:.0%} (B: {second_tflops:.4g}, {p.p_fit[1]:.0%}).",
        highlight=False,
    )


def _word(field: str) -> str:
    name = field.removesuffix("_s").removesuffix("_gib").replace("_", " ")
    for short in ("tp", "cp", "ep", "pp", "dp"):
        name = name.replace(f"{short} ", f"{short.upper()} ") if name.startswith(f"{short} ") else name
    return "GEMM" if name == "gemm" else name


def _cells(mine: float, my_total: float, other: float, other_total: float) -> list[str]:
    return [
        f"{mine:.4g}",
        f"{mine / my_total:.1%}",
        f"{other:.4g}",
        f"{other / other_total:.1%}",
        f"{mine - other:+.3g}",
    ]
