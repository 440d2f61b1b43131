"""What one layer and the output layer cost on one rank for one microbatch: device time by kind, and bytes to exchange.

None of it depends on how layers are spread over stages, so a search computes it once for each TP, CP, EP and micro
batch that its layouts share (`step_time.py`).
"""

from dataclasses import dataclass

import numpy as np

from hptool.candidates import Layouts
from hptool.predict.memory import ROUTED_COPIES
from hptool.predict.parallel import encoder_tokens, hidden_split, padded_vocab, tokens
from hptool.predict.parts import Column, choose
from hptool.predict.setting import Setting

#: Flash attention's backward pass over its forward pass (Dao 2023, arXiv:2307.08691, section 3.1: five GEMMs
#: against two).
BACKWARD_ATTENTION = 2.5

#: Side of the tiles in which GEMM kernels cut their results, the usual one of cuBLAS on tensor cores.
TILE = 128


#: How far apart the ranks of tensor parallelism lie.
ONE = np.ones(1)

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
    waves = rows * columns / (TILE * TILE * s.multiprocessors)
    loss = (1 + s.half_waves / waves) * (1 + s.half_depth / depth)
    compute = 2 * rows * columns * depth / s.gemm_flops_per_s * loss
    moved = s.element_bytes * (rows * columns + rows * depth + columns * depth)
    return np.asarray(np.maximum(compute, moved / s.memory_bytes_per_s))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Gemms:
    """Seconds of GEMMs, forward and backward (by inputs and by weights)."""

    forward_s: Column
    backward_s: Column

    def __add__(self, other: "_Gemms") -> "_Gemms":
        return _Gemms(forward_s=self.forward_s + other.forward_s, backward_s=self.backward_s + other.backward_s)

    def times(self, share: Column) -> "_Gemms":
        """As often as that."""
        return _Gemms(forward_s=share * self.forward_s, backward_s=share * self.backward_s)


def _linear(rows: Column, width_in: Column, width_out: Column, s: Setting) -> _Gemms:
    """One linear layer. Widths are of one rank: at least one element, where a table holds models without it."""
    width_in, width_out = np.maximum(1.0, width_in), np.maximum(1.0, width_out)
    return _Gemms(
        forward_s=gemm_s(rows, width_out, width_in, s),
        backward_s=gemm_s(rows, width_in, width_out, s) + gemm_s(width_out, width_in, rows, s),
    )


