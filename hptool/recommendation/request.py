"""What `hptool recommend` is asked: its flags, checked."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from hptool import files, plots, rates, scaling, seed_runs
from hptool.errors import InputError
from hptool.facts import Cluster
from hptool.recommend import Budget
from hptool.scaling import Fit, Law

Say = Callable[[str], None]


class Result(Protocol):
    """What a request came to: for people and for programs."""

    def show(self, console: Console) -> None:
        """Print it."""

    def document(self) -> Mapping[str, Any]:
        """Plain values for JSON."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
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
    def of(cls, options: Mapping[str, Any]) -> "Request":
        """Checked one by one, then against each other; the runs are fitted."""
        _check_numbers(options)
        tokens = read_tokens(options["tokens"])
        _check_together(options, tokens)
        cluster = rates.cluster_of(options["gpu"] or rates.USUAL_GPU, options["cluster"])
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


_COMPUTE_OPTIMAL = "compute-optimal"
_SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
MOST_TOKENS = 1e18


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


def read_tokens(text: str | None) -> float | str | None:
    """A count such as 300B or 3e11, the word compute-optimal, or None; InputError for anything else."""
    if text is None or text == _COMPUTE_OPTIMAL:
        return text
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e\+?[0-9]+)?)([kmbt]?)", text.lower())
    value = float(match[1]) * _SUFFIXES[match[2]] if match else 0.0
    if not 1 <= value <= MOST_TOKENS:
        raise InputError(
            f"--tokens: {text!r} given, allowed is a number from 1 to {MOST_TOKENS:g}, such as 300e9 or 300B, "
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
