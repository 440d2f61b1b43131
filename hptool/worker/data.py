"""Samples for training and validation: synthetic, or of `.bin/.idx` sets and texts. The same for every layout.

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
from hptool.worker import masking, text

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


class Tokens1d(Protocol):
    """A long row of tokens."""

    def read(self, start: int, count: int) -> Tokens:
        """So many tokens from `start` on."""
        ...

    def cut(self, part: float) -> int:
        """How many tokens are the first `part` of it, from 0 to 1."""
        ...


class IndexedTokens:
    """A tokenised set, whose documents lie one behind the other."""

    def __init__(self, prefix: str, source: str) -> None:
        for path in (get_idx_path(prefix), get_bin_path(prefix)):
            if not Path(path).is_file():
                raise InputError(f"{source}: {prefix!r} given, but there is no file {path}")
        self._set = IndexedDataset(prefix)
        self._dtype = np.dtype(self._set.index.dtype)

    def read(self, start: int, count: int) -> Tokens:
        """As `Tokens1d.read`."""
        tokens = self._set.bin_reader.read(dtype=self._dtype, count=count, offset=start * self._dtype.itemsize)
        return np.asarray(tokens, dtype=np.int64)

    def cut(self, part: float) -> int:
        """As `Tokens1d.cut`, in whole documents."""
        documents = round(len(self._set.index) * part)
        return int(self._set.index.sequence_lengths[:documents].sum(dtype=np.int64))


class Pieces:
    """Consecutive samples of the tokens from `start` to `stop`, over and over; with a seed in shuffled order."""

    def __init__(self, tokens: Tokens1d, start: int, stop: int, seq_length: int, seed: int | None = None) -> None:
        self._tokens = tokens
        self._start = start
        self._seq_length = seq_length
        self.count = max(0, (stop - start - 1) // seq_length)
        self._first, self._stride = 0, 1
        if seed is not None and self.count:
            # n -> (n·stride + first) mod count meets every sample once in each round, if they have no common divisor.
            draw = np.random.Generator(np.random.Philox(key=[seed, 0]))
            self._first = int(draw.integers(self.count))
            self._stride = _coprime(int(draw.integers(self.count)), self.count)

    def sample(self, number: int) -> Tokens:
        """As `Samples.sample`."""
        place = (number * self._stride + self._first) % self.count
        return self._tokens.read(self._start + place * self._seq_length, self._seq_length + 1)


class BlendedSamples:
    """Several sets, mixed by weight and evenly."""

    def __init__(self, sets: list[Pieces], weights: list[float]) -> None:
        self._sets = sets
        self._bounds = np.cumsum(weights) / sum(weights)

    def sample(self, number: int) -> Tokens:
        """As `Samples.sample`."""
        which = int(np.searchsorted(self._bounds, (number * _GOLDEN) % 1.0, side="right"))
        return self._sets[min(which, len(self._sets) - 1)].sample(number)


class JoinedSamples:
    """The samples of several sets, one set after the other, over and over."""

    def __init__(self, sets: list[Pieces]) -> None:
        self._sets = sets
        self._ends = np.cumsum([pieces.count for pieces in sets])

    def sample(self, number: int) -> Tokens:
        """As `Samples.sample`."""
        place = number % int(self._ends[-1])
        which = int(np.searchsorted(self._ends, place, side="right"))
        return self._sets[which].sample(place - int(self._ends[which]) + self._sets[which].count)


def samples_of(config: BaseConfig) -> Samples:
    """What the config trains on. InputError where its files are missing or too small."""
    seed, length = config.model.seed, _seq_length(config)
    if not config.model.data.data_prefix:
        return SyntheticSamples(seed=seed, vocab_size=config.shape.vocab_size, seq_length=length)
    sets, weights = [], []
    train, _ = _parts(config.model.data)
    for weight, prefix in _weighted_prefixes(config.model.data):
        tokens = _tokens_of(prefix, config)
        stop = tokens.cut(train)
        pieces = Pieces(tokens, 0, stop, length, seed)
        if not pieces.count:
            raise InputError(f"{_PREFIX}: {prefix!r} given, but its {stop} training tokens are fewer than one sample")
        sets.append(pieces)
        weights.append(weight)
    return sets[0] if len(sets) == 1 else BlendedSamples(sets, weights)


def validation_samples_of(config: BaseConfig) -> tuple[Samples, int]:
    """What the training does not see: the second part of each set, in its order; and how many samples there are."""
    data, length = config.model.data, _seq_length(config)
    if not data.data_prefix:
        synthetic = SyntheticSamples(seed=config.model.seed, vocab_size=config.shape.vocab_size, seq_length=length)
        return _Later(synthetic), _SYNTHETIC_BATCHES * config.model.global_batch_size
    train, validation = _parts(data)
    sets = []
    for _, prefix in _weighted_prefixes(data):
        tokens = _tokens_of(prefix, config)
        sets.append(Pieces(tokens, tokens.cut(train), tokens.cut(validation), length))
    joined = JoinedSamples(sets)
    return joined, sum(pieces.count for pieces in sets)


#: Synthetic samples from this number on are for validation, no training gets so far; and how many of them there are.
_LATER = 2**32
_SYNTHETIC_BATCHES = 32


@dataclass(frozen=True, slots=True)
class _Later:
    samples: Samples

    def sample(self, number: int) -> Tokens:
        return self.samples.sample(number + _LATER)


_PREFIX = "model.data.data_prefix"


def _seq_length(config: BaseConfig) -> int:
    """From one sample to the next in a set; a sample has one token more."""
    return masking.tokens_read(config) - 1


def _tokens_of(prefix: str, config: BaseConfig) -> Tokens1d:
    """A tokenised set; or a text, which is tokenised here."""
    if not text.is_text(prefix):
        return IndexedTokens(prefix, _PREFIX)
    tokenizer = text.tokenizer_of(config)
    text.check_text(Path(prefix))
    return text.TextTokens(Path(prefix), tokenizer)


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


def _parts(data: DataSection) -> tuple[float, float]:
    """Where training and validation end, from 0 to 1: the parts of `splits_string`, as Megatron reads it."""
    try:
        parts = [float(part) for part in data.splits_string.split(",")]
    except ValueError:
        parts = []
    if not parts or min(parts) < 0 or parts[0] == 0:
        raise InputError(f"model.data.splits_string: {data.splits_string!r} given, allowed are parts such as 99990,8,2")
    return parts[0] / sum(parts), sum(parts[:2]) / sum(parts)


def _coprime(start: int, n: int) -> int:
    """The first number from `start` on that shares no divisor with n."""
    return next(x for x in range(start, start + n + 2) if math.gcd(x, n) == 1)
