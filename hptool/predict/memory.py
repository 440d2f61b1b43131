"""Memory of the fullest rank, as its parts. All figures in GiB, one row a layout.

The byte counts are those of Megatron-core's layers with saved tensors counted one by one; with bf16 and dropout they
add up to the 34·s·b·h of Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from dataclasses import dataclass, fields

import numpy as np

from hptool.candidates import Layouts, Recompute
from hptool.predict.parallel import (
    Table,
    data_parallel,
    encoder_tokens,
    hidden_split,
    microbatches,
    padded_vocab,
    stage_kinds,
    tokens,
)
from hptool.predict.parts import Column, add_up, choose
from hptool.predict.setting import Setting
from hptool.units import GIB

#: Mean and reciprocal deviation of two norms a layer, fp32, for each token.
NORM_STATISTICS_BYTES = 16

#: Copies of a token that dispatching it to an expert and back saves: sent and received, permuted, and the expert's
#: result before and after it is permuted back. Explains the MoE runs of Megatron-LM's CI to 8 %.
ROUTED_COPIES = 5

#: What fragments of the CUDA caching allocator's blocks cannot be used, over what is allocated. Published runs
#: reserve 1.04 times what they allocate (median on B200), but the allocator gives its cache back before it fails.
ALLOCATOR_SLACK = 0.015

#: The stage of ZeRO in which weights and gradients are sharded too (FSDP).
ZERO_WEIGHTS = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Memory:
    """The parts of a rank's memory, GiB; they add up to `total_gib`.

    `framework_gib` are buffers that the framework allocates whatever the model; `slack_gib` is what the caching
    allocator holds beyond its tensors; `reserved_gib` lies outside it: device context and communication library.
    """

    weights_gib: Column
    gradients_gib: Column
    optimizer_gib: Column
    activations_gib: Column
    logits_gib: Column
    buffers_gib: Column
    framework_gib: Column
    slack_gib: Column
    reserved_gib: Column

    @property
    def total_gib(self) -> Column:
        """All of it: what has to fit into the device."""
        return add_up(self)

    @property
    def allocated_gib(self) -> Column:
        """The tensors alone: what `torch.cuda.max_memory_allocated` reports."""
        parts = (self.weights_gib, self.gradients_gib, self.optimizer_gib, self.activations_gib, self.logits_gib)
        return np.asarray(sum(parts) + self.buffers_gib + self.framework_gib)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankParameters:
    """Parameters that one rank of a stage holds: those of experts, and all others."""

    dense: Column
    experts: Column

    @property
    def total(self) -> Column:
        """All of them."""
        return np.asarray(self.dense + self.experts)


def rank_parameters(t: Layouts, s: Setting, *, first: bool, last: bool) -> RankParameters:
    """Parameters of one rank of a stage. A model without a pipeline is first and last stage in one.

    With an encoder, a stage that is neither is taken for the last one without what only that one has.
    """
    attention = s.hidden * (2 * s.attention_width + 2 * s.kv_width)
    mlp = s.hidden * s.ffn * (s.mlp_inputs + 1)
    # Split over TP: the GEMMs of attention and MLP, and the biases of the column-parallel ones.
    attention = (attention + s.qkv_bias * (s.attention_width + 2 * s.kv_width)) / t.tp + s.bias * s.hidden
    mlp = (mlp + s.bias * s.mlp_inputs * s.ffn) / t.tp + s.bias * s.hidden
    layer = attention + mlp + 2 * s.norm
    layers = np.ceil(s.num_layers / t.pp)
    if np.any(s.encoder_layers):
        encoder, layers = stage_kinds(t, s, first=first)
        cross = np.where(s.encoder_layers > 0, layers * (attention + s.norm), 0)
        dense = (encoder + layers) * layer + cross + _has_encoder_norm(t, s, first=first, last=last) * s.norm
    else:
        dense = layers * layer
    experts = np.zeros(len(t))
    if np.any(s.experts):
        expert_layers = layers * s.expert_layers / s.num_layers
        shared_mlp = s.hidden * s.shared_ffn * (s.mlp_inputs + 1) / t.tp
        dense = dense + expert_layers * (s.experts * (s.hidden + s.bias) + shared_mlp - mlp)
        one = s.hidden * s.expert_ffn * (s.mlp_inputs + 1) + s.bias * s.mlp_inputs * s.expert_ffn
        experts = expert_layers * s.experts / t.ep * (one / t.tp + s.bias * s.hidden)
    words = padded_vocab(t, s)
    table = words * s.hidden
    if first:
        dense = dense + table + s.positions * s.hidden + s.binary_head * 2 * s.hidden
    if last:
        # The last stage needs its own copy of tied embeddings, unless it is the first stage too.
        dense = dense + (1 - s.tied * first) * table + s.norm
        # Megatron-core's T5 and BERT have a bias for each word; BERT's head and pooler are on every rank of TP.
        dense = dense + ((s.encoder_layers > 0) + s.mlm_head) * words
        square = s.hidden * s.hidden + s.hidden
        dense = dense + s.mlm_head * (square + s.norm) + s.binary_head * (square + 2 * s.hidden + 2)
    return RankParameters(dense=np.asarray(dense), experts=experts)


def _has_encoder_norm(t: Layouts, s: Setting, *, first: bool, last: bool) -> Column:
    """The stage holds the encoder's last layer, and its norm."""
    chunk = (s.encoder_layers + s.num_layers) / (t.pp * t.vpp)
    holder = np.floor((s.encoder_layers - 1) / chunk) % t.pp
    return np.asarray((s.encoder_layers > 0) & (holder == (0 if first else t.pp - 1)) & (first or last))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _States:
    """GiB of weights, gradients and optimizer on a rank of the first stage, and of the last."""

    first_weights: Column
    first_gradients: Column
    first_optimizer: Column
    last_weights: Column
    last_gradients: Column
    last_optimizer: Column


