"""Which points of a serving search to measure next, and when to stop. Pure.

Within a layout the latency grows with the batch, so what a limit allows is bracketed; a run measures several batches of
a layout one after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hptool.candidates import IntColumn
from hptool.predict.parts import Column
from hptool.serving import Objective, ServingPoints, Targets
from hptool.strategy import Ending


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTrial:
    """A point that was measured, failed or is under way; the times (at the percentile of the targets) where measured."""

    row: int
    ending: Ending
    latency_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingView:
    """What is expected of every point, given what was measured; `error` is a relative standard deviation."""

    latency_ms: Column
    ttft_ms: Column
    tpot_ms: Column
    error: Column
    p_fit: Column


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingLandscape:
    """All points that can start; `layout[i]` numbers the layout of row i. `view` learns from what is known."""

    points: ServingPoints
    layout: IntColumn
    view: Callable[[Sequence[ServedTrial]], ServingView]
    objective: Objective
    targets: Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Sitting:
    """A run to start: points of one layout, in this order.

    With `stops_early` it ends at the first point that leaves the limits or the memory, since larger batches would too.
    """

    layout: int
    rows: tuple[int, ...]
    stops_early: bool
    why: str
