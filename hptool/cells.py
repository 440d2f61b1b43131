"""Cells of tables of runs, as numbers, words and switches; what is none of these is an error that says so."""

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pandas as pd

#: More than any count of a real run: what is larger would overflow.
MOST = 2**24

#: Characters of a cell that an error shows.
SHOWN = 60

Row = Mapping[Any, Any]


class RowError(ValueError):
    """Why a row cannot be predicted."""


def number(row: Row, name: str) -> float | None:
    """A cell as a number; None where it is empty."""
    value = row.get(name)
    if isinstance(value, float) and math.isfinite(value):
        return value
    if is_empty(value):
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(cast("Any", value))
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if math.isnan(found):
        raise RowError(f"{name}: {shown(value)} given, allowed is a number")
    if math.isinf(found):
        raise RowError(f"{name}: {shown(value)} given, allowed is a finite number")
    return found


def is_empty(value: object) -> bool:
    """A cell that says nothing."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value is pd.NA or (isinstance(value, str) and not value.strip())


def shown(value: object) -> str:
    """A cell in an error: in one line, and not the whole of a long one."""
    value = value.item() if isinstance(value, np.generic) else value
    text = f"{value:.15g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def count(row: Row, name: str, default: int | None = None) -> int:
    """A cell as a whole number of 1 or more."""
    value = number(row, name)
    if value is None and default is not None:
        return default
    if value is None or value < 1 or value != int(value):
        given = "nothing" if value is None else shown(row.get(name))
        raise RowError(f"{name}: {given} given, allowed is a whole number of 1 or more")
    if value > MOST:
        raise RowError(f"{name}: {shown(row.get(name))} given, allowed is at most {MOST}")
    return int(value)


def optional(row: Row, name: str) -> int | None:
    """As `count`; None where the cell is empty."""
    return None if number(row, name) is None else count(row, name)


def word(row: Row, name: str) -> str:
    """A cell as text without spaces around it."""
    value = row.get(name)
    return "" if is_empty(value) else str(value).strip()


def switch(row: Row, name: str, default: bool) -> bool:  # noqa: FBT001 (a cell's default)
    """A cell as on or off; `unknown` and nothing are the default."""
    text = word(row, name).lower()
    if text in ("", "unknown"):
        return default
    if text in ("1", "1.0", "true"):
        return True
    if text in ("0", "0.0", "false"):
        return False
    raise RowError(f"{name}: {shown(text)} given, allowed is 0, 1 or unknown")
