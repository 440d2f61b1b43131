"""Time of prompts and of tokens, as its parts. Milliseconds, one row a point.

A prompt is bound by compute, a token by what has to be read for it: weights once for all requests, keys and values
once for each.
"""

from dataclasses import dataclass

import numpy as np

from hptool.predict.inference_case import Case, Constants
from hptool.predict.inference_memory import rank_kv_width
from hptool.predict.layer import TILE
from hptool.predict.parts import Column, add_up
from hptool.units import MICRO, MILLI

#: Of what computes and what reads, the longer is nearly all of both; where they are alike they are in each other's way.
SHARPNESS = 4.0

#: Attentions of a decoder layer beside an encoder, over one.
_CROSS = 1.5


#: Keeps the logarithm of the share of experts that a token leaves out finite, where it leaves out none.
_ALL = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PassTime:
    """The parts of a pass through the whole model, milliseconds; they add up to `total_ms`.

    `memory_ms` is reading weights, keys, values and activations, as far as nothing computes meanwhile; `launch_ms` is
    what small kernels take whatever they work on, and the host as far as the device waits for it.
    """

    compute_ms: Column
    memory_ms: Column
    all_reduce_ms: Column
    pipeline_ms: Column
    launch_ms: Column
    sampling_ms: Column

    @property
    def total_ms(self) -> Column:
        """All of it."""
        return add_up(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingTimes:
    """Milliseconds: of a whole answer, to its first token, of each token after it, and of waiting for room before."""

    latency_ms: Column
    ttft_ms: Column
    tpot_ms: Column
    waiting_ms: Column
    prefill: PassTime
    decode: PassTime


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Linear:
    """What linear layers cost: seconds of compute at the facts' rate, bytes of weights that are read."""

    compute_s: Column
    weight_bytes: Column

    def __add__(self, other: "_Linear") -> "_Linear":
        return _Linear(compute_s=self.compute_s + other.compute_s, weight_bytes=self.weight_bytes + other.weight_bytes)

    def times(self, count: Column) -> "_Linear":
        return _Linear(compute_s=count * self.compute_s, weight_bytes=count * self.weight_bytes)


def serving_times(c: Case, k: Constants, running: Column) -> ServingTimes:
    """Times of requests of which `running` run at once and the others wait for the room that those leave.

    Static, all prompts come first and then all tokens. In flight, the other requests' prompts come before a request's
    first token or between its tokens, but all of them within its time: in the long run as many start as end.
    """
    everyone, alone, step = prefill(c, k, running), prefill(c, k, np.ones(1)), decode(c, k, running)
    first_ms, own_ms = everyone.total_ms, alone.total_ms
    asked_ms = k["request_ms"] * np.ones(1)
    steps = c.output_len - 1
    busy_ms = asked_ms + first_ms + steps * step.total_ms
    waiting_ms = (c.batch / running - 1) * busy_ms
    before_ms = np.where((c.in_flight > 0) & (steps > 0), own_ms + k["burst"] * (first_ms - own_ms), first_ms)
    after_ms = steps * step.total_ms + first_ms - before_ms
    return ServingTimes(
        latency_ms=np.asarray(waiting_ms + busy_ms),
        ttft_ms=np.asarray(waiting_ms + asked_ms + before_ms),
        tpot_ms=np.where(steps > 0, after_ms / np.maximum(1.0, steps), step.total_ms),
        waiting_ms=np.asarray(waiting_ms),
        prefill=everyone,
        decode=step,
    )


def prefill(c: Case, k: Constants, requests: Column) -> PassTime:
    """The prompts of so many requests, in as few passes as the engine can."""
    # Cut into as many parts as there are stages, a pipeline fills and drains once.
    parts = 1 - np.where(c.pp > 1, k["pipelining"], 0.0) * (1 - (2 * c.pp - 1) / c.pp**2)
    together = 1 + (requests - 1) * parts
    passes = np.maximum(1.0, together * c.input_len / c.prefill_tokens)
    has_encoder = c.encoder_layers > 0
    # With an encoder the prompt is the encoder's, and the decoder starts with one token.
    own = np.where(has_encoder, 1.0, c.input_len) * together / passes
    scores = together / passes * np.where(has_encoder, 1.0, c.input_len**2 * (1 - 0.5 * c.causal))
    work = _layer(c, k, own).times(c.layers)
    attention_flop = 4 * scores * c.attention_width / c.tp * c.layers
    tokens = own * c.layers
    if np.any(has_encoder):
        encoded = c.input_len * together / passes
        cross = _linear(c, encoded, 2 * c.kv_width / c.tp, c.hidden) + _linear(
            c, own, c.attention_width / c.tp, 2 * c.hidden
        )
        work = work + _layer(c, k, encoded).times(c.encoder_layers) + cross.times(np.where(has_encoder, c.layers, 0.0))
        attention_flop = attention_flop + 4 * encoded * c.input_len * c.attention_width / c.tp * c.encoder_layers
        tokens = tokens + encoded * c.encoder_layers
    attention_s = attention_flop / (c.attention_flops_per_s * k["attention_speed"]) * (1 + c.half_length / c.input_len)
    moved = tokens * c.hidden * k["hidden_passes"] * c.wide_bytes
    one = _pass(
        c,
        k,
        layers=_decoder_layers(c) + c.encoder_layers,
        work=work,
        reads=np.ones(1),
        requests=together / passes,
        tokens=tokens / np.maximum(1.0, c.layers + c.encoder_layers),
        attention_s=attention_s,
        moved_s=moved / (c.memory_bytes_per_s * k["weight_speed"]),
    )
    return _times(one, passes)


def decode(c: Case, k: Constants, requests: Column) -> PassTime:
    """One token for each of so many requests, half of their outputs being there already."""
    parts = 1 - np.where(c.pp > 1, k["pipelining"], 0.0) * (1 - 1 / c.pp)
    together = 1 + (requests - 1) * parts
    has_encoder = c.encoder_layers > 0
    work = _layer(c, k, together).times(c.layers)
    if np.any(has_encoder):
        cross = _linear(c, together, c.attention_width / c.tp, 2 * c.hidden)
        work = work + cross.times(np.where(has_encoder, c.layers, 0.0))
    # Keys and values of the prompt (an encoder's too, by cross-attention) and of half of the output.
    context = c.input_len + c.output_len / 2
    keys = together * context * 2 * rank_kv_width(c) * c.kv_bytes * c.layers
    scores = 4 * together * context * c.query_bound * c.attention_width / c.tp * c.layers
    attention_s = _both(
        keys / (c.memory_bytes_per_s * k["kv_speed"]), scores / (c.attention_flops_per_s * k["query_speed"])
    )
    moved = together * c.hidden * k["hidden_passes"] * c.wide_bytes * c.layers
    return _pass(
        c,
        k,
        layers=_decoder_layers(c),
        work=work,
        reads=np.maximum(1.0, together / c.decode_rows),
        requests=together,
        tokens=together,
        attention_s=0.0 * together,
        moved_s=attention_s + moved / (c.memory_bytes_per_s * k["weight_speed"]),
    )


def _pass(
    c: Case,
    k: Constants,
    *,
    layers: Column,
    work: _Linear,
    reads: Column,
    requests: Column,
    tokens: Column,
    attention_s: Column,
    moved_s: Column,
) -> PassTime:
    """All layers, the output layer for a token of each request, and drawing one; `tokens` pass each layer."""
    head = 2 * requests * c.hidden * c.vocab / c.tp / c.wide_flops_per_s
    compute_s = (work.compute_s + head) / k["gemm_speed"]
    read = work.weight_bytes * reads + c.vocab * c.hidden / c.tp * c.wide_bytes
    read_s = read / (c.memory_bytes_per_s * k["weight_speed"])
    linear_s = _both(compute_s, read_s)
    computing_s = linear_s * (compute_s / linear_s) ** SHARPNESS
    all_reduce_s = 2 * layers * _all_reduce_s(c, k, tokens * c.hidden * c.wide_bytes)
    pipeline_s = (c.pp - 1) * _send_s(c, k, tokens * c.hidden * c.wide_bytes)
    small_s = layers * k["layer_us"] * MICRO
    device_s = linear_s + attention_s + moved_s + all_reduce_s + small_s
    host_s = (1 - c.graphs) * layers * k["host_layer_us"] * MICRO
    waiting_s = _both(device_s, host_s) - device_s
    return PassTime(
        compute_ms=(computing_s + attention_s) / MILLI,
        memory_ms=(linear_s - computing_s + moved_s) / MILLI,
        all_reduce_ms=all_reduce_s / MILLI,
        pipeline_ms=pipeline_s / MILLI,
        launch_ms=(small_s + waiting_s) / MILLI,
        sampling_ms=(k["step_us"] + k["request_us"] * requests) * MICRO / MILLI,
    )


def _decoder_layers(c: Case) -> Column:
    """The decoder's layers, of which each counts for more where it has a second attention."""
    return np.asarray(c.layers * np.where(c.encoder_layers > 0, _CROSS, 1.0))


def _both(one_s: Column, other_s: Column) -> Column:
    """About the longer of two times that overlap, and more where they are alike and get into each other's way."""
    return np.asarray((one_s**SHARPNESS + other_s**SHARPNESS) ** (1 / SHARPNESS))


def _times(one: PassTime, passes: Column) -> PassTime:
    return PassTime(**{name: getattr(one, name) * passes for name in PassTime.__dataclass_fields__})


def _linear(c: Case, rows: Column, columns: Column, depth: Column, count: Column | float = 1.0) -> _Linear:
    """So many GEMMs at once of rows x columns results over a depth (the curve of `layer.gemm_s`), and their weights."""
    waves = count * rows * columns / (TILE * TILE * c.multiprocessors)
    loss = (1 + c.half_waves / waves) * (1 + c.half_depth / depth)
    return _Linear(
        compute_s=count * 2 * rows * columns * depth / c.gemm_flops_per_s * loss,
        weight_bytes=count * columns * depth * c.weight_bytes,
    )


def _mlp(c: Case, rows: Column, width: Column, count: Column | float = 1.0) -> _Linear:
    """So many MLPs of this width at once."""
    width = np.maximum(1.0, width / c.tp)
    return _linear(c, rows, c.mlp_inputs * width, c.hidden, count) + _linear(c, rows, c.hidden, width, count)


def _layer(c: Case, k: Constants, rows: Column) -> _Linear:
    """The linear layers of one layer, or the mean of those with experts and those without."""
    attention = _linear(c, rows, c.attention_width / c.tp + 2 * rank_kv_width(c), c.hidden) + _linear(
        c, rows, c.hidden, c.attention_width / c.tp
    )
    dense = _mlp(c, rows, c.ffn)
    if not np.any(c.experts):
        return attention + dense
    share = c.expert_layers / c.layers
    experts, each = np.maximum(1.0, c.experts), np.maximum(1.0, c.experts_per_token)
    # Of which so many are chosen by any of the tokens, where each token chooses at random.
    chosen = experts * -np.expm1(rows * np.log1p(-np.minimum(each / experts, 1 - _ALL)))
    routed = _mlp(c, rows * each / chosen, c.expert_ffn, chosen)
    routed = _Linear(compute_s=routed.compute_s / k["expert_speed"], weight_bytes=routed.weight_bytes)
    shared = _mlp(c, rows, c.shared_ffn).times(1.0 * (c.shared_ffn > 0))
    return attention + dense.times(1 - share) + (routed + shared).times(share)


def _all_reduce_s(c: Case, k: Constants, size: Column) -> Column:
    """A ring's bytes over the link, and latencies: one for each doubling of the group and once more."""
    local = np.minimum(c.tp, c.gpus_per_node)
    is_inside = c.tp <= c.gpus_per_node
    rate = np.where(is_inside, c.intra_bytes_per_s, np.minimum(c.intra_bytes_per_s, c.inter_bytes_per_s * local))
    hops = (1 + np.log2(local)) * c.intra_latency_s + np.log2(c.tp / local) * c.inter_latency_s
    moved = 2 * (c.tp - 1) / c.tp * size / (rate * k["link_speed"])
    return np.asarray((c.tp > 1) * (moved + hops * k["collective_hops"]))


def _send_s(c: Case, k: Constants, size: Column) -> Column:
    """Activations to the next stage, which lies on the same node where all stages do."""
    is_inside = c.tp * c.pp <= c.gpus_per_node
    rate = np.where(is_inside, c.intra_bytes_per_s, c.inter_bytes_per_s)
    latency = np.where(is_inside, c.intra_latency_s, c.inter_latency_s)
    return np.asarray(size / rate + latency * k["pipeline_hops"])
