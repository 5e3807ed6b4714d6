"""The numbers of a figure: columns by name, as they are drawn and as they are written."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np

from ..errors import HfkdError

# Columns of equal length, in order.
Table = dict[str, np.ndarray]


class LeftOutError(HfkdError):
    """Says why a figure cannot be drawn of a run."""


def write_csv(table: Table, path: Path) -> None:
    """A header and a line a row: numbers with six significant digits, nothing for one that is not known (NaN)."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        for row in zip(*(column.tolist() for column in table.values()), strict=True):
            writer.writerow(_text(value) if isinstance(value, float) else value for value in row)


def rows_where(table: Table, column: str, value: str) -> Table:
    """The rows that hold a value in a column."""
    chosen = table[column] == value
    return {name: values[chosen] for name, values in table.items()}


def stacked(tables: list[Table]) -> Table:
    """The rows of several tables with the same columns, one below the other."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