def _mlp(rows: Column, width: Column, t: Layouts, s: Setting) -> _Gemms:
    """Both linear layers of an MLP of this width."""
    return _linear(rows, s.hidden, s.mlp_inputs * width / t.tp, s) + _linear(rows, width / t.tp, s.hidden, s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Work:
    """What one layer does in a forward pass: GEMMs, attention, passes over scores, elements read and written."""

    gemms: _Gemms
    attention_s: Column
    scores_s: Column
    elements: Column


def layer_cost(t: Layouts, s: Setting) -> LayerCost:
    """The cost of one decoder layer of each row; an encoder's layers are shared out over the decoder's."""
    on_rank, split, e = tokens(t, s), hidden_split(t, s), s.element_bytes
    work = _decoder_layer(t, s, on_rank)
    if np.any(s.encoder_layers):
        work = _with_encoder(t, s, on_rank, work)
    vocab = padded_vocab(t, s)
    head = _linear(on_rank, s.hidden, vocab, s)
    softmax_s = s.logit_passes * 4 * on_rank * vocab / s.memory_bytes_per_s
    all_reduce = 2 * (t.tp - 1) / t.tp * on_rank * s.hidden * e
    tp_s = transfer_s(all_reduce, s, t.tp, ONE) + latency_s(s, t.tp, ONE) + s.collective_s * np.log2(t.tp)
    keys_and_values = (t.cp - 1) * 2 * s.kv_width / t.tp * on_rank * e
    if np.any(s.cp_by_heads):  # queries, keys, values and output, but for the rank's own part of each
        exchanged = (t.cp - 1) / t.cp * 2 * (s.attention_width + s.kv_width) / t.tp * on_rank * e
        keys_and_values = choose(s.cp_by_heads > 0, exchanged, keys_and_values)
    bound_s = np.asarray(work.elements * e / s.memory_bytes_per_s)
    core_s = work.attention_s + work.scores_s
    nothing = np.zeros(len(t))
    return LayerCost(
        gemm_s=work.gemms.forward_s + work.gemms.backward_s + nothing,
        attention_s=(1 + BACKWARD_ATTENTION) * work.attention_s + 3 * work.scores_s,
        memory_bound_s=3 * bound_s,
        again_s=work.gemms.forward_s + core_s + bound_s,
        core_s=core_s,
        # Behind attention and MLP, forward and backward: all-reduces, or as much in gathers and scatters with sequence
        # parallelism, whose backward pass repeats the gathers.
        tp_s=choose(s.sequence_parallel > 0, 5.0, 4.0) * tp_s,
        tp_again_s=2 * tp_s,
        cp_again_s=transfer_s(keys_and_values, s, t.cp, t.tp) + latency_s(s, t.cp, t.tp),
        ep_s=_expert_exchange_s(t, s, on_rank) if np.any(s.experts) else nothing,
        head_s=head.forward_s + head.backward_s + softmax_s,
        send_bytes=(on_rank + encoder_tokens(t, s)) * s.hidden * e / split,
        # A decoder layer beside an encoder has two attentions instead of one.
        launched_layers=nothing + 1.0 + s.encoder_layers / s.num_layers + 0.5 * (s.encoder_layers > 0),
    )


def _attention_gemms(rows: Column, t: Layouts, s: Setting) -> _Gemms:
    """Queries, keys and values of some tokens, and the output."""
    projections = _linear(rows, s.hidden, (s.attention_width + 2 * s.kv_width) / t.tp, s)
    return projections + _linear(rows, s.attention_width / t.tp, s.hidden, s)


def _decoder_layer(t: Layouts, s: Setting, rows: Column) -> _Work:
    """A decoder layer, or the mean of those with experts and those without."""
    share = s.expert_layers / s.num_layers
    gemms = _attention_gemms(rows, t, s) + _mlp(rows, s.ffn, t, s).times(1 - share)
    width, copies = (1 - share) * s.ffn, 0 * share
    if np.any(s.experts):
        local = np.maximum(1.0, s.experts / t.ep)
        routed = _mlp(np.maximum(1.0, rows * s.experts_per_token / local), s.expert_ffn, t, s)
        shared = _mlp(rows, s.shared_ffn, t, s)
        gemms = gemms + routed.times(share * local) + shared.times(share * (s.shared_ffn > 0))
        width = width + share * (s.experts_per_token * s.expert_ffn + s.shared_ffn)
        copies = share * s.experts_per_token * ROUTED_PASSES
    passes = s.hidden_passes / hidden_split(t, s) + copies
    attention_s, scores_s = _attention_s(t, s, rows, s.seq_length, s.causal)
    elements = rows * (passes * s.hidden + s.ffn_passes * s.mlp_inputs * width / t.tp)
    return _Work(gemms=gemms, attention_s=attention_s, scores_s=scores_s, elements=elements)


def _with_encoder(t: Layouts, s: Setting, rows: Column, own: _Work) -> _Work:
    """A decoder layer with its cross-attention, and its share of the encoder's layers."""
    present = 1.0 * (s.encoder_layers > 0)
    share = s.encoder_layers / s.num_layers
    keys = np.maximum(1.0, s.encoder_seq_length)
    encoder_rows = np.maximum(1.0, t.mbs * s.encoder_seq_length / t.cp)
    cross = _linear(encoder_rows, s.hidden, 2 * s.kv_width / t.tp, s)
    cross = cross + _linear(rows, s.hidden, s.attention_width / t.tp, s)
    cross = cross + _linear(rows, s.attention_width / t.tp, s.hidden, s)
    encoder = _attention_gemms(encoder_rows, t, s) + _mlp(encoder_rows, s.ffn, t, s)
    cross_s, cross_scores_s = _attention_s(t, s, rows, keys, 0 * s.causal)
    encoder_s, encoder_scores_s = _attention_s(t, s, encoder_rows, keys, 0 * s.causal)
    return _Work(
        gemms=own.gemms + cross.times(present) + encoder.times(share),
        attention_s=own.attention_s + present * cross_s + share * encoder_s,
        scores_s=own.scores_s + present * cross_scores_s + share * encoder_scores_s,
        # A third norm and residual in a decoder layer; an encoder layer for its tokens.
        elements=own.elements * (1 + present * 0.5 + share * encoder_rows / rows),
    )


def _expert_exchange_s(t: Layouts, s: Setting, rows: Column) -> Column:
    """Tokens to their experts and back, forward and backward: four all-to-alls."""
    outside = (t.ep - 1) / t.ep * rows * s.experts_per_token * s.hidden * s.element_bytes / hidden_split(t, s)
    each = transfer_s(outside, s, t.ep, t.tp) + latency_s(s, t.ep, t.tp)
    return np.asarray(s.expert_layers / s.num_layers * 4 * each)


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
