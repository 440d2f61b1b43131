"""Ways to serve a model: how it is cut over GPUs, what is asked of it, and the points that are measured of that."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from hptool.candidates import BoolColumn, IntColumn
from hptool.facts import Precision

#: Words, one a row.
WordColumn = NDArray[np.str_]

#: What a search may want most: the highest rate for each GPU within the limits, the shortest latency, or every point
#: that is better than all others in one of the two.
Objective = Literal["throughput-per-gpu", "latency", "pareto"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Lengths:
    """What is asked: prompts of `input_len` tokens, each continued by `output_len` tokens."""

    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len"):
            if getattr(self, name) < 1:
                msg = f"{name}: {getattr(self, name)} given, allowed is 1 or more"
                raise ValueError(msg)

    @property
    def name(self) -> str:
        """As users write it: `60:20`."""
        return f"{self.input_len}:{self.output_len}"

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """What such a text stands for; ValueError where it stands for nothing."""
        found = re.fullmatch(r"([1-9][0-9]{0,6}):([1-9][0-9]{0,6})", text.strip())
        if not found:
            msg = f"{text!r} given, allowed is INPUT:OUTPUT in tokens, such as 60:20"
            raise ValueError(msg)
        return cls(input_len=int(found[1]), output_len=int(found[2]))


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ServingLayout:
    """One way to cut a model over GPUs for serving, what it computes in, and whether kernels are launched as graphs."""

    tp: int = 1
    pp: int = 1
    precision: Precision = "bf16"
    cuda_graphs: bool = False

    @property
    def gpus(self) -> int:
        """GPUs of one replica: TP·PP."""
        return self.tp * self.pp

    @property
    def name(self) -> str:
        """A file name that tells this layout from every other: `tp2-pp1-bf16`, `tp2-pp1-bf16-graphs`."""
        return f"tp{self.tp}-pp{self.pp}-{self.precision}{'-graphs' if self.cuda_graphs else ''}"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ServingPoint:
    """What is measured at once: a layout that answers `batch` requests of these lengths side by side."""

    layout: ServingLayout
    lengths: Lengths
    batch: int

    @property
    def name(self) -> str:
        """Within its layout: `60:20/8`."""
        return f"{self.lengths.name}/{self.batch}"


#: The columns of a table of points.
POINT_AXES = ("tp", "pp", "batch", "input_len", "output_len", "precision", "cuda_graphs")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingPoints:
    """A table of points: equally long columns, one row a point."""

    tp: IntColumn
    pp: IntColumn
    batch: IntColumn
    input_len: IntColumn
    output_len: IntColumn
    precision: WordColumn
    cuda_graphs: BoolColumn

    def __len__(self) -> int:
        return len(self.tp)

    def row(self, i: int) -> ServingPoint:
        """Row `i` as a point."""
        precision: Any = str(self.precision[i])
        return ServingPoint(
            layout=ServingLayout(
                tp=int(self.tp[i]), pp=int(self.pp[i]), precision=precision, cuda_graphs=bool(self.cuda_graphs[i])
            ),
            lengths=Lengths(input_len=int(self.input_len[i]), output_len=int(self.output_len[i])),
            batch=int(self.batch[i]),
        )

    def rows(self) -> list[ServingPoint]:
        """All rows, in order."""
        return [self.row(i) for i in range(len(self))]

    def select(self, index: BoolColumn | IntColumn) -> "ServingPoints":
        """The rows at `index`: a mask, or positions in the wanted order."""
        return ServingPoints(**{axis: getattr(self, axis)[index] for axis in POINT_AXES})

    @property
    def gpus(self) -> IntColumn:
        """TP·PP of each row."""
        return self.tp * self.pp

    @classmethod
    def of(cls, points: Sequence[ServingPoint]) -> Self:
        """A table of these points."""

        def column(name: str, kind: Any) -> Any:
            where = {"batch": lambda p: p, "input_len": lambda p: p.lengths, "output_len": lambda p: p.lengths}
            return np.array([getattr(where.get(name, lambda p: p.layout)(p), name) for p in points], dtype=kind)

        words: dict[str, Any] = {"precision": np.str_, "cuda_graphs": np.bool_}
        return cls(**{axis: column(axis, words.get(axis, np.int64)) for axis in POINT_AXES})


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a service must keep: limits of the time to the first token, of each token after it, and of whole answers.

    Each holds for the percentile `percentile` of the measured requests. None is no limit.
    """

    max_latency_ms: float | None = None
    max_ttft_ms: float | None = None
    max_tpot_ms: float | None = None
    percentile: Literal[50, 95, 99] = 50
