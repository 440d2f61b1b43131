"""What is given: GPUs, clusters and model shapes. No I/O; `files.py` reads these types from YAML."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["fp32", "bf16"]

#: Megatron pads the vocabulary to a multiple of this times TP (`make_vocab_size_divisible_by`).
VOCAB_DIVISOR = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Fractions of the data-sheet peaks that real kernels reach; 0 < each <= 1."""

    gemm: float
    attention: float
    memory: float
    network: float

    def __post_init__(self) -> None:
        for name in ("gemm", "attention", "memory", "network"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                msg = f"efficiency.{name}: {value} given, allowed is 0 < x <= 1"
                raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One accelerator (or one CPU core of a rank), with the source of its figures.

    `peak_tflops` is dense (no sparsity), by precision. `memory_gib` is what a rank may use in all;
    `reserved_gib` of it never reaches the tensors (device context, communication library, imports).
    """

    name: str
    source: str
    device: Literal["cuda", "cpu"]
    memory_gib: float
    reserved_gib: float
    peak_tflops: Mapping[Precision, float]
    default_precision: Precision
    memory_gb_per_s: float
    launch_overhead_us: float
    efficiency: Efficiency
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.default_precision not in self.peak_tflops:
            msg = f"default_precision: {self.default_precision} given, allowed is one of {sorted(self.peak_tflops)}"
            raise ValueError(msg)
        if not 0 <= self.reserved_gib < self.memory_gib:
            msg = f"reserved_gib: {self.reserved_gib} given, allowed is 0 <= x < memory_gib ({self.memory_gib})"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way between two GPUs: bandwidth for one GPU in one direction, and the time of an empty message."""

    bandwidth_gb_per_s: float
    latency_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmOptions:
    """What this site's `sbatch` wants. Every field is optional; none is guessed."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclusive: bool = False
    mem_gib_per_node: int | None = None
    cpus_per_gpu: int = 1
    array_parallelism: int = 8
    setup: tuple[str, ...] = ()
    extra_options: Mapping[str, str | int | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.extra_options:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                msg = f"extra_options: {name!r} given, allowed are sbatch's long options without their dashes"
                raise ValueError(msg)
        # A line break would end the #SBATCH comment, and the rest would be run as a command.
        words = {name: getattr(self, name) for name in ("partition", "account", "qos", "constraint")}
        for name, value in {**words, **self.extra_options}.items():
            if isinstance(value, str) and not value.isprintable():
                msg = f"{name}: {value!r} given, allowed is one line of printable text"
                raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs, how they are wired and how a job gets onto them."""

    name: str
    source: str
    gpu: GpuSpec
    nodes: int
    gpus_per_node: int
    intra_node: Link
    inter_node: Link
    scheduler: Literal["slurm", "local"]
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                msg = f"{name}: {getattr(self, name)} given, allowed is 1 or more"
                raise ValueError(msg)
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                msg = f"environment: {name!r} given, allowed are names of letters, digits and _"
                raise ValueError(msg)
        if self.scheduler == "local" and self.nodes != 1:
            msg = f"nodes: {self.nodes} given, allowed is 1 with scheduler: local"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions of a decoder-only transformer, in Megatron-core's words."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    seq_length: int
    max_position_embeddings: int
    vocab_size: int
    tied_embeddings: bool
    has_bias: bool

    @property
    def attention_width(self) -> int:
        """Width of the queries of all heads; equals hidden_size for most models."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Width of the keys (or the values) of all query groups."""
        return self.num_query_groups * self.kv_channels

    @property
    def layer_matmul_parameters(self) -> int:
        """Weights of one layer that take part in a GEMM: qkv, attention output, both of the MLP."""
        attention = self.hidden_size * (2 * self.attention_width + 2 * self.kv_width)
        return attention + 2 * self.hidden_size * self.ffn_hidden_size

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer: the GEMM weights, their biases and two LayerNorms."""
        biases = 0
        if self.has_bias:
            biases = self.attention_width + 2 * self.kv_width + 2 * self.hidden_size + self.ffn_hidden_size
        return self.layer_matmul_parameters + biases + 4 * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, without padding of the vocabulary."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        positions = self.max_position_embeddings * self.hidden_size
        return self.num_layers * self.layer_parameters + embeddings + positions + 2 * self.hidden_size

    def padded_vocab_size(self, tp: int, divisor: int = VOCAB_DIVISOR) -> int:
        """The vocabulary that a model with this TP really holds (Megatron pads to divisor·TP)."""
        multiple = divisor * tp
        return math.ceil(self.vocab_size / multiple) * multiple
