"""A sum that is shown as its parts: a dataclass of columns, one row a layout."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

Column = NDArray[Any]  # numbers, one a row

T = TypeVar("T")


def take(table: T, index: Any) -> T:
    """The rows at `index` of a column, or of a dataclass of columns and such dataclasses."""
    columns: Any = table
    if isinstance(columns, np.ndarray):
        return cast("T", columns[index])
    return type(table)(**{f.name: take(getattr(columns, f.name), index) for f in fields(columns)})


def join(tables: Iterable[T], rows: int, **there: Any) -> T:
    """Tables of the same columns below one another, `rows` in all; each is let go of before the next is asked for.

    `there` are fields that the whole has already.
    """
    whole: dict[str, Any] = {}
    kind: Any = None
    at = 0
    for table in tables:
        kind = type(table)
        kept = {f.name: getattr(table, f.name) for f in fields(kind) if f.name not in there}
        whole = whole or {name: _empty(part, rows) for name, part in kept.items()}
        at += max(_put(whole[name], part, at) for name, part in kept.items())
    return cast("T", kind(**whole, **there))


def _empty(table: Any, rows: int) -> Any:
    if isinstance(table, np.ndarray):
        return np.empty(rows, table.dtype)
    return type(table)(**{f.name: _empty(getattr(table, f.name), rows) for f in fields(table)})


def _put(whole: Any, table: Any, at: int) -> int:
    """Write a table's rows from row `at` on, and say how many they are."""
    if isinstance(table, np.ndarray):
        whole[at : at + len(table)] = table
        return len(table)
    return max(_put(getattr(whole, f.name), getattr(table, f.name), at) for f in fields(table))


def add_up(parts: Any) -> Column:
    """The sum of all columns of a dataclass, row by row."""
    first, *rest = (getattr(parts, field.name) for field in fields(parts))
    total = first.copy()
    for column in rest:
        total += column
    return np.asarray(total)


def choose(condition: Column, then: Any, otherwise: Any) -> Any:
    """`np.where`, without the work where one condition holds for all rows."""
    if condition.size == 1:
        return then if condition.item() else otherwise
    return np.where(condition, then, otherwise)
