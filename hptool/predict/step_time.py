"""Time of a training step, as its parts. All figures in seconds, one row a layout.

A sum of closed-form terms: work over peak times an efficiency, bytes over bandwidth, messages times latency.
The efficiencies and links are facts of the GPU and the cluster (`cluster/`), none belongs to a model.
"""

from dataclasses import dataclass

import numpy as np

from hptool.candidates import BoolColumn, IntColumn, Layouts, Recompute, Workload
from hptool.facts import Cluster, Link
from hptool.predict.flops import attention_flops_per_token, logit_flops_per_token
from hptool.predict.memory import GRADIENT_BYTES, OPTIMIZER_BYTES, WEIGHT_BYTES, rank_parameters
from hptool.predict.parallel import (
    cp_inside_node,
    data_parallel,
    dp_inside_node,
    keeps_scores_on_chip,
    microbatches,
    pp_inside_node,
)
from hptool.predict.parts import Column, add_up
from hptool.units import GB, MICRO, TERA

#: A backward pass costs twice its forward GEMMs; flash attention also recomputes its scores: 2.5 (Dao 2023,
#: arXiv:2307.08691, section 3.1: seven GEMMs backward against two forward, of which the tiles save one and a half).
BACKWARD_GEMM = 2.0
BACKWARD_ATTENTION = 2.5

#: Passes over a layer's activations that are no GEMM, in elements: both norms, both residual additions with
#: dropout, and the biases read and write 10 times the hidden size; GELU with its bias 2 times the MLP's width.
HIDDEN_PASSES = 10
MLP_PASSES = 2

#: Passes over the attention scores where no flash kernel keeps them on the chip: mask, softmax, dropout.
SCORE_PASSES = 4

