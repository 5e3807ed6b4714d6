"""ONNX files in a model card: what `hfkd export` measured of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runs.onnx_files import measured, onnx_files
from ..runs.tables import markdown_table, without_empty_columns
from .card_text import code, images_in_words

HEADING = "## Files for ONNX Runtime"
COLUMNS = {  # key of a measurement: heading of its column, form of its cells
    "top1": ("top-1", "{:.2f}"),
    "agreement": ("same class as float32", "{:.2f}"),
    "bytes": ("bytes", "{:,}"),
    "ms_1_thread": ("ms, 1 thread", "{:.2f}"),
    "ms_all_threads": ("ms, all threads", "{:.2f}"),
}


def files_section(folder: Path, results: dict[str, Any]) -> str | None:
    """Return the table of the ONNX files beside an export; None if there are none of its weights."""
    files, _ = onnx_files(folder)
    if not files:
        return None
    places = {file.precision: code(f"{file.path.parent.name}/{file.path.name}") for file in files}
    rows = [
        [places.get(precision, ""), precision, *(_cell(figures.get(key), form) for key, (_, form) in COLUMNS.items())]
        for precision, figures in measured(files).items()
    ]
    table = markdown_table(
        *without_empty_columns(["file", "precision", *(heading for heading, _ in COLUMNS.values())], rows)
    )
    note = (
        f"These weights in ONNX, measured in ONNX Runtime; accuracy in percent of {images_in_words(results)}, latency "
        "of one image (median) on the CPU of the export. `preprocessing.json` beside a file says how to prepare images."
    )
    return f"{HEADING}\n\n{note}\n\n{table}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
