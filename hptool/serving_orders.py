"""What a serving run is asked to do beside its config: `serving.json` in its directory. Knows no framework.

Where that file lies beside a run's `config.yaml`, the worker serves the model instead of training it, whoever starts
it. Precision and layout are the config's.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

from hptool.serving import Lengths, ServingPoint, Targets

#: The file beside a run's config that makes it a serving run.
SERVING = "serving.json"

#: Who answers: the worker's own loop over Megatron-core, or a command of the user's.
Engine = Literal["megatron", "command"]

#: Of fewer timed passes the median has no interval worth its name (`timing.median_interval`: five give 94 %).
FEWEST_REPEATS = 5

#: What may stand in braces in a command's words.
PLACEHOLDERS = ("batch", "input_len", "output_len", "tp", "pp", "precision", "config", "repeats")

#: What looks like one of them; braces of JSON do not.
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PointOrder:
    """One point: `batch` prompts of `input_len` tokens at once, each continued by `output_len` tokens."""

    batch: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        for name in ("batch", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} given, allowed is 1 or more")

    @property
    def name(self) -> str:
        """As `ServingPoint.name` and `ServedPoint.name`: `60:20/8`."""
        return f"{self.input_len}:{self.output_len}/{self.batch}"

    @property
    def lengths(self) -> Lengths:
        """What is asked of each request."""
        return Lengths(input_len=self.input_len, output_len=self.output_len)

    @classmethod
    def of(cls, point: ServingPoint) -> Self:
        """What is left of a point when its layout is in the config."""
        return cls(batch=point.batch, input_len=point.lengths.input_len, output_len=point.lengths.output_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOrders:
    """The points of one run, in the order in which they are measured, and how each is.

    Every point is answered `repeats` times over after its warm-up. A point that runs out of memory takes the larger
    batches of the same lengths with it; with `stops_early` so does one that is beyond the `targets`. No point but the
    first is begun after `max_seconds` from the start of the run. `checkpoint` is one of `hptool train`: its
    `checkpoints/step-N`, or the directory of the training for the newest; None takes random weights, which cost the
    same time.

    With `engine` "command" `command` is run for each point, word by word and by no shell, with the `PLACEHOLDERS` in
    braces filled in; see docs/worker.md for what it has to answer. After `max_seconds` it is ended.
    """

    points: tuple[PointOrder, ...]
    cuda_graphs: bool = False
    engine: Engine = "megatron"
    command: tuple[str, ...] = ()
    repeats: int = FEWEST_REPEATS
    checkpoint: str | None = None
    stops_early: bool = False
    targets: Targets = field(default_factory=Targets)
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if not self.points:
            problems.append("points: none given, allowed is one or more")
        if len(set(self.points)) < len(self.points):
            twice = sorted({point.name for point in self.points if self.points.count(point) > 1})
            problems.append(f"points: {', '.join(twice)} given twice, allowed is once")
        if self.repeats < FEWEST_REPEATS:
            problems.append(f"repeats: {self.repeats} given, allowed is {FEWEST_REPEATS} or more")
        if bool(self.command) != (self.engine == "command"):
            problems.append(
                f"command: {list(self.command)} given, allowed is a list of words with engine command and none without"
            )
        unknown = {name for word in self.command for name in _PLACEHOLDER.findall(word)} - set(PLACEHOLDERS)
        if unknown:
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            problems += [f"command: {{{name}}} given, allowed are {known}" for name in sorted(unknown)]
        if self.engine == "command" and self.checkpoint is not None:
            problems.append("checkpoint: given, allowed is null with engine command, which loads its own weights")
        if self.max_seconds is not None and not 0 < self.max_seconds < math.inf:
            problems.append(f"max_seconds: {self.max_seconds} given, allowed is null or more than 0")
        problems += _bad_limits(self.targets)
        if problems:
            raise ValueError("\n".join(problems))

    def words(self, point: PointOrder, **values: object) -> list[str]:
        """The command for a point, with `values` for those placeholders that are not the point's."""
        known = {"repeats": self.repeats, **asdict(point), **values}
        return [_PLACEHOLDER.sub(lambda found: str(known[found[1]]), word) for word in self.command]

    @classmethod
    def of(cls, points: Sequence[ServingPoint], **settings: object) -> Self:
        """The orders for points of one layout; ValueError where they are of several."""
        layouts = {point.layout for point in points}
        if len(layouts) > 1:
            names = ", ".join(sorted(layout.name for layout in layouts))
            raise ValueError(f"points: of the layouts {names} given, allowed is one layout a run")
        graphs = any(layout.cuda_graphs for layout in layouts)
        orders: Self = cls(points=tuple(map(PointOrder.of, points)), cuda_graphs=graphs, **settings)  # type: ignore[arg-type]
        return orders

    def larger(self, point: PointOrder) -> tuple[PointOrder, ...]:
        """The points of the same lengths with larger batches."""
        return tuple(other for other in self.points if other.lengths == point.lengths and other.batch > point.batch)


def _bad_limits(targets: Targets) -> list[str]:
    limits = ("max_latency_ms", "max_ttft_ms", "max_tpot_ms")
    given = {name: getattr(targets, name) for name in limits}
    return [
        f"targets.{name}: {value} given, allowed is null or more than 0"
        for name, value in given.items()
        if value is not None and not 0 < value < math.inf
    ]
