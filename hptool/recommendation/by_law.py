"""What a scaling law advises: published, or fitted to own runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hptool import plots, rates, scaling
from hptool.errors import InputError, NoFeasibleLayout
from hptool.recommend import Budget, Size
from hptool.recommendation.request import MOST_TOKENS, Request, Result, Say
from hptool.recommendation.sizes import one_model, sizes_of_family
from hptool.recommendation.words import (
    ENCODER_TOKENS,
    between,
    circumstances,
    divided,
    doubts_document,
    figure,
    in_days,
    large,
    law_parameters,
    new_table,
    plain,
    print_answer,
    print_facts,
    size_document,
    spread,
)
from hptool.scaling import FAR, FLOP_PER_PARAMETER_TOKEN, Doubt, Fit, Law, NextRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """What a law makes of `compute` FLOP (6·N·D): the best N and D, and the loss that they reach."""

    compute: float
    parameters: float
    tokens: float
    loss: float
    tflops_per_gpu: float
    rate_from: str
    parameters_interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Smaller:
    """A model of another size that reaches the loss of the optimum; `tokens` are infinite where none do."""

    factor: float
    parameters: float
    tokens: float
    cost: float
    days: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ByLaw:
    """A law, how far to trust it, and what it advises for the budget, if there is one."""

    request: Request
    law: Law
    fit: Fit | None
    doubts: Sequence[Doubt]
    optimum: Optimum | None
    sizes: Sequence[Size]
    smaller: Smaller | None
    next_runs: Sequence[NextRun]
    target: float

    def show(self, console: Console) -> None:
        """Print the answer, how far to trust it, and the numbers behind it."""
        print_answer(console, self.headline, self.doubts)
        print_facts(console, {**self._optimum_facts(), **self._law_facts()})
        if self.optimum is not None:
            console.print(self._presets_table())
        if self.next_runs:
            self._show_next_runs(console)
        if self.request.plot is not None:
            console.print(f"written: {self.request.plot}", soft_wrap=True, markup=False)

    @property
    def headline(self) -> str:
        """The answer in a line."""
        if self.optimum is None:
            return f"a law fitted to {len(self.fit.runs) if self.fit else 0} runs"
        best = f"{large(self.optimum.parameters)} parameters on {large(self.optimum.tokens)} tokens"
        nearest = f"; nearest preset {self.nearest.name}" if self.nearest else ""
        return f"train {best}: {in_days(self.request.budget.days)} on {self.request.where}{nearest}"

    @property
    def nearest(self) -> Size | None:
        """The preset that reaches the least loss within the budget."""
        possible = [size for size in self.sizes if size.tflops_per_gpu is not None]
        return min(possible, key=self._loss) if possible else None

    def _loss(self, size: Size) -> float:
        return self.law.loss(size.active_parameters, size.tokens_within(self.request.budget))

    def _optimum_facts(self) -> dict[str, str]:
        best = self.optimum
        if best is None:
            return {}
        facts = {
            "optimal N": large(best.parameters) + between(best.parameters_interval),
            "optimal D": large(best.tokens)
            + between(divided(best.compute, best.parameters_interval))
            + f", {best.tokens / best.parameters:.1f} for each parameter",
            "loss": f"{best.loss:.4g} by the law",
            "compute": f"{best.compute:.3g} FLOP, {scaling.COMPUTE_CONVENTION}",
            "TFLOPS/GPU": f"{best.tflops_per_gpu:.4g}: {best.rate_from}",
        }
        if (other := self.smaller) is not None:
            facts[f"{other.factor:g} × the size"] = _smaller_text(other)
        return facts

    def _law_facts(self) -> dict[str, str]:
        law, fit = self.law, self.fit
        facts = {"law": f"{law.name}: L(N, D) = E + A / N^alpha + B / D^beta", "source": law.source}
        for i, (name, value) in enumerate(law_parameters(law).items()):
            interval = fit.interval(lambda laws, i=i: laws[..., i]) if fit else None  # type: ignore[misc]
            unknown = ", not determined by these runs" if fit and not fit.determined else ""
            facts[name] = f"{value:.5g}{between(interval)}{unknown}"
        if fit is not None:
            least, most = float(fit.runs.compute.min()), float(fit.runs.compute.max())
            facts["runs"] = (
                f"{len(fit.runs)} of {least:.2g} to {most:.2g} FLOP, missed by {fit.rms:.2%} (rms); the fit supports "
                f"up to {FAR * most:.2g} FLOP ({FAR:g}x)"
            )
            facts |= {
                f"left out, line {run.line}": f"N {large(run.parameters)}, D {large(run.tokens)}, "
                f"loss {run.loss:.4g}: {run.error:+.0%} off the law"
                for run in fit.dropped
            }
        return facts

    def _presets_table(self) -> Table:
        table = new_table("model", "parameters", "TFLOPS/GPU", "tokens", "tokens/N", "loss", "")
        for size in sorted(self.sizes, key=lambda size: size.parameters):
            start = (escape(size.name), large(size.parameters))
            if size.tflops_per_gpu is None:
                table.add_row(*start, "", "", "", "", escape(size.refusal))
                continue
            tokens = size.tokens_within(self.request.budget)
            table.add_row(
                *start,
                f"{size.tflops_per_gpu:.4g}",
                large(tokens),
                f"{tokens / size.active_parameters:.3g}",
                f"{self._loss(size):.4g}",
                "nearest" if size is self.nearest else "",
            )
        encoder = f" ({ENCODER_TOKENS})" if any(size.encoder for size in self.sizes) else ""
        table.title = f"Presets, each on the tokens that fill the budget{encoder}"
        table.title_justify = "left"
        return table

    def _show_next_runs(self, console: Console) -> None:
        table = new_table("parameters", "tokens", "FLOP", "N known within", "why")
        table.title = f"Next seed runs, for N at {self.target:.2g} FLOP; fit again after them"
        table.title_justify = "left"
        for run in self.next_runs:
            narrowed = f"{spread(run.spread_before)} -> {spread(run.spread_after)}"
            table.add_row(large(run.parameters), large(run.tokens), f"{run.compute:.2g}", narrowed, run.reason)
        console.print(table)

    def document(self) -> Mapping[str, Any]:
        """Everything that is printed."""
        return {
            "answer": self.headline,
            **doubts_document(self.doubts),
            "law": {"name": self.law.name, "source": self.law.source, **law_parameters(self.law)},
            "fit": self._fit_document(),
            "optimum": plain(asdict(self.optimum)) if self.optimum else None,
            "size_factor": plain(asdict(self.smaller)) if self.smaller else None,
            "nearest": self.nearest.name if self.optimum and self.nearest else None,
            "next_runs": [plain({**asdict(run), "reason": run.reason}) for run in self.next_runs],
            "compute_convention": scaling.COMPUTE_CONVENTION,
            **circumstances(self.request),
            "sizes": [{**size_document(size, self.request.budget), **self._advised(size)} for size in self.sizes],
        }

    def _advised(self, size: Size) -> Mapping[str, Any]:
        if size.tflops_per_gpu is None:
            return {"tokens_that_fill_the_budget": None, "loss": None}
        return {"tokens_that_fill_the_budget": size.tokens_within(self.request.budget), "loss": self._loss(size)}

    def _fit_document(self) -> Mapping[str, Any] | None:
        fit = self.fit
        if fit is None:
            return None
        intervals = {
            name: fit.interval(lambda laws, i=i: laws[..., i])  # type: ignore[misc]
            for i, name in enumerate(law_parameters(self.law))
        }
        compute = fit.runs.compute
        return {
            "runs": len(fit.runs),
            "determined": fit.determined,
            "interval_80": intervals,
            "rms_residual": fit.rms,
            "compute": [float(compute.min()), float(compute.max())],
            "supported_compute": FAR * float(compute.max()),
            "dropped": [asdict(run) for run in fit.dropped],
            "ignored_columns": list(self.request.ignored),
        }


def by_law(request: Request, say: Say) -> Result:
    """Parameters and tokens of the least loss on the budget; InputError where the law cannot tell."""
    fit = request.fit
    law = fit.law if fit is not None else request.law
    if law is None:
        msg = "neither a law nor a fit"
        raise ValueError(msg)
    if request.ignored:
        say(f"ignored columns: {', '.join(request.ignored)}")
    if request.model is not None:
        return _model_by_law(request, request.model, law)
    optimum: Optimum | None = None
    sizes: Sequence[Size] = ()
    if request.gpus is not None or request.days is not None or fit is None:
        budget = request.budget  # first, because it may be missing
        sizes = sizes_of_family(request)
        optimum = _optimum(request, law, budget, sizes)
    compute = optimum.compute if optimum else None
    target = compute or (FAR * float(fit.runs.compute.max()) if fit else 0.0)
    if request.plot is not None and fit is not None:
        plots.save_fit(request.plot, fit, compute)
    return ByLaw(
        request=request,
        law=law,
        fit=fit,
        doubts=_doubts(fit, compute, sizes),
        optimum=optimum,
        sizes=sizes,
        smaller=_smaller(request, law, optimum, sizes),
        next_runs=scaling.next_runs(fit, target) if fit and request.next_runs else (),
        target=target,
    )


def _model_by_law(request: Request, model: str, law: Law) -> Result:
    anywhere = request.cluster if request.gpus is not None else replace(request.cluster, nodes=1)
    size = rates.size_on(anywhere, model, 1.0)
    tokens = law.optimal_tokens(size.active_parameters)
    if not 1 <= tokens <= MOST_TOKENS:
        raise InputError(f"--model: {model} has no number of tokens that is optimal by the law {law.name}")
    text = f"{large(tokens)}, compute-optimal by the law {law.name}"
    compute = FLOP_PER_PARAMETER_TOKEN * size.active_parameters * tokens
    return one_model(replace(request, tokens=tokens), model, text, _doubts(request.fit, compute, [size]))


def _doubts(fit: Fit | None, compute: float | None, sizes: Sequence[Size]) -> Sequence[Doubt]:
    """Reasons not to trust the fit, where there is one, and a law of dense models for `sizes`."""
    return [*(scaling.doubts(fit, compute) if fit else ()), *_doubts_of(sizes)]


def _doubts_of(sizes: Sequence[Size]) -> list[Doubt]:
    if any(size.active_parameters < size.parameters for size in sizes):
        message = "the law is of dense models; of models with experts it is given the parameters that a token sees"
        return [Doubt(kind="experts", message=message)]
    return []


def _optimum(request: Request, law: Law, budget: Budget, sizes: Sequence[Size]) -> Optimum:
    """The rate depends on the size and the size on the rate: found by going round a few times."""
    possible = sorted((s for s in sizes if s.tflops_per_gpu is not None), key=lambda size: size.active_parameters)
    if not possible:
        raise NoFeasibleLayout(f"no layout holds any size of {request.family} on {request.where}")
    parameters = possible[len(possible) // 2].active_parameters
    for _ in range(20):
        parameters = law.optimal_parameters(budget.flop(_rate(possible, parameters)))
    rate = _rate(possible, parameters)
    compute = budget.flop(rate)
    tokens = compute / FLOP_PER_PARAMETER_TOKEN / parameters
    return Optimum(
        compute=compute,
        parameters=parameters,
        tokens=tokens,
        loss=law.loss(parameters, tokens),
        tflops_per_gpu=rate,
        rate_from="given" if request.tflops else _rate_source(possible, parameters),
        parameters_interval=request.fit.interval(lambda laws: scaling.optimal_parameters(laws, compute))
        if request.fit
        else None,
    )


def _rate(sizes: Sequence[Size], parameters: float) -> float:
    """TFLOPS per GPU of a model of that size: linear in log parameters between presets, beyond them the last."""
    logs = [math.log(size.active_parameters) for size in sizes]
    return float(np.interp(math.log(parameters), logs, [size.tflops_per_gpu or 0.0 for size in sizes]))


def _rate_source(sizes: Sequence[Size], parameters: float) -> str:
    below = [size.name for size in sizes if size.active_parameters <= parameters][-1:]
    above = [size.name for size in sizes if size.active_parameters > parameters][:1]
    return f"hptool's prediction for the best layout{'s' * (len(below + above) - 1)} of {' and '.join(below + above)}"


def _smaller(request: Request, law: Law, optimum: Optimum | None, sizes: Sequence[Size]) -> Smaller | None:
    if request.size_factor is None:
        return None
    if optimum is None:
        raise InputError("--size-factor: needs a budget: --gpus and --days")
    parameters = request.size_factor * optimum.parameters
    tokens = law.tokens_for(parameters, optimum.loss)
    possible = sorted((s for s in sizes if s.tflops_per_gpu is not None), key=lambda size: size.active_parameters)
    cost = parameters * tokens / (optimum.parameters * optimum.tokens)
    slower = optimum.tflops_per_gpu / _rate(possible, parameters)
    return Smaller(
        factor=request.size_factor,
        parameters=parameters,
        tokens=tokens,
        cost=cost,
        days=request.budget.days * cost * slower,
    )


def _smaller_text(other: Smaller) -> str:
    if math.isinf(other.tokens):
        return f"{large(other.parameters)} parameters reach this loss on no number of tokens"
    return (
        f"{large(other.parameters)} parameters reach this loss on {large(other.tokens)} tokens: "
        f"{other.cost:.2f} × the FLOP, {figure(other.days)} days"
    )