def _states(t: Layouts, s: Setting) -> _States:
    replicas = data_parallel(t, s) * t.cp
    zero3 = s.zero_stage >= ZERO_WEIGHTS
    columns = []
    for parameters in (stage_parameters(t, s, first=True), stage_parameters(t, s, first=False)):
        whole = parameters.total
        sharded = parameters.dense / replicas + parameters.experts / np.maximum(1.0, replicas / t.ep)
        columns += [
            s.element_bytes / GIB * choose(zero3, sharded, whole),
            s.gradient_bytes / GIB * choose(zero3, sharded, whole),
            s.optimizer_bytes / GIB * choose(s.zero_stage >= 1, sharded, whole),
        ]
    return _States(**dict(zip((f.name for f in fields(_States)), columns, strict=True)))


def stage_parameters(t: Layouts, s: Setting, *, first: bool) -> RankParameters:
    """Parameters of a rank of the first stage, or else of the last; without a pipeline they are one."""
    alone = rank_parameters(t, s, first=True, last=True)
    stage = rank_parameters(t, s, first=first, last=not first)
    single = t.pp == 1
    return RankParameters(
        dense=np.where(single, alone.dense, stage.dense), experts=np.where(single, alone.experts, stage.experts)
    )


def layer_activation_bytes(t: Layouts, s: Setting) -> Column:
    """Bytes that one layer saves for the backward pass of one microbatch, without recomputing whole layers.

    With an encoder, one of the decoder's.
    """
    own = _self_attending_bytes(t, s, tokens(t, s), s.seq_length)
    if not np.any(s.encoder_layers):
        return own
    # A decoder layer's cross-attention: one norm more, its queries and output, and keys and values of the encoder.
    on_rank, e = tokens(t, s), s.element_bytes
    cross = (s.hidden * (2 * e + s.dropout) / hidden_split(t, s) + 2 * s.attention_width * e / t.tp) * on_rank
    cross = cross + 2 * s.kv_width * e / t.tp * encoder_tokens(t, s)
    cross = cross + _attention_bytes(t, s, on_rank, s.encoder_seq_length)
    return np.asarray(own + np.where(s.encoder_layers > 0, cross, 0))


def encoder_layer_activation_bytes(t: Layouts, s: Setting) -> Column:
    """As `layer_activation_bytes`, of a layer of the encoder."""
    return _self_attending_bytes(t, s, encoder_tokens(t, s), s.encoder_seq_length)


def _self_attending_bytes(t: Layouts, s: Setting, on_rank: Column, length: Column) -> Column:
    """Of a layer that attends to its own sequence of this length, this many of its tokens on the rank."""
    e = s.element_bytes
    split = hidden_split(t, s)
    # Input and output of both norms; dropout masks of one byte behind attention and MLP. What sequence parallelism
    # gathers for a GEMM and keeps is not split.
    on_hidden = s.hidden * (s.saved_hidden * e + 2 * s.dropout) * ((1 - s.gathered_share) / split + s.gathered_share)
    # Queries, keys, values and the attention's output. What context parallelism gathers is saved whole, and the output
    # once more in the order of the sequence; exchanged for heads, the output alone is there twice.
    gathered = (s.cp_gathers - s.cp_by_heads) * (2 * s.kv_width * t.cp) + s.cp_gathers * s.attention_width
    gathered = (t.cp > 1) * gathered
    on_heads = (2 * s.attention_width + 2 * s.kv_width + gathered) * e / t.tp
    # What the MLP projects to, before and after its activation; with experts for each token routed to one, with the
    # token's copy before and after.
    widths = s.mlp_inputs + 1 + s.saved_ffn
    dense = widths * s.ffn * e / t.tp
    routed = s.experts_per_token * (widths * s.expert_ffn / t.tp + ROUTED_COPIES * s.hidden) * e
    routed = routed + widths * s.shared_ffn * e / t.tp
    share = s.expert_layers / s.num_layers
    on_mlp = (1 - share) * dense + share * routed
    per_token = on_hidden + on_heads + on_mlp + NORM_STATISTICS_BYTES
    return np.asarray(per_token * on_rank + _attention_bytes(t, s, on_rank, length))


