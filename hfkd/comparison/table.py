"""Table of a comparison, as Markdown and as CSV."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs.tables import csv_table, markdown_table, plain, without_empty_columns
from .rows import Row, Spread

GAP = "-"  # an unknown value
MEASURES = {  # heading of a column: function that reads its value from a row
    "best top-1": lambda row: row.value("best", "top1"),
    "best top-5": lambda row: row.value("best", "top5"),
    "last top-1": lambda row: row.value("last", "top1"),
    "last top-5": lambda row: row.value("last", "top5"),
    "agreement": lambda row: row.value("best", "agreement"),
    "teacher top-1": lambda row: row.teacher_top1,
    "images/s": lambda row: row.images_per_second,
}
UNIT = "Percent of the evaluation images."
BESIDE_PUBLISHED = "measured beside published"  # in the title of a report of `hfkd reproduce`
LEGEND = {  # what a table holds: its explanation
    "best top-1": f"{UNIT} Best: the epoch with the highest top-1, which papers report, with its other values.",
    "±": "Several seeds: mean ± standard deviation (n - 1 in the denominator).",
    "difference": "Difference: best top-1 minus the published one, if the run follows the published one.",
    "images/s": "images/s: in training, on the run's devices.",
}
# Columns in the order in which a narrow terminal does without them.
DISPENSABLE = ("parameters", "devices", "last top-5", "best top-5", "seeds", "images/s", "agreement", "last top-1")


def is_report(path: Path) -> bool:
    """Return True if a file is a table of hfkd; a table without a measurement has no legend."""
    content = path.read_bytes() if path.is_file() else b""
    return UNIT.encode() in content or BESIDE_PUBLISHED.encode() in content.partition(b"\n")[0]


@dataclass(frozen=True)
class Gap:
    """Row without a measurement yet; `note` is the reason."""

    label: str
    published_top1: float | None
    note: str


def text_table(rows: Sequence[Row], gaps: Sequence[Gap] = ()) -> str:
    """Return the rows, then the gaps, as a padded Markdown table without the columns in which nothing is known."""
    return _table([_cells(row) for row in rows] + [_cells_of_gap(gap) for gap in gaps])


def terminal_table(rows: Sequence[Row], gaps: Sequence[Gap] = ()) -> str:
    """Return `text_table`, or a narrower one where standard output is a terminal that it does not fit.

    The rows are then numbered, their names and notes are listed below, and dispensable columns are left out.
    """
    whole = text_table(rows, gaps)
    if not sys.stdout.isatty():
        return whole
    width = shutil.get_terminal_size().columns
    if _width(whole) <= width:
        return whole
    records = [_cells(row) for row in rows] + [_cells_of_gap(gap) for gap in gaps]
    names = [f"{record.pop('run')}{'; ' * bool(record['note'])}{record.pop('note')}" for record in records]
    records = [{"run": str(number)} | record for number, record in enumerate(records, start=1)]
    table, left_out = _table(records), []
    for name in DISPENSABLE:
        if _width(table) <= width:
            break
        left_out += [name] if f" {name} " in table.partition("\n")[0] else []
        records = [{key: cell for key, cell in record.items() if key != name} for record in records]
        table = _table(records)
    listed = "\n".join(f"{number}. {name}" for number, name in enumerate(names, start=1))
    more = f"\n\nThe file also has: {', '.join(left_out)}." if left_out else ""
    return f"{table}\n\n{listed}{more}"


def legend(table: str) -> str:
    """Return the explanation of what a table holds."""
    shown = table.partition("\n\n")[0]  # without what `terminal_table` lists below it
    sentences = [text for name, text in LEGEND.items() if name in shown]
    return textwrap.fill(" ".join(sentences), 116)


def _table(records: Sequence[dict[str, str]]) -> str:
    header = list(records[0])
    rows = [[record[name] for name in header] for record in records]
    right = set(header) - {"run", "seeds", "devices", "note"}
    return markdown_table(*without_empty_columns(header, rows, empty=("", GAP)), padded=True, right=right)


def _width(table: str) -> int:
    return len(table.partition("\n")[0])


def csv_text(rows: Sequence[Row], gaps: Sequence[Gap] = ()) -> str:
    """Return the same table as CSV with all digits: a column for each mean and each standard deviation."""
    records = [_record(row) for row in rows]
    records += [{"run": gap.label, "published": gap.published_top1, "note": gap.note} for gap in gaps]
    return csv_table(records[0], [[record.get(name) for name in records[0]] for record in records])


def _cells(row: Row) -> dict[str, str]:
    """Return the cells of the Markdown table by column."""
    cells = {name: _written(measure(row), 0 if name == "images/s" else 2) for name, measure in MEASURES.items()}
    speed = cells.pop("images/s")
    seeds = ", ".join(map(str, _seeds(row)))
    return {
        "run": plain(row.label),
        **cells,
        "published": GAP if row.published_top1 is None else f"{row.published_top1:.2f}",
        "difference": GAP if row.difference is None else f"{row.difference:+.2f}",
        "images/s": speed,
        "devices": plain(_devices(row)),
        "parameters": f"{row.first.results['parameters']:,}",
        "seeds": f"{seeds} (n = {len(row.runs)})" if len(row.runs) > 1 else seeds,
        "note": plain(row.note),
    }


def _cells_of_gap(gap: Gap) -> dict[str, str]:
    return {
        "run": gap.label,
        **dict.fromkeys([*MEASURES, "difference", "devices", "parameters", "seeds"], GAP),
        "published": GAP if gap.published_top1 is None else f"{gap.published_top1:.2f}",
        "note": gap.note,
    }


def _record(row: Row) -> dict[str, Any]:
    """Return the cells of the CSV table by column."""
    record: dict[str, Any] = {"run": row.label}
    for name, measure in MEASURES.items():
        value = measure(row)
        record[name] = None if value is None else value.mean
        record[f"{name} deviation"] = None if value is None else value.deviation
    return record | {
        "published": row.published_top1,
        "difference": row.difference,
        "devices": _devices(row),
        "parameters": row.first.results["parameters"],
        "n": len(row.runs),
        "seeds": " ".join(map(str, _seeds(row))),
        "note": row.note,
        "folders": " ".join(str(run.folder) for run in row.runs),
    }


def _seeds(row: Row) -> list[int]:
    return [run.results["seed"] for run in row.runs]


def _devices(row: Row) -> str:
    return ", ".join(dict.fromkeys(run.results["devices"] for run in row.runs))


def _written(value: Spread | None, digits: int) -> str:
    return GAP if value is None else value.text(digits)
