"""What follows from a layout and its setting: replicas, microbatches, shares; and which rows share it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np

from hptool.candidates import AXES, IntColumn, Layouts
from hptool.predict.parts import Column, choose, take
from hptool.predict.setting import Setting

T = TypeVar("T")


def data_parallel(t: Layouts, s: Setting) -> Column:
    """Replicas of the model: GPUs over TP·PP·CP."""
    return np.asarray(s.gpus / t.gpus_per_replica)


def microbatches(t: Layouts, s: Setting) -> Column:
    """Microbatches that each replica works through in a step."""
    return np.asarray(s.gbs / (t.mbs * data_parallel(t, s)))


def tokens(t: Layouts, s: Setting) -> Column:
    """Tokens of a microbatch on one rank of context parallelism: the decoder's where there is an encoder."""
    return np.asarray(t.mbs * s.seq_length / t.cp)


def encoder_tokens(t: Layouts, s: Setting) -> Column:
    """Tokens of a microbatch in the encoder, on one rank of context parallelism."""
    return np.asarray(t.mbs * s.encoder_seq_length / t.cp)


def hidden_split(t: Layouts, s: Setting) -> Column:
    """Over how many ranks what is outside attention and MLP is split: sequence parallelism does that over TP."""
    return np.asarray(choose(s.sequence_parallel > 0, t.tp, np.ones(1)))


def stage_layers(t: Layouts, s: Setting) -> Column:
    """Decoder layers of the largest stage, each with its share of an encoder's.

    Stages are cut from the layers of both, the encoder's first, so that one of encoder layers alone may take longer
    than the mean: as many layers as would take as long.
    """
    layers = np.ceil(s.num_layers / t.pp)
    if not np.any(s.encoder_layers):
        return layers
    encoder_layer, decoder_layer = _layer_flops(s)
    mean = (s.encoder_layers * encoder_layer + s.num_layers * decoder_layer) / t.pp
    stages = [
        kinds[0] * encoder_layer + kinds[1] * decoder_layer
        for kinds in (stage_kinds(t, s, first=x) for x in (True, False))
    ]
    return np.where(s.encoder_layers > 0, s.num_layers / t.pp * np.maximum(*stages) / mean, layers)


def stage_kinds(t: Layouts, s: Setting, *, first: bool) -> tuple[Column, Column]:
    """Encoder and decoder layers on a rank of the first stage, or of the last; of all its chunks where it has several.

    Chunk k of stage i holds the layers that follow those of the k·pp + i chunks before it.
    """
    layers = s.encoder_layers + s.num_layers
    chunk = layers / (t.pp * t.vpp)
    rounds = np.floor(s.encoder_layers / (t.pp * chunk))
    before = 0.0 if first else (t.pp - 1) * chunk
    begun = np.clip(s.encoder_layers - rounds * t.pp * chunk - before, 0.0, chunk)
    encoder = np.asarray(rounds * chunk + begun)
    return encoder, np.asarray(np.where(s.encoder_layers > 0, layers / t.pp - encoder, np.ceil(s.num_layers / t.pp)))


def _layer_flops(s: Setting) -> tuple[Column, Column]:
    """Multiplications of an encoder layer's and a decoder layer's GEMMs for one sequence."""
    inputs = s.hidden * (s.attention_width + 2 * s.kv_width)
    attention, mlp = inputs + s.hidden * s.attention_width, (s.mlp_inputs + 1) * s.hidden * s.ffn
    keys_and_values = 2 * s.hidden * s.kv_width
    encoder = s.encoder_seq_length * (attention + mlp)
    decoder = s.seq_length * (2 * attention - keys_and_values + mlp) + s.encoder_seq_length * keys_and_values
    return encoder, decoder


def padded_vocab(t: Layouts, s: Setting) -> Column:
    """The vocabulary's share of one TP rank, padded as Megatron pads it."""
    return np.ceil(s.vocab / (s.vocab_divisor * t.tp)) * s.vocab_divisor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Layouts with their setting, and which of them share what.

    The cost of a layer and of the output layer for one microbatch is the same for all rows with the same TP, CP, EP
    and micro batch; what happens once a step for all rows with the same TP, PP, CP and EP. A table of a
    million layouts has some hundred of each.
    """

    layouts: Layouts
    setting: Setting
    microbatch: tuple[Layouts, IntColumn | slice]
    step: tuple[Layouts, IntColumn | slice]

    @classmethod
    def of(cls, t: Layouts, s: Setting) -> Self:
        """With a setting of its own for each row, each row stands for itself."""
        microbatch = _combinations(t, s, ("tp", "cp", "ep", "mbs"))
        # Chunks decide which of an encoder's and a decoder's layers a rank holds.
        chunks = ("vpp",) if np.any(s.encoder_layers) else ()
        step = _combinations(t, s, ("tp", "pp", "cp", "ep", *chunks))
        # Floats once, because NumPy casts an integer column anew in every formula.
        numbers: dict[str, Any] = {axis: getattr(t, axis).astype(np.float64) for axis in AXES}
        return cls(layouts=Layouts(**numbers), setting=s, microbatch=microbatch, step=step)

    def per_microbatch(self, formula: Callable[[Layouts, Setting], T]) -> T:
        """A formula's columns for each row, computed once for the rows that share a microbatch's cost."""
        few, own = self.microbatch
        return take(formula(few, self.setting), own)

    def per_step(self, formula: Callable[[Layouts, Setting], T]) -> T:
        """A formula's columns for each row, computed once for the rows that share what happens once a step."""
        few, own = self.step
        return take(formula(few, self.setting), own)


def _combinations(t: Layouts, s: Setting, axes: Sequence[str]) -> tuple[Layouts, IntColumn | slice]:
    """One layout for each combination of these axes, and for each row of `t` which of them is its own."""
    if len(s) > 1 or len(t) == 0:
        return t, slice(None)
    key = np.zeros(len(t), dtype=np.int64)
    for name in axes:
        axis = getattr(t, name)
        numbers = np.zeros(int(axis.max()) + 1, dtype=np.int64)
        numbers[axis] = 1
        numbers = np.cumsum(numbers) - 1
        if numbers[-1]:
            key *= numbers[-1] + 1
            key += numbers[axis]
    example = np.full(int(key.max()) + 1, -1, dtype=np.int64)
    example[key] = np.arange(len(t))
    used = example >= 0
    return t.select(example[used]), (np.cumsum(used) - 1)[key]
