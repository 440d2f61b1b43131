"""Curves of efficiency, fitted to timed operations: what `layer.py` multiplies the data sheet with, from measurements.

Each fit inverts one formula of `layer.py`. Residuals are logarithms of measured over predicted times, so that a
microsecond of a small operation counts as much as a millisecond of a large one; their loss grows linearly beyond a few
per cent, so that a disturbed point among several does not move a curve.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hptool.facts import Efficiency, Framework, GpuSpec, Link, MeasuredPoint, Precision
from hptool.predict.layer import BACKWARD_ATTENTION, TILE
from hptool.predict.setting import WEIGHT_BYTES
from hptool.units import GB, MICRO, TERA

Floats = NDArray[np.float64]

#: Where the loss turns from squares to absolute values: timers of quiet machines repeat within some 3 %.
_NOISE = 0.03

#: The search for a minimum: points on each axis of a grid, how often it is drawn closer around its best and by how
#: much, so that no other valley is missed. Then steps along the valley, in which efficiency and half-way marks trade
#: for each other, too narrow for a grid.
_GRID = 9
_ZOOMS = 16
_ZOOM = 0.7
_STEPS = 80
_DIFFERENCE = 1e-5

#: No curve is half-way up only beyond these: waves, elements of depth, keys. Larger ones mean a rate and no curve.
_MOST_WAVES = 64.0
_MOST_DEPTH = 4096.0
_MOST_LENGTH = 16384.0

#: What a link can be: from a slow network to ten times NVLink; from shared memory to a rank that waits for its core.
_LINK_BYTES_PER_S = (1e6, 1e13)
_LINK_LATENCY_S = (1e-7, 1.0)

#: Efficiencies looked at. A device whose data sheet is unknown may be faster than what is held for its peak.
_LEAST_EFFICIENCY = 0.01
_MOST_EFFICIENCY = 100.0

#: A curve of three figures asks for more points than it has figures.
_FEWEST_POINTS = {"gemm": 6, "attention": 3, "link": 4}

#: Bytes that go through a rank's port over those of the message, by collective, for n ranks (ring algorithms;
#: nccl-tests, doc/PERFORMANCE.md). `layer.py` counts them so.
RING_SHARE: Mapping[str, Callable[[float], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,  # noqa: ARG005 (of however many)
}

GEMM = "gemm"
ATTENTION = "attention"
LAYER_REST = "layer_rest"
TINY_LAYER = "tiny_layer"
COPY = "copy"

#: Kernels of a layer that are no GEMM, and how often a layer runs each, by its hidden size or by the MLP's width.
KERNELS: Mapping[str, int] = {"norm": 2, "activation": 1, "residual_add": 2}

#: What is left of them where a compiler merges them: each reads and writes, and merged with a neighbour does one of it.
_MERGED = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmarks:
    """What the ranks of a calibration measured; `left_out` are operations for which there was no time."""

    device: str
    multiprocessors: int | None
    memory_gib: float | None
    versions: Mapping[str, str]
    took_s: float
    nodes: int
    gpus_per_node: int
    precision: Precision
    points: tuple[MeasuredPoint, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Figures by name, and their relative error at the points they were fitted to (root mean square, logarithms)."""

    figures: Mapping[str, float]
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """A GPU's figures as measured; those that were not measured are as they were, and named in `kept`."""

    efficiency: Efficiency
    launch_overhead_us: float
    peak_tflops: float
    memory_gb_per_s: float
    intra_node: Link | None
    inter_node: Link | None
    errors: Mapping[str, float]
    kept: tuple[str, ...] = field(default=())


# ---------------------------------------------------------------- one curve each


