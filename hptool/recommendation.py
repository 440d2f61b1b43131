"""`hptool recommend`: the size that a budget trains, the days or GPUs of one size, or what a scaling law advises."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hptool import files, plots, rates, scaling, seed_runs
from hptool.errors import InputError, NoFeasibleLayout
from hptool.facts import Cluster
from hptool.predict.flops import MODEL_FLOPS_CONVENTION
from hptool.recommend import Budget, Recommendation, Size, recommend
from hptool.scaling import FAR, FLOP_PER_PARAMETER_TOKEN, Doubt, Fit, Law, NextRun

Say = Callable[[str], None]

#: What a training takes beside its steps, which no figure here has.
_LEFT_OUT = "Days are those of the steps: checkpoints, validation and restarts come on top."

_ENCODER_TOKENS = "of the encoder; the decoder reads its own beside them"

#: Of the smallest preset: a size that far below is no extrapolation any more.
_SMALLEST_PART = 0.1

_INTERVAL = 1.2816  # standard deviations, as predictions show: 80 %


class Result(Protocol):
    """What a request came to: for people and for programs."""

    def show(self, console: Console) -> None:
        """Print it."""

    def document(self) -> Mapping[str, Any]:
        """Plain values for JSON."""


def answer(options: Mapping[str, Any], say: Say) -> Result:
    """What the flags ask for; InputError where they contradict each other or hold what cannot be."""
    request = _Request.of(options)
    if request.law is not None or request.fit is not None:
        return _by_law(request, say)
    if request.model is None:
        return _largest(request)
    return _one_model(request, request.model)


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Request:
    """The flags, checked. `tokens` is None for those of each preset, or for those that `law` or `fit` finds."""

    gpus: int | None
    days: float | None
    cluster: Cluster
    profile: str | None
    family: str
    model: str | None
    tokens: float | None
    tflops: float | None
    confidence: float
    law: Law | None
    fit: Fit | None
    ignored: Sequence[str]
    next_runs: bool
    size_factor: float | None
    plot: Path | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "_Request":
        """Checked one by one, then against each other; the runs are fitted."""
        _check_numbers(options)
        tokens = _tokens(options["tokens"])
        _check_together(options, tokens)
        cluster = rates.cluster_of(options["gpu"] or _GPU, options["cluster"])
        gpus = options["gpus"]
        if gpus is None and options["cluster"] is not None and options["model"] is None:
            gpus = cluster.nodes * cluster.gpus_per_node
        if gpus is not None:
            cluster = rates.with_gpus(cluster, gpus, options["cluster"])
        peak = max(cluster.gpu.peak_tflops.values())
        if options["tflops"] is not None and options["tflops"] > peak:
            raise InputError(
                f"--tflops: {options['tflops']:g} given, allowed is up to {peak:g}, the peak of {cluster.gpu.name}"
            )
        fit, ignored = _fitted(options)
        by_law = tokens == _COMPUTE_OPTIMAL or options["law"] is not None
        return cls(
            gpus=gpus,
            cluster=cluster,
            tokens=tokens if isinstance(tokens, float) else None,
            family=options["family"] or "gpt3",
            profile=options["cluster"],
            law=_published(options["law"]) if by_law and fit is None else None,
            fit=fit,
            ignored=ignored,
            **{name: options[name] for name in ("days", "model", "tflops", "confidence", "next_runs", "size_factor")},
            plot=options["plot"],
        )

    @property
    def budget(self) -> Budget:
        """What there is; both must have been given."""
        missing = [name for name in ("gpus", "days") if getattr(self, name) is None]
        if self.gpus is None or self.days is None:
            raise InputError(
                f"{' and '.join(f'--{name}' for name in missing)}: needed, such as --gpus 160 --days 5 "
                "(or --model, for the days or GPUs of one size)"
            )
        return Budget(gpus=self.gpus, days=self.days)

    @property
    def where(self) -> str:
        """The GPUs in words."""
        return f"{self.gpus} × {self.cluster.gpu.name}"


_GPU = "a100-80gb"
_COMPUTE_OPTIMAL = "compute-optimal"
_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_MOST_TOKENS = 1e18


def _check_numbers(options: Mapping[str, Any]) -> None:
    problems = [
        f"--{name.replace('_', '-')}: {options[name]:g} given, allowed is more than 0"
        for name in ("gpus", "days", "tflops", "size_factor")
        if options[name] is not None and not (math.isfinite(options[name]) and options[name] > 0)
    ]
    if not 0.5 <= options["confidence"] < 1:  # noqa: PLR2004 (an even chance)
        problems.append(f"--confidence: {options['confidence']:g} given, allowed is 0.5 or more and less than 1")
    if problems:
        raise InputError(*problems)


def _tokens(text: str | None) -> float | str | None:
    if text is None or text == _COMPUTE_OPTIMAL:
        return text
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e\+?[0-9]+)?)([kmbt]?)", text.lower())
    value = float(match[1]) * _SUFFIXES[match[2]] if match else 0.0
    if not 1 <= value <= _MOST_TOKENS:
        raise InputError(
            f"--tokens: {text!r} given, allowed is a number from 1 to {_MOST_TOKENS:g}, such as 300e9 or 300B, "
            f"or {_COMPUTE_OPTIMAL}"
        )
    return value


def _check_together(options: Mapping[str, Any], tokens: float | str | None) -> None:
    by_law = tokens == _COMPUTE_OPTIMAL or options["law"] is not None or options["runs"] is not None
    problems = []
    if by_law and isinstance(tokens, float):
        other = "--law" if options["law"] is not None else "--runs"
        problems.append(f"--tokens: {options['tokens']} given, but {other} finds the tokens; give one of them")
    pairs = [("law", "runs"), ("gpu", "cluster"), ("family", "model"), ("size_factor", "model")]
    problems += [
        f"--{first.replace('_', '-')}: is not for use with --{second}"
        for first, second in pairs
        if options[first] is not None and options[second] is not None
    ]
    needs = {name: "--runs" for name in ("keep_outliers", "next_runs", "plot") if options["runs"] is None}
    if not by_law:
        needs["size_factor"] = f"--tokens {_COMPUTE_OPTIMAL} (or --runs)"
    problems += [f"--{name.replace('_', '-')}: needs {what}" for name, what in needs.items() if options[name]]
    if problems:
        raise InputError(*problems)
    if options["plot"] is not None:
        plots.refuse_plot(options["plot"])


def _published(name: str | None) -> Law:
    laws = files.read(files.data_directory("base_configs") / "scaling_laws.yaml", scaling.Laws).laws
    known = {law.name: law for law in laws}
    if name is not None and name not in known:
        raise InputError(f"--law: unknown law {name!r}; {files.nearest(name, sorted(known))}")
    return known[name] if name is not None else laws[0]


def _fitted(options: Mapping[str, Any]) -> tuple[Fit | None, Sequence[str]]:
    if options["runs"] is None:
        return None, ()
    runs, ignored = seed_runs.read_runs(options["runs"])
    return scaling.fit_law(runs, keep_outliers=options["keep_outliers"]), ignored


# ---------------------------------------------------------------- the largest size of a family


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Largest:
    """The largest size of a family that trains within a budget, or what would help where none does."""

    request: _Request
    found: Recommendation

    def show(self, console: Console) -> None:
        """Print the answer, the numbers behind it and all sizes."""
        found, request = self.found, self.request
        _print_answer(console, self.headline, ())
        facts = {"fills the budget": self._filling()}
        if (size := found.chosen) is not None:
            facts |= {
                "preset": f"{size.name}, the largest that ends in time{_certainty(size, found.confidence)}",
                "tokens": _tokens_text(size, request),
                "days": _days_text(size, found.budget.gpus),
                "TFLOPS/GPU": _rate_text(size, request),
            }
        else:
            facts |= {"would help": self._help()}
        _print_facts(console, {**facts, "FLOPs": MODEL_FLOPS_CONVENTION})
        console.print(_sizes_table(found, found.confidence))
        console.print(_LEFT_OUT)
        if size is not None:
            console.print(_next_step(size.name, request), soft_wrap=True, markup=False)

    @property
    def headline(self) -> str:
        """The answer in a line."""
        found, budget = self.found, self.found.budget
        if (size := found.chosen) is not None:
            days = f"{_figure(size.days(budget.gpus))} of {_days(budget.days)}"
            return f"train {size.name} ({_large(size.parameters)} parameters): {days} on {self.request.where}"
        what = f"{self.request.family} in {_days(budget.days)} on {self.request.where}"
        smallest = next((size for size in found.sizes if size.tflops_per_gpu is not None), None)
        if smallest is None:
            return f"does not fit: no layout holds any size of {what}"
        days = _figure(smallest.days(budget.gpus))
        return f"does not fit: no size of {what}; the smallest, {smallest.name}, takes {days} days"

    def _filling(self) -> str:
        found = self.found
        if not found.filling:
            return "nothing: no layout holds any size"
        sure = f" ({_large(found.sure_filling)} to be {found.confidence:.0%} sure)" if not self.request.tflops else ""
        return (
            f"{_large(found.filling)} parameters take exactly {_days(found.budget.days)} on "
            f"{_large(found.filling_tokens)} tokens{sure}: {found.how}"
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
            own = f"; or a model of about {_large(found.sure_filling)} parameters"
        return (
            f"for {smallest.name}: {_figure(days)} days, or some {gpus} GPUs, or "
            f"{_large(smallest.tokens * budget.days / days)} tokens{own}"
        )

    def document(self) -> Mapping[str, Any]:
        """Everything that is printed."""
        found = self.found
        return {
            "answer": self.headline,
            "fits": found.chosen is not None,
            "recommended": _size_document(found.chosen, found.budget) if found.chosen else None,
            "parameters_that_fill_the_budget": found.filling or None,
            "parameters_that_fill_the_budget_surely": found.sure_filling or None,
            "parameters_found_by": found.how,
            "tokens_that_fill_the_budget_with_them": found.filling_tokens or None,
            "would_help": None if found.chosen else self._help(),
            "confidence": found.confidence,
            **_circumstances(self.request),
            "sizes": [
                {**_size_document(size, found.budget), "fits": size.fits(found.budget, found.confidence)}
                for size in found.sizes
            ],
        }


def _largest(request: _Request) -> Result:
    budget = request.budget
    return Largest(request=request, found=recommend(budget, _sizes(request), request.confidence))


def _sizes(request: _Request) -> Sequence[Size]:
    """The presets of the family on all of the GPUs."""
    return [
        rates.size_on(request.cluster, name, request.tokens or tokens, request.tflops)
        for name, tokens in rates.recommended(request.family).items()
    ]


def _sizes_table(found: Recommendation, confidence: float) -> Table:
    table = _table("model", "parameters", "tokens", "TFLOPS/GPU", "days", "80 % between", "in time", "")
    for size in found.sizes:
        figures = (escape(size.name), _large(size.parameters), _large(size.tokens))
        if size.tflops_per_gpu is None:
            table.add_row(*figures, "", "", "", "", escape(size.refusal))
            continue
        chosen = "chosen" if size is found.chosen else "fits" if size.fits(found.budget, confidence) else "too long"
        low, high = _interval(size, found.budget.gpus)
        table.add_row(
            *figures,
            f"{size.tflops_per_gpu:.4g}",
            _figure(size.days(found.budget.gpus)),
            f"{_short(low)}-{_short(high)}" if size.error else "",
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

    request: _Request
    size: Size
    sure: tuple[int, Size] | None
    law_tokens: str
    doubts: Sequence[Doubt]

    def show(self, console: Console) -> None:
        """Print the answer and the numbers behind it."""
        size, request = self.size, self.request
        _print_answer(console, self.headline, self.doubts)
        _print_facts(
            console,
            {
                "parameters": f"{_large(size.parameters)}",
                "tokens": self.law_tokens or _tokens_text(size, request),
                "days": _days_text(size, request.gpus or 1),
                "GPUs": self._gpus_text(),
                "TFLOPS/GPU": _rate_text(size, request),
                "FLOPs": MODEL_FLOPS_CONVENTION,
            },
        )
        console.print(_LEFT_OUT)
        console.print(_next_step(size.name, request), soft_wrap=True, markup=False)

    @property
    def headline(self) -> str:
        """The answer in a line."""
        request, size = self.request, self.size
        gpus = request.gpus or 1
        taken = f"{_figure(size.days(gpus))}"
        if request.days is None:
            return f"{size.name} trains in {taken} days on {request.where}"
        if self.given:
            fits = size.fits(Budget(gpus=gpus, days=request.days), request.confidence)
            says = "fits" if fits else "does not fit"
            return f"{says}: {size.name} takes {taken} of {_days(request.days)} on {request.where}"
        sure = "" if self.sure is None or not size.error else f", {self.sure[0]} to be {request.confidence:.0%} sure"
        return f"{size.name} in {_days(request.days)} needs {gpus} × {request.cluster.gpu.name}{sure}"

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
            "fits": size.fits(budget, request.confidence) if request.days is not None else None,
            "model": _size_document(size, budget),
            "gpus_exactly": size.gpus(request.days) if request.days is not None else None,
            "gpus_surely": self.sure[0] if self.sure else None,
            "tokens_by": self.law_tokens or None,
            **_doubts_document(self.doubts),
            "confidence": request.confidence,
            **_circumstances(request),
        }


def _one_model(request: _Request, model: str, law_tokens: str = "", doubts: Sequence[Doubt] = ()) -> Result:
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
            f"{model}: no layout trains {_large(tokens)} tokens in {days:g} days on up to {most} "
            f"{request.cluster.gpu.name}\nwhat would help: more days, fewer tokens or a smaller model"
        )
    cluster, size = both[0]
    gpus = cluster.nodes * cluster.gpus_per_node
    sure = (both[1][0].nodes * cluster.gpus_per_node, both[1][1]) if both[1] else None
    found = replace(request, gpus=gpus, cluster=cluster)
    return OneModel(request=found, size=size, sure=sure, law_tokens=law_tokens, doubts=doubts)


# ---------------------------------------------------------------- by a scaling law


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

    request: _Request
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
        _print_answer(console, self.headline, self.doubts)
        _print_facts(console, {**self._optimum_facts(), **self._law_facts()})
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
        best = f"{_large(self.optimum.parameters)} parameters on {_large(self.optimum.tokens)} tokens"
        nearest = f"; nearest preset {self.nearest.name}" if self.nearest else ""
        return f"train {best}: {_days(self.request.budget.days)} on {self.request.where}{nearest}"

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
            "optimal N": _large(best.parameters) + _between(best.parameters_interval),
            "optimal D": _large(best.tokens)
            + _between(_divided(best.compute, best.parameters_interval))
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
        for i, (name, value) in enumerate(_named(law).items()):
            interval = fit.interval(lambda laws, i=i: laws[..., i]) if fit else None  # type: ignore[misc]
            unknown = ", not determined by these runs" if fit and not fit.determined else ""
            facts[name] = f"{value:.5g}{_between(interval)}{unknown}"
        if fit is not None:
            least, most = float(fit.runs.compute.min()), float(fit.runs.compute.max())
            facts["runs"] = (
                f"{len(fit.runs)} of {least:.2g} to {most:.2g} FLOP, missed by {fit.rms:.2%} (rms); the fit supports "
                f"up to {FAR * most:.2g} FLOP ({FAR:g}x)"
            )
            facts |= {
                f"left out, line {run.line}": f"N {_large(run.parameters)}, D {_large(run.tokens)}, "
                f"loss {run.loss:.4g}: {run.error:+.0%} off the law"
                for run in fit.dropped
            }
        return facts

    def _presets_table(self) -> Table:
        table = _table("model", "parameters", "TFLOPS/GPU", "tokens", "tokens/N", "loss", "")
        for size in sorted(self.sizes, key=lambda size: size.parameters):
            start = (escape(size.name), _large(size.parameters))
            if size.tflops_per_gpu is None:
                table.add_row(*start, "", "", "", "", escape(size.refusal))
                continue
            tokens = size.tokens_within(self.request.budget)
            table.add_row(
                *start,
                f"{size.tflops_per_gpu:.4g}",
                _large(tokens),
                f"{tokens / size.active_parameters:.3g}",
                f"{self._loss(size):.4g}",
                "nearest" if size is self.nearest else "",
            )
        encoder = f" ({_ENCODER_TOKENS})" if any(size.encoder for size in self.sizes) else ""
        table.title = f"Presets, each on the tokens that fill the budget{encoder}"
        table.title_justify = "left"
        return table

    def _show_next_runs(self, console: Console) -> None:
        table = _table("parameters", "tokens", "FLOP", "N known within", "why")
        table.title = f"Next seed runs, for N at {self.target:.2g} FLOP; fit again after them"
        table.title_justify = "left"
        for run in self.next_runs:
            spread = f"{_spread(run.spread_before)} -> {_spread(run.spread_after)}"
            table.add_row(_large(run.parameters), _large(run.tokens), f"{run.compute:.2g}", spread, run.reason)
        console.print(table)

    def document(self) -> Mapping[str, Any]:
        """Everything that is printed."""
        return {
            "answer": self.headline,
            **_doubts_document(self.doubts),
            "law": {"name": self.law.name, "source": self.law.source, **_named(self.law)},
            "fit": self._fit_document(),
            "optimum": _plain(asdict(self.optimum)) if self.optimum else None,
            "size_factor": _plain(asdict(self.smaller)) if self.smaller else None,
            "nearest": self.nearest.name if self.optimum and self.nearest else None,
            "next_runs": [_plain({**asdict(run), "reason": run.reason}) for run in self.next_runs],
            "compute_convention": scaling.COMPUTE_CONVENTION,
            **_circumstances(self.request),
            "sizes": [{**_size_document(size, self.request.budget), **self._advised(size)} for size in self.sizes],
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
            for i, name in enumerate(_named(self.law))
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


def _by_law(request: _Request, say: Say) -> Result:
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
        sizes = _sizes(request)
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


def _model_by_law(request: _Request, model: str, law: Law) -> Result:
    anywhere = request.cluster if request.gpus is not None else replace(request.cluster, nodes=1)
    size = rates.size_on(anywhere, model, 1.0)
    tokens = law.optimal_tokens(size.active_parameters)
    if not 1 <= tokens <= _MOST_TOKENS:
        raise InputError(f"--model: {model} has no number of tokens that is optimal by the law {law.name}")
    text = f"{_large(tokens)}, compute-optimal by the law {law.name}"
    compute = FLOP_PER_PARAMETER_TOKEN * size.active_parameters * tokens
    return _one_model(replace(request, tokens=tokens), model, text, _doubts(request.fit, compute, [size]))


def _doubts(fit: Fit | None, compute: float | None, sizes: Sequence[Size]) -> Sequence[Doubt]:
    """Reasons not to trust the fit, where there is one, and a law of dense models for `sizes`."""
    return [*(scaling.doubts(fit, compute) if fit else ()), *_doubts_of(sizes)]


def _doubts_of(sizes: Sequence[Size]) -> list[Doubt]:
    if any(size.active_parameters < size.parameters for size in sizes):
        message = "the law is of dense models; of models with experts it is given the parameters that a token sees"
        return [Doubt(kind="experts", message=message)]
    return []


def _optimum(request: _Request, law: Law, budget: Budget, sizes: Sequence[Size]) -> Optimum:
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


def _smaller(request: _Request, law: Law, optimum: Optimum | None, sizes: Sequence[Size]) -> Smaller | None:
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
        return f"{_large(other.parameters)} parameters reach this loss on no number of tokens"
    return (
        f"{_large(other.parameters)} parameters reach this loss on {_large(other.tokens)} tokens: "
        f"{other.cost:.2f} × the FLOP, {_figure(other.days)} days"
    )


# ---------------------------------------------------------------- words and figures


def _named(law: Law) -> dict[str, float]:
    return {"E": law.e, "A": law.a, "B": law.b, "alpha": law.alpha, "beta": law.beta}


def _circumstances(request: _Request) -> dict[str, Any]:
    return {
        "gpus": request.gpus,
        "days": request.days,
        "gpu": request.cluster.gpu.name,
        "cluster": request.profile,
        "nodes": request.cluster.nodes if request.gpus is not None else None,
        "model_flops_convention": MODEL_FLOPS_CONVENTION,
    }


def _size_document(size: Size, budget: Budget) -> dict[str, Any]:
    low, high = _interval(size, budget.gpus)
    return _plain(
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


def _doubts_document(doubts: Sequence[Doubt]) -> dict[str, Any]:
    return {"trusted": not any(doubt.severe for doubt in doubts), "warnings": [asdict(doubt) for doubt in doubts]}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _interval(size: Size, gpus: float) -> tuple[float, float]:
    days, width = size.days(gpus), math.exp(_INTERVAL * size.error)
    return days / width, days * width


def _days_text(size: Size, gpus: float) -> str:
    low, high = _interval(size, gpus)
    between = f", 80 % between {_figure(low)} and {_figure(high)}" if size.error else ""
    return f"{_figure(size.days(gpus))}{between}"


def _tokens_text(size: Size, request: _Request) -> str:
    origin = "as given" if request.tokens else "the preset's; --tokens changes them"
    return f"{_large(size.tokens)} ({origin}){f', {_ENCODER_TOKENS}' if size.encoder else ''}"


def _certainty(size: Size, confidence: float) -> str:
    return f" with a probability of {confidence:.0%}" if size.error else ""


def _rate_text(size: Size, request: _Request) -> str:
    if request.tflops:
        return f"{size.tflops_per_gpu:.4g}, as given"
    nodes = f"{request.cluster.nodes} node{'s' * (request.cluster.nodes > 1)} of {request.cluster.gpus_per_node}"
    return f"{size.tflops_per_gpu:.4g}: hptool's prediction for its best layout on {nodes}, {size.layout}"


def _next_step(model: str, request: _Request) -> str:
    cluster = request.profile or "YOUR-CLUSTER"
    return f"next: hptool search-train --model {model} --cluster {cluster} --nodes {request.cluster.nodes}"


def _days(value: float) -> str:
    return f"{value:g} day{'s' * (value != 1)}"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"  # noqa: PLR2004 (no 1e+03)


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"  # noqa: PLR2004 (no 1e+02)


def _large(value: float) -> str:
    """5.05B, 300B, 1.2T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.3g}{letter}" if scaled < 999.5 else f"{scaled:.4g}{letter}"  # noqa: PLR2004
    return f"{value:.3g}"