def _attention_bytes(t: Layouts, s: Setting, queries: Column, keys: Column) -> Column:
    fused = 4 * s.heads / t.tp * queries  # the softmax's log-sum-exp, fp32
    return np.asarray(choose(s.flash > 0, fused, _score_bytes(t, s, queries, keys)))


def _score_bytes(t: Layouts, s: Setting, queries: Column, keys: Column) -> Column:
    """What attention saves of its scores without a flash kernel."""
    # Softmax, and with dropout its mask and result: 5·a·s²·b in bf16. Computed in fp32, the softmax is saved so, and
    # only what the next GEMM reads in the model's precision.
    plain = s.softmax_in_fp32
    per_score = s.element_bytes + 4 * plain + s.dropout * (1 + s.element_bytes * (1 - plain)) + s.score_bytes
    return np.asarray(per_score * s.heads / t.tp * queries * keys)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Microbatch:
    """GiB on one rank that do not depend on its stage: of a layer, its core attention, its input, the logits.

    The `encoder_` ones are of an encoder's layer where there is one.
    """

    layer: Column
    core: Column
    layer_input: Column
    encoder_layer: Column
    encoder_core: Column
    encoder_layer_input: Column
    embedding: Column
    last_norm: Column
    logits: Column
    buffers: Column


def _microbatch(t: Layouts, s: Setting) -> _Microbatch:
    e = s.element_bytes
    on_rank = tokens(t, s)
    vocab = padded_vocab(t, s)
    width = choose(s.gathers_logits > 0, s.vocab, vocab)
    # Context parallelism holds keys and values of another rank beside its own, or has gathered those of all.
    others = choose(s.cp_gathers > 0, np.zeros(1), 2 * s.kv_width / t.tp * e * on_rank)
    gathered = np.where(t.cp > 1, others, 0)
    weights = s.hidden * (2 * s.attention_width + 2 * s.kv_width + (s.mlp_inputs + 1) * s.ffn) / t.tp * e
    # The bias of ALiBi, one for all layers.
    bias = s.alibi * s.heads / t.tp * s.seq_length * s.seq_length * e
    # Weights that are sharded are gathered a layer at a time, the next one while one computes.
    spare = 2 * (s.zero_stage >= ZERO_WEIGHTS) + s.weight_gradient_buffers
    hidden = s.hidden * e / hidden_split(t, s) / GIB  # of one token
    nothing = np.zeros(len(t))
    scores, on_encoder = _score_bytes(t, s, on_rank, s.seq_length), encoder_tokens(t, s) + nothing
    encoder_layer = encoder_scores = nothing
    if np.any(s.encoder_layers):
        encoder_layer = encoder_layer_activation_bytes(t, s)
        encoder_scores = _score_bytes(t, s, on_encoder, s.encoder_seq_length)
        scores = scores + _score_bytes(t, s, on_rank, s.encoder_seq_length)
    return _Microbatch(
        layer=layer_activation_bytes(t, s) / GIB,
        core=np.asarray(choose(s.flash > 0, nothing, scores / GIB)),
        layer_input=on_rank * hidden,
        encoder_layer=encoder_layer / GIB,
        encoder_core=np.asarray(choose(s.flash > 0, nothing, encoder_scores / GIB)),
        encoder_layer_input=on_encoder * hidden,
        embedding=s.dropout * (on_rank + on_encoder) * hidden / e,
        last_norm=2 * on_rank * s.hidden * e / hidden_split(t, s) / GIB,
        logits=on_rank * width * (s.logit_bytes + (t.tp > 1) * s.gathered_logit_bytes) / GIB,
        buffers=(gathered + bias + spare * weights + s.table_gradient_buffer * vocab * s.hidden * e) / GIB,
    )


def _in_flight(t: Layouts, m: Column, *, first: bool) -> Column:
    """Microbatches of one chunk (L/(pp·vpp) layers) whose activations a stage holds at the peak.

    1F1B keeps pp in flight on its first stage and one on its last; interleaving one chunk of each more (Megatron's
    warm-up).
    """
    chunks = t.pp * t.vpp + (t.vpp > 1) * (t.pp - 1) if first else (t.vpp - 1) * t.pp + 1
    return np.asarray(np.minimum(chunks, m * t.vpp))


