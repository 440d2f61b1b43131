"""What a serving search found, as people read it: tables, a page, the files that other programs take."""

from collections.abc import Sequence
from dataclasses import dataclass

from hptool.candidates import Rejection
from hptool.facts import Cluster
from hptool.measurement import Failure, PointFailure, ServedPoint, ServingMeasurement
from hptool.report import Spent
from hptool.serving import Lengths, Objective, ServingLayout, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class PointPrediction:
    """What was expected of a point; `p_fit` is the chance that it fits into memory."""

    latency_ms: float
    ttft_ms: float
    tpot_ms: float
    memory_gib: float
    p_fit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRow:
    """One point that was tried. `served` is what it gave, or `failure` why it gave nothing.

    `predicted` is from before the search, `learned` from its end, when the model knew the other runs (not this one).
    `run` is the run's name, and `measurement` all that this run measured.
    """

    layout: ServingLayout
    lengths: Lengths
    batch: int
    run: str
    log_path: str
    predicted: PointPrediction
    learned: PointPrediction | None = None
    measurement: ServingMeasurement | None = None
    served: ServedPoint | None = None
    failure: Failure | PointFailure | None = None
    meets_targets: bool = False
    is_pareto: bool = False

    @property
    def name(self) -> str:
        """Within its search: `tp2-pp1-bf16 60:20/8`."""
        return f"{self.layout.name} {self.lengths.name}/{self.batch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The best point for one kind of request; where none keeps the targets, `closest` comes nearest to them."""

    lengths: Lengths
    best: ServingRow | None
    closest: ServingRow | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedPoint:
    """A point and what is expected of it at the end of the search."""

    layout: ServingLayout
    lengths: Lengths
    batch: int
    predicted: PointPrediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """How far the predictions were off: medians of the relative error of the latency over the measured points.

    `before` the search; `after` it with each point predicted from the others. None where too little was measured.
    """

    points: int
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingReport:
    """Everything that the readers of a serving search see.

    `rows` are by lengths, the best first, failures last. `expected` are the best predicted points, measured or not.
    `layouts` and `points` could start; `skipped` counts points that nobody had to measure, by reason.
    """

    model: str
    num_parameters: int
    cluster: Cluster
    nodes: int
    engine: str
    objective: Objective
    targets: Targets
    layouts: int
    points: int
    rejections: Sequence[Rejection]
    rows: Sequence[ServingRow]
    answers: Sequence[Answer]
    expected: Sequence[ExpectedPoint]
    trust: Trust
    spent: Spent
    notes: Sequence[str]
    best_path: str | None
    serve_command: str | None
