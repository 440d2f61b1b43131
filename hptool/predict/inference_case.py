"""Everything that the formulas of serving read, as columns: of the model, of what is asked, of device and links.

What calibration may move is kept apart (`Constants`), so that many values of it are tried in one call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from hptool.facts import Cluster, Engine, ModelShape, Precision
from hptool.predict.parts import Column
from hptool.serving import ServingPoints
from hptool.units import GB, GIB, MICRO, TERA

#: Bytes of an element of weights.
WEIGHT_BYTES: dict[Precision, float] = {
    "fp32": 4,
    "tf32": 4,
    "fp16": 2,
    "bf16": 2,
    "fp8": 1,
    "mxfp8": 1 + 1 / 32,  # a scale of 8 bits for each 32 elements
    "nvfp4": 0.5 + 1 / 16,  # a scale of 8 bits for each 16 elements
}

#: The precision of what stays wide where GEMMs take fewer bits: embeddings, the output layer, activations, attention.
WIDE: dict[Precision, Precision] = {"fp8": "bf16", "mxfp8": "bf16", "nvfp4": "bf16"}

#: What calibration may move, one an engine, and how far it may lie from what is believed of a fitted engine: standard
#: deviations of logarithms. Rates of kernels differ less between versions than what a scheduler costs.
CONSTANTS: dict[str, float] = {
    "gemm_speed": 0.2,
    "expert_speed": 0.3,
    "attention_speed": 0.3,
    "query_speed": 0.4,
    "weight_speed": 0.12,
    "kv_speed": 0.3,
    "link_speed": 0.3,
    "hidden_passes": 0.3,
    "layer_us": 0.4,
    "host_layer_us": 0.7,
    "step_us": 0.6,
    "request_us": 0.6,
    "request_ms": 1.3,
    "collective_hops": 0.4,
    "pipeline_hops": 0.4,
    "pipelining": 0.3,
    "burst": 0.4,
}

#: The most that some may be: shares, and rates of which the GPU's facts have 50 to 80 % of the data sheet's already.
CEILINGS: dict[str, float] = {
    "gemm_speed": 1.3,
    "expert_speed": 1.3,
    "attention_speed": 2.0,
    "weight_speed": 1.27,
    "link_speed": 2.0,
    "kv_speed": 1.27,
    "pipelining": 1.0,
    "burst": 1.0,
}

#: A figure for each constant, or a column that broadcasts against the rows.
Constants = Mapping[str, Column | float]


def constants_of(engine: Engine) -> dict[str, float]:
    """What calibration may move of an engine."""
    return {name: float(getattr(engine, name)) for name in CONSTANTS}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """Columns of one entry a row. Widths are in elements, rates in bytes or FLOP a second, times in seconds."""

    # What is asked.
    tp: Column
    pp: Column
    batch: Column
    input_len: Column
    output_len: Column
    graphs: Column
    # The model.
    layers: Column
    encoder_layers: Column
    expert_layers: Column
    hidden: Column
    ffn: Column
    mlp_inputs: Column
    heads: Column
    attention_width: Column
    kv_width: Column
    kv_channels: Column
    vocab: Column
    causal: Column
    experts: Column
    experts_per_token: Column
    expert_ffn: Column
    shared_ffn: Column
    table_parameters: Column
    # How it is computed.
    weight_bytes: Column
    wide_bytes: Column
    kv_bytes: Column
    in_flight: Column
    paged_kv: Column
    kv_block_tokens: Column
    memory_share: Column
    reserved_output: Column
    prefill_tokens: Column
    decode_rows: Column
    query_bound: Column
    activation_widths: Column
    layer_widths: Column
    buffer_bytes: Column
    # The device.
    memory_bytes: Column
    reserved_bytes: Column
    gemm_flops_per_s: Column
    wide_flops_per_s: Column
    attention_flops_per_s: Column
    memory_bytes_per_s: Column
    multiprocessors: Column
    half_waves: Column
    half_depth: Column
    half_length: Column
    # The links.
    gpus_per_node: Column
    intra_bytes_per_s: Column
    intra_latency_s: Column
    inter_bytes_per_s: Column
    inter_latency_s: Column

    def __len__(self) -> int:
        return len(self.tp)


def case(points: ServingPoints, shape: ModelShape, cluster: Cluster, engine: Engine) -> Case:
    """The columns of these points; ValueError where the GPU cannot compute in a point's precision."""
    gpu, efficiency = cluster.gpu, cluster.gpu.efficiency
    peaks = gpu.peak_tflops
    kinds, which = np.unique(points.precision, return_inverse=True)
    if unknown := [str(kind) for kind in kinds if kind not in peaks]:
        msg = f"precision: {unknown[0]} given, allowed on {gpu.name} is {' or '.join(sorted(peaks))}"
        raise ValueError(msg)
    precisions: list[Precision] = [next(p for p in peaks if p == kind) for kind in kinds]
    wide = [WIDE.get(p, p) for p in precisions]

    def by_precision(values: Sequence[float]) -> Column:
        return np.array(values, dtype=np.float64)[which.reshape(-1)]

    same: dict[str, float] = {
        "layers": shape.num_layers,
        "encoder_layers": shape.encoder_num_layers,
        "expert_layers": shape.num_expert_layers,
        "hidden": shape.hidden_size,
        "ffn": shape.ffn_hidden_size,
        "mlp_inputs": shape.mlp_inputs,
        "heads": shape.num_attention_heads,
        "attention_width": shape.attention_width,
        "kv_width": shape.kv_width,
        "kv_channels": shape.kv_channels,
        "vocab": shape.vocab_size,
        "causal": shape.causal,
        "experts": shape.num_experts,
        "experts_per_token": shape.experts_per_token,
        "expert_ffn": shape.expert_ffn_hidden_size,
        "shared_ffn": shape.shared_ffn_hidden_size,
        "table_parameters": shape.vocab_size * shape.hidden_size
        + (shape.max_position_embeddings * shape.hidden_size if shape.learned_positions else 0),
        "in_flight": engine.in_flight,
        "paged_kv": engine.paged_kv,
        "kv_block_tokens": engine.kv_block_tokens,
        "memory_share": engine.memory_share,
        "reserved_output": engine.reserved_output,
        "prefill_tokens": engine.prefill_tokens or np.inf,
        "decode_rows": engine.decode_rows or np.inf,
        "query_bound": shape.num_attention_heads // shape.num_query_groups not in engine.query_groups,
        "activation_widths": engine.activation_widths,
        "layer_widths": engine.layer_widths,
        "buffer_bytes": engine.buffer_gib * GIB,
        "memory_bytes": gpu.memory_gib * GIB,
        "reserved_bytes": gpu.reserved_gib * GIB,
        "memory_bytes_per_s": gpu.memory_gb_per_s * GB * efficiency.memory,
        "multiprocessors": gpu.multiprocessors,
        "half_waves": efficiency.gemm_half_waves,
        "half_depth": efficiency.gemm_half_depth,
        "half_length": efficiency.attention_half_length,
        "gpus_per_node": gpu.gpus_per_nvlink_domain or cluster.gpus_per_node,
        "intra_bytes_per_s": cluster.intra_node.bandwidth_gb_per_s * GB * cluster.intra_node.efficiency,
        "intra_latency_s": cluster.intra_node.latency_us * MICRO,
        "inter_bytes_per_s": cluster.inter_node.bandwidth_gb_per_s * GB * cluster.inter_node.efficiency,
        "inter_latency_s": cluster.inter_node.latency_us * MICRO,
    }
    asked = {
        name: getattr(points, name).astype(np.float64) for name in ("tp", "pp", "batch", "input_len", "output_len")
    }
    return Case(
        **asked,
        graphs=(points.cuda_graphs | engine.cuda_graphs).astype(np.float64),
        weight_bytes=by_precision([WEIGHT_BYTES[p] for p in precisions]),
        wide_bytes=by_precision([WEIGHT_BYTES[p] for p in wide]),
        kv_bytes=by_precision([engine.kv_bytes if p in WIDE else WEIGHT_BYTES[p] for p in precisions]),
        gemm_flops_per_s=by_precision([peaks[p] * TERA * efficiency.gemm for p in precisions]),
        wide_flops_per_s=by_precision(
            [peaks.get(p, peaks[gpu.default_precision]) * TERA * efficiency.gemm for p in wide]
        ),
        attention_flops_per_s=by_precision(
            [peaks.get(p, peaks[gpu.default_precision]) * TERA * efficiency.attention for p in wide]
        ),
        **{name: np.full(len(points), float(value)) for name, value in same.items()},
    )


def join_cases(cases: Sequence[Case]) -> Case:
    """The rows of all of them below one another."""
    return Case(**{f.name: np.concatenate([getattr(one, f.name) for one in cases]) for f in fields(Case)})