#: Operations that the host launches for a layer, views not counted. Counted by dispatching models of two and four
#: layers of Megatron-core 0.16.1 with local layers, dropout and torch's attention on a CPU.
FORWARD_OPERATIONS = 45
BACKWARD_OPERATIONS = 57


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTime:
    """The parts of a step, seconds; they add up to `total_s`."""

    gemm_s: Column
    attention_s: Column
    memory_bound_s: Column
    recompute_s: Column
    launch_s: Column
    tp_communication_s: Column
    cp_communication_s: Column
    pp_communication_s: Column
    bubble_s: Column
    dp_communication_s: Column
    optimizer_s: Column

    @property
    def total_s(self) -> Column:
        """All of it."""
        return add_up(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """Device time of one layer's forward pass over one microbatch on one rank, by kind of kernel."""

    gemm_s: Column
    attention_s: Column
    memory_bound_s: Column

    @property
    def total_s(self) -> Column:
        return self.gemm_s + self.attention_s + self.memory_bound_s


def predict_step_time(t: Layouts, work: Workload, cluster: Cluster) -> StepTime:
    """Expected seconds of one step of the whole global batch."""
    shape, gpu = work.shape, cluster.gpu
    m = microbatches(t, work)
    tokens = t.mbs * shape.seq_length / t.cp
    layers = shape.num_layers / t.pp

    layer = _layer(t, work, cluster)
    gemm = layers * layer.gemm_s * (1 + BACKWARD_GEMM)
    attention = layers * layer.attention_s * (1 + BACKWARD_ATTENTION)
    memory_bound = layers * layer.memory_bound_s * (1 + BACKWARD_GEMM)
    # What recomputation runs a second time, in layers.
    block = np.where(t.recompute == Recompute.BLOCK, t.recompute_num_layers * t.vpp, 0)
    again = np.where(t.recompute == Recompute.UNIFORM, layers, block)
    selective = np.where(t.recompute == Recompute.SELECTIVE, layers, 0)
    recompute = again * layer.total_s + selective * layer.attention_s
    busy = gemm + attention + memory_bound + recompute
    operations = layers * (FORWARD_OPERATIONS + BACKWARD_OPERATIONS) + again * FORWARD_OPERATIONS
    launched = operations * gpu.launch_overhead_us * MICRO
    # A GPU works while the host launches ahead, and waits where it cannot; a CPU is its own host.
    launch = np.maximum(0.0, launched - busy) if gpu.device == "cuda" else launched

    tp_communication = _tp_communication(t, work, cluster, layers, again)
    cp_communication = _cp_communication(t, work, cluster, layers, again)
    sends = _pipeline_sends(t, work, cluster)
    stage = busy + launch + tp_communication + cp_communication + sends
    logits = logit_flops_per_token(shape) / t.tp * tokens / (_peak(work, cluster) * gpu.efficiency.gemm)
    parameters = np.where(
        t.pp == 1, rank_parameters(t, work, first=True, last=True), rank_parameters(t, work, first=True, last=False)
    )
    return StepTime(
        gemm_s=m * (gemm + (1 + BACKWARD_GEMM) * logits),
        attention_s=m * attention,
        memory_bound_s=m * memory_bound,
        recompute_s=m * recompute,
        launch_s=m * launch,
        tp_communication_s=m * tp_communication,
        cp_communication_s=m * cp_communication,
        pp_communication_s=m * sends,
        # While the pipeline fills and drains, each stage idles for pp - 1 microbatches, or 1/vpp of them.
        bubble_s=(t.pp - 1) / t.vpp * stage,
        dp_communication_s=_dp_communication(t, work, cluster, parameters, busy),
        optimizer_s=_optimizer(t, work, cluster, parameters),
    )


def _peak(work: Workload, cluster: Cluster) -> float:
    return cluster.gpu.peak_tflops[work.precision] * TERA


def _memory_bytes_per_s(cluster: Cluster) -> float:
    return cluster.gpu.memory_gb_per_s * GB * cluster.gpu.efficiency.memory


def _hidden_split(t: Layouts, work: Workload) -> IntColumn:
    """Over how many ranks what is outside attention and MLP is split: sequence parallelism does that over TP."""
    return np.where(work.sequence_parallel, t.tp, 1)


def _layer(t: Layouts, work: Workload, cluster: Cluster) -> _Layer:
    shape, efficiency = work.shape, cluster.gpu.efficiency
    peak = _peak(work, cluster)
    tokens = t.mbs * shape.seq_length / t.cp
    split = HIDDEN_PASSES * shape.hidden_size / _hidden_split(t, work)
    elements = tokens * (split + MLP_PASSES * shape.ffn_hidden_size / t.tp)
    if not keeps_scores_on_chip(work, cluster.gpu):  # written and read once for each
        elements = elements + SCORE_PASSES * shape.num_attention_heads / t.tp * tokens * shape.seq_length
    return _Layer(
        gemm_s=2 * shape.layer_matmul_parameters * tokens / t.tp / (peak * efficiency.gemm),
        attention_s=attention_flops_per_token(shape) * tokens / t.tp / (peak * efficiency.attention),
        memory_bound_s=elements * WEIGHT_BYTES[work.precision] / _memory_bytes_per_s(cluster),
    )


def _transfer(size: Column, messages: Column, inside: BoolColumn, cluster: Cluster) -> Column:
    """Seconds for `size` bytes in `messages` messages, inside the node or across."""

    def over(link: Link) -> Column:
        rate = link.bandwidth_gb_per_s * GB * cluster.gpu.efficiency.network
        return np.asarray(size / rate + messages * link.latency_us * MICRO)

    return np.where(inside, over(cluster.intra_node), over(cluster.inter_node))


def _tp_communication(t: Layouts, work: Workload, cluster: Cluster, layers: Column, again: Column) -> Column:
    """All-reduces behind attention and MLP, forward and backward, of one microbatch.

    Sequence parallelism makes them gathers and scatters of the same size; its backward pass repeats the gathers.
    """
    tokens = t.mbs * work.shape.seq_length / t.cp
    size = 2 * (t.tp - 1) / t.tp * tokens * work.shape.hidden_size * WEIGHT_BYTES[work.precision]
    all_reduce = _transfer(size, 2.0 * (t.tp - 1), t.tp <= work.gpus_per_node, cluster)
    return np.asarray((np.where(work.sequence_parallel, 5.0, 4.0) * layers + 2 * again) * all_reduce)


def _cp_communication(t: Layouts, work: Workload, cluster: Cluster, layers: Column, again: Column) -> Column:
    """Keys and values gathered forward; gathered again and their gradients scattered backward."""
    tokens = t.mbs * work.shape.seq_length / t.cp
    size = (t.cp - 1) * 2 * work.shape.kv_width / t.tp * tokens * WEIGHT_BYTES[work.precision]
    return (3 * layers + again) * _transfer(size, t.cp - 1.0, cp_inside_node(t, work), cluster)


def _pipeline_sends(t: Layouts, work: Workload, cluster: Cluster) -> Column:
    """An activation forward and a gradient backward for every chunk of a microbatch."""
    tokens = t.mbs * work.shape.seq_length / t.cp
    size = tokens * work.shape.hidden_size * WEIGHT_BYTES[work.precision] / _hidden_split(t, work)
    crossings = np.where(t.pp > 1, 2.0 * t.vpp, 0.0)
    return crossings * _transfer(size, np.ones(len(t)), pp_inside_node(t, work), cluster)


def _dp_communication(t: Layouts, work: Workload, cluster: Cluster, parameters: IntColumn, busy: Column) -> Column:
    """Gradients scattered over the replicas and weights gathered from them, once a step.

    Overlapped, the former hides behind the last microbatch's backward pass and the latter behind the first one's
    forward pass: two thirds and one third of a microbatch's device time.
    """
    replicas = data_parallel(t, work) * t.cp
    ring = (replicas - 1) / replicas
    inside = dp_inside_node(t, work)
    scatter = _transfer(ring * GRADIENT_BYTES[work.precision] * parameters, replicas - 1.0, inside, cluster)
    gather = _transfer(ring * WEIGHT_BYTES[work.precision] * parameters, replicas - 1.0, inside, cluster)
    if work.overlap_grad_sync:
        scatter = np.maximum(0.0, scatter - busy * 2 / 3)
    if work.overlap_param_sync:
        gather = np.maximum(0.0, gather - busy / 3)
    return np.where(replicas > 1, scatter + gather, 0.0)


def _optimizer(t: Layouts, work: Workload, cluster: Cluster, parameters: IntColumn) -> Column:
    """Adam passes over its shard of states, weights and gradients; norm and zeroing over all the rank's gradients."""
    gradient = GRADIENT_BYTES[work.precision]
    shard = 2 * (OPTIMIZER_BYTES[work.precision] + WEIGHT_BYTES[work.precision]) + gradient
    replicas = data_parallel(t, work) * t.cp
    return np.asarray((shard / replicas + 2 * gradient) * parameters / _memory_bytes_per_s(cluster))
