"""Everything that the formulas read beside the layout, as columns: one path for one workload and for many.

A search has one workload, so each column has one entry and broadcasts over the layouts. A table of published runs
has another workload in each row: the same columns, as long as the table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from hptool.candidates import Workload
from hptool.facts import Cluster, Framework, Precision
from hptool.predict.flops import model_flops_per_sequence
from hptool.predict.parts import Column
from hptool.units import GB, GIB, MIB, MICRO, MILLI, TERA

#: Bytes of a weight, and of its optimizer state before sharding: Adam keeps two fp32 moments, and an fp32 copy of
#: weights that are not fp32 themselves. 8- and 4-bit GEMMs keep bf16 weights and cast them (Megatron's default).
WEIGHT_BYTES: dict[Precision, int] = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 2, "mxfp8": 2, "nvfp4": 2}
OPTIMIZER_BYTES: dict[Precision, int] = {p: 8 if b == 4 else 12 for p, b in WEIGHT_BYTES.items()}  # noqa: PLR2004

#: The precision in which attention is computed where the GEMMs use fewer bits (Transformer Engine's default).
_ATTENTION_PRECISION: dict[Precision, Precision] = {"fp8": "bf16", "mxfp8": "bf16", "nvfp4": "bf16"}

#: Relative error beside the framework's for models with experts or an encoder: the scatter of the published runs of
#: both, of which there are few, on few frameworks.
UNSURE_SHAPE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """Columns of one entry, or of one a row. Widths are in elements, rates in bytes or FLOP a second, times in seconds.

    `attention` and `mlp` count the weights of one layer's GEMMs, `experts` those of all its experts; `split` are
    biases divided over TP, `whole` the parameters that every rank of a TP group holds.
    """

    # The model.
    num_layers: Column
    expert_layers: Column
    hidden: Column
    ffn: Column
    mlp_inputs: Column
    heads: Column
    head_width: Column
    attention_width: Column
    kv_width: Column
    seq_length: Column
    tokens_per_sequence: Column
    vocab: Column
    vocab_divisor: Column
    tied: Column
    positions: Column
    causal: Column
    norm: Column
    bias: Column
    qkv_bias: Column
    mlm_head: Column
    binary_head: Column
    experts: Column
    experts_per_token: Column
    expert_ffn: Column
    shared_ffn: Column
    encoder_layers: Column
    encoder_seq_length: Column
    model_flops_per_sequence: Column
    # How it is trained.
    gbs: Column
    gpus: Column
    gpus_per_node: Column
    sequence_parallel: Column
    flash: Column
    alibi: Column
    dropout: Column
    overlap_grad_sync: Column
    overlap_param_sync: Column
    zero_stage: Column
    element_bytes: Column
    gradient_bytes: Column
    optimizer_bytes: Column
    # The framework.
    forward_launch_s: Column
    backward_launch_s: Column
    hidden_passes: Column
    ffn_passes: Column
    score_passes: Column
    logit_bytes: Column
    gathers_logits: Column
    gathered_logit_bytes: Column
    weight_gradient_buffers: Column
    saved_hidden: Column
    saved_ffn: Column
    softmax_in_fp32: Column
    score_bytes: Column
    cp_gathers: Column
    cp_by_heads: Column
    table_gradient_buffer: Column
    gathered_share: Column
    recomputes_flash: Column
    rebuilt_layers: Column
    rebuilt_beside_logits: Column
    framework_bytes: Column
    step_overhead_s: Column
    pipeline_sync_s: Column
    collective_s: Column
    logit_passes: Column
    sync_passes: Column
    # The device.
    on_gpu: Column
    memory_bytes: Column
    reserved_bytes: Column
    gemm_flops_per_s: Column
    attention_flops_per_s: Column
    memory_bytes_per_s: Column
    multiprocessors: Column
    half_waves: Column
    half_depth: Column
    half_length: Column
    # The links.
    intra_bytes_per_s: Column
    intra_latency_s: Column
    inter_bytes_per_s: Column
    inter_latency_s: Column
    # How far to trust what is not calibrated: relative standard deviations.
    step_time_error: Column
    memory_error: Column
    fitted: Column

    def __len__(self) -> int:
        return len(self.gbs)


def stack(scenarios: Sequence[tuple[Workload, Cluster, Framework]]) -> Setting:
    """One entry a scenario."""
    rows = [_numbers(*scenario) for scenario in scenarios]
    return Setting(**{f.name: np.array([row[f.name] for row in rows], dtype=np.float64) for f in fields(Setting)})


def _numbers(work: Workload, cluster: Cluster, framework: Framework) -> dict[str, float]:
    shape, gpu, efficiency = work.shape, cluster.gpu, cluster.gpu.efficiency
    # A graph is launched once, whatever is in it.
    launch_s = 0.0 if work.cuda_graph else gpu.launch_overhead_us * MICRO
    attention_precision = _ATTENTION_PRECISION.get(work.precision, work.precision)
    element = WEIGHT_BYTES[work.precision]
    doubt = UNSURE_SHAPE if shape.num_experts or shape.encoder_num_layers else 0.0
    return {
        "num_layers": shape.num_layers,
        "expert_layers": shape.num_expert_layers,
        "hidden": shape.hidden_size,
        "ffn": shape.ffn_hidden_size,
        "mlp_inputs": shape.mlp_inputs,
        "heads": shape.num_attention_heads,
        "head_width": shape.kv_channels,
        "attention_width": shape.attention_width,
        "kv_width": shape.kv_width,
        "seq_length": shape.seq_length,
        "tokens_per_sequence": shape.tokens_per_sequence,
        "vocab": shape.vocab_size,
        "vocab_divisor": work.vocab_divisor,
        "tied": shape.tied_embeddings,
        "positions": shape.max_position_embeddings if shape.learned_positions else 0,
        "causal": shape.causal,
        "norm": shape.norm_parameters,
        "bias": shape.has_bias,
        "qkv_bias": shape.has_bias or shape.has_qkv_bias,
        "mlm_head": shape.has_mlm_head,
        "binary_head": shape.has_binary_head,
        "experts": shape.num_experts,
        "experts_per_token": shape.experts_per_token,
        "expert_ffn": shape.expert_ffn_hidden_size,
        "shared_ffn": shape.shared_ffn_hidden_size,
        "encoder_layers": shape.encoder_num_layers,
        "encoder_seq_length": shape.encoder_seq_length,
        "model_flops_per_sequence": model_flops_per_sequence(shape),
        "gbs": work.gbs,
        "gpus": work.gpus,
        "gpus_per_node": gpu.gpus_per_nvlink_domain or work.gpus_per_node,
        "sequence_parallel": work.sequence_parallel,
        # torch's flash kernel for CPUs knows no dropout and gives way to plain GEMMs.
        "flash": work.flash_attention and not (gpu.device == "cpu" and work.dropout),
        "alibi": work.alibi,
        "dropout": work.dropout,
        "overlap_grad_sync": work.overlap_grad_sync,
        "overlap_param_sync": work.overlap_param_sync,
        "zero_stage": work.zero_stage,
        "element_bytes": element,
        "gradient_bytes": max(framework.gradient_bytes, 4 if element == 4 else 2),  # noqa: PLR2004
        "optimizer_bytes": OPTIMIZER_BYTES[work.precision],
        "forward_launch_s": framework.forward_operations * launch_s,
        "backward_launch_s": framework.backward_operations * launch_s,
        "hidden_passes": framework.hidden_passes,
        "ffn_passes": framework.ffn_passes,
        "score_passes": framework.score_passes,
        # The framework's figure is of 16-bit logits.
        "logit_bytes": framework.logit_bytes + element - 2,
        "gathers_logits": framework.gathers_logits,
        "gathered_logit_bytes": framework.gathered_logit_bytes,
        "weight_gradient_buffers": framework.weight_gradient_buffers,
        "saved_hidden": framework.saved_hidden,
        "saved_ffn": framework.saved_ffn,
        "softmax_in_fp32": framework.softmax_in_fp32,
        "score_bytes": framework.score_bytes,
        "cp_gathers": framework.cp_gathers,
        "cp_by_heads": framework.cp_gathers and work.cp_comm_type == "a2a",
        "recomputes_flash": framework.recomputes_flash,
        "table_gradient_buffer": framework.table_gradient_buffer,
        "gathered_share": framework.gathered_share,
        "rebuilt_layers": framework.rebuilt_layers,
        "rebuilt_beside_logits": framework.rebuilt_beside_logits,
        "framework_bytes": framework.allocated_mib * MIB if gpu.device == "cuda" else 0.0,
        "step_overhead_s": framework.step_overhead_ms * MILLI if gpu.device == "cuda" else 0.0,
        "pipeline_sync_s": framework.pipeline_sync_us * MICRO if gpu.device == "cuda" else 0.0,
        "collective_s": framework.collective_us * MICRO if gpu.device == "cuda" else 0.0,
        "logit_passes": framework.logit_passes,
        "sync_passes": framework.sync_passes,
        "on_gpu": gpu.device == "cuda",
        "memory_bytes": gpu.memory_gib * GIB,
        "reserved_bytes": gpu.reserved_gib * GIB,
        "gemm_flops_per_s": gpu.peak_tflops[work.precision] * TERA * efficiency.gemm,
        "attention_flops_per_s": gpu.peak_tflops[attention_precision]
        * TERA
        * efficiency.attention
        * framework.attention_speed,
        "memory_bytes_per_s": gpu.memory_gb_per_s * GB * efficiency.memory,
        "multiprocessors": gpu.multiprocessors,
        "half_waves": efficiency.gemm_half_waves,
        "half_depth": efficiency.gemm_half_depth,
        "half_length": efficiency.attention_half_length,
        "intra_bytes_per_s": cluster.intra_node.bandwidth_gb_per_s * GB * cluster.intra_node.efficiency,
        "intra_latency_s": cluster.intra_node.latency_us * MICRO,
        "inter_bytes_per_s": cluster.inter_node.bandwidth_gb_per_s * GB * cluster.inter_node.efficiency,
        "inter_latency_s": cluster.inter_node.latency_us * MICRO,
        "step_time_error": math.hypot(framework.step_time_error, doubt),
        "memory_error": math.hypot(framework.memory_error, doubt / 2),
        "fitted": framework.fitted,
    }
