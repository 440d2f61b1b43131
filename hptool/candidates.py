"""Layouts: enumerate the ways to cut a model over GPUs, and reject what cannot start, with a reason."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from hptool.facts import VOCAB_DIVISOR, ModelShape, Precision

IntColumn = NDArray[np.int64]
BoolColumn = NDArray[np.bool_]


#: What the sizes of an 8-bit GEMM must be multiples of (cuBLAS documentation, cublasLtMatmul, FP8 kernels).
FP8_MULTIPLE = 16


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
    ep: int = 1
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
        experts = f"-ep{self.ep}" if self.ep > 1 else ""
        recompute = self.recompute_label.replace("-", "")
        return f"tp{self.tp}-pp{self.pp}-vpp{self.vpp}-cp{self.cp}{experts}-mbs{self.mbs}-{recompute}"

    @property
    def short_name(self) -> str:
        """The name without what is not used, for narrow tables; `parse` reads it."""
        parts = self.name.split("-")
        return "-".join(x for x in parts if x not in ("vpp1", "cp1", "none"))

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """The layout that `name` (or a part of it, such as `tp8-pp8`) stands for; ValueError where it names none."""
        values: dict[str, Any] = {}
        for word in text.lower().split("-"):
            axis = re.fullmatch(r"(tp|pp|vpp|cp|ep|mbs)([1-9][0-9]*)", word)
            mode = re.fullmatch(r"(none|selective)|(uniform|block)([1-9][0-9]*)", word)
            if axis and axis[1] not in values:
                values[axis[1]] = int(axis[2])
            elif mode and "recompute" not in values:
                values["recompute"] = Recompute[(mode[1] or mode[2]).upper()]
                values["recompute_num_layers"] = int(mode[3] or 0)
            else:
                msg = f"{text!r} given, allowed is a layout such as tp8-pp8-vpp3-cp1-mbs1-none or a part of it"
                raise ValueError(msg)
        return cls(**values)


#: The columns of a table of layouts, in the order in which layouts are named and sorted.
AXES = ("tp", "pp", "vpp", "cp", "ep", "mbs", "recompute", "recompute_num_layers")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layouts:
    """A table of layouts: equally long integer columns, one row a layout."""

    tp: IntColumn
    pp: IntColumn
    vpp: IntColumn
    cp: IntColumn
    ep: IntColumn
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
    """What every layout has to carry: the model, its global batch, the GPUs to spread over, and how it is trained."""

    shape: ModelShape
    gbs: int
    gpus: int
    gpus_per_node: int
    precision: Precision = "bf16"
    sequence_parallel: bool = True
    flash_attention: bool = True
    alibi: bool = False
    cp_comm_type: Literal["all_gather", "a2a"] = "all_gather"
    dropout: bool = False
    cuda_graph: bool = False
    overlap_grad_sync: bool = False
    overlap_param_sync: bool = False
    zero_stage: int = 1
    vocab_divisor: int = VOCAB_DIVISOR


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """How far `auto` goes; read from `base_configs/search_space.yaml`.

    Of `mbs`, those above `long_mbs` are for sequences so short that a micro batch stays within
    `max_microbatch_tokens`.
    """

    mbs: tuple[int, ...]
    long_mbs: int
    max_microbatch_tokens: int
    min_tokens_per_cp_rank: int
    block_fractions: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The values to try of each axis; None is `auto`.

    `recompute` holds pairs of mode and layer count, in which a count of None stands for every sensible one.
    """

    tp: tuple[int, ...] | None = None
    pp: tuple[int, ...] | None = None
    vpp: tuple[int, ...] | None = None
    cp: tuple[int, ...] | None = None
    ep: tuple[int, ...] | None = None
    mbs: tuple[int, ...] | None = None
    recompute: tuple[tuple[Recompute, int | None], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """One reason for which layouts cannot start, how many there are, and the first of them."""

    reason: str
    count: int
    example: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """The layouts that pass every static check, and why the others do not."""

    layouts: Layouts
    rejections: tuple[Rejection, ...]


def enumerate_layouts(space: SearchSpace, work: Workload, limits: SearchLimits) -> Candidates:
    """Every layout of the space that Megatron-core can start, each once, and the rest counted by reason.

    A layout that breaks several rules counts under the first of `_rules`. The order is that of `AXES`.
    """
    table = _product(space, work, limits)
    alive = np.ones(len(table), dtype=np.bool_)
    rejections = []
    for reason, broken in _rules(table, work):
        out = alive & broken
        if out.any():
            first = table.row(int(np.argmax(out)))
            rejections.append(Rejection(reason=reason, count=int(out.sum()), example=first.name))
        alive &= ~broken
    return Candidates(layouts=table.select(alive), rejections=tuple(rejections))


def refusal(layout: Layout, work: Workload) -> str | None:
    """Why this layout cannot start; None where it can."""
    return next((reason for reason, broken in _rules(Layouts.of([layout]), work) if broken[0]), None)


def _product(space: SearchSpace, work: Workload, limits: SearchLimits) -> Layouts:
    """The full grid as a table, without duplicates, sorted by `AXES`."""
    shape = work.shape
    tp = space.tp or _divisors(work.gpus_per_node)
    pp = space.pp or tuple(d for d in _divisors(shape.pipeline_layers) if d <= work.gpus)
    cp = space.cp or _auto_cp(work, limits)
    ep = space.ep or _divisors(shape.num_experts or 1)
    mbs = space.mbs or _auto_mbs(work, limits)
    blocks = []
    for stages in sorted(set(pp)):
        # What a stage holds decides which numbers of chunks and recomputed layers make sense.
        for chunks in sorted(set(space.vpp or _auto_vpp(shape.pipeline_layers, stages))):
            layers = max(1, shape.pipeline_layers // (stages * chunks))
            recompute = sorted(set(_recompute_pairs(space, layers, limits)))
            grid = np.meshgrid(
                np.unique(tp),
                [stages],
                [chunks],
                np.unique(cp),
                np.unique(ep),
                np.unique(mbs),
                range(len(recompute)),
                indexing="ij",
            )
            pairs = np.array(recompute, dtype=np.int64)[grid[6].ravel()]
            blocks.append(np.column_stack([*(axis.ravel() for axis in grid[:6]), pairs]))
    rows = np.concatenate(blocks).astype(np.int64)
    rows = rows[np.lexsort(rows.T[::-1])]
    return Layouts(**{axis: rows[:, i].copy() for i, axis in enumerate(AXES)})


def _auto_mbs(work: Workload, limits: SearchLimits) -> tuple[int, ...]:
    length = max(work.shape.seq_length, work.shape.encoder_seq_length)
    most = max(limits.long_mbs, limits.max_microbatch_tokens // length)
    return tuple(m for m in limits.mbs if m <= min(work.gbs, most))


def _auto_vpp(num_layers: int, pp: int) -> tuple[int, ...]:
    if pp == 1 or num_layers % pp:
        return (1,)
    return _divisors(num_layers // pp)


def _auto_cp(work: Workload, limits: SearchLimits) -> tuple[int, ...]:
    """Powers of two that leave each rank enough tokens to be worth the exchange."""
    sizes = [1]
    if not work.shape.is_causal_alone:
        return (1,)
    while work.shape.seq_length // (2 * sizes[-1]) >= limits.min_tokens_per_cp_rank and 2 * sizes[-1] <= work.gpus:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def _recompute_pairs(space: SearchSpace, layers: int, limits: SearchLimits) -> list[tuple[int, int]]:
    """(mode, layer count) for stages (or virtual stages) of `layers` layers."""
    wanted = space.recompute or (
        (Recompute.NONE, None),
        (Recompute.SELECTIVE, None),
        (Recompute.UNIFORM, None),
        (Recompute.BLOCK, None),
    )
    pairs: list[tuple[int, int]] = []
    for mode, count in wanted:
        if not mode.is_full:
            pairs.append((mode, 0))
        elif count is not None:
            pairs.append((mode, count))
        elif mode is Recompute.UNIFORM:
            pairs.append((mode, 1))
        else:  # fractions of the stage, all of it being the same as uniform-1
            counts = {round(fraction * layers) for fraction in limits.block_fractions}
            pairs += [(mode, n) for n in counts if 1 <= n < layers]
    return pairs


def _divisors(n: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, n + 1) if n % d == 0)


def _rules(t: Layouts, work: Workload) -> list[tuple[str, BoolColumn]]:
    """Why a layout cannot start: the reason, and the rows that break it. The order is that of blame.

    Each is a refusal of Megatron-core 0.16 (or an endless or senseless run) that is cheaper to foresee.
    """
    shape = work.shape
    heads, groups, layers = shape.num_attention_heads, shape.num_query_groups, shape.pipeline_layers
    dp = np.maximum(1, work.gpus // t.gpus_per_replica)
    microbatches = np.maximum(1, work.gbs // (t.mbs * dp))
    layers_per_chunk = np.maximum(1, layers // (t.pp * t.vpp))
    lengths = [length for length in (shape.encoder_seq_length, shape.seq_length) if length]
    has_experts, split = shape.num_experts > 0, t.tp > 1
    by_heads = (t.cp > 1) & (work.cp_comm_type == "a2a")
    uniform, block = t.recompute == Recompute.UNIFORM, t.recompute == Recompute.BLOCK
    chunk = np.maximum(1, t.recompute_num_layers)
    return [
        (f"tp does not divide the {heads} attention heads", heads % t.tp != 0),
        (f"tp does not divide the {groups} query groups", groups % t.tp != 0),
        *((f"tp does not divide {name} {width}", width % t.tp != 0) for name, width in mlp_widths(shape)),
        (f"tp does not divide a node of {work.gpus_per_node} GPUs", work.gpus_per_node % t.tp != 0),
        (f"tp·pp·cp does not divide the {work.gpus} GPUs", work.gpus % t.gpus_per_replica != 0),
        (f"pp·vpp does not divide the {layers} layers", layers % (t.pp * t.vpp) != 0),
        (
            f"ep does not divide the {shape.num_experts} experts"
            if has_experts
            else "ep > 1 needs a model with experts",
            max(1, shape.num_experts) % t.ep != 0,
        ),
        (
            "tp·ep·pp does not divide the GPUs (experts are spread over the ranks of data and context parallelism)",
            work.gpus % (t.tp * t.ep * t.pp) != 0,
        ),
        ("experts need sequence parallelism where tp > 1", has_experts & split & (not work.sequence_parallel)),
        ("experts with biases cannot be split by tp", has_experts & split & shape.has_bias),
        ("CUDA graphs need tp, pp and cp of 1", (t.gpus_per_replica > 1) & work.cuda_graph),
        ("a virtual pipeline needs pp > 1", (t.vpp > 1) & (t.pp == 1)),
        ("context parallelism needs a causal model without an encoder", (t.cp > 1) & (not shape.is_causal_alone)),
        (f"2·cp does not divide the sequence of {shape.seq_length}", (t.cp > 1) & (shape.seq_length % (2 * t.cp) != 0)),
        ("context parallelism needs flash attention", (t.cp > 1) & (not work.flash_attention)),
        ("context parallelism needs attention without ALiBi", (t.cp > 1) & work.alibi),
        *(
            (f"cp does not divide a rank's {name} (cp_comm_type a2a)", by_heads & (count // t.tp % t.cp != 0))
            for name, count in (("attention heads", heads), ("query groups", groups))
        ),
        *(
            (
                f"tp leaves a rank a part of {name} {width} that no multiple of {FP8_MULTIPLE} is (fp8)",
                (work.precision == "fp8") & (width // t.tp % FP8_MULTIPLE != 0),
            )
            for name, width in (("hidden_size", shape.hidden_size), *mlp_widths(shape))
        ),
        (
            f"mbs times a rank's part of the sequence is no multiple of {FP8_MULTIPLE} (fp8)",
            (work.precision == "fp8") & (t.mbs * (shape.seq_length // t.cp) % FP8_MULTIPLE != 0),
        ),
        *(
            (
                f"tp does not divide a rank's part of the sequence of {length} (sequence parallelism)",
                work.sequence_parallel & split & (length // t.cp % t.tp != 0),
            )
            for length in lengths
        ),
        (f"mbs·dp does not divide the global batch of {work.gbs}", work.gbs % (t.mbs * dp) != 0),
        ("pp does not divide the microbatches of an interleaved schedule", (t.vpp > 1) & (microbatches % t.pp != 0)),
        ("a recompute layer count below 1", t.recompute_num_layers < np.where(uniform | block, 1, 0)),
        (
            "uniform recomputation in chunks that do not divide a stage's layers",
            uniform & (layers_per_chunk % chunk != 0),
        ),
        (
            "uniform recomputation in chunks of both encoder and decoder layers",
            uniform & (shape.encoder_num_layers % layers_per_chunk % chunk != 0),
        ),
        (
            "block recomputation of all of a stage's layers or more (the same as uniform-1)",
            block & (t.recompute_num_layers >= layers_per_chunk),
        ),
    ]


def mlp_widths(shape: ModelShape) -> list[tuple[str, int]]:
    """The widths of the model's MLPs by their keys."""
    widths = {
        "ffn_hidden_size": shape.ffn_hidden_size * (shape.num_expert_layers < shape.num_layers),
        "moe_ffn_hidden_size": shape.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": shape.shared_ffn_hidden_size,
    }
    return [(name, width) for name, width in widths.items() if width]
