"""Floating-point operations of a training step."""

from hptool.facts import ModelShape

#: Stored beside every rate, because trackers differ: torchtitan counts attention in full, Megatron-LM halves it.
MODEL_FLOPS_CONVENTION = (
    "forward and backward, no recomputation, causal attention counted half, vocabulary without padding"
)

#: A backward pass costs two GEMMs for each of the forward pass: one for the inputs, one for the weights.
FORWARD_AND_BACKWARD = 3


def attention_flops_per_token(shape: ModelShape) -> float:
    """Forward FLOPs of one layer's core attention for one token of a full sequence.

    Scores and weighted values are two GEMMs of 2·s·width; a causal mask needs half of each (Megatron-LM's
    `num_floating_point_operations` halves it too).
    """
    return 2 * 2 * shape.seq_length * shape.attention_width / 2


def layer_flops_per_token(shape: ModelShape) -> float:
    """Forward FLOPs of one layer for one token: two for each weight of a GEMM, and the attention."""
    return 2 * shape.layer_matmul_parameters + attention_flops_per_token(shape)


def logit_flops_per_token(shape: ModelShape) -> float:
    """Forward FLOPs of the output layer for one token."""
    return 2 * shape.hidden_size * shape.vocab_size


def model_flops_per_step(shape: ModelShape, gbs: int) -> float:
    """FLOPs that a step of `gbs` sequences needs, by `MODEL_FLOPS_CONVENTION`, over all GPUs."""
    per_token = shape.num_layers * layer_flops_per_token(shape) + logit_flops_per_token(shape)
    return FORWARD_AND_BACKWARD * per_token * gbs * shape.seq_length
