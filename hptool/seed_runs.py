"""A table of a user's own training runs, read strictly: what a scaling law is fitted to."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hptool import files
from hptool.errors import InputError
from hptool.scaling import SeedRuns

#: The columns that are read, each under one of these names in any case, and the largest value of each.
_COLUMNS: Mapping[str, tuple[tuple[str, ...], float]] = {
    "parameters": (("parameters", "n"), 1e18),
    "tokens": (("tokens", "d"), 1e18),
    "loss": (("loss",), 1e6),
}
_LEAST = {"parameters": 1.0, "tokens": 1.0, "loss": 1e-6}

#: Mistakes of a file that are told; there may be one a row.
_MOST_PROBLEMS = 10


def read_runs(path: Path) -> tuple[SeedRuns, Sequence[str]]:
    """The runs of a CSV file, and the columns of it that were ignored.

    InputError names every cell that is no number above 0, with its line.
    """
    rows = _rows(path)
    if not rows:
        raise InputError(f"{path}: the file is empty")
    (_, header), *body = rows
    places, ignored = _places(path, header)
    problems: list[str] = []
    columns: dict[str, list[float]] = {name: [] for name in places}
    for line, cells in body:
        if len(cells) != len(header):
            problems.append(f"{path}: line {line}: {len(cells)} cells given, allowed is {len(header)}, as in line 1")
            continue
        for name, place in places.items():
            value = _number(cells[place])
            least, most = _LEAST[name], _COLUMNS[name][1]
            if not least <= value <= most:
                problems.append(
                    f"{path}: line {line}: {header[place]}: {cells[place][:40]!r} given, "
                    f"allowed is a number from {least:g} to {most:g}"
                )
            columns[name].append(value)
    if problems:
        rest = len(problems) - _MOST_PROBLEMS
        raise InputError(*problems[:_MOST_PROBLEMS], *([f"{path}: and {rest} more mistakes"] if rest > 0 else []))
    runs = SeedRuns(
        source=str(path),
        line=np.array([line for line, _ in body], dtype=np.int64),
        **{name: np.array(values, dtype=np.float64) for name, values in columns.items()},
    )
    return runs, ignored


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Lines with something in them, numbered from 1."""
    reader = csv.reader(io.StringIO(files.read_text(path).removeprefix("\ufeff")), strict=True)
    try:
        return [
            (reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row)
        ]
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV table (line {reader.line_num}): {error}") from error


def _places(path: Path, header: Sequence[str]) -> tuple[Mapping[str, int], Sequence[str]]:
    """Where each column is, and the names of the others."""
    words = [name.lower() for name in header]
    problems = []
    places = {}
    for name, (allowed, _) in _COLUMNS.items():
        found = [i for i, word in enumerate(words) if word in allowed]
        spelling = " or ".join(allowed).replace(" n", " N").replace(" d", " D")
        if len(found) == 1:
            places[name] = found[0]
        elif found:
            given = ", ".join(header[i] for i in found)
            problems.append(f"{path}: columns {given} given, allowed is one of {spelling}")
        else:
            problems.append(f"{path}: column {spelling} missing; given are {', '.join(header)}")
    if problems:
        raise InputError(*problems)
    return places, [name for i, name in enumerate(header) if i not in places.values()]


def _number(text: str) -> float:
    """NaN where it is none; Python's own `1_000` is none either."""
    try:
        value = float(text) if "_" not in text else math.nan
    except ValueError:
        return math.nan
    return value