def fit_gemm(
    rows: Floats,
    columns: Floats,
    depth: Floats,
    seconds: Floats,
    *,
    peak_flops_per_s: float,
    multiprocessors: int,
    element_bytes: int,
    memory_bytes_per_s: float,
    most_efficiency: float = 1.0,
) -> Fit:
    """`gemm`, `gemm_half_waves` and `gemm_half_depth` of `layer.gemm_s`, from GEMMs of rows x columns over a depth."""
    ideal = 2 * rows * columns * depth / peak_flops_per_s
    moving = element_bytes * (rows * columns + rows * depth + columns * depth) / memory_bytes_per_s
    waves = rows * columns / (TILE * TILE * multiprocessors)

    def predicted(efficiency: Floats, half_waves: Floats, half_depth: Floats) -> Floats:
        loss = (1 + half_waves / waves) * (1 + half_depth / depth)
        return np.asarray(np.maximum(ideal / efficiency * loss, moving))

    axes: _Axes = {
        "gemm": _Logarithmic(_LEAST_EFFICIENCY, most_efficiency),
        "gemm_half_waves": _FromZero(_MOST_WAVES, 0.01),
        "gemm_half_depth": _FromZero(_MOST_DEPTH, 1.0),
    }
    return _fit(predicted, axes, seconds)


def fit_attention(
    flops: Floats, keys: Floats, seconds: Floats, *, peak_flops_per_s: float, most_efficiency: float = 1.0
) -> Fit:
    """`attention` and `attention_half_length` of flash attention, from passes of so many FLOP over so many keys."""

    def predicted(efficiency: Floats, half_length: Floats) -> Floats:
        return np.asarray(flops / (peak_flops_per_s * efficiency) * (1 + half_length / keys))

    axes: _Axes = {
        "attention": _Logarithmic(_LEAST_EFFICIENCY, most_efficiency),
        "attention_half_length": _FromZero(_MOST_LENGTH, 1.0),
    }
    return _fit(predicted, axes, seconds)


def fit_link(ring_bytes: Floats, hops: Floats, seconds: Floats) -> Fit:
    """`bytes_per_s` and `latency_s` of a link: bytes over the one, hops times the other (`layer.transfer_s`)."""

    def predicted(bytes_per_s: Floats, latency_s: Floats) -> Floats:
        return np.asarray(ring_bytes / bytes_per_s + hops * latency_s)

    axes: _Axes = {"bytes_per_s": _Logarithmic(*_LINK_BYTES_PER_S), "latency_s": _Logarithmic(*_LINK_LATENCY_S)}
    return _fit(predicted, axes, seconds)


def fit_rate(work: Floats, seconds: Floats) -> Fit:
    """The `rate` of work a second that is in the middle of the points."""
    logs = np.log(work / seconds)
    middle = float(np.median(logs))
    return Fit(figures={"rate": float(np.exp(middle))}, error=_spread(logs - middle))


@dataclass(frozen=True, slots=True)
class _Logarithmic:
    """An axis from `least` to `most`, each step of the grid a factor."""

    least: float
    most: float

    @property
    def length(self) -> float:
        return float(np.log(self.most / self.least))

    def value(self, place: Floats) -> Floats:
        return np.asarray(self.least * np.exp(place))


@dataclass(frozen=True, slots=True)
class _FromZero:
    """An axis from 0 to `most`: steps of about `fine` near zero, factors far from it."""

    most: float
    fine: float

    @property
    def length(self) -> float:
        return float(np.log1p(self.most / self.fine))

    def value(self, place: Floats) -> Floats:
        return np.asarray(self.fine * np.expm1(place))


_Axes: TypeAlias = Mapping[str, _Logarithmic | _FromZero]


def _fit(predicted: Callable[..., Floats], axes: _Axes, seconds: Floats) -> Fit:
    """The figures on the axes whose predictions come nearest to the measured seconds."""
    measured = np.log(seconds)

    def residuals(places: Floats) -> Floats:
        values = [axis.value(places[:, i, None]) for i, axis in enumerate(axes.values())]
        return np.asarray(measured - np.log(predicted(*values)))

    def loss(places: Floats) -> Floats:
        return np.asarray(np.mean(np.sqrt(1 + (residuals(places) / _NOISE) ** 2), axis=1))

    lengths = np.array([axis.length for axis in axes.values()])
    best = _step_down(residuals, _search(loss, lengths), lengths)
    figures = {name: float(axis.value(best[i])) for i, (name, axis) in enumerate(axes.items())}
    return Fit(figures=figures, error=_spread(residuals(best[None])[0]))


