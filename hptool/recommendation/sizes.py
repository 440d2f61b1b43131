"""The largest size of a family that a budget trains, and the days or GPUs of one size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hptool import rates
from hptool.errors import InputError, NoFeasibleLayout
from hptool.predict.flops import MODEL_FLOPS_CONVENTION
from hptool.recommend import Budget, Recommendation, Size, recommend
from hptool.recommendation.request import Request, Result
from hptool.recommendation.words import (
    LEFT_OUT,
    certainty,
    circumstances,
    days_interval,
    days_with_interval,
    doubts_document,
    figure,
    in_days,
    large,
    new_table,
    next_step,
    print_answer,
    print_facts,
    rate_text,
    short,
    size_document,
    tokens_text,
)
from hptool.scaling import Doubt

#: Of the smallest preset: a size that far below is no extrapolation any more.
_SMALLEST_PART = 0.1


# ---------------------------------------------------------------- the largest size of a family


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Largest:
    """The largest size of a family that trains within a budget, or what would help where none does."""

    request: Request
    found: Recommendation

    def show(self, console: Console) -> None:
        """Print the answer, the numbers behind it and all sizes."""
        found, request = self.found, self.request
        print_answer(console, self.headline, ())
        facts = {"fills the budget": self._filling()}
        if (size := found.chosen) is not None:
            facts |= {
                "preset": f"{size.name}, the largest that ends in time{certainty(size, found.confidence)}",
                "tokens": tokens_text(size, request),
                "days": days_with_interval(size, found.budget.gpus),
                "TFLOPS/GPU": rate_text(size, request),
            }
        else:
            facts |= {"would help": self._help()}
        print_facts(console, {**facts, "FLOPs": MODEL_FLOPS_CONVENTION})
        console.print(_sizes_table(found, found.confidence))
        console.print(LEFT_OUT)
        if size is not None:
            console.print(next_step(size.name, request), soft_wrap=True, markup=False)

    @property
    def headline(self) -> str:
        """The answer in a line."""
        found, budget = self.found, self.found.budget
        if (size := found.chosen) is not None:
            days = f"{figure(size.days(budget.gpus))} of {in_days(budget.days)}"
            return f"train {size.name} ({large(size.parameters)} parameters): {days} on {self.request.where}"
        what = f"{self.request.family} in {in_days(budget.days)} on {self.request.where}"
        smallest = next((size for size in found.sizes if size.tflops_per_gpu is not None), None)
        if smallest is None:
            return f"does not fit: no layout holds any size of {what}"
        days = figure(smallest.days(budget.gpus))
        return f"does not fit: no size of {what}; the smallest, {smallest.name}, takes {days} days"

    def _filling(self) -> str:
        found = self.found
        if not found.filling:
            return "nothing: no layout holds any size"
        sure = f" ({large(found.sure_filling)} to be {found.confidence:.0%} sure)" if not self.request.tflops else ""
        return (
            f"{large(found.filling)} parameters take exactly {in_days(found.budget.days)} on "
            f"{large(found.filling_tokens)} tokens{sure}: {found.how}"
        )

    def _help(self) -> str:
        found, budget = self.found, self.found.budget
        smallest = next((size for size in found.sizes if size.tflops_per_gpu is not None), None)
        if smallest is None:
            return "more GPUs, GPUs of more memory, or another family"
        days = smallest.sure_days(budget.gpus, found.confidence)
        node = self.request.cluster.gpus_per_node
        gpus = math.ceil(budget.gpus * days / budget.days / node) * node
        own = ""
        if found.sure_filling > _SMALLEST_PART * smallest.parameters:
            own = f"; or a model of about {large(found.sure_filling)} parameters"
        return (
            f"for {smallest.name}: {figure(days)} days, or some {gpus} GPUs, or "
            f"{large(smallest.tokens * budget.days / days)} tokens{own}"
        )

    def document(self) -> Mapping[str, Any]:
        """Everything that is printed."""
        found = self.found
        return {
            "answer": self.headline,
            "fits": found.chosen is not None,
            "recommended": size_document(found.chosen, found.budget) if found.chosen else None,
            "parameters_that_fill_the_budget": found.filling or None,
            "parameters_that_fill_the_budget_surely": found.sure_filling or None,
            "parameters_found_by": found.how,
            "tokens_that_fill_the_budget_with_them": found.filling_tokens or None,
            "would_help": None if found.chosen else self._help(),
            "confidence": found.confidence,
            **circumstances(self.request),
            "sizes": [
                {**size_document(size, found.budget), "fits": size.fits(found.budget, found.confidence)}
                for size in found.sizes
            ],
        }


def largest(request: Request) -> Result:
    """The largest preset of the family that the budget trains."""
    budget = request.budget
    return Largest(request=request, found=recommend(budget, sizes_of_family(request), request.confidence))


def sizes_of_family(request: Request) -> Sequence[Size]:
    """The presets of the family on all of the GPUs."""
    return [
        rates.size_on(request.cluster, name, request.tokens or tokens, request.tflops)
        for name, tokens in rates.recommended(request.family).items()
    ]


def _sizes_table(found: Recommendation, confidence: float) -> Table:
    table = new_table("model", "parameters", "tokens", "TFLOPS/GPU", "days", "80 % between", "in time", "")
    for size in found.sizes:
        figures = (escape(size.name), large(size.parameters), large(size.tokens))
        if size.tflops_per_gpu is None:
            table.add_row(*figures, "", "", "", "", escape(size.refusal))
            continue
        chosen = "chosen" if size is found.chosen else "fits" if size.fits(found.budget, confidence) else "too long"
        low, high = days_interval(size, found.budget.gpus)
        table.add_row(
            *figures,
            f"{size.tflops_per_gpu:.4g}",
            figure(size.days(found.budget.gpus)),
            f"{short(low)}-{short(high)}" if size.error else "",
            f"{size.chance(found.budget):.0%}",
            chosen,
        )
    return table


# ---------------------------------------------------------------- one size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OneModel:
    """Days of a model on GPUs, the GPUs that it needs for days, or whether both agree.

    Without `--gpus`, `size` and the request's GPUs are those that end in time as expected, and `sure` those that do
    so with the asked-for certainty; None where no number of nodes does.
    """

    request: Request
    size: Size
    sure: tuple[int, Size] | None
    law_tokens: str
    doubts: Sequence[Doubt]

    def show(self, console: Console) -> None:
        """Print the answer and the numbers behind it."""
        size, request = self.size, self.request
        print_answer(console, self.headline, self.doubts)
        print_facts(
            console,
            {
                "parameters": f"{large(size.parameters)}",
                "tokens": self.law_tokens or tokens_text(size, request),
                "days": days_with_interval(size, request.gpus or 1),
                "GPUs": self._gpus_text(),
                "TFLOPS/GPU": rate_text(size, request),
                "FLOPs": MODEL_FLOPS_CONVENTION,
            },
        )
        console.print(LEFT_OUT)
        if self.fits is not False:
            console.print(next_step(size.name, request), soft_wrap=True, markup=False)

    @property
    def fits(self) -> bool | None:
        """The model ends in these days with the asked-for certainty; None where no days were given."""
        days = self.request.days
        if days is None:
            return None
        return self.size.fits(Budget(gpus=self.request.gpus or 1, days=days), self.request.confidence)

    @property
    def headline(self) -> str:
        """The answer in a line."""
        request, size = self.request, self.size
        gpus = request.gpus or 1
        taken = f"{figure(size.days(gpus))}"
        if request.days is None:
            return f"{size.name} trains in {taken} days on {request.where}"
        if self.given:
            says = "fits" if self.fits else "does not fit"
            return f"{says}: {size.name} takes {taken} of {in_days(request.days)} on {request.where}"
        sure = "" if self.sure is None or not size.error else f", {self.sure[0]} to be {request.confidence:.0%} sure"
        return f"{size.name} in {in_days(request.days)} needs {gpus} × {request.cluster.gpu.name}{sure}"

    @property
    def given(self) -> bool:
        """The GPUs were asked for, not found."""
        return self.sure is None and self.request.days is not None

    def _gpus_text(self) -> str:
        request = self.request
        nodes = f"{request.gpus} ({request.cluster.nodes} nodes of {request.cluster.gpus_per_node})"
        if request.days is None:
            return nodes
        exact = f"{self.size.gpus(request.days):.1f} at this rate for exactly {request.days:g} days"
        return f"{nodes}; {exact}"

    def document(self) -> Mapping[str, Any]:
        """Everything that is printed."""
        request, size = self.request, self.size
        budget = Budget(gpus=request.gpus or 1, days=request.days or size.days(request.gpus or 1))
        return {
            "answer": self.headline,
            "fits": self.fits,
            "model": size_document(size, budget),
            "gpus_exactly": size.gpus(request.days) if request.days is not None else None,
            "gpus_surely": self.sure[0] if self.sure else None,
            "tokens_by": self.law_tokens or None,
            **doubts_document(self.doubts),
            "confidence": request.confidence,
            **circumstances(request),
        }


def one_model(request: Request, model: str, law_tokens: str = "", doubts: Sequence[Doubt] = ()) -> Result:
    """The days of one size on these GPUs, or the GPUs that it needs in these days."""
    tokens = request.tokens or rates.tokens_of(model)
    if tokens is None:
        raise InputError(f"--tokens: needed beside --model {model}, which is no preset with tokens of its own")
    if request.gpus is not None:
        size = rates.size_on(request.cluster, model, tokens, request.tflops)
        if size.tflops_per_gpu is None:
            raise NoFeasibleLayout(f"{model}: {size.refusal}\nwhat would help: more GPUs, or GPUs of more memory")
        return OneModel(request=request, size=size, sure=None, law_tokens=law_tokens, doubts=doubts)
    if request.days is None:
        raise InputError("--gpus or --days: one is needed beside --model, to find the other")
    days = request.days

    def in_time(size: Size, gpus: int) -> bool:
        return size.days(gpus) <= days

    def surely(size: Size, gpus: int) -> bool:
        return size.sure_days(gpus, request.confidence) <= days

    both = rates.fewest_nodes(request.cluster, model, tokens, request.tflops, (in_time, surely))
    if both[0] is None:
        most = request.cluster.nodes * request.cluster.gpus_per_node
        raise NoFeasibleLayout(
            f"{model}: no layout trains {large(tokens)} tokens in {days:g} days on up to {most} "
            f"{request.cluster.gpu.name}\nwhat would help: more days, fewer tokens or a smaller model"
        )
    cluster, size = both[0]
    gpus = cluster.nodes * cluster.gpus_per_node
    sure = (both[1][0].nodes * cluster.gpus_per_node, both[1][1]) if both[1] else None
    found = replace(request, gpus=gpus, cluster=cluster)
    return OneModel(request=found, size=size, sure=sure, law_tokens=law_tokens, doubts=doubts)
