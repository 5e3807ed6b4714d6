"""The numbers of a figure: columns by name, as they are drawn and as they are written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HfkdError
from ..runs.tables import csv_table

# Columns of equal length, in order.
Table = dict[str, np.ndarray]


class LeftOutError(HfkdError):
    """Says why a figure cannot be drawn of a run."""


def write_csv(table: Table, path: Path) -> None:
    """A header and a line a row: numbers with six significant digits, nothing for one that is not known (NaN)."""
    columns = [[_text(value) for value in column.tolist()] for column in table.values()]
    path.write_text(csv_table(table, zip(*columns, strict=True), line_end="\r\n"), newline="")


def rows_where(table: Table, column: str, value: str) -> Table:
    """The rows that hold a value in a column."""
    chosen = table[column] == value
    return {name: values[chosen] for name, values in table.items()}


def stacked(tables: list[Table]) -> Table:
    """The rows of several tables with the same columns, one below the other."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)