def _search(loss: Callable[[Floats], Floats], lengths: Floats) -> Floats:
    """About the place of the least loss between 0 and `lengths`: a grid that is drawn closer around its best point."""
    steps = np.stack(np.meshgrid(*[np.linspace(-1, 1, _GRID)] * len(lengths), indexing="ij"), axis=-1)
    steps = steps.reshape(-1, len(lengths))
    best, half = lengths / 2, lengths / 2
    for _ in range(_ZOOMS):
        # The best so far is on the grid, so that the loss never rises.
        places = np.clip(best + steps * half, 0.0, lengths)
        best, half = places[int(np.argmin(loss(places)))], half * _ZOOM
    return np.asarray(best)


def _step_down(residuals: Callable[[Floats], Floats], start: Floats, lengths: Floats) -> Floats:
    """The bottom of the valley at `start`, by the steps of Levenberg and Marquardt on squares weighted by the loss."""
    place, damping = start, 1e-3
    moves = _DIFFERENCE * np.eye(len(start))

    def loss(at: Floats) -> float:
        return float(np.mean(np.sqrt(1 + (residuals(at[None])[0] / _NOISE) ** 2)))

    for _ in range(_STEPS):
        own = residuals(place[None])[0]
        slopes = (residuals(place + moves) - residuals(place - moves)).T / (2 * _DIFFERENCE)
        weights = 1 / np.sqrt(1 + (own / _NOISE) ** 2)
        downhill = -slopes.T @ (weights * own)
        # What is at its limit and would go beyond it stays, and leaves the others their way.
        free = ~((place <= 0) & (downhill < 0) | (place >= lengths) & (downhill > 0))
        if not np.any(free):
            break
        curvature = (slopes.T @ (weights[:, None] * slopes))[np.ix_(free, free)]
        damped = curvature + damping * np.diag(np.diag(curvature) + 1e-12)
        step = np.zeros_like(place)
        step[free] = np.linalg.solve(damped, downhill[free])
        tried = np.clip(place + step, 0.0, lengths)
        if loss(tried) < loss(place):
            place, damping = tried, damping / 4
        else:
            damping *= 8
            if damping > 1 / _DIFFERENCE**2:
                break
    return place


def _spread(residuals: Floats) -> float:
    return float(np.sqrt(np.mean(residuals**2)))


# ---------------------------------------------------------------- all of a GPU


