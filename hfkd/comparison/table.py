"""The table of a comparison: as text, which is markdown, and as csv."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..runs.tables import csv_table, markdown_table, without_empty_columns
from .rows import Row, Spread

GAP = "-"  # what is not known
MEASURES = {  # the heading of a column: how to read its values
    "best top-1": lambda row: row.value("best", "top1"),
    "best top-5": lambda row: row.value("best", "top5"),
    "last top-1": lambda row: row.value("last", "top1"),
    "last top-5": lambda row: row.value("last", "top5"),
    "agreement": lambda row: row.value("best", "agreement"),
    "teacher top-1": lambda row: row.teacher_top1,
    "images/s": lambda row: row.images_per_second,
}
LEGEND = (
    "Percent of the evaluation images. Best: the epoch of the highest top-1, which papers report, with its top-5 and\n"
    "agreement with the teacher. Of several seeds: mean ± standard deviation (n - 1 in the denominator). Difference:\n"
    "best top-1 less the published, where a run is what was published. images/s: of training, on the run's devices."
)


@dataclass(frozen=True)
class Gap:
    """A row of which nothing is measured yet; `note` says why."""

    label: str
    published_top1: float | None
    note: str


def text_table(rows: Sequence[Row], gaps: Sequence[Gap] = ()) -> str:
    """The rows, and the gaps behind them, as a markdown table, padded to be read as it is; without columns in which
    nothing is known."""
    records = [_cells(row) for row in rows] + [_cells_of_gap(gap) for gap in gaps]
    header = list(records[0])
    rows = [[record[name] for name in header] for record in records]
    right = set(header) - {"run", "seeds", "devices", "note"}
    return markdown_table(*without_empty_columns(header, rows, empty=("", GAP)), padded=True, right=right)


def csv_text(rows: Sequence[Row], gaps: Sequence[Gap] = ()) -> str:
    """The same with all digits: a column for each mean and each standard deviation, empty where it is not known."""
    records = [_record(row) for row in rows]
    records += [{"run": gap.label, "published": gap.published_top1, "note": gap.note} for gap in gaps]
    return csv_table(records[0], [[record.get(name) for name in records[0]] for record in records])


def _cells(row: Row) -> dict[str, str]:
    """What stands in the text table."""
    cells = {name: _written(measure(row), 0 if name == "images/s" else 2) for name, measure in MEASURES.items()}
    speed = cells.pop("images/s")
    seeds = ", ".join(map(str, _seeds(row)))
    return {
        "run": row.label,
        **cells,
        "published": GAP if row.published_top1 is None else f"{row.published_top1:.2f}",
        "difference": GAP if row.difference is None else f"{row.difference:+.2f}",
        "images/s": speed,
        "devices": _devices(row),
        "parameters": f"{row.first.results['parameters']:,}",
        "seeds": f"{seeds} (n = {len(row.runs)})" if len(row.runs) > 1 else seeds,
        "note": row.note,
    }


def _cells_of_gap(gap: Gap) -> dict[str, str]:
    return {
        "run": gap.label,
        **dict.fromkeys([*MEASURES, "difference", "devices", "parameters", "seeds"], GAP),
        "published": GAP if gap.published_top1 is None else f"{gap.published_top1:.2f}",
        "note": gap.note,
    }


def _record(row: Row) -> dict[str, Any]:
    """What stands in the csv."""
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
