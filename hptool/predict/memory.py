"""Memory of the fullest rank, as its parts. All figures in GiB, one row a layout.

The byte counts are those of Megatron-core's local layers with saved tensors counted one by one; with bf16 and
dropout they add up to the 34·s·b·h of Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from dataclasses import dataclass, fields

import numpy as np

from hptool.candidates import IntColumn, Layouts, Recompute, Workload
from hptool.facts import GpuSpec, Precision
from hptool.predict.parallel import data_parallel, keeps_scores_on_chip, microbatches
from hptool.predict.parts import Column, add_up
from hptool.units import GIB, MIB

#: Bytes of a weight, of its gradient, and of its optimizer state before sharding. Adam keeps two fp32 moments, and
#: beside bf16 weights an fp32 copy; bf16 gradients are accumulated in fp32 (Megatron's distributed optimizer:
#: 6 + 12/dp bytes a parameter in all).
WEIGHT_BYTES: dict[Precision, int] = {"bf16": 2, "fp32": 4}
GRADIENT_BYTES: dict[Precision, int] = {"bf16": 4, "fp32": 4}
OPTIMIZER_BYTES: dict[Precision, int] = {"bf16": 12, "fp32": 8}

#: Mean and reciprocal deviation of two norms a layer, fp32, for each token.
NORM_STATISTICS_BYTES = 16

#: What Megatron-LM's local layers hold in the allocator whatever the model (workspaces), fitted on 208 runs of its CI.
LOCAL_LAYERS_FIXED_BYTES = 144 * MIB

#: Reserved over allocated memory of the CUDA caching allocator: median of published B200 runs (maximum 1.09).
ALLOCATOR_SLACK = 0.04

#: Relative standard error of the total, from the same runs where nothing was calibrated.
RELATIVE_ERROR = 0.10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Memory:
    """The parts of the fullest rank's memory, GiB; they add up to `total_gib`."""

    weights_gib: Column
    gradients_gib: Column
    optimizer_gib: Column
    activations_gib: Column
    logits_gib: Column
    reserved_gib: Column

    @property
    def total_gib(self) -> Column:
        """All of it."""
        return add_up(self)


