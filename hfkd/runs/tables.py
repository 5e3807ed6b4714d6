"""Tables as text: Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Container, Iterable, Sequence
from typing import Any

from .reading import printable


def markdown_table(
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    padded: bool = False,
    right: Container[str] = (),
    compact: bool = False,
) -> str:
    """Return a Markdown table.

    Args:
        padded: pad each column to its widest cell, for tables that people also read as plain text.
        right: headings of the columns that are aligned right.
        compact: write the rule, and an empty heading, with fewer spaces.
    """
    # A bar would end its cell, even in a code span, and a line break its row.
    cells = [[printable(str(cell)).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    columns = [
        _column(column, padded, name in right, compact)
        for name, column in zip(header, zip(*cells, strict=True), strict=True)
    ]
    return "\n".join(f"|{'|'.join(line)}|" for line in zip(*columns, strict=True))


def _column(cells: Sequence[str], padded: bool, right: bool, compact: bool) -> list[str]:
    """Return the cells of a column, the first one a heading, with the rule behind it."""
    width = max(map(len, cells)) if padded else 0
    heading, *values = (f" {cell.rjust(width) if right else cell.ljust(width)} " for cell in cells)
    rule = "-" * ((width or 3) - right) + ":" * right
    if compact:
        return [heading if cells[0] else " ", rule, *values]
    return [heading, f" {rule} ", *values]


def plain(text: str) -> str:
    """Return a text from a file with its special characters escaped, so that Markdown shows it as it is.

    Of brackets only those of a link or an image are special: most stand in the name of a split, such as test[:50].
    """
    return re.sub(r"([\\`<>]|\](?=[(\[:]))", r"\\\1", printable(text))


def _harmless(cell: Any) -> Any:
    if not isinstance(cell, str) or not re.match(r"[=+\-@\t\r]", cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def without_empty_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], empty: Container[str] = ("",)
) -> tuple[list[str], list[list[str]]]:
    """Return a table without the columns in which every cell is one of the `empty` values; the first column stays."""
    kept = [index for index in range(len(header)) if index == 0 or any(row[index] not in empty for row in rows)]
    return [header[index] for index in kept], [[row[index] for index in kept] for row in rows]


def csv_table(header: Iterable[str], rows: Iterable[Sequence[Any]], line_end: str = "\n") -> str:
    """Return the text of a CSV file; None is an empty cell.

    A spreadsheet would run a text that begins like a formula; an apostrophe in front makes it a text.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=line_end)
    writer.writerow(header)
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    return file.getvalue()