def _activations(t: Layouts, s: Setting, own: _Microbatch, in_flight: Column, *, first: bool) -> tuple[Column, Column]:
    """GiB that a stage keeps with this many microbatches of a chunk in flight, and that it rebuilds on the way back."""
    layers, layer, layer_input, core = np.ceil(s.num_layers / t.pp), own.layer, own.layer_input, own.core
    passing: Column | float = 0.0
    if np.any(s.encoder_layers):
        # The mean of the layers that the stage holds.
        encoder, decoder = stage_kinds(t, s, first=first)
        layers = encoder + decoder
        # What passes by: the encoder's result, or where it is not there yet the decoder's embeddings.
        passing = np.where(decoder > 0, own.encoder_layer_input, own.layer_input) * (s.encoder_layers > 0)
        share = encoder / layers
        layer = _blend(own.encoder_layer, layer, share)
        layer_input, core = _blend(own.encoder_layer_input, layer_input, share), _blend(own.encoder_core, core, share)
    layers = layers / t.vpp
    # A recomputed layer (or chunk of layers) keeps its input alone, and one is rebuilt at a time.
    count = np.maximum(1, t.recompute_num_layers)
    is_uniform, is_block = t.recompute == Recompute.UNIFORM, t.recompute == Recompute.BLOCK
    # Sums of products, because a choice between columns costs more where rows are in no order.
    inputs = is_uniform * (layers / count) + is_block * count
    whole = layers - is_uniform * layers - is_block * count
    rebuilt = (is_uniform * count + is_block) * layer * s.rebuilt_layers
    if not np.all(s.flash):  # with a flash kernel there are no scores to recompute
        again = (t.recompute == Recompute.SELECTIVE) * core
        layer, rebuilt = layer - again, rebuilt + again
    return in_flight * (inputs * layer_input + whole * layer + passing), rebuilt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stage:
    """GiB of what differs between the first stage and the last."""

    weights_gib: Column
    gradients_gib: Column
    optimizer_gib: Column
    activations_gib: Column
    logits_gib: Column


def predict_memory(table: Table) -> Memory:
    """Memory of the fuller of the first and the last stage, row by row."""
    own, first, last = _stages(table)
    chosen = 1.0 * (add_up(first) >= add_up(last))
    fuller = {f.name: _blend(getattr(first, f.name), getattr(last, f.name), chosen) for f in fields(_Stage)}
    return _memory(table.setting, own, _Stage(**fuller))


def stage_memory(table: Table) -> tuple[Memory, Memory]:
    """Memory of a rank of the first stage and of the last; without a pipeline they are one."""
    own, first, last = _stages(table)
    return _memory(table.setting, own, first), _memory(table.setting, own, last)


def _blend(one: Column, other: Column, share: Column) -> Column:
    """A choice, which costs less than one by branches where rows are in no order."""
    return np.asarray(other + share * (one - other))


def _stages(table: Table) -> tuple[_Microbatch, _Stage, _Stage]:
    t, s = table.layouts, table.setting
    own = table.per_microbatch(_microbatch)
    states = table.per_step(_states)
    m = microbatches(t, s)
    stages = []
    for first in (True, False):
        in_flight = _in_flight(t, m, first=first)
        kept, rebuilt = _activations(t, s, own, in_flight, first=first)
        # The mask of the embedding's dropout, and input and output of the last norm.
        kept = kept + (in_flight / t.vpp * own.embedding if first else own.last_norm)
        logits = own.logits * (t.pp == 1) if first else own.logits
        # The logits are gone when layers are rebuilt, or nearly so: the larger of the two is the peak.
        beside = np.minimum(rebuilt, logits) * s.rebuilt_beside_logits
        is_last = 1.0 * (rebuilt >= logits)
        stages.append(
            _Stage(
                weights_gib=states.first_weights if first else states.last_weights,
                gradients_gib=states.first_gradients if first else states.last_gradients,
                optimizer_gib=states.first_optimizer if first else states.last_optimizer,
                activations_gib=kept + _blend(rebuilt, beside, is_last),
                logits_gib=_blend(beside, logits, is_last),
            )
        )
    return own, stages[0], stages[1]


def _memory(s: Setting, own: _Microbatch, stage: _Stage) -> Memory:
    nothing = np.zeros(len(own.buffers))
    allocated = add_up(stage) + own.buffers + s.framework_bytes / GIB
    return Memory(
        **{f.name: getattr(stage, f.name) for f in fields(_Stage)},
        buffers_gib=own.buffers,
        framework_gib=nothing + s.framework_bytes / GIB,
        slack_gib=s.on_gpu * ALLOCATOR_SLACK * allocated,
        reserved_gib=nothing + s.reserved_bytes / GIB,
    )
