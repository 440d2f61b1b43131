"""Figures, sentences and tables that the answers of `hptool recommend` share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hptool.predict.flops import MODEL_FLOPS_CONVENTION
from hptool.recommend import Budget, Size
from hptool.recommendation.request import Request
from hptool.scaling import FLOP_PER_PARAMETER_TOKEN, Doubt, Law

#: What a training takes beside its steps, which no figure here has.
LEFT_OUT = "Days are those of the steps: checkpoints, validation and restarts come on top."

ENCODER_TOKENS = "of the encoder; the decoder reads its own beside them"

_INTERVAL = 1.2816  # standard deviations, as predictions show: 80 %


def law_parameters(law: Law) -> dict[str, float]:
    """The five parameters of a law by their usual letters."""
    return {"E": law.e, "A": law.a, "B": law.b, "alpha": law.alpha, "beta": law.beta}


def circumstances(request: Request) -> dict[str, Any]:
    """What an answer holds for: the GPUs and how their rate was found."""
    return {
        "gpus": request.gpus,
        "days": request.days,
        "gpu": request.cluster.gpu.name,
        "cluster": request.profile,
        "nodes": request.cluster.nodes if request.gpus is not None else None,
        "model_flops_convention": MODEL_FLOPS_CONVENTION,
    }


def size_document(size: Size, budget: Budget) -> dict[str, Any]:
    """A size with its days and its chance, for programs."""
    low, high = days_interval(size, budget.gpus)
    return plain(
        {
            "model": size.name,
            "parameters": size.parameters,
            "active_parameters": size.active_parameters,
            "tokens": size.tokens,
            "tokens_of": "encoder" if size.encoder else "decoder",
            "flop": size.tokens * size.flop_per_token,
            "tflops_per_gpu": size.tflops_per_gpu,
            "layout": size.layout or None,
            "days": size.days(budget.gpus),
            "days_low": low,
            "days_high": high,
            "chance_in_time": size.chance(budget),
            "refusal": size.refusal or None,
        }
    )


def doubts_document(doubts: Sequence[Doubt]) -> dict[str, Any]:
    """Whether a fit is to be trusted, and what speaks against it."""
    return {"trusted": not any(doubt.severe for doubt in doubts), "warnings": [asdict(doubt) for doubt in doubts]}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def days_interval(size: Size, gpus: float) -> tuple[float, float]:
    """Days between which 80 of 100 such trainings should take."""
    days, width = size.days(gpus), math.exp(_INTERVAL * size.error)
    return days / width, days * width


def days_with_interval(size: Size, gpus: float) -> str:
    """Expected days, and the interval where the rate is predicted."""
    low, high = days_interval(size, gpus)
    between = f", 80 % between {figure(low)} and {figure(high)}" if size.error else ""
    return f"{figure(size.days(gpus))}{between}"


def tokens_text(size: Size, request: Request) -> str:
    """Tokens and where their number comes from."""
    origin = "as given" if request.tokens else "the preset's; --tokens changes them"
    return f"{large(size.tokens)} ({origin}){f', {ENCODER_TOKENS}' if size.encoder else ''}"


def certainty(size: Size, confidence: float) -> str:
    """With what probability, where there is one."""
    return f" with a probability of {confidence:.0%}" if size.error else ""


def rate_text(size: Size, request: Request) -> str:
    """TFLOPS of a GPU and where they come from."""
    if request.tflops:
        return f"{size.tflops_per_gpu:.4g}, as given"
    nodes = f"{request.cluster.nodes} node{'s' * (request.cluster.nodes > 1)} of {request.cluster.gpus_per_node}"
    return f"{size.tflops_per_gpu:.4g}: hptool's prediction for its best layout on {nodes}, {size.layout}"


def next_step(model: str, request: Request) -> str:
    """The command that finds the layout."""
    cluster = request.profile or "YOUR-CLUSTER"
    return f"next: hptool search-train --model {model} --cluster {cluster} --nodes {request.cluster.nodes}"


def in_days(value: float) -> str:
    """Days in words."""
    return f"{value:g} day{'s' * (value != 1)}"


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"  # noqa: PLR2004 (no 1e+03)


def short(value: float) -> str:
    """Two digits."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"  # noqa: PLR2004 (no 1e+02)


def large(value: float) -> str:
    """5.05B, 300B, 1.2T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.3g}{letter}" if scaled < 999.5 else f"{scaled:.4g}{letter}"  # noqa: PLR2004
    return f"{value:.3g}"


def between(interval: tuple[float, float] | None) -> str:
    """An interval of large numbers."""
    if interval is None:
        return ""
    low, high = interval
    if low < 1e4:  # noqa: PLR2004 (figures of a law, not parameters and tokens)
        return f", 80 % between {low:.4g} and {high:.4g}"
    return f", 80 % between {large(low)} and {large(high)}"


def divided(compute: float, parameters: tuple[float, float] | None) -> tuple[float, float] | None:
    """Tokens for an interval of parameters."""
    if parameters is None:
        return None
    low, high = (compute / FLOP_PER_PARAMETER_TOKEN / size for size in reversed(parameters))
    return low, high


def spread(factor: float) -> str:
    """A factor of uncertainty."""
    return f"{factor:.2f}x" if factor < 100 else "nothing"  # noqa: PLR2004 (worth no figure)


def new_table(*headings: str) -> Table:
    """A plain table with these headings."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i in (0, len(headings) - 1) else "right", no_wrap=i == 0)
    return table


def print_answer(console: Console, answer: str, doubts: Sequence[Doubt]) -> None:
    """The answer in one bold line, with a warning in front where it is not to be trusted."""
    doubtful = "not to be trusted: " if any(doubt.severe for doubt in doubts) else ""
    console.print(f"{doubtful}{answer}", style="bold", soft_wrap=True, markup=False)
    for doubt in doubts:
        console.print(f"warning: {doubt.message}", soft_wrap=True, markup=False)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Names and what they stand for, in two columns."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for name, text in facts.items():
        table.add_row(name, escape(text))
    console.print(table)
