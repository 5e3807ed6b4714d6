"""Training curves of a model card: accuracy and loss terms over the epochs of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plots import (
    BLACK,
    BLUE,
    GREEN,
    TERM_COLOURS,
    TERM_STYLES,
    VERMILION,
    mark_decades,
    mark_epochs,
    marker,
    new_sheet,
    tidy,
)
from ..runs.writing import writing


def save_curves(results: dict[str, Any], path: Path) -> None:
    """Write the training curves of a run as a PNG, 1600 px wide.

    The upper panel shows the student's top-1 and its agreement with the teacher, in percent, with the teacher's and
    the published top-1 as horizontal lines; of a run without either, the loss of the evaluation images. The lower
    panel shows the weighted loss terms, if any were logged.

    Args:
        results: content of results.json.
    """
    rows = results["epochs"]
    terms = _loss_terms(rows)
    figure = new_sheet(8, 6.8 if terms else 3.6)
    panels = figure.subplots(2 if terms else 1, sharex=True, squeeze=False)[:, 0]
    if any(name in row for row in rows for name in ("eval_top1", "eval_agreement")):
        _draw_accuracy(panels[0], results)
    else:
        _draw(panels[0], rows, "eval_loss", label="sum of the\nweighted terms", color=BLUE)
        panels[0].set_ylabel("loss of the evaluation images")
    if terms:
        _draw_losses(panels[1], rows, terms)
    for axes in panels:
        tidy(axes)
        axes.margins(x=0.02)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)  # beside the curves, never over them
    panels[-1].set_xlabel("epoch")
    whole = rows[-1]["epoch"] - rows[0]["epoch"] >= 2
    mark_epochs(panels[-1].xaxis, whole)
    with writing(path) as file:
        figure.savefig(file)


def _loss_terms(rows: list[dict[str, Any]]) -> list[str]:
    """Return the names of the terms in the order in which they were logged; of several terms, their sum comes first."""
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
    axes.set_ylabel("% of the evaluation images")


def _draw_losses(axes, rows: list[dict[str, Any]], terms: list[str]) -> None:
    for index, term in enumerate(terms):
        style = {"color": TERM_COLOURS[index % len(TERM_COLOURS)], "linestyle": TERM_STYLES[index % len(TERM_STYLES)]}
        _draw(axes, rows, term, label="sum" if term == "loss" else term.removeprefix("loss_"), **style)
    # The terms differ in magnitude, which a log scale shows. VID's term may be negative, which it cannot show.
    if all(row[term] > 0 for row in rows for term in terms if term in row):
        axes.set_yscale("log")
        mark_decades(axes.yaxis)
    axes.set_ylabel("training loss, weighted terms")


def _draw(axes, rows: list[dict[str, Any]], name: str, **style: Any) -> None:
    """Draw a curve over the rows that have the value."""
    points = [(row["epoch"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), marker=marker(len(points)), markersize=4, **style)
