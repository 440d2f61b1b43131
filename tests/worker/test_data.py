"""Samples do not depend on the layout, and real sets are read as they were written."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.measurement import FailureKind
from tests.worker.runs import Launcher, on_ranks, tiny_config, tiny_family, write_set

SEQ = 32


def batch(config: BaseConfig, step: int) -> list[dict[str, Any]]:
    """What one rank reads in a step."""
    import torch  # noqa: PLC0415 (heavy)

    from hptool.worker import batches, data  # noqa: PLC0415 (heavy)

    read = batches.microbatches(config, data.samples_of(config), step, torch.device("cpu"))
    return [{f.name: getattr(x, f.name).tolist() for f in fields(x)} for x in read]  # type: ignore[arg-type]


def rows(ranks: list[list[dict[str, Any]]], key: str) -> list[list[int]]:
    """All rows of all ranks, sorted."""
    return sorted(row for rank in ranks for microbatch in rank for row in microbatch[key])


@pytest.mark.parametrize("changes", [{"trainer__devices": 2}, {"model__micro_batch_size": 4}], ids=str)
@pytest.mark.parametrize("family", [None, "bert", "t5"])
def test_global_batch_does_not_depend_on_the_layout(
    tmp_path: Path, family: str | None, changes: dict[str, Any]
) -> None:
    of_family = tiny_family(family) if family else {}
    one, other = tiny_config(**of_family), tiny_config(**of_family, **changes)
    expected = on_ranks(tmp_path / "one", one, lambda: batch(one, 3))
    found = on_ranks(tmp_path / "other", other, lambda: batch(other, 3))
    for key in expected[0][0].keys() - {"in_order"}:
        assert rows(found, key) == rows(expected, key)
        assert len(rows(found, key)) == one.model.global_batch_size


def test_steps_and_seeds_have_their_own_samples(tmp_path: Path) -> None:
    config, reseeded = tiny_config(), tiny_config(model__seed=5)
    answers = [
        on_ranks(tmp_path / str(i), c, lambda c=c, step=step: batch(c, step))  # type: ignore[misc]
        for i, (c, step) in enumerate([(config, 0), (config, 1), (reseeded, 0)])
    ]
    tokens = [str(rows(answer, "tokens")) for answer in answers]
    assert len(set(tokens)) == 3


def test_labels_are_the_next_tokens(tmp_path: Path) -> None:
    config = tiny_config()
    ((microbatch, *_),) = on_ranks(tmp_path, config, lambda: batch(config, 0))
    for tokens, labels in zip(microbatch["tokens"], microbatch["labels"], strict=True):
        assert tokens[1:] == labels[:-1]
        assert min(tokens) >= 0 and max(tokens) < config.shape.vocab_size  # noqa: PT018 (a range)


def test_context_parallel_ranks_share_each_row(tmp_path: Path) -> None:
    one, two = tiny_config(), tiny_config(trainer__devices=2, model__context_parallel_size=2)
    ((whole, *_),) = on_ranks(tmp_path / "one", one, lambda: batch(one, 0))
    (first, *_), (second, *_) = on_ranks(tmp_path / "two", two, lambda: batch(two, 0))
    quarter = SEQ // 4
    assert first["positions"][0] == [*range(quarter), *range(3 * quarter, SEQ)]
    assert second["positions"][0] == list(range(quarter, 3 * quarter))
    for part in (first, second):
        for key in ("tokens", "labels"):
            places = part["positions"][0]
            assert part[key] == [[row[place] for place in places] for row in whole[key]]


def test_indexed_set_is_read_as_written(tmp_path: Path) -> None:
    # Token k·100 + j at place j of sample k, so that each sample names itself.
    stream = [min(k, 4) * 100 + j for k in range(5) for j in range(SEQ)] + [499]
    prefix = write_set(tmp_path / "set", [stream[:50], stream[50:]])
    config = tiny_config(model__data__data_prefix=str(prefix), model__data__splits_string="1,0,0")
    (read,) = on_ranks(tmp_path / "run", config, lambda: [batch(config, step) for step in range(5)])
    tokens = [row for step in read for microbatch in step for row in microbatch["tokens"]]
    pieces = [stream[k * SEQ : (k + 1) * SEQ] for k in range(5)]
    # 40 samples of a set of 5: every one eight times, once in each round.
    for start in range(0, 40, 5):
        assert sorted(tokens[start : start + 5]) == pieces


def test_only_the_training_split_is_read(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "set", [[1] * 40, [1] * 40, [2] * 40, [2] * 40])
    config = tiny_config(model__data__data_prefix=str(prefix), model__data__splits_string="50,40,10")
    (read,) = on_ranks(tmp_path / "run", config, lambda: batch(config, 0))
    assert {token for microbatch in read for row in microbatch["tokens"] for token in row} == {1}


def test_blend_follows_its_weights(tmp_path: Path) -> None:
    first = write_set(tmp_path / "first", [[1] * 400])
    second = write_set(tmp_path / "second", [[2] * 400])
    config = tiny_config(model__data__data_prefix=[0.75, str(first), 0.25, str(second)])
    (read,) = on_ranks(tmp_path / "run", config, lambda: [batch(config, step) for step in range(20)])
    tokens = [row[0] for step in read for microbatch in step for row in microbatch["tokens"]]
    assert tokens.count(1) == pytest.approx(120, abs=3)
    assert tokens.count(2) == pytest.approx(40, abs=3)


def test_real_set_trains_alike_on_one_and_two_ranks(launcher: Launcher, tmp_path: Path) -> None:
    prefix = str(write_set(tmp_path / "set", [[(7 * i * i) % 500 for i in range(2000)]]))
    one = launcher.run(model__data__data_prefix=prefix)
    two = launcher.run(model__data__data_prefix=[prefix], trainer__devices=2)
    synthetic = launcher.run()
    assert list(two.losses) == pytest.approx(list(one.losses), rel=1e-6)
    assert list(synthetic.losses) != pytest.approx(list(one.losses), rel=1e-4)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in {".bin", ".idx"} and path.is_file()]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"data_prefix": "short"}, "fewer than one sample"),
        ({"data_prefix": [0.5, "set", 0.5]}, "weight, prefix"),
        ({"data_prefix": "set", "splits_string": "a,b"}, "splits_string"),
    ],
)
def test_unusable_data_is_refused(launcher: Launcher, tmp_path: Path, data: dict[str, Any], said: str) -> None:
    write_set(tmp_path / "set", [[1] * 400])
    write_set(tmp_path / "short", [[1] * 20])
    prefix = data["data_prefix"]
    here = str(tmp_path / prefix) if isinstance(prefix, str) else [0.5, str(tmp_path / "set"), 0.5]
    changes = {f"model__data__{key}": value for key, value in ({**data, "data_prefix": here}).items()}
    run = launcher.start(**changes)
    assert run.wait() == 1
    (failure,) = run.failures
    assert failure.kind is FailureKind.INVALID
    assert said in failure.message


def test_indexed_set_names_the_missing_file(tmp_path: Path) -> None:
    from hptool.worker.data import IndexedTokens  # noqa: PLC0415 (imports torch and megatron)

    prefix = write_set(tmp_path / "set", [[1] * 400])
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(InputError, match=r"there is no file .*set\.bin"):
        IndexedTokens(str(prefix), "here")
