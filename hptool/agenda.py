"""What a search carries out, whatever it times: which run is next, what lies in its directory, what its end says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hptool.facts import Cluster
from hptool.results import OutcomeRecord, Submission
from hptool.strategy import Stop, Wait


class Limits(Protocol):
    """How much a search may cost."""

    @property
    def max_minutes_per_run(self) -> float:
        """After so many minutes a run is ended."""

    @property
    def max_hours(self) -> float | None:
        """After so many hours the search is ended."""

    @property
    def budget_gpu_hours(self) -> float | None:
        """No run is started that is expected to make the search cost more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A run to start of the layout `name`: `steps` steps, or the points `parts`, on `nodes` nodes.

    `what` says it in words, and `why` the reason. With `stops_early` a point beyond the limits ends its lengths.
    """

    name: str
    nodes: int
    gpus: int
    steps: int
    predicted_step_time_s: float
    what: str
    why: str
    parts: tuple[str, ...] = ()
    stops_early: bool = False


class Agenda(Protocol):
    """One search: decides from its records alone, so that a search that is resumed goes on the same way."""

    @property
    def cluster(self) -> Cluster:
        """Where runs are started."""

    @property
    def limits(self) -> Limits:
        """How much they may cost."""

    def knows(self, name: str) -> bool:
        """Records of a layout of this name belong to this search."""

    def next(self, records: Sequence[OutcomeRecord], under_way: Sequence[Task | Submission]) -> Task | Wait | Stop:
        """What to start, given what ended and what has not."""

    def texts(self, task: Task) -> Mapping[str, str]:
        """What lies in the directory of the run when it starts, by file name; `config.yaml` among it."""

    def expected_s(self, run: Task | Submission) -> float:
        """How long the run is expected to work, without its start."""

    def own_s(self, record: OutcomeRecord) -> float:
        """How long a measured run has worked by its own clock, its start included."""

    def said(self, record: OutcomeRecord, submission: Submission) -> str:
        """What a measured run says, on one line."""
