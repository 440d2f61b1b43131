"""What one layer and the output layer cost on one rank for one microbatch: device time by kind, and bytes to exchange.

None of it depends on how layers are spread over stages, so a search computes it once for each TP, CP, EP and micro
batch that its layouts share (`step_time.py`).
"""

from dataclasses import dataclass

import numpy as np

from hptool.candidates import Layouts
from hptool.predict.memory import ROUTED_COPIES
from hptool.predict.parallel import hidden_split, padded_vocab, tokens
from hptool.predict.parts import Column, choose
from hptool.predict.setting import Setting

#: Flash attention's backward pass over its forward pass (Dao 2023, arXiv:2307.08691, section 3.1: five GEMMs
#: against two).
BACKWARD_ATTENTION = 2.5

#: Side of the tiles in which GEMM kernels cut their results, the usual one of cuBLAS on tensor cores.
TILE = 128


#: Passes over a token's hidden size for each expert that it is routed to: each of the copies that are saved
#: (`memory.ROUTED_COPIES`) is written and read.
ROUTED_PASSES = 2 * ROUTED_COPIES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerCost:
    """Seconds of one layer for one microbatch on one rank, forward and backward, by kind of kernel and of exchange.

    `again_s` is what recomputing the layer runs a second time, `core_s` that of the core attention alone, and
    `tp_again_s` and `cp_again_s` its exchanges. `head_s` is the output layer with the loss.
    """

    gemm_s: Column
    attention_s: Column
    memory_bound_s: Column
    again_s: Column
    core_s: Column
    tp_s: Column
    tp_again_s: Column
    cp_again_s: Column
    ep_s: Column
    head_s: Column
    send_bytes: Column
    launched_layers: Column


def transfer_s(size: Column, s: Setting, ranks: Column, stride: Column) -> Column:
    """Seconds of one ring pass of `size` bytes in a group of `ranks` that lie `stride` GPUs apart.

    Inside a node the links are the rank's own. Across nodes a group has as many network ports as it has ranks in
    each node, and a message goes through the port's latency once.
    """
    local = np.clip(s.gpus_per_node / stride, 1, ranks)
    inside = ranks <= local
    across = np.minimum(s.intra_bytes_per_s, s.inter_bytes_per_s * local)
    rate = np.where(inside, s.intra_bytes_per_s, across)
    return np.asarray(size / rate)


def latency_s(s: Setting, ranks: Column, stride: Column) -> Column:
    """Seconds that a collective of no bytes takes: a tree of hops, inside the node and across."""
    local = np.clip(s.gpus_per_node / stride, 1, ranks)
    hops = np.log2(ranks / local) * s.inter_latency_s + np.log2(local) * s.intra_latency_s
    return np.asarray(hops)


def gemm_s(rows: Column, columns: Column, depth: Column, s: Setting) -> Column:
    """Seconds of a GEMM of rows x columns results over a depth, or of moving its operands where that takes longer."""
    # At least one element: a table may hold models without what others have (experts, an encoder).
    waves = np.maximum(1.0, rows * columns) / (TILE * TILE * s.multiprocessors)
    loss = (1 + s.half_waves / waves) * (1 + s.half_depth / np.maximum(1.0, depth))
    compute = 2 * rows * columns * depth / s.gemm_flops_per_s * loss
    moved = s.element_bytes * (rows * columns + rows * depth + columns * depth)
    return np.asarray(np.maximum(compute, moved / s.memory_bytes_per_s))


def _linear_s(rows: Column, width_in: Column, width_out: Column, s: Setting) -> tuple[Column, Column]:
    """Forward and backward (by inputs, by weights) of one linear layer."""
    forward = gemm_s(rows, width_out, width_in, s)
    return forward, gemm_s(rows, width_in, width_out, s) + gemm_s(width_out, width_in, rows, s)


