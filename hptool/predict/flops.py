"""Floating-point operations of a training step."""

from hptool.facts import ModelShape

#: Stored beside every rate, because trackers differ: torchtitan counts attention in full, Megatron-LM halves it.
MODEL_FLOPS_CONVENTION = (
    "forward and backward, no recomputation, causal attention counted half, vocabulary without padding"
)

#: A backward pass costs two GEMMs for each of the forward pass: one for the inputs, one for the weights.
FORWARD_AND_BACKWARD = 3


def attention_flops(shape: ModelShape, queries: int, keys: int, *, causal: bool) -> float:
    """Forward FLOPs of one layer's core attention over one sequence.

    Scores and weighted values are two GEMMs of 2·queries·keys·width; a causal mask needs half of each (Megatron-LM's
    `num_floating_point_operations` halves it too).
    """
    return 2 * 2 * queries * keys * shape.attention_width * (0.5 if causal else 1.0)


def model_flops_per_sequence(shape: ModelShape) -> float:
    """FLOPs that training on one sequence needs, by `MODEL_FLOPS_CONVENTION`."""
    hidden, decoder, encoder = shape.hidden_size, shape.seq_length, shape.encoder_seq_length
    dense = shape.mlp_parameters(shape.ffn_hidden_size)
    routed = shape.experts_per_token * shape.mlp_parameters(shape.expert_ffn_hidden_size)
    expert = routed + shape.mlp_parameters(shape.shared_ffn_hidden_size) + shape.num_experts * hidden
    mlps = (shape.num_layers - shape.num_expert_layers) * dense + shape.num_expert_layers * expert
    attention: float = 2 * decoder * shape.attention_parameters
    attention += attention_flops(shape, decoder, decoder, causal=shape.causal)
    total: float = 2 * decoder * mlps + shape.num_layers * attention
    if shape.encoder_num_layers:
        # Cross-attention: queries and output of the decoder's tokens, keys and values of the encoder's.
        cross = 2 * hidden * (decoder * 2 * shape.attention_width + encoder * 2 * shape.kv_width)
        total += shape.num_layers * (cross + attention_flops(shape, decoder, encoder, causal=False))
        own = 2 * encoder * (shape.attention_parameters + dense)
        total += shape.encoder_num_layers * (own + attention_flops(shape, encoder, encoder, causal=False))
    logits = 2 * decoder * hidden * shape.vocab_size
    return FORWARD_AND_BACKWARD * (total + logits)


def model_flops_per_step(shape: ModelShape, gbs: int) -> float:
    """FLOPs that a step of `gbs` sequences needs, by `MODEL_FLOPS_CONVENTION`, over all GPUs."""
    return gbs * model_flops_per_sequence(shape)