def _between(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    large = low >= 1e4  # noqa: PLR2004 (parameters and tokens, not figures of a law)
    return f", 80 % between {_large(low) if large else f'{low:.4g}'} and {_large(high) if large else f'{high:.4g}'}"


def _divided(compute: float, parameters: tuple[float, float] | None) -> tuple[float, float] | None:
    """Tokens for an interval of parameters."""
    if parameters is None:
        return None
    low, high = (compute / FLOP_PER_PARAMETER_TOKEN / size for size in reversed(parameters))
    return low, high


def _spread(factor: float) -> str:
    return f"{factor:.2f}x" if factor < 100 else "nothing"  # noqa: PLR2004 (worth no figure)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i in (0, len(headings) - 1) else "right", no_wrap=i == 0)
    return table


def _print_answer(console: Console, answer: str, doubts: Sequence[Doubt]) -> None:
    doubtful = "not to be trusted: " if any(doubt.severe for doubt in doubts) else ""
    console.print(f"{doubtful}{answer}", style="bold", soft_wrap=True, markup=False)
    for doubt in doubts:
        console.print(f"warning: {doubt.message}", soft_wrap=True, markup=False)


def _print_facts(console: Console, facts: Mapping[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    for name, text in facts.items():
        table.add_row(name, escape(text))
    console.print(table)
