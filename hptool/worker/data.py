"""Training samples: synthetic, or cut from tokenised `.bin/.idx` sets. The same for every layout.

A sample is named by its number in the whole training (step · global batch + place in the batch), so that it does not
matter which rank asks for it. Nothing is written, not even an index beside the data: candidates run side by side, and
Megatron's `GPTDataset` would let them overwrite each other's index files.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path, get_idx_path
from numpy.typing import NDArray

from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.nemo_keys import DataSection

Tokens = NDArray[np.int64]

#: The golden ratio's fraction, whose multiples spread evenly over 0..1 (Weyl 1916).
_GOLDEN = (math.sqrt(5) - 1) / 2


class Samples(Protocol):
    """Numbered samples of seq_length + 1 tokens: the inputs, and one on for the labels."""

    def sample(self, number: int) -> Tokens:
        """The tokens of one sample; any number from 0 is there."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticSamples:
    """Independent random tokens, small ones more often than large ones, as in text sorted by frequency."""

    seed: int
    vocab_size: int
    seq_length: int

    def sample(self, number: int) -> Tokens:
        """As `Samples.sample`."""
        uniform = np.random.Generator(np.random.Philox(key=[self.seed, number])).random(self.seq_length + 1)
        return (self.vocab_size * uniform**2).astype(np.int64)


class IndexedSamples:
    """The training part of a tokenised set, as consecutive samples in shuffled order, over and over."""

    def __init__(self, prefix: str, *, train_fraction: float, seq_length: int, seed: int, source: str) -> None:
        for path in (get_idx_path(prefix), get_bin_path(prefix)):
            if not Path(path).is_file():
                raise InputError(f"{source}: {prefix!r} given, but there is no file {path}")
        self._set = IndexedDataset(prefix)
        self._seq_length = seq_length
        index = self._set.index
        self._dtype = np.dtype(index.dtype)
        documents = round(len(index) * train_fraction)
        # Documents lie in the file one behind the other, so a sample is a piece of the file.
        tokens = int(index.sequence_lengths[:documents].sum(dtype=np.int64))
        self._samples = (tokens - 1) // seq_length
        if self._samples < 1:
            raise InputError(f"{source}: {prefix!r} given, but its {tokens} training tokens are fewer than one sample")
        # n -> (n·stride + start) mod samples meets every sample once in each round, if they have no common divisor.
        draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
        self._start = int(draw.integers(self._samples))
        self._stride = _coprime(int(draw.integers(self._samples)), self._samples)

    def sample(self, number: int) -> Tokens:
        """As `Samples.sample`."""
        place = (number * self._stride + self._start) % self._samples
        offset = place * self._seq_length * self._dtype.itemsize
        tokens = self._set.bin_reader.read(dtype=self._dtype, count=self._seq_length + 1, offset=offset)
        return np.asarray(tokens, dtype=np.int64)


class BlendedSamples:
    """Several sets, mixed by weight and evenly."""

    def __init__(self, sets: list[IndexedSamples], weights: list[float]) -> None:
        self._sets = sets
        self._bounds = np.cumsum(weights) / sum(weights)

    def sample(self, number: int) -> Tokens:
        """As `Samples.sample`."""
        which = int(np.searchsorted(self._bounds, (number * _GOLDEN) % 1.0, side="right"))
        return self._sets[min(which, len(self._sets) - 1)].sample(number)


def samples_of(config: BaseConfig) -> Samples:
    """What the config trains on. InputError where its files are missing or too small."""
    data, seed = config.model.data, config.model.seed
    if not data.data_prefix:
        return SyntheticSamples(seed=seed, vocab_size=config.shape.vocab_size, seq_length=data.seq_length)
    weighted = _weighted_prefixes(data)
    fraction = _train_fraction(data)
    source = "model.data.data_prefix"
    sets = [
        IndexedSamples(prefix, train_fraction=fraction, seq_length=data.seq_length, seed=seed, source=source)
        for _, prefix in weighted
    ]
    return sets[0] if len(sets) == 1 else BlendedSamples(sets, [weight for weight, _ in weighted])


def _weighted_prefixes(data: DataSection) -> list[tuple[float, str]]:
    """NeMo's forms: one prefix, a list of prefixes, or a list that alternates weights and prefixes."""
    given = data.data_prefix
    parts = [given] if isinstance(given, str) else list(given or ())
    if all(_number(part) is None for part in parts):
        return [(1.0, str(part)) for part in parts]
    weights = [_number(part) for part in parts[::2]]
    prefixes = parts[1::2]
    if len(weights) != len(prefixes) or any(weight is None or weight <= 0 for weight in weights):
        raise InputError(
            f"model.data.data_prefix: {parts!r} given, allowed is a prefix, a list of prefixes, or a list of "
            "weight, prefix, weight, prefix, …"
        )
    return [(weight, str(prefix)) for weight, prefix in zip(weights, prefixes, strict=True) if weight is not None]


def _number(part: str | float) -> float | None:
    try:
        return float(part)
    except ValueError:
        return None


def _train_fraction(data: DataSection) -> float:
    """The first of the three parts, as Megatron reads `splits_string`."""
    try:
        parts = [float(part) for part in data.splits_string.split(",")]
    except ValueError:
        parts = []
    if not parts or min(parts) < 0 or parts[0] == 0:
        raise InputError(f"model.data.splits_string: {data.splits_string!r} given, allowed are parts such as 99990,8,2")
    return parts[0] / sum(parts)


def _coprime(start: int, n: int) -> int:
    """The first number from `start` on that shares no divisor with n."""
    return next(x for x in range(start, start + n + 2) if math.gcd(x, n) == 1)