def fit_curves(found: Benchmarks, gpu: GpuSpec, framework: Framework) -> Curves:
    """All figures of `gpu` that its benchmarks tell, as the predictions of `framework` use them.

    Memory comes first, since a GEMM is never faster than its operands move. Where the peaks are no data sheet's (a
    CPU's), they are raised to what was measured, for no efficiency is above one.
    """
    points = _Points(found.points)
    errors: dict[str, float] = {}
    figures: dict[str, float] = {}
    kept: list[str] = []

    def take(what: str, fit: Fit | None, *names: str) -> None:
        if fit is None:
            kept.extend(names)
        else:
            errors[what] = fit.error
            figures.update(fit.figures)

    launch_s = _launch_s(points, framework)
    take("launch", launch_s, "launch_overhead_us")
    overhead_us = figures["launch_s"] / MICRO if launch_s else gpu.launch_overhead_us
    copying = max([2 * p.sizes["bytes"] / (p.time_us * MICRO) for p in points.of(COPY)], default=0.0)
    memory_gb_per_s = max(gpu.memory_gb_per_s, copying / GB)
    element = WEIGHT_BYTES[found.precision]
    # A CPU is its own host: it computes nothing while it launches.
    launching_s = overhead_us * MICRO * _operations(framework) if gpu.device == "cpu" else 0.0
    bound = _memory(points, framework, element, launching_s)
    take("memory", bound, "memory")
    memory = gpu.efficiency.memory * gpu.memory_gb_per_s / memory_gb_per_s
    if bound is not None:
        memory = min(1.0, figures["rate"] / (memory_gb_per_s * GB))
    most = _MOST_EFFICIENCY if gpu.device == "cpu" else 1.0
    peak = gpu.peak_tflops[found.precision] * TERA
    gemms = points.of(GEMM)
    gemm = None
    if len(gemms) >= _FEWEST_POINTS["gemm"]:
        gemm = fit_gemm(
            points.sizes(gemms, "rows"),
            points.sizes(gemms, "columns"),
            points.sizes(gemms, "depth"),
            points.seconds(gemms),
            peak_flops_per_s=peak,
            multiprocessors=gpu.multiprocessors,
            element_bytes=element,
            memory_bytes_per_s=memory * memory_gb_per_s * GB,
            most_efficiency=most,
        )
    take("gemm", gemm, "gemm", "gemm_half_waves", "gemm_half_depth")
    attentions = points.of(ATTENTION)
    attention = None
    if len(attentions) >= _FEWEST_POINTS["attention"]:
        attention = fit_attention(
            np.array([attention_flops(point) for point in attentions]),
            points.sizes(attentions, "length"),
            points.seconds(attentions),
            peak_flops_per_s=peak * framework.attention_speed,
            most_efficiency=most,
        )
    take("attention", attention, "attention", "attention_half_length")
    figures["memory"] = memory
    given = {name: getattr(gpu.efficiency, name) for name in Efficiency.__dataclass_fields__} | {
        name: value for name, value in figures.items() if name in Efficiency.__dataclass_fields__
    }
    # What is faster than the peak that was held for it shows that the peak was none.
    raised = max(1.0, given["gemm"], given["attention"]) if gpu.device == "cpu" else 1.0
    given |= {name: min(1.0, given[name] / raised) for name in ("gemm", "attention")}
    links: dict[str, Link | None] = {}
    for name, way in (("intra_node", "inside"), ("inter_node", "across")):
        fit = _link(points, way)
        links[name] = None if fit is None else _as_link(fit, getattr(gpu, name), is_nominal=gpu.device == "cuda")
        take(name, fit, *([name] if name == "intra_node" or found.nodes > 1 else []))
    return Curves(
        efficiency=Efficiency(**given),
        launch_overhead_us=overhead_us,
        peak_tflops=gpu.peak_tflops[found.precision] * raised,
        memory_gb_per_s=memory_gb_per_s,
        intra_node=links["intra_node"],
        inter_node=links["inter_node"],
        errors=errors,
        kept=tuple(kept),
    )


def attention_flops(point: MeasuredPoint) -> float:
    """Of one forward and backward pass, as `layer.py` counts them: half of all scores where a mask is causal."""
    s = point.sizes
    whole = 4.0 * s["batch"] * s["length"] ** 2 * s["heads"] * s["head_size"]
    return whole * (1 - 0.5 * s["causal"]) * (1 + BACKWARD_ATTENTION)


def layer_gemms(hidden: int, ffn: int, tokens: int) -> Sequence[Mapping[str, int]]:
    """Sizes of all GEMMs of a plain layer: four linear ones, each forward (pass 0), by inputs (1), by weights (2)."""
    linear = ((hidden, 3 * hidden), (hidden, hidden), (hidden, ffn), (ffn, hidden))
    return [gemm for width_in, width_out in linear for gemm in linear_gemms(tokens, width_in, width_out)]


def linear_gemms(tokens: int, width_in: int, width_out: int) -> Sequence[Mapping[str, int]]:
    """Sizes of the three GEMMs of a linear layer: forward (pass 0), by inputs (1), by weights (2)."""
    shapes = ((tokens, width_out, width_in), (tokens, width_in, width_out), (width_out, width_in, tokens))
    return [dict(rows=m, columns=n, depth=k, **{"pass": i}) for i, (m, n, k) in enumerate(shapes)]


class _Points:
    """Points by kind."""

    def __init__(self, points: Iterable[MeasuredPoint]) -> None:
        self._points = tuple(points)

    def of(self, *kinds: str) -> Sequence[MeasuredPoint]:
        return [point for point in self._points if point.kind in kinds]

    def time_s(self, kind: str, **sizes: int) -> float | None:
        """Of the point with these sizes; None where there is none."""
        found = [p for p in self.of(kind) if all(p.sizes.get(name) == value for name, value in sizes.items())]
        return found[0].time_us * MICRO if found else None

    @staticmethod
    def sizes(points: Sequence[MeasuredPoint], name: str) -> Floats:
        return np.array([point.sizes[name] for point in points], dtype=np.float64)

    @staticmethod
    def seconds(points: Sequence[MeasuredPoint]) -> Floats:
        return np.array([point.time_us * MICRO for point in points], dtype=np.float64)


