"""What BERT and T5 train on: tokens of a sample hidden, to be found again. Knows neither torch nor megatron.

Which tokens are hidden depends on the seed and the sample's number alone, so that all layouts train on the same. How
many, and how long a sample is then, are the same for all samples: nothing is padded but the end of T5's decoder,
which no other token attends to, so that no attention needs a mask; and a mean over microbatches is one over tokens.

The keys do not tell special tokens, since a tokenizer is not read: BERT's are the last three of the vocabulary, T5's
sentinels its last ones, as in its own; T5 begins and pads with 0 and ends with 1, as its own does too.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hptool.base_config import BaseConfig
from hptool.nemo_keys import DataSection

Tokens = NDArray[np.int64]
Mask = NDArray[np.bool_]

#: Devlin et al. 2019 (arXiv:1810.04805), section 3.1: what stands in the place of a hidden token.
_MASKED, _REPLACED = 0.8, 0.1

#: Places of a BERT sample with two segments that hold no token of the set: one in front, one behind each.
_SEPARATORS = 3

#: Chance that a span ends after a token, before the longest are left out (Joshi et al. 2020, arXiv:1907.10529).
_SPAN_END = 0.2

#: T5's own (Raffel et al. 2020, arXiv:1910.10683): begins the decoder's tokens and pads them; ends its labels.
_START, _END = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTokens:
    """A sample of BERT: tokens with some hidden, what they were, and where; the places' segments, 0 or 1.

    `in_order` says of two segments that the first was in front.
    """

    tokens: Tokens
    labels: Tokens
    counted: Mask
    segments: Tokens
    in_order: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenSpans:
    """A sample of T5: the encoder's tokens, the decoder's, its labels, and which of them count."""

    encoder_tokens: Tokens
    decoder_tokens: Tokens
    labels: Tokens
    counted: Mask


def tokens_read(config: BaseConfig) -> int:
    """How many tokens of the set a sample of this family is made of: for GPT one more than its length."""
    if config.is_encoder_decoder:
        return span_lengths(config)[0]
    if config.is_bert:
        return config.shape.seq_length - _SEPARATORS * config.shape.has_binary_head
    return config.shape.seq_length + 1


def problems(config: BaseConfig) -> list[str]:
    """What the config asks of its samples that they cannot be, each with its key."""
    data = config.model.data
    found = []

    def need(ok: bool, key: str, allowed: str) -> None:  # noqa: FBT001 (reads as a sentence)
        if not ok:
            found.append(f"model.data.{key}: {getattr(data, key)!r} given, allowed is {allowed}")

    if not (config.is_bert or config.is_encoder_decoder):
        return []
    need(0 < data.masked_lm_prob < 1, "masked_lm_prob", "0 < x < 1")
    # Of synthetic tokens, which are there to be timed, no one can want short samples or whole words.
    timed = not data.data_prefix
    need(timed or data.short_seq_prob == 0, "short_seq_prob", "0 (all samples fill their length)")
    need(timed or not data.whole_word_masking, "whole_word_masking", "false (words are not known)")
    if found:
        return found
    if config.is_bert:
        need(tokens_read(config) >= 2, "seq_length", f"{_SEPARATORS + 2} or more")  # noqa: PLR2004 (two segments)
        return found
    need(timed or data.geometric_dist, "geometric_dist", "true")
    need(timed or not data.favor_longer_ngrams, "favor_longer_ngrams", "false")
    need(data.max_ngram_size >= 1, "max_ngram_size", "1 or more")
    longest = data.max_ngram_size
    need(data.mean_ngram_size in (None, *range(1, longest + 1)), "mean_ngram_size", f"null, or 1 to {longest}")
    if found:
        return found
    read, hidden, spans = span_lengths(config)
    need(read - hidden >= spans, "masked_lm_prob", "so small that there is a token between any two spans")
    length = hidden + spans + 1
    need(
        config.shape.seq_length >= length,
        "seq_length_dec",
        f"{length} or more ({hidden} hidden tokens in {spans} spans, and their end)",
    )
    return found


def hide_tokens(sample: Tokens, config: BaseConfig, number: int) -> HiddenTokens:
    """BERT's: single tokens hidden, `masked_lm_prob` of the sample, rounded; its segments swapped every other time."""
    draw = _draw(config, number)
    vocabulary, length = config.shape.vocab_size, config.shape.seq_length
    front, behind, hidden = (vocabulary - i for i in (3, 2, 1))
    tokens, segments = sample[: tokens_read(config)].copy(), np.zeros(length, dtype=np.int64)
    places, in_order = np.arange(length), True
    if config.shape.has_binary_head:
        cut = int(draw.integers(1, len(tokens)))
        parts = [tokens[:cut], tokens[cut:]]
        in_order = bool(draw.random() < 0.5)  # noqa: PLR2004 (either)
        first, second = parts if in_order else parts[::-1]
        tokens = np.concatenate([[front], first, [behind], second, [behind]])
        segments[len(first) + 2 :] = 1
        places = np.delete(places, [0, len(first) + 1, length - 1])
    chosen = draw.choice(places, max(1, round(config.model.data.masked_lm_prob * len(places))), replace=False)
    counted = np.zeros(length, dtype=np.bool_)
    counted[chosen] = True
    labels = tokens.copy()
    fate = draw.random(length)
    tokens[counted & (fate < _MASKED)] = hidden
    replaced = counted & (fate >= _MASKED) & (fate < _MASKED + _REPLACED)
    tokens[replaced] = draw.integers(vocabulary, size=length)[replaced]
    return HiddenTokens(tokens=tokens, labels=labels, counted=counted, segments=segments, in_order=in_order)


