"""A sum that is shown as its parts: a dataclass of columns, one row a layout."""

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Column = NDArray[Any]  # numbers, one a row


def add_up(parts: Any) -> Column:
    """The sum of all columns of a dataclass, row by row."""
    return np.asarray(np.sum([getattr(parts, field.name) for field in fields(parts)], axis=0))
