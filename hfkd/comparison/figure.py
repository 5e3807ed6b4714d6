"""Figure of a comparison: top-1 over the epochs, with the published curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plots import TERM_COLOURS, mark_epochs, marker, new_sheet, tidy
from ..runs.writing import writing
from .rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ("-", "--", "-.")  # published curves are dotted
LONG_RUN = 20  # epochs


def save_comparison(rows: Sequence[Row], path: Path) -> None:
    """Write `comparison_figure` as a PNG."""
    figure = comparison_figure(rows)
    with writing(path) as file:
        figure.savefig(file)


def comparison_figure(rows: Sequence[Row]) -> Figure:
    """Draw the top-1 of every row over the epochs, in percent.

    Several seeds are thin lines with their mean. A dotted line of the same colour is the recipe's published curve, as
    far as the runs go. A second panel enlarges the last quarter of long runs, where the differences are small.
    """
    last_epoch = max(run.results["epochs"][-1]["epoch"] for row in rows for run in row.runs)
    long = last_epoch >= LONG_RUN
    entries = sum(1 + bool(row.published and row.published.test_top1) for row in rows)
    figure = new_sheet(10, max(8.0 if long else 4.2, 0.45 * entries))
    panels = figure.subplots(2 if long else 1, squeeze=False)[:, 0]
    for axes in panels:
        _draw_rows(axes, rows, last_epoch)
        tidy(axes)
        axes.margins(x=0.02)
        axes.set_ylabel("top-1 (% of the evaluation images)")
        mark_epochs(axes.xaxis, whole=last_epoch >= 3)
    if long:
        _enlarge(panels[1], 0.75 * last_epoch, last_epoch)
    panels[-1].set_xlabel("epoch")
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return figure


def _enlarge(axes: Axes, first: float, last: float) -> None:
    """Limit a panel to the epochs after `first`, up to `last`."""
    shown = [y for line in axes.lines for x, y in zip(*line.get_data(), strict=True) if first < x <= last]
    margin = 0.05 * (max(shown) - min(shown)) or 0.5
    axes.set_xlim(first, last)
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_title("the last quarter, enlarged", loc="left", fontsize="medium")


def _draw_rows(axes: Axes, rows: Sequence[Row], last_epoch: float) -> None:
    published = set()
    for index, row in enumerate(rows):
        colour, style = TERM_COLOURS[index % len(TERM_COLOURS)], STYLES[index % len(STYLES)]
        _draw_row(axes, row, colour, style)
        if row.published is not None and row.published.test_top1 and row.first.name not in published:
            published.add(row.first.name)
            _draw_published(axes, row, colour, last_epoch)


def _draw_row(axes: Axes, row: Row, colour: str, style: str) -> None:
    curves = [
        {entry["epoch"]: entry["eval_top1"] for entry in run.results["epochs"] if "eval_top1" in entry}
        for run in row.runs
    ]
    if not any(curves):  # evaluated without labels; the table tells the rest
        return
    label = _broken(row.label)
    if len(curves) > 1:
        for curve in curves:
            axes.plot(list(curve), list(curve.values()), color=colour, linewidth=0.5, alpha=0.5)
        shared = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)]
        curves = [{epoch: statistics.fmean(curve[epoch] for curve in curves) for epoch in shared}]
        label += f"\nmean of {len(row.runs)} seeds"
    look = _look(len(curves[0])) | {"color": colour, "linestyle": style, "label": label}
    axes.plot(list(curves[0]), list(curves[0].values()), **look)


def _draw_published(axes: Axes, row: Row, colour: str, last_epoch: float) -> None:
    top1 = row.published.test_top1
    shown = top1[: max(1, int(last_epoch))]
    part = f"the first {len(shown)} of {len(top1)}" if len(shown) < len(top1) else f"{len(top1)}"
    label = f"{_broken(row.first.name)}\npublished, {part} epochs"
    look = _look(len(shown)) | {"color": colour, "linestyle": ":", "label": label}
    axes.plot(range(1, len(shown) + 1), shown, **look, zorder=1.5)  # behind the measured curves


def _look(points: int) -> dict[str, Any]:
    """Return the style of a curve: a thinner line where its points are too many to be marked."""
    return {"marker": marker(points), "markersize": 3, "linewidth": 1.5 if marker(points) else 1.0}


def _broken(label: str, width: int = 48) -> str:
    """Break a long label into lines at its spaces."""
    lines = [""]
    for word in label.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return "\n".join(lines)
