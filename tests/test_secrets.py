"""What is secret in an environment, and that no text keeps it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hptool.secrets import is_secret, redact


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "DB_PASSWORD",
        "PGPASSWORD",
        "MYSQL_PASSWD",
        "CLIENT_SECRET",
        "GIT_CREDENTIALS",
        "REGISTRY_AUTH",
        "AUTH_HEADER",
        "SLURM_JWT",
        "hf_token",
        "TOKEN",
    ],
)
def test_secret_names(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "HOME",
        "PWD",
        "MONKEY",
        "KEYBOARD",
        "AUTHOR",
        "TOKENIZERS_PARALLELISM",
        "MAX_TOKENS",
        "SSH_AUTH_SOCK",
        "HF_TOKEN_PATH",
        "POSTGRES_PASSWORD_FILE",
        "NCCL_DEBUG",
        "SLURM_JOB_ID",
        "",
    ],
)
def test_other_names(name: str) -> None:
    assert not is_secret(name)


def test_value_gives_way_to_its_name() -> None:
    text = "401 for https://x/?token=hf_abcdef, retried with hf_abcdef"
    masked = "401 for https://x/?token=<masked: HF_TOKEN>, retried with <masked: HF_TOKEN>"
    assert redact(text, {"HF_TOKEN": "hf_abcdef", "USER": "retried"}) == masked


def test_secret_within_a_secret_leaves_no_rest() -> None:
    environment = {"A_TOKEN": "abcdef", "B_TOKEN": "abcdefghij"}
    assert redact("abcdefghij abcdef", environment) == "<masked: B_TOKEN> <masked: A_TOKEN>"


def test_quoted_value_is_found() -> None:
    value = "it's\nof two\\lines"
    assert redact(f"KeyError: {value!r}", {"A_KEY": value}) == 'KeyError: "<masked: A_KEY>"'


@pytest.mark.parametrize("value", ["", "true", "12345"])
def test_short_values_stay(value: str) -> None:
    assert redact("it is true that 12345 is a number", {"A_KEY": value}) == "it is true that 12345 is a number"


def test_paths_of_what_is_there_stay(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    path.write_text("{}")
    assert redact(f"reads {path}", {"GOOGLE_APPLICATION_CREDENTIALS": str(path)}) == f"reads {path}"
    # A key of AWS may begin with a slash, too.
    assert redact("/abcdef/ghi+jk", {"AWS_SECRET_ACCESS_KEY": "/abcdef/ghi+jk"}) == "<masked: AWS_SECRET_ACCESS_KEY>"


def test_default_is_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_moment")
    assert redact("hf_of_this_moment") == "<masked: HF_TOKEN>"


@given(
    value=st.text("abcdefgh0123456789+.*\\|$^()[]{}_-", min_size=6),
    before=st.text("xyz \n"),
    after=st.text("xyz \n"),
)
def test_no_value_stays_and_all_else_does(value: str, before: str, after: str) -> None:
    assert redact(before + value + after, {"A_TOKEN": value}) == f"{before}<masked: A_TOKEN>{after}"
    assert redact(before + after, {"A_TOKEN": value}) == before + after
