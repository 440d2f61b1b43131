"""Texts as data: how they are read and cut, and that a model learns from one."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hptool.errors import InputError
from hptool.worker import text
from tests.worker.runs import Launcher, tiny_config, write_set
from tests.worker.trainings import QUIET, TEXT, evaluations, train

SEQ = 32

#: A text of 20 samples and one token, of which half are for training.
BYTES: dict[str, Any] = {
    "model__override_vocab_size": 257,
    "model__tokenizer": {"library": "byte-level"},
    "model__data__splits_string": "50,25,25",
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A text whose bytes tell their places: byte i is i // 32, but for the last."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(i // SEQ for i in range(20 * SEQ)))
    return path


def test_bytes_become_tokens_and_text_again() -> None:
    tokenizer = text.ByteTokenizer()
    said = "Größe → 1\n"
    assert tokenizer.encode(said) == list(said.encode())
    assert tokenizer.decode(tokenizer.encode(said)) == said
    assert tokenizer.decode([97, tokenizer.end, 98]) == "a\n\nb"
    assert tokenizer.decode([0xC3]) == "\ufffd"  # half a letter


def test_hugging_faces_tokenizer_is_read(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "one": 1, "two": 2, "?": 3}, unk_token="?"))  # noqa: S106 (no password)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    config = tiny_config(model__tokenizer={"library": "huggingface", "type": str(tmp_path)})
    tokenizer = text.tokenizer_of(config)
    assert (tokenizer.encode("two one"), tokenizer.end, tokenizer.vocab_size) == ([2, 1], 0, 4)
    assert tokenizer.decode([2, 1]) == "two one"


def test_text_is_cut_into_training_and_validation(written: Path) -> None:
    from hptool.worker import data  # noqa: PLC0415 (imports torch and megatron)

    config = tiny_config(model__data__data_prefix=str(written), **BYTES)
    training = data.samples_of(config)
    # 641 tokens with the end of the document: 320 are for training, 161 for validation.
    seen = [training.sample(number) for number in range(9)]
    assert sorted(int(sample[0]) for sample in seen) == list(range(9))  # all of them, in another order
    assert max(int(sample.max()) for sample in seen) < 10
    samples, count = data.validation_samples_of(config)
    assert count == 5
    assert [int(samples.sample(number)[0]) for number in range(6)] == [10, 11, 12, 13, 14, 10]
    assert all(len(samples.sample(number)) == SEQ + 1 for number in range(5))


def test_document_ends_with_its_own_token(written: Path) -> None:
    tokens = text.TextTokens(written, text.ByteTokenizer())
    assert tokens.read(20 * SEQ - 2, 3).tolist() == [19, 19, 256]
    assert tokens.cut(1.0) == 20 * SEQ + 1


def test_validation_goes_through_all_sets_once(tmp_path: Path) -> None:
    from hptool.worker import data  # noqa: PLC0415 (imports torch and megatron)

    # Each set: a document for training, one for validation.
    sets = [write_set(tmp_path / str(i), [[10 + i] * 70, [20 + i] * (33 + 32 * i)]) for i in range(3)]
    prefixes = [part for prefix in sets for part in (0.5, str(prefix))]
    config = tiny_config(model__data__data_prefix=prefixes, model__data__splits_string="50,50,0")
    samples, count = data.validation_samples_of(config)
    assert count == 6
    assert [samples.sample(number).tolist() for number in range(6)] == [[x] * 33 for x in (20, 21, 21, 22, 22, 22)]


def test_a_set_is_no_text_whatever_its_name(tmp_path: Path) -> None:
    prefix = str(write_set(tmp_path / "set.txt", [[1] * 40]))
    Path(prefix).write_text("a text beside it")
    assert not text.is_text(prefix)
    assert text.is_text(str(TEXT))
    assert not text.is_text(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"caf\xe9 ol\xe9", "not UTF-8"), (b"caf\xc3", "not UTF-8")],
)
def test_unreadable_text_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"text.txt: {said}"):
        text.check_text(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__override_vocab_size": 256}, "model.override_vocab_size: 256 given, allowed .* 257 or more"),
        ({"model__tokenizer": {"library": "megatron"}}, "model.tokenizer.library: 'megatron' given, .* byte-level"),
        ({"model__tokenizer": {"library": "huggingface", "type": "gpt2"}}, "model.tokenizer"),
    ],
)
def test_tokenizer_that_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        text.tokenizer_of(tiny_config(**{**BYTES, **changes}))


def test_timed_run_reads_a_text_too(launcher: Launcher, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    run = launcher.start(model__data__data_prefix=str(short), **BYTES)
    assert run.wait() == 1
    assert "fewer than one sample" in run.failures[0].message
    assert launcher.run(model__data__data_prefix=str(TEXT), **BYTES).losses[0] == pytest.approx(math.log(384), abs=0.3)


def entropy(counts: Counter[int]) -> float:
    """Of one byte after another, in nats, for somebody who knows how often each occurs."""
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())


def test_real_text_is_learnt(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        **BYTES,
        "trainer__devices": 2,
        "trainer__max_steps": 120,
        "model__data__data_prefix": str(TEXT),
        "model__data__splits_string": "90,10,0",
        "model__data__seq_length": 64,
        "model__encoder_seq_length": 64,
        "model__max_position_embeddings": 64,
        "model__num_layers": 2,
        "model__micro_batch_size": 8,
        "model__global_batch_size": 16,
        "model__init_method_std": 0.05,
        "model__share_embeddings_and_output_weights": False,
        "model__make_vocab_size_divisible_by": 1,
        "model__optim": {"lr": 0.006, "weight_decay": 0.01, "sched": {"warmup_steps": 10, "min_lr": 0.001}},
    }
    orders = replace(QUIET, validate_every=40, validation_batches=1.0, prompt="You may ", sample_tokens=24)
    result = train(tmp_path / "run", orders, **changes)
    found = [line["validation_loss"] for line in evaluations(tmp_path / "run")]
    assert found[0] == pytest.approx(math.log(257), abs=0.2)
    assert found == sorted(found, reverse=True)
    # Less than for somebody who knows how often each letter occurs, be it in the whole text or in this very part.
    written = TEXT.read_bytes()
    cut = round(0.9 * (len(written) + 1))
    assert result.validation_loss == found[-1]
    assert found[-1] < min(entropy(Counter(written)), entropy(Counter(written[cut:]))) - 0.1
    sample = evaluations(tmp_path / "run")[-1]["sample"]
    assert sample.startswith("You may ")
    assert len(sample) > len("You may ")
    assert result.tokens == 120 * 16 * 64
    assert np.isfinite(found).all()