def rank_parameters(t: Layouts, work: Workload, *, first: bool, last: bool) -> IntColumn:
    """Parameters that one rank of a stage holds. A model without a pipeline is first and last stage in one."""
    shape = work.shape
    hidden = shape.hidden_size
    # Split over TP: both GEMMs of attention and MLP, and the biases of the column-parallel ones.
    split = shape.layer_matmul_parameters
    whole = 4 * hidden
    if shape.has_bias:
        split += shape.attention_width + 2 * shape.kv_width + shape.ffn_hidden_size
        whole += 2 * hidden
    parameters = shape.num_layers // t.pp * (split // t.tp + whole)
    padded = -(-shape.vocab_size // (work.vocab_divisor * t.tp)) * work.vocab_divisor
    if first:
        parameters = parameters + padded * hidden + shape.max_position_embeddings * hidden
    if last:
        # The last stage needs its own copy of tied embeddings, unless it is the first stage too.
        own_head = 0 if first and shape.tied_embeddings else 1
        parameters = parameters + own_head * padded * hidden + 2 * hidden
    return parameters


def layer_activation_bytes(t: Layouts, work: Workload, gpu: GpuSpec) -> Column:
    """Bytes that one layer saves for the backward pass of one microbatch, without recomputing whole layers."""
    shape = work.shape
    element = WEIGHT_BYTES[work.precision]
    tokens = t.mbs * shape.seq_length / t.cp
    hidden_split = np.where(work.sequence_parallel, t.tp, 1)
    # Input and output of both norms; dropout masks of one byte behind attention and MLP.
    on_hidden = shape.hidden_size * (4 * element + (2 if work.dropout else 0)) / hidden_split
    # Queries, keys, values, the attention's output, and the MLP's activation before and after GELU.
    on_heads = (2 * shape.attention_width + 2 * shape.kv_width + 2 * shape.ffn_hidden_size) * element / t.tp
    # With context parallelism each rank keeps the keys and values that it gathered from all, beside its own.
    gathered = np.where(t.cp > 1, 2 * shape.kv_width * t.cp * element / t.tp, 0)
    heads_per_rank = shape.num_attention_heads / t.tp
    if keeps_scores_on_chip(work, gpu):
        attention = 4 * heads_per_rank * tokens  # the softmax's log-sum-exp, fp32
    else:
        # Softmax, and with dropout its mask and result: 5·a·s²·b in bf16.
        per_score = 2 * element + 1 if work.dropout else element
        scores = per_score * heads_per_rank * tokens * shape.seq_length
        attention = np.where(t.recompute == Recompute.SELECTIVE, 0, scores)
    return np.asarray((on_hidden + on_heads + gathered + NORM_STATISTICS_BYTES) * tokens + attention, dtype=np.float64)


def _activation_bytes(t: Layouts, work: Workload, gpu: GpuSpec, in_flight: Column) -> Column:
    """All saved activations of a stage: `in_flight` counts microbatches of a chunk, L/(pp·vpp) layers each."""
    shape = work.shape
    layers = shape.num_layers / (t.pp * t.vpp)
    whole = layer_activation_bytes(t, work, gpu)
    # A recomputed layer (or chunk of layers) keeps its input alone, and one is rebuilt at a time.
    tokens = t.mbs * shape.seq_length / t.cp
    inputs = tokens * shape.hidden_size * WEIGHT_BYTES[work.precision] / np.where(work.sequence_parallel, t.tp, 1)
    count = np.maximum(1, t.recompute_num_layers)
    uniform = in_flight * (layers / count) * inputs + count * whole
    block = in_flight * (count * inputs + (layers - count) * whole) + whole
    return np.select(
        [t.recompute == Recompute.UNIFORM, t.recompute == Recompute.BLOCK],
        [uniform, block],
        default=in_flight * layers * whole,
    )


def predict_memory(t: Layouts, work: Workload, gpu: GpuSpec) -> Memory:
    """Memory of the first and the last stage; each row keeps the fuller of the two."""
    first = _stage(t, work, gpu, first=True)
    last = _stage(t, work, gpu, first=False)
    fuller = first.total_gib >= last.total_gib
    return Memory(**{f.name: np.where(fuller, getattr(first, f.name), getattr(last, f.name)) for f in fields(Memory)})


def _stage(t: Layouts, work: Workload, gpu: GpuSpec, *, first: bool) -> Memory:
    shape = work.shape
    single = t.pp == 1
    own = rank_parameters(t, work, first=first, last=not first)
    parameters = np.where(single, rank_parameters(t, work, first=True, last=True), own)
    m = microbatches(t, work)
    if first:  # 1F1B keeps pp microbatches in flight; interleaving one chunk of each more (Megatron's warm-up)
        in_flight = np.where(t.vpp > 1, np.minimum(t.pp * t.vpp + t.pp - 1, m * t.vpp), np.minimum(t.pp, m))
    else:
        in_flight = np.where(t.vpp > 1, np.minimum((t.vpp - 1) * t.pp + 1, m * t.vpp), 1)
    tokens = t.mbs * shape.seq_length / t.cp
    element = WEIGHT_BYTES[work.precision]
    # Logits in the model's precision and their softmax in fp32.
    vocab = -(-shape.vocab_size // (work.vocab_divisor * t.tp)) * work.vocab_divisor
    has_logits = single if first else np.ones(len(t))
    activations = _activation_bytes(t, work, gpu, in_flight.astype(np.float64))
    states = parameters.astype(np.float64)
    sharded = states / (data_parallel(t, work) * t.cp)
    parts = {
        "weights_gib": WEIGHT_BYTES[work.precision] * states,
        "gradients_gib": GRADIENT_BYTES[work.precision] * states,
        "optimizer_gib": OPTIMIZER_BYTES[work.precision] * sharded,
        "activations_gib": activations,
        "logits_gib": has_logits * tokens * vocab * (element + 4),
    }
    reserved = np.full(len(t), gpu.reserved_gib * GIB)
    if gpu.device == "cuda":
        reserved += LOCAL_LAYERS_FIXED_BYTES + ALLOCATOR_SLACK * np.sum(list(parts.values()), axis=0)
    return Memory(**{name: value / GIB for name, value in parts.items()}, reserved_gib=reserved / GIB)
