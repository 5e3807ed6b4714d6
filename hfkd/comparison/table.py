"""The table of a comparison: as text, which is markdown, and as csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    names = [name for name in records[0] if name == "run" or any(record[name] not in ("", GAP) for record in records)]
    widths = {name: max(len(name), *(len(record[name]) for record in records)) for name in names}
    left = ("run", "seeds", "devices", "note")
    rule = {name: "-" * width if name in left else "-" * (width - 1) + ":" for name, width in widths.items()}
    lines = []
    for record in ({name: name for name in names}, rule, *records):
        cells = (f"{record[name]:{'<' if name in left else '>'}{widths[name]}}" for name in names)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def csv_table(rows: Sequence[Row], gaps: Sequence[Gap] = ()) -> str:
    """The same with all digits: a column for each mean and each standard deviation, empty where it is not known."""
    file = io.StringIO()
    records = [_record(row) for row in rows]
    records += [{"run": gap.label, "published": gap.published_top1, "note": gap.note} for gap in gaps]
    writer = csv.DictWriter(file, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def _cells(row: Row) -> dict[str, str]:
    """What stands in the text table."""
    cells = {name: _written(measure(row), 0 if name == "images/s" else 2) for name, measure in MEASURES.items()}
    speed = cells.pop("images/s")
    seeds = ", ".join(map(str, _seeds(row)))
    return {
        "run": row.label.replace("|", "\\|"),
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
