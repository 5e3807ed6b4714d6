"""The figure of a model card: how accuracy and loss terms went over the epochs of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plots import BLACK, BLUE, GREEN, TERM_COLOURS, TERM_STYLES, VERMILION

MARKED_ROWS = 30  # up to so many evaluations, each is marked by a dot


def save_curves(results: dict[str, Any], path: Path) -> None:
    """Writes the figure of `results` (those of results.json) as a PNG, 1600 px wide.

    Above: top-1 of the student and its agreement with the teacher, in percent, with the teacher's and the published
    top-1 as horizontal lines. Below, where the rows hold any: the weighted loss terms.

    Raises:
        ImportError: without matplotlib.
    """
    # Not pyplot, which looks for a display and keeps every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = results["epochs"]
    terms = _loss_terms(rows)
    figure = Figure(figsize=(8, 6.8 if terms else 3.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if terms else 1, sharex=True, squeeze=False)[:, 0]
    _draw_accuracy(panels[0], results)
    if terms:
        _draw_losses(panels[1], rows, terms)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)  # beside the curves, never over them
    panels[-1].set_xlabel("epoch")
    whole = rows[-1]["epoch"] - rows[0]["epoch"] >= 2
    panels[-1].xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=whole))
    figure.savefig(path)


def _loss_terms(rows: list[dict[str, Any]]) -> list[str]:
    """The names of the terms, in the order in which they are logged; their sum first, where there are several."""
    names = list(dict.fromkeys(name for row in rows for name in row if name.startswith("loss_")))
    summed = any("loss" in row for row in rows) and len(names) != 1
    return ["loss", *names] if summed else names


def _draw_accuracy(axes, results: dict[str, Any]) -> None:
    rows = results["epochs"]
    role = results["role"]
    _draw(axes, rows, "eval_top1", label=f"{role}, top-1", color=BLUE)
    _draw(axes, rows, "eval_agreement", label="agreement\nwith the teacher", color=VERMILION, linestyle="-.")
    teacher = [row["eval_teacher_top1"] for row in rows if "eval_teacher_top1" in row]
    if teacher:
        axes.axhline(teacher[-1], label=f"teacher, top-1\n({teacher[-1]:.2f})", color=BLACK, linestyle="--")
    published = results["published_top1"]
    if published is not None:
        axes.axhline(published, label=f"published top-1\n({published:.2f})", color=GREEN, linestyle=":", linewidth=2)
    axes.set_ylabel("evaluation images (%)")


def _draw_losses(axes, rows: list[dict[str, Any]], terms: list[str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for index, term in enumerate(terms):
        style = {"color": TERM_COLOURS[index % len(TERM_COLOURS)], "linestyle": TERM_STYLES[index % len(TERM_STYLES)]}
        _draw(axes, rows, term, label="sum" if term == "loss" else term.removeprefix("loss_"), **style)
    if all(row[term] > 0 for row in rows for term in terms if term in row):  # VID's may fall below 0
        axes.set_yscale("log")  # terms differ in size
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("training loss, weighted terms")


def _draw(axes, rows: list[dict[str, Any]], name: str, **style: Any) -> None:
    """A curve over the rows that have the value."""
    points = [(row["epoch"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) <= MARKED_ROWS else "", markersize=4, **style)
