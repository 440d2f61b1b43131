"""Memory of the fullest rank that serves, as its parts, and how many requests it can hold. GiB, one row a point."""

from dataclasses import dataclass

import numpy as np

from hptool.predict.inference_case import Case
from hptool.predict.parts import Column, add_up
from hptool.units import GIB

#: Bytes of a logit while tokens are drawn: fp32, once as the output layer leaves it and once in order.
LOGIT_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingMemory:
    """The parts of a rank's memory, GiB; they add up to `total_gib`.

    `kv_cache_gib` is of the requests that run at once, in whole blocks; `engine_gib` are buffers of the engine whatever
    the model; `reserved_gib` is what never reaches it: device context and communication library.
    """

    weights_gib: Column
    kv_cache_gib: Column
    activations_gib: Column
    logits_gib: Column
    engine_gib: Column
    reserved_gib: Column

    @property
    def total_gib(self) -> Column:
        """All of it."""
        return add_up(self)


def most_running(c: Case) -> Column:
    """How many requests of a point's lengths there is room for, whatever its batch; no end where nothing is paged."""
    one = request_kv_bytes(c, np.where(c.paged_kv > 0, c.reserved_output, 1.0) * c.output_len)
    room = c.memory_bytes * c.memory_share - rank_weight_bytes(c) - _activation_bytes(c)
    return np.where(c.paged_kv > 0, np.maximum(1.0, room / one), np.inf)


def predict_memory(c: Case) -> tuple[ServingMemory, Column, Column]:
    """Memory, how many requests run at once, and the GiB that are needed for any to run.

    With a paged cache a request waits for the room that others leave, so only one has to fit.
    """
    weights = rank_weight_bytes(c)
    activations = _activation_bytes(c)
    one = request_kv_bytes(c, np.where(c.paged_kv > 0, c.reserved_output, 1.0) * c.output_len)
    running = np.minimum(c.batch, most_running(c))
    memory = ServingMemory(
        weights_gib=weights / GIB,
        kv_cache_gib=running * one / GIB,
        activations_gib=activations / GIB,
        logits_gib=LOGIT_BYTES * running * c.vocab / GIB,
        engine_gib=c.buffer_bytes / GIB,
        reserved_gib=c.reserved_bytes / GIB,
    )
    whole = request_kv_bytes(c, c.output_len)
    least = memory.total_gib - memory.kv_cache_gib + np.where(c.paged_kv > 0, 1.0, c.batch) * whole / GIB
    return memory, running, np.asarray(least)


def prompt_tokens(c: Case, requests: Column) -> Column:
    """Tokens of the prompts that a pass takes on at once."""
    return np.asarray(np.minimum(requests * c.input_len, c.prefill_tokens))


def _activation_bytes(c: Case) -> Column:
    """Bytes of a prompt pass beside keys and values."""
    projected = (c.attention_width / c.tp + 2 * rank_kv_width(c)) + c.mlp_inputs * _mlp_width(c) / c.tp
    per_token = c.hidden * c.activation_widths + projected * c.layer_widths
    return np.asarray(prompt_tokens(c, c.batch) * per_token * c.wide_bytes)


def _mlp_width(c: Case) -> Column:
    """Width of the MLPs that a token passes in the widest of the layers."""
    return np.asarray(
        np.maximum(np.where(c.expert_layers < c.layers, c.ffn, 0.0), c.experts_per_token * c.expert_ffn + c.shared_ffn)
    )


def rank_kv_width(c: Case) -> Column:
    """Width of the keys (or the values) on a rank: where TP is more than the query groups, ranks share one."""
    return np.maximum(c.kv_width / c.tp, c.kv_channels)


def request_kv_bytes(c: Case, output_len: Column) -> Column:
    """Bytes of a request's keys and values on a rank of the largest stage, in whole blocks.

    With an encoder the prompt is the encoder's: its keys and values are those of the decoder's cross-attention.
    """
    tokens = np.ceil((c.input_len + output_len) / c.kv_block_tokens) * c.kv_block_tokens
    return np.asarray(np.ceil(c.layers / c.pp) * tokens * 2 * rank_kv_width(c) * c.kv_bytes)


def rank_weight_bytes(c: Case) -> Column:
    """Bytes of the weights on a rank of the first or last stage: layers in the GEMMs' precision, tables wide."""
    stage = np.ceil((c.layers + c.encoder_layers) / c.pp) / (c.layers + c.encoder_layers)
    attention = c.hidden * (2 * c.attention_width / c.tp + 2 * rank_kv_width(c))
    per_width = c.hidden * (c.mlp_inputs + 1) / c.tp
    dense = (c.layers - c.expert_layers + c.encoder_layers) * per_width * c.ffn
    routed = c.expert_layers * (per_width * (c.experts * c.expert_ffn + c.shared_ffn) + c.hidden * c.experts)
    cross = np.where(c.encoder_layers > 0, c.layers, 0.0)
    layers = dense + routed + (c.layers + c.encoder_layers + cross) * attention
    # Tied or not, engines hold a table for the first layer and one for the last.
    tables = np.where(c.pp == 1, 2.0, 1.0) * c.table_parameters / c.tp
    return np.asarray(stage * layers * c.weight_bytes + tables * c.wide_bytes)