def layer_cost(t: Layouts, s: Setting) -> LayerCost:
    """The cost of one decoder layer of each row; an encoder's layers are shared out over the decoder's."""
    on_rank = tokens(t, s)
    split = hidden_split(t, s)
    linears = [
        _linear_s(on_rank, s.hidden, (s.attention_width + 2 * s.kv_width) / t.tp, s),
        _linear_s(on_rank, s.attention_width / t.tp, s.hidden, s),
    ]
    mlp = [
        _linear_s(on_rank, s.hidden, s.mlp_inputs * s.ffn / t.tp, s),
        _linear_s(on_rank, s.ffn / t.tp, s.hidden, s),
    ]
    share = s.expert_layers / s.num_layers
    expert_tokens = on_rank * s.experts_per_token
    forward = sum(f for f, _ in linears) + (1 - share) * sum(f for f, _ in mlp)
    backward = sum(b for _, b in linears) + (1 - share) * sum(b for _, b in mlp)
    ffn_width = (1 - share) * s.ffn
    exchanged = np.zeros(len(t))
    if np.any(s.experts):
        local = np.maximum(1.0, s.experts / t.ep)
        rows = np.maximum(1.0, expert_tokens / local)
        routed = [
            _linear_s(rows, s.hidden, np.maximum(1.0, s.mlp_inputs * s.expert_ffn / t.tp), s),
            _linear_s(rows, np.maximum(1.0, s.expert_ffn / t.tp), s.hidden, s),
        ]
        shared = [
            _linear_s(on_rank, s.hidden, np.maximum(1.0, s.mlp_inputs * s.shared_ffn / t.tp), s),
            _linear_s(on_rank, np.maximum(1.0, s.shared_ffn / t.tp), s.hidden, s),
        ]
        has_shared = s.shared_ffn > 0
        forward = forward + share * (local * sum(f for f, _ in routed) + has_shared * sum(f for f, _ in shared))
        backward = backward + share * (local * sum(b for _, b in routed) + has_shared * sum(b for _, b in shared))
        ffn_width = ffn_width + share * (s.experts_per_token * s.expert_ffn + s.shared_ffn)
        # Tokens to their experts and back, forward and backward: four all-to-alls.
        outside = (t.ep - 1) / t.ep * expert_tokens * s.hidden * s.element_bytes / split
        stride = t.tp * 1.0
        exchanged = share * 4 * (transfer_s(outside, s, t.ep, stride) + latency_s(s, t.ep, stride))
    attention, scores = _attention_s(t, s, on_rank, s.seq_length, s.causal)
    e = s.element_bytes
    elements = on_rank * (s.hidden_passes * s.hidden / split + s.ffn_passes * s.mlp_inputs * ffn_width / t.tp)
    elements = elements + share * expert_tokens * ROUTED_PASSES * s.hidden
    if np.any(s.encoder_layers):
        encoder_rows = t.mbs * s.encoder_seq_length / t.cp
        per = s.encoder_layers / s.num_layers
        kv = _linear_s(encoder_rows, s.hidden, np.maximum(1.0, 2 * s.kv_width / t.tp), s)
        q = _linear_s(on_rank, s.hidden, s.attention_width / t.tp, s)
        ratio = encoder_rows / on_rank
        has = s.encoder_layers > 0
        dense_forward = sum(f for f, _ in linears) + sum(f for f, _ in mlp)
        dense_backward = sum(b for _, b in linears) + sum(b for _, b in mlp)
        forward = forward + np.where(has, kv[0] + q[0] + linears[1][0] + per * ratio * dense_forward, 0)
        backward = backward + np.where(has, kv[1] + q[1] + linears[1][1] + per * ratio * dense_backward, 0)
        cross, cross_scores = _attention_s(t, s, on_rank, np.maximum(1.0, s.encoder_seq_length), 0 * s.causal)
        own, own_scores = _attention_s(t, s, encoder_rows, np.maximum(1.0, s.encoder_seq_length), 0 * s.causal)
        attention = attention + np.where(has, cross + per * own, 0)
        scores = scores + np.where(has, cross_scores + per * own_scores, 0)
        elements = elements * np.where(has, 1.5 + per * ratio, 1.0)
    size = 2 * (t.tp - 1) / t.tp * on_rank * s.hidden * e
    one = np.ones(len(t))
    collective = transfer_s(size, s, t.tp * one, one) + latency_s(s, t.tp * one, one) + s.collective_s * np.log2(t.tp)
    kv_size = (t.cp - 1) * 2 * s.kv_width / t.tp * on_rank * e
    cp = transfer_s(kv_size, s, t.cp * one, t.tp * one) + latency_s(s, t.cp * one, t.tp * one)
    vocab = padded_vocab(t, s)
    head = _linear_s(on_rank, s.hidden, vocab, s)
    softmax = s.logit_passes * 4 * on_rank * vocab / s.memory_bytes_per_s
    bound_s = np.asarray(elements * e / s.memory_bytes_per_s)
    core_s = attention + scores
    # Behind attention and MLP, forward and backward: all-reduces, or as much in gathers and scatters with sequence
    # parallelism, whose backward pass repeats the gathers.
    collectives = choose(s.sequence_parallel > 0, 5.0, 4.0)
    return LayerCost(
        gemm_s=np.asarray(forward + backward + 0 * on_rank),
        attention_s=(1 + BACKWARD_ATTENTION) * attention + 3 * scores,
        memory_bound_s=3 * bound_s,
        again_s=np.asarray(forward + core_s + bound_s),
        core_s=core_s,
        tp_s=collectives * collective,
        tp_again_s=2 * collective,
        cp_again_s=cp,
        ep_s=exchanged + 0 * on_rank,
        head_s=head[0] + head[1] + softmax,
        send_bytes=on_rank * s.hidden * e / split,
        launched_layers=np.asarray(1.0 + s.encoder_layers / s.num_layers + 0.5 * (s.encoder_layers > 0) + 0 * on_rank),
    )


def _attention_s(t: Layouts, s: Setting, queries: Column, keys: Column, causal: Column) -> tuple[Column, Column]:
    """Forward seconds of the core attention's GEMMs, and of the passes over its scores where no kernel fuses them.

    Fused, a causal mask halves the work; plain GEMMs compute all of it.
    """
    width = s.attention_width / t.tp
    whole = 4 * queries * keys * width
    fused = whole * (1 - 0.5 * causal) / s.attention_flops_per_s * (1 + s.half_length / keys)
    # Plain: two batched GEMMs whose depth (or width) is the head's.
    plain = whole / s.gemm_flops_per_s * (1 + s.half_depth / s.head_width)
    passes = s.score_passes * s.heads / t.tp * queries * keys * s.element_bytes / s.memory_bytes_per_s
    return choose(s.flash > 0, fused, plain), choose(s.flash > 0, 0 * passes, passes)
