"""What BERT and T5 find again is what was hidden, as much of each sample as of any other, whatever the layout."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool.base_config import BaseConfig
from hptool.worker import masking
from tests.worker.runs import tiny_config, tiny_family

VOCABULARY = 500
MASK = VOCABULARY - 1


def bert(**changes: Any) -> BaseConfig:
    """A tiny BERT."""
    return tiny_config(**tiny_family("bert", **changes))


def t5(encoder: int = 512, decoder: int = 160, **changes: Any) -> BaseConfig:
    """A tiny T5 with these lengths."""
    lengths = {
        "model__seq_length": encoder,
        "model__max_position_embeddings": max(encoder, decoder),
        "model__data__seq_length": encoder,
        "model__data__seq_length_dec": decoder,
        "model__data__mean_ngram_size": None,
    }
    return tiny_config(**tiny_family("t5", **(lengths | changes)))


def tokens(config: BaseConfig, first: int = 0) -> Any:
    """As many as a sample is made of, each another."""
    return np.arange(first, first + masking.tokens_read(config))


def test_bert_hides_the_published_parts_of_its_tokens() -> None:
    # Devlin et al. 2019: 15 % of the tokens; of them 80 % masked, 10 % another token, 10 % as they were.
    config = bert(model__bert_binary_head=False)
    fates = np.zeros(3)
    for number in range(600):
        sample = tokens(config)
        hidden = masking.hide_tokens(sample, config, number)
        assert list(hidden.labels) == list(sample)
        assert hidden.counted.sum() == round(0.15 * 32)
        assert (hidden.tokens == hidden.labels)[~hidden.counted].all()
        found, was = hidden.tokens[hidden.counted], hidden.labels[hidden.counted]
        fates += [(found == MASK).sum(), ((found != MASK) & (found != was)).sum(), (found == was).sum()]
    assert fates / fates.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_segments_of_bert_are_swapped_every_other_time() -> None:
    config = bert()
    front, behind = VOCABULARY - 3, VOCABULARY - 2
    ordered = 0
    for number in range(400):
        sample = tokens(config)
        hidden = masking.hide_tokens(sample, config, number)
        middle, end = np.flatnonzero(hidden.labels == behind).tolist()
        assert (hidden.labels[0], end) == (front, 31)
        assert not hidden.counted[[0, middle, end]].any()
        first, second = hidden.labels[1:middle], hidden.labels[middle + 1 : end]
        whole = [*first, *second] if hidden.in_order else [*second, *first]
        assert whole == list(sample)
        assert list(hidden.segments) == [0] * (middle + 1) + [1] * (31 - middle)
        ordered += hidden.in_order
    assert 160 < ordered < 240


@settings(max_examples=60, deadline=None)
@given(
    length=st.sampled_from([32, 100, 512]),
    probability=st.sampled_from([0.05, 0.15, 0.4]),
    mean=st.sampled_from([None, 1, 3]),
    longest=st.sampled_from([3, 4, 10]),
    number=st.integers(0, 10**6),
)
def test_t5_says_again_what_its_sentinels_hide(
    length: int, probability: float, mean: int | None, longest: int, number: int
) -> None:
    keys = {"masked_lm_prob": probability, "mean_ngram_size": mean, "max_ngram_size": longest}
    config = t5(length, length, **{f"model__data__{key}": value for key, value in keys.items() if value is not None})
    assert masking.problems(config) == []
    read, hidden, spans = masking.span_lengths(config)
    assert hidden == max(1, round(probability * read))
    sample = tokens(config, first=1000)
    made = masking.hide_spans(sample, config, number)
    # The encoder is full, and each of its sentinels stands for the tokens behind it in the labels.
    assert len(made.encoder_tokens) == length
    said = list(made.labels[made.counted])
    assert said.pop() == 1
    assert len(said) == hidden + spans
    found: dict[int, list[int]] = {}
    for token in said:
        if token < VOCABULARY:
            found[token] = []
        else:
            found[next(reversed(found))].append(token)
    assert list(found) == [VOCABULARY - 1 - i for i in range(spans)]
    assert all(1 <= len(span) <= longest for span in found.values())
    again = [token for x in made.encoder_tokens for token in found.get(int(x), [x])]
    assert again == list(sample)
    # The decoder is told one token later, and nothing of what is behind the end counts.
    assert list(made.decoder_tokens) == [0, *made.labels[:-1]]
    assert not made.labels[~made.counted].any()


def test_lengths_of_t5_are_near_the_published_ones() -> None:
    # Raffel et al. 2020, section 3.1.4: 15 % in spans of three make 512 tokens of 568 and targets of 114, with an
    # end in both.
    read, hidden, spans = masking.span_lengths(t5(511, 114, model__data__mean_ngram_size=3))
    assert (read, hidden + spans + 1) == (568, 114)


#: Samples cut from a set, in which words and lengths mean something.
REAL: dict[str, Any] = {"model__data__data_prefix": "a_set"}


@pytest.mark.parametrize("config", [bert(), t5()], ids=["bert", "t5"])
def test_numbers_and_seeds_hide_other_tokens(config: BaseConfig) -> None:
    hide = masking.hide_tokens if config.is_bert else masking.hide_spans
    sample = tokens(config)
    reseeded = bert(model__seed=5) if config.is_bert else t5(model__seed=5)
    made = [str(hide(sample, c, number)) for c, number in ((config, 1), (config, 2), (reseeded, 1), (config, 1))]
    assert len(set(made)) == 3
    assert made[0] == made[3]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (bert(model__data__masked_lm_prob=0.0), "masked_lm_prob: 0.0 given"),
        (bert(model__data__short_seq_prob=0.1, **REAL), "short_seq_prob: 0.1 given, allowed is 0"),
        (bert(model__data__whole_word_masking=True, **REAL), "whole_word_masking: True given"),
        (t5(512, 64), "seq_length_dec: 64 given, allowed is 110 or more"),
        (t5(model__data__geometric_dist=False, **REAL), "geometric_dist: False given"),
        (t5(model__data__favor_longer_ngrams=True, **REAL), "favor_longer_ngrams: True given"),
        (t5(model__data__max_ngram_size=0), "max_ngram_size: 0 given"),
        (t5(512, 1800, model__data__masked_lm_prob=0.9), "masked_lm_prob: 0.9 given"),
    ],
)
def test_what_samples_cannot_be_is_refused_by_name(config: BaseConfig, said: str) -> None:
    (problem,) = masking.problems(config)
    assert problem.startswith(f"model.data.{said}")
