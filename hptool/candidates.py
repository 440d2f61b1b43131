"""Layouts: enumerate the ways to cut a model over GPUs, and reject what cannot start, with a reason."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Self

import numpy as np
from numpy.typing import NDArray

from hptool.facts import ModelShape

IntColumn = NDArray[np.int64]
BoolColumn = NDArray[np.bool_]


class Recompute(IntEnum):
    """What is thrown away in the forward pass and computed again in the backward pass."""

    NONE = 0
    SELECTIVE = 1  # the core attention only
    UNIFORM = 2  # every layer, in chunks of `recompute_num_layers`
    BLOCK = 3  # the first `recompute_num_layers` layers of each (virtual) stage

    @property
    def is_full(self) -> bool:
        """Whole layers are recomputed, and a layer count says which."""
        return self >= Recompute.UNIFORM

    def label(self, num_layers: int) -> str:
        """The word that users write and reports print: `none`, `selective`, `uniform-1`, `block-4`."""
        return f"{self.name.lower()}-{num_layers}" if self.is_full else self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Layout:
    """One way to cut a model over GPUs. `dp` follows from the number of GPUs."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    mbs: int = 1
    recompute: Recompute = Recompute.NONE
    recompute_num_layers: int = 0

    @property
    def gpus_per_replica(self) -> int:
        """GPUs that hold one copy of the model: TP·PP·CP."""
        return self.tp * self.pp * self.cp

    @property
    def recompute_label(self) -> str:
        """As `Recompute.label`."""
        return self.recompute.label(self.recompute_num_layers)

    @property
    def name(self) -> str:
        """A file name that tells this layout from every other."""
        return (
            f"tp{self.tp}-pp{self.pp}-vpp{self.vpp}-cp{self.cp}-mbs{self.mbs}-{self.recompute_label.replace('-', '')}"
        )


#: The columns of a table of layouts, in the order in which layouts are named and sorted.
AXES = ("tp", "pp", "vpp", "cp", "mbs", "recompute", "recompute_num_layers")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layouts:
    """A table of layouts: equally long integer columns, one row a layout."""

    tp: IntColumn
    pp: IntColumn
    vpp: IntColumn
    cp: IntColumn
    mbs: IntColumn
    recompute: IntColumn
    recompute_num_layers: IntColumn

    def __len__(self) -> int:
        return len(self.tp)

    def row(self, i: int) -> Layout:
        """Row `i` as a Layout."""
        values = {axis: int(getattr(self, axis)[i]) for axis in AXES}
        return Layout(**(values | {"recompute": Recompute(values["recompute"])}))  # type: ignore[arg-type]

    def rows(self) -> list[Layout]:
        """All rows, in order."""
        return [self.row(i) for i in range(len(self))]

    def select(self, index: BoolColumn | IntColumn) -> "Layouts":
        """The rows at `index`: a mask, or positions in the wanted order."""
        return Layouts(**{axis: getattr(self, axis)[index] for axis in AXES})

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> Self:
        """A table of these layouts."""
        return cls(**{axis: np.array([getattr(x, axis) for x in layouts], dtype=np.int64) for axis in AXES})

    @property
    def gpus_per_replica(self) -> IntColumn:
        """TP·PP·CP of each row."""
        return self.tp * self.pp * self.cp


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What every layout has to carry: the model, its global batch, and the GPUs to spread over."""

    shape: ModelShape
    gbs: int
    gpus: int
    gpus_per_node: int
    sequence_parallel: bool = True
    flash_attention: bool = True
