"""Numbers of a figure: columns by name, drawn and written as CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import HfkdError
from ..runs.tables import csv_table
from ..runs.writing import write_whole

LINE_END = "\r\n"

# Columns of equal length, in order.
Table = dict[str, np.ndarray]


class LeftOutError(HfkdError):
    """Error for a figure that cannot be drawn of a run; the message is the reason."""


def write_csv(table: Table, path: Path) -> None:
    """Write a table as CSV, numbers with six significant digits; NaN is an empty cell."""
    columns = [[_text(value) for value in column.tolist()] for column in table.values()]
    write_whole(path, csv_table(table, zip(*columns, strict=True), line_end=LINE_END))


def is_table(path: Path, table: Table) -> bool:
    """Return True if a file is a CSV with the columns of a table."""
    header = csv_table(table, [], line_end=LINE_END).encode()
    return path.is_file() and path.read_bytes().startswith(header)


def rows_where(table: Table, column: str, value: str) -> Table:
    """Return the rows that hold a value in a column."""
    chosen = table[column] == value
    return {name: values[chosen] for name, values in table.items()}


def panel_title(role: str, roles: Sequence[str], text: str) -> str:
    """Return the title of a network's panel, with its role if there are several networks."""
    return f"{role}: {text}" if len(roles) > 1 else text


def stacked(tables: list[Table]) -> Table:
    """Stack the rows of several tables with the same columns."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)