def hide_spans(sample: Tokens, config: BaseConfig, number: int) -> HiddenSpans:
    """T5's: spans hidden behind a sentinel each, which the decoder says again with what was there."""
    draw = _draw(config, number)
    read, hidden, spans = span_lengths(config)
    vocabulary, length = config.shape.vocab_size, config.shape.seq_length
    # Any way to cut a number into parts is as likely as any other: spans of geometric lengths, given their sum.
    kept_lengths = _parts(draw, read - hidden, spans)
    span_sizes = _bounded(draw, _parts(draw, hidden, spans), config.model.data.max_ngram_size)
    encoder: list[int] = []
    said: list[int] = []
    rest = sample.tolist()
    for i, (kept, size) in enumerate(zip(kept_lengths.tolist(), span_sizes.tolist(), strict=True)):
        sentinel = vocabulary - 1 - i
        encoder += [*rest[:kept], sentinel]
        said += [sentinel, *rest[kept : kept + size]]
        rest = rest[kept + size :]
    said.append(_END)
    padding = [_START] * (length - len(said))
    labels = np.array(said + padding, dtype=np.int64)
    return HiddenSpans(
        encoder_tokens=np.array(encoder, dtype=np.int64),
        decoder_tokens=np.concatenate([[_START], labels[:-1]]),  # what was said so far
        labels=labels,
        counted=np.arange(length) < len(said),
    )


def span_lengths(config: BaseConfig) -> tuple[int, int, int]:
    """Tokens of the set in a sample of T5, how many of them are hidden, and in how many spans.

    So many that the encoder's tokens, a sentinel for each span among them, fill its length.
    """
    data = config.model.data
    mean = data.mean_ngram_size or _mean_span(data)
    return _span_lengths(config.shape.encoder_seq_length, data.masked_lm_prob, mean, data.max_ngram_size)


@functools.cache  # asked for each sample
def _span_lengths(length: int, probability: float, mean: float, longest: int) -> tuple[int, int, int]:
    read = length
    while True:  # one token more adds one to the encoder's, or none where it is hidden in a span that is there
        hidden = max(1, round(probability * read))
        spans = min(hidden, max(1, round(hidden / mean), -(-hidden // longest)))
        if read - hidden + spans >= length:
            return read, hidden, spans
        read += 1


def _mean_span(data: DataSection) -> float:
    """Of geometric lengths up to the longest: 3.8 with SpanBERT's ten."""
    lengths = np.arange(1, data.max_ngram_size + 1)
    weights = _SPAN_END * (1 - _SPAN_END) ** (lengths - 1)
    return float((lengths * weights).sum() / weights.sum())


def _parts(draw: np.random.Generator, total: int, count: int) -> NDArray[np.int64]:
    """`count` numbers of at least one that add up to `total`."""
    cuts = np.sort(draw.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _bounded(draw: np.random.Generator, parts: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """The same sum, with what exceeds `most` given to parts that have room."""
    excess = int(np.maximum(0, parts - most).sum())
    parts = np.minimum(parts, most)
    while excess:
        open_parts = np.flatnonzero(parts < most)
        chosen = draw.permutation(open_parts)[:excess]
        parts[chosen] += 1
        excess -= len(chosen)
    return parts


def _draw(config: BaseConfig, number: int) -> np.random.Generator:
    """A sample's own generator, apart from that of synthetic tokens, which begins at counter 0."""
    return np.random.Generator(np.random.Philox(key=[config.model.seed, number], counter=[0, 0, 0, 1]))
