"""Files: strict when reading, all or nothing when writing."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hptool import files
from hptool.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A nested section."""

    depth: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A file with one of each."""

    rate: float
    name: str = ""
    inner: Inner = Inner()
    sizes: tuple[int, ...] = ()


def parsed(text: str) -> Sample:
    return files.parse(files.parse_yaml(text, "f.yaml"), Sample, "f.yaml")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("3.35e12", 3.35e12), ("1.5", 1.5), ("-2E+3", -2000.0), ("7", 7.0)]
)
def test_numbers_are_numbers_in_every_spelling(text: str, value: float) -> None:
    assert parsed(f"rate: {text}").rate == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate: [1", "f.yaml: not valid YAML (line 2, column 1)"),
        ("rate: 1\nrate: 2", "the key 'rate' is given twice"),
        ("rate: 1\n\tname: x", "not valid YAML (line 2, column 1)"),
        ("- 1", "f.yaml: a mapping of keys is needed, list given"),
        ("", "f.yaml: a mapping of keys is needed, NoneType given"),
        ("name: x", "f.yaml: rate: required key is missing"),
        ("rate: fast", "f.yaml: rate: 'fast' given, allowed is number"),
        ("rate: 1\nname: no", "f.yaml: name: False given, allowed is string"),
        ("rate: 1\ninner: {dept: 3}", "f.yaml: inner.dept: unknown key; did you mean depth?"),
        ("rate: 1\ninner: {depth: 1.5}", "f.yaml: inner.depth: 1.5 given, allowed is integer"),
        ("rate: 1\nsizes: [1, x]", "f.yaml: sizes.1: 'x' given, allowed is integer"),
        ("rate: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("? {a: 1}\n: 2", "a key must be a word"),
    ],
)
def test_a_broken_file_is_one_clear_error(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(text)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_missing_file_a_directory_and_a_binary_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, words in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / "binary", "UTF-8"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            files.read_yaml(path)
        assert str(path) in str(caught.value)


@given(st.binary(max_size=200))
def test_no_bytes_whatever_end_in_a_traceback(content: bytes) -> None:
    with contextlib.suppress(InputError):
        files.parse(files.parse_yaml(content.decode("utf-8", errors="ignore"), "fuzz"), Sample, "fuzz")


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@given(st.dictionaries(st.text(min_size=1), scalars | st.lists(scalars)))
def test_yaml_gives_back_what_it_was_given(document: dict[str, Any]) -> None:
    assert files.parse_yaml(files.yaml_text(document), "round trip") == document


@pytest.mark.parametrize(
    ("override", "value"), [("inner.depth=4", 4), ("name='a=b'", "a=b"), ("sizes=[1, 2]", [1, 2]), ("rate=1e-4", 1e-4)]
)
def test_an_override_sets_a_dotted_key(override: str, value: Any) -> None:
    document: Any = files.apply_overrides({"rate": 1, "inner": {"depth": 1}}, [override], "override")
    for key in override.partition("=")[0].split("."):
        document = document[key]
    assert document == value


@pytest.mark.parametrize("override", ["rate", "=1", "a..b=1", "a b=1", "rate=[1"])
def test_a_malformed_override_is_an_error(override: str) -> None:
    with pytest.raises(InputError, match=r"^override"):
        files.apply_overrides({}, [override], "override")


def test_an_override_leaves_the_original_alone() -> None:
    original = {"inner": {"depth": 1}}
    files.apply_overrides(original, ["inner.depth=2"], "override")
    assert original == {"inner": {"depth": 1}}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    files.write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "gpt3/../../x", "nosuch", "gpt3", "gpus/cpu"])
def test_a_name_never_leads_out_of_its_directory(name: str) -> None:
    with pytest.raises(InputError, match="unknown cluster profile"):
        files.read_cluster(name)


def test_a_misspelt_name_is_told_its_nearest() -> None:
    with pytest.raises(InputError, match="did you mean dgx-a100"):
        files.read_cluster("dgx-a10")


def test_a_profile_with_an_unknown_gpu_names_the_nearest(tmp_path: Path) -> None:
    text = (files.data_directory("cluster") / "local.yaml").read_text().replace("gpu: cpu", "gpu: h10")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=r"mine.yaml: gpu: unknown GPU 'h10'; did you mean h100"):
        files.read_cluster(str(tmp_path / "mine.yaml"))


def test_a_number_in_a_profiles_environment_is_its_text(tmp_path: Path) -> None:
    text = (files.data_directory("cluster") / "local.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(f"{text}environment: {{NCCL_IB_DISABLE: 1, RATIO: 0.5, NAME: x}}\n")
    cluster = files.read_cluster(str(tmp_path / "mine.yaml"))
    assert cluster.environment == {"NCCL_IB_DISABLE": "1", "RATIO": "0.5", "NAME": "x"}
    (tmp_path / "mine.yaml").write_text(f"{text}environment: {{DEBUG: yes}}\n")
    with pytest.raises(InputError, match=r"environment\.DEBUG"):
        files.read_cluster(str(tmp_path / "mine.yaml"))
