"""Secrets of the environment, kept out of what is written: logs and reports travel further than the job does."""

import os
import re
from collections.abc import Iterator, Mapping

#: Parts of a variable's name, between underscores, that make it a secret.
_WORDS = frozenset({"KEY", "KEYS", "SECRETS", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "AUTH", "JWT"})

#: What such a part may end with, as in PGPASSWORD.
_ENDS = ("PASSWORD", "PASSWD", "TOKEN", "SECRET", "APIKEY")

#: What such a name ends with where it only says where the secret is.
_PLACES = frozenset({"PATH", "FILE", "DIR", "HOME", "SOCK", "SOCKET"})

#: Shorter values are words like "true" or "none", and would take half of the text with them.
_SHORTEST = 6


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with `<masked: NAME>` for each value of a variable that is a secret; see `is_secret`.

    Values of fewer than 6 characters stay, and so do paths of what is there, which say only where a secret is kept. A
    value is found as it is, and as Python quotes it.
    """
    masks: dict[str, str] = {}
    for name in sorted(filter(is_secret, environment)):
        value = environment[name].strip()
        if len(value) >= _SHORTEST and not _is_path(value):
            masks.update(dict.fromkeys(_forms(value), f"<masked: {name}>"))
    if not masks:
        return text
    longest_first = sorted(masks, key=len, reverse=True)  # or a secret within a secret would leave its rest
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: masks[found.group()], text)


def is_secret(name: str) -> bool:
    """A variable of this name holds a secret, as do HF_TOKEN and WANDB_API_KEY, and not SSH_AUTH_SOCK or MAX_TOKENS."""
    words = name.upper().split("_")
    return words[-1] not in _PLACES and any(word in _WORDS or word.endswith(_ENDS) for word in words)


def _is_path(value: str) -> bool:
    return value.startswith(("/", "./", "../")) and os.path.exists(value)  # noqa: PTH110 (pathlib's raises for long ones)


def _forms(value: str) -> Iterator[str]:
    yield value
    yield repr(value)[1:-1]
