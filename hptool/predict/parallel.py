"""What follows from a layout, its workload and the device: replicas, microbatches, kernels, groups of ranks."""

from hptool.candidates import BoolColumn, IntColumn, Layouts, Workload
from hptool.facts import GpuSpec


def data_parallel(t: Layouts, work: Workload) -> IntColumn:
    """Replicas of the model: GPUs over TP·PP·CP."""
    return work.gpus // t.gpus_per_replica


def microbatches(t: Layouts, work: Workload) -> IntColumn:
    """Microbatches that each replica works through in a step."""
    return work.gbs // (t.mbs * data_parallel(t, work))


def keeps_scores_on_chip(work: Workload, gpu: GpuSpec) -> bool:
    """A flash kernel computes the attention. torch's for CPUs knows no dropout and gives way to plain GEMMs."""
    return work.flash_attention and not (gpu.device == "cpu" and work.dropout)


# Megatron numbers ranks with TP fastest, then CP, then DP, then PP: a group is inside a node as long as the
# ranks that it spans are.


def cp_inside_node(t: Layouts, work: Workload) -> BoolColumn:
    """A context-parallel group does not leave its node."""
    return t.tp * t.cp <= work.gpus_per_node


def dp_inside_node(t: Layouts, work: Workload) -> BoolColumn:
    """A data-parallel group does not leave its node."""
    return t.tp * t.cp * data_parallel(t, work) <= work.gpus_per_node


def pp_inside_node(t: Layouts, work: Workload) -> BoolColumn:
    """Neighbouring stages are in one node."""
    return work.gpus <= work.gpus_per_node + 0 * t.pp
