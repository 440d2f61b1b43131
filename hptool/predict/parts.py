"""A sum that is shown as its parts: a dataclass of columns, one row a layout."""

from collections.abc import Sequence
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


def join(tables: Sequence[T]) -> T:
    """Tables of the same columns below one another."""
    columns: Sequence[Any] = tables
    if len(columns) == 1:
        return tables[0]
    if isinstance(columns[0], np.ndarray):
        return cast("T", np.concatenate(columns))
    return type(tables[0])(**{f.name: join([getattr(t, f.name) for t in columns]) for f in fields(columns[0])})


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
