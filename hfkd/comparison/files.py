"""ONNX files of the compared runs and their teachers: accuracy as measured at the export, latency measured here."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..export.formats import FORMATS, read_onnx, write_model
from ..names import architecture_of
from ..networks.costs import latencies
from ..networks.input_spec import input_spec
from ..runs.finished import FinishedRun
from ..runs.onnx_files import PRECISIONS, export_command, measured, onnx_files
from ..runs.tables import markdown_table, plain
from .rows import Row
from .savings import ROUNDS, UNREADABLE, teacher_networks

LEGEND = (
    "Top-1 and agreement: percent of the evaluation images in ONNX Runtime, measured by hfkd export; for a float32 "
    "file without a lower precision beside it, and for a teacher, the top-1 of the run. Latency: one image on this "
    "CPU, the fastest of {} rounds, in which all files take turns."
)


@dataclass(frozen=True)
class _Line:
    """Line of the table: ONNX files of one network, or of all networks of an ensemble."""

    label: str
    precision: str
    image_sizes: dict[Path, int]
    figures: dict[str, Any]


def files_text(rows: Sequence[Row], teacher: str | None = None, rounds: int = ROUNDS) -> str:
    """Return a table of the ONNX files of runs and teachers, its explanation, and how to make those that are missing.

    Args:
        teacher: folder, Hub id or architecture, for rows whose own teacher is not where the recipe says.
    """
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        lines = [line for row in rows for run in row.runs for line in _lines_of(run, _label(row, run), missing)]
        lines += _lines_of_teachers(rows, teacher, Path(scratch), missing) if lines else []
        parts = [_table(lines, rounds), textwrap.fill(LEGEND.format(rounds), 116)] if lines else []
    parts += ["Not measured:\n" + "\n".join(f"- {plain(reason)}" for reason in missing)] if missing else []
    return "\n\n".join(parts)


def _label(row: Row, run: FinishedRun) -> str:
    return row.label if len(row.runs) == 1 else f"{row.label}, seed {run.results['seed']}"


def _lines_of(run: FinishedRun, label: str, missing: list[str]) -> Iterator[_Line]:
    """Give a line for each ONNX file of a run; what is missing is added to a list."""
    if run.export is None:
        missing.append(f"{label}: {run.folder} holds no trained model.")
        return
    files, reasons = onnx_files(run.export)
    figures = measured(files)
    for file in files:
        yield _Line(label, file.precision, {file.path: file.facts["image_size"]}, figures[file.precision])
    # `hfkd export` writes no other ONNX file of a student that was trained for int8.
    possible = ("int8",) if run.results.get("quantize") == "int8" else PRECISIONS
    for precision in sorted({*possible} - {file.precision for file in files}, key=PRECISIONS.index):
        reason = reasons.get(precision, "there is no file")
        missing.append(f"{label}, {precision}: {reason}. Export it: {export_command(run.export, precision)}")


def _lines_of_teachers(rows: Sequence[Row], given: str | None, folder: Path, missing: list[str]) -> list[_Line]:
    """Write each teacher as float32 files into a folder, and return a line for each."""
    lines: dict[tuple[str, float], _Line] = {}  # teachers of one architecture may differ in their top-1
    for row in rows:
        if row.teacher_top1 is None:
            continue
        try:
            networks = teacher_networks(row, given)
            label = f"teacher {' + '.join(map(architecture_of, networks))}"
            if (label, row.teacher_top1.mean) in lines:
                continue
            sizes = {}
            for index, network in enumerate(networks):
                path = folder / f"{len(lines)}_{index}.onnx"
                sizes[path] = input_spec(network).image_size
                write_model(network.eval(), sizes[path], FORMATS["onnx"], path, "")
        except UNREADABLE as error:
            missing.append(f"teacher of {row.label}: {error}")
            continue
        figures = {"top1": row.teacher_top1.mean, "bytes": sum(path.stat().st_size for path in sizes)}
        lines[label, row.teacher_top1.mean] = _Line(label, "float32", sizes, figures)
    return list(lines.values())


def _table(lines: Sequence[_Line], rounds: int) -> str:
    sizes = {str(path): size for line in lines for path, size in line.image_sizes.items()}
    times = {}
    for threads in sorted({1, torch.get_num_threads()}):
        models = {name: read_onnx(Path(name), threads) for name in sizes}
        times[f"ms, {threads} thread{'s' * (threads > 1)}"] = latencies(models, sizes, rounds=rounds)
    header = ["run", "precision", "top-1", "same class as float32", "bytes", *times]
    cells = [
        [
            plain(line.label),
            line.precision,
            *("-" if line.figures.get(key) is None else f"{line.figures[key]:.2f}" for key in ("top1", "agreement")),
            f"{line.figures['bytes']:,}",
            *(f"{sum(each[str(path)] for path in line.image_sizes):.2f}" for each in times.values()),
        ]
        for line in lines
    ]
    return markdown_table(header, cells, padded=True, right={*header} - {"run", "precision"})
