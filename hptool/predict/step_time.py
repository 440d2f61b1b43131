"""Time of a training step, as its parts. All figures in seconds, one row a layout.

A sum of closed-form terms: work over peak times an efficiency, bytes over bandwidth, messages times latency.
The efficiencies and links are facts of the GPU, the cluster and the framework (`cluster/`), none belongs to a model.
"""

from dataclasses import dataclass

import numpy as np

from hptool.candidates import Layouts, Recompute
from hptool.predict.layer import latency_s, layer_cost, transfer_s
from hptool.predict.memory import ZERO_WEIGHTS, stage_parameters
from hptool.predict.parallel import Table, data_parallel, microbatches, stage_layers
from hptool.predict.parts import Column, add_up, choose
from hptool.predict.setting import Setting


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTime:
    """The parts of a step, seconds; they add up to `total_s`. What is hidden behind other work is not in them."""

    gemm_s: Column
    attention_s: Column
    memory_bound_s: Column
    logits_s: Column
    recompute_s: Column
    launch_s: Column
    tp_communication_s: Column
    cp_communication_s: Column
    ep_communication_s: Column
    pp_communication_s: Column
    bubble_s: Column
    dp_communication_s: Column
    optimizer_s: Column
    overhead_s: Column

    @property
    def total_s(self) -> Column:
        """All of it."""
        return add_up(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Once:
    """Seconds of what happens once a step, nothing of it hidden; `gather_again_s` is for weights that are sharded."""

    scatter_s: Column
    gather_s: Column
    gather_again_s: Column
    optimizer_s: Column


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stage:
    """Seconds of one microbatch on the slowest stage, by what works; `launched_s` is the host's time."""

    microbatches: Column
    gemm_s: Column
    attention_s: Column
    memory_bound_s: Column
    recompute_s: Column
    tp_communication_s: Column
    cp_communication_s: Column
    ep_communication_s: Column
    launched_s: Column
    sends_s: Column
    logits_s: Column
    layers: Column

    @property
    def computing_s(self) -> Column:
        """The device's own work, without its output layer."""
        return np.asarray(self.gemm_s + self.attention_s + self.memory_bound_s + self.recompute_s)

    @property
    def exchanging_s(self) -> Column:
        """What waits for other ranks in the middle of a layer."""
        return np.asarray(self.tp_communication_s + self.cp_communication_s + self.ep_communication_s)


def predict_step_time(table: Table) -> StepTime:
    """Expected seconds of one step of the whole global batch."""
    t, s = table.layouts, table.setting
    stage, once = _stage(table), table.per_step(_once)
    m = stage.microbatches
    busy = stage.computing_s + stage.exchanging_s
    # A GPU works while the host launches ahead, and waits where it cannot; a CPU is its own host.
    launch = choose(s.on_gpu > 0, _longer(busy, stage.launched_s) - busy, stage.launched_s)
    # The output layer holds up the pipeline, except for the layers that the last stage has fewer than the largest.
    spare = (stage.layers - np.floor(s.num_layers / t.pp)) / stage.layers * (busy + launch)
    return StepTime(
        gemm_s=m * stage.gemm_s,
        attention_s=m * stage.attention_s,
        memory_bound_s=m * stage.memory_bound_s,
        logits_s=m * np.maximum(0.0, stage.logits_s - spare),
        recompute_s=m * stage.recompute_s,
        launch_s=m * launch,
        tp_communication_s=m * stage.tp_communication_s,
        cp_communication_s=m * stage.cp_communication_s,
        ep_communication_s=m * stage.ep_communication_s,
        pp_communication_s=m * stage.sends_s,
        # Each stage idles for the other stages' share of one microbatch, or of one of its vpp chunks.
        bubble_s=(t.pp - 1) / t.vpp * (busy + launch + stage.sends_s),
        dp_communication_s=_exposed(s, once, m, busy + launch),
        optimizer_s=once.optimizer_s,
        overhead_s=s.step_overhead_s + np.zeros(len(t)),
    )


def step_time_bounds(table: Table) -> tuple[Column, Column]:
    """Seconds of a step in which all that can overlap does, and of one in which nothing does."""
    t, s = table.layouts, table.setting
    stage, once = _stage(table), table.per_step(_once)
    m = stage.microbatches
    bubble = (t.pp - 1) / t.vpp
    longest = np.maximum(stage.computing_s, np.maximum(stage.exchanging_s, stage.launched_s))
    longest = np.maximum(longest, stage.sends_s)
    synchronising = once.scatter_s + once.gather_s + (m - 1) * once.gather_again_s
    best = (m + bubble) * longest + np.maximum(0.0, synchronising - m * longest) + once.optimizer_s
    whole = stage.computing_s + stage.exchanging_s + stage.launched_s + stage.sends_s
    worst = (m + bubble) * whole + m * stage.logits_s + synchronising + once.optimizer_s + s.step_overhead_s
    return np.asarray(best), np.asarray(worst)


def _stage(table: Table) -> _Stage:
    t, s = table.layouts, table.setting
    c = table.per_microbatch(layer_cost)
    layers = stage_layers(t, s)
    # What recomputation runs a second time, in layers.
    block = (t.recompute == Recompute.BLOCK) * t.recompute_num_layers * t.vpp
    block = block * s.num_layers / (s.num_layers + s.encoder_layers)  # those of an encoder among them
    again = (t.recompute == Recompute.UNIFORM) * layers + block
    selective = (t.recompute == Recompute.SELECTIVE) * layers
    return _Stage(
        microbatches=microbatches(t, s),
        gemm_s=layers * c.gemm_s,
        attention_s=layers * c.attention_s,
        memory_bound_s=layers * c.memory_bound_s,
        recompute_s=again * c.again_s + selective * choose(s.flash > s.recomputes_flash, 0 * c.core_s, c.core_s),
        tp_communication_s=layers * c.tp_s + again * c.tp_again_s,
        cp_communication_s=(3 * layers + again) * c.cp_again_s,
        ep_communication_s=(layers + again / 2) * c.ep_s,
        launched_s=(layers * (s.forward_launch_s + s.backward_launch_s) + again * s.forward_launch_s)
        * c.launched_layers,
        sends_s=_pipeline_sends(t, s, c.send_bytes),
        logits_s=c.head_s,
        layers=layers,
    )


def _longer(one: Column, other: Column) -> Column:
    """About the longer of two times, and more where they are alike and get into each other's way."""
    one, other = one * one, other * other
    return np.asarray(np.sqrt(np.sqrt(one * one + other * other)))


def _pipeline_sends(t: Layouts, s: Setting, size: Column) -> Column:
    """An activation forward and a gradient backward for every chunk of a microbatch."""
    # Stages are the outermost cut: neighbours share a node only where all the ranks of two stages do.
    inside = 2 * s.gpus <= s.gpus_per_node * t.pp
    rate = np.where(inside, s.intra_bytes_per_s, s.inter_bytes_per_s)
    latency = np.where(inside, s.intra_latency_s, s.inter_latency_s) + s.pipeline_sync_s
    return np.asarray((t.pp > 1) * 2 * t.vpp * (size / rate + latency))


def _once(t: Layouts, s: Setting) -> _Once:
    """Gradients scattered over the replicas, weights gathered from them, and the optimizer between the two."""
    parameters = stage_parameters(t, s, first=True).total
    replicas = data_parallel(t, s) * t.cp
    ring = (replicas - 1) / replicas * s.sync_passes * parameters
    latency = latency_s(s, replicas, t.tp)
    scatter = transfer_s(ring * s.gradient_bytes, s, replicas, t.tp) + latency
    gather = transfer_s(ring * s.element_bytes, s, replicas, t.tp) + latency
    # Adam passes over its shard of states, weights and gradients; norm and zeroing over all the rank's gradients.
    shard = 2 * (s.optimizer_bytes + s.element_bytes) + s.gradient_bytes
    shards = choose(s.zero_stage >= 1, replicas, np.ones(1))
    return _Once(
        scatter_s=scatter,
        # Unsharded optimizers all-reduce gradients: as if the gather were of gradients too.
        gather_s=np.asarray(choose(s.zero_stage >= 1, gather, scatter)),
        # Sharded weights are gathered for each pass, and their gradients scattered.
        gather_again_s=np.asarray(choose(s.zero_stage >= ZERO_WEIGHTS, 2 * gather + scatter, 0 * gather)),
        optimizer_s=(shard / shards + 2 * s.gradient_bytes) * parameters / s.memory_bytes_per_s,
    )


def _exposed(s: Setting, once: _Once, m: Column, busy: Column) -> Column:
    """What of data parallelism's exchange nothing hides.

    Overlapped, the scatter hides behind the last microbatch's backward pass and the gather behind the first one's
    forward pass: two thirds and one third of a microbatch's device time. Sharded weights hide behind all of it.
    """
    scatter, gather = once.scatter_s, once.gather_s
    scatter = choose(s.overlap_grad_sync > 0, np.maximum(0.0, scatter - busy * 2 / 3), scatter)
    gather = choose(s.overlap_param_sync > 0, np.maximum(0.0, gather - busy / 3), gather)
    sharded = m * np.maximum(0.0, once.gather_again_s - busy)
    return np.asarray(choose(s.zero_stage >= ZERO_WEIGHTS, sharded, scatter + gather))