def _operations(framework: Framework) -> float:
    return framework.forward_operations + framework.backward_operations


def _launch_s(points: _Points, framework: Framework) -> Fit | None:
    """Host seconds of an operation: a layer so small that the host is all of its time, over its operations."""
    tiny = points.of(TINY_LAYER)
    if not tiny:
        return None
    each = points.seconds(tiny) / _operations(framework)
    return Fit(figures={"launch_s": float(np.median(each))}, error=_spread(np.log(each / np.median(each))))


def _memory(points: _Points, framework: Framework, element_bytes: int, launching_s: float) -> Fit | None:
    """Bytes that the formulas count for a layer, over the time that it takes beside its GEMMs and its attention.

    The passes of a framework stand for all of that time. It is a difference of noisy times, but never less than what
    the kernels of KERNELS take, merged as well as can be.
    """
    moved, seconds = [], []
    for layer in points.of(LAYER_REST):
        size = layer.sizes
        hidden, ffn, tokens = size["hidden"], size["ffn"], size["batch"] * size["length"]
        widths = {name: ffn if name == "activation" else hidden for name in KERNELS}
        least = _MERGED * sum(
            count * (points.time_s(name, tokens=tokens, width=widths[name]) or 0.0) for name, count in KERNELS.items()
        )
        rest = max(layer.time_us * MICRO - launching_s, least)
        if rest > 0:
            passes = framework.hidden_passes * hidden + framework.ffn_passes * ffn
            moved.append(3 * tokens * passes * element_bytes)
            seconds.append(rest)
    return fit_rate(np.array(moved), np.array(seconds)) if moved else None


def _link(points: _Points, way: str) -> Fit | None:
    """Of the collectives inside nodes, or of those whose ranks are each on a node of its own."""
    across = int(way == "across")
    own = [p for p in points.of(*RING_SHARE) if p.sizes["across"] == across and p.sizes["ranks"] > 1]
    if len(own) < _FEWEST_POINTS["link"]:
        return None
    ring = np.array([RING_SHARE[p.kind](p.sizes["ranks"]) * p.sizes["bytes"] for p in own])
    hops = np.array([1.0 if p.kind == "send" else np.log2(p.sizes["ranks"]) for p in own])
    return fit_link(ring, hops, points.seconds(own))


def _as_link(fit: Fit, held: Link, *, is_nominal: bool) -> Link:
    """With the data sheet's bandwidth where there is one and nothing was faster."""
    rate = fit.figures["bytes_per_s"] / GB
    is_below = is_nominal and rate <= held.bandwidth_gb_per_s
    bandwidth = held.bandwidth_gb_per_s if is_below else rate
    return Link(bandwidth_gb_per_s=bandwidth, efficiency=rate / bandwidth, latency_us=fit.figures["latency_s"] / MICRO)


def rates(points: Iterable[MeasuredPoint]) -> Mapping[str, float]:
    """The highest rate of each kind of operation, in its own unit, for those who read a calibration."""
    best: dict[str, float] = {}
    for point in points:
        size, seconds = point.sizes, point.time_us * MICRO
        if point.kind == GEMM:
            rate, unit = 2.0 * size["rows"] * size["columns"] * size["depth"] / TERA, "TFLOP/s"
        elif point.kind == ATTENTION:
            rate, unit = attention_flops(point) / TERA, "TFLOP/s"
        elif point.kind == COPY:
            rate, unit = 2.0 * size["bytes"] / GB, "GB/s"
        elif point.kind in RING_SHARE:
            rate, unit = RING_SHARE[point.kind](size["ranks"]) * size["bytes"] / GB, "GB/s"
        else:
            continue
        name = f"{point.kind} ({unit})"
        best[name] = max(best.get(name, 0.0), rate / seconds)
    return best
