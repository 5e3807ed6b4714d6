"""What a search found: tables, and the recipe with the best values."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..recipe.keys import SCHEDULE_KEYS
from .space import TRIAL_SETTINGS, Parameter, settings, short

# Keys of the command line that the best recipe does not get: they make trials shorter than the run that they are for,
# or concern trials alone, or the search gives them other values. A given warm-up is kept.
OF_THE_TRIALS = {
    *(key for key in SCHEDULE_KEYS if key != "warmup_steps"),
    *TRIAL_SETTINGS,
    *("train_split", "teacher_cache", "published_top1", "output_dir", "losses"),
}


@dataclass(frozen=True)
class SearchedTrial:
    """What was measured of one choice.

    Attributes:
        values: by the key of the parameter.
        top1: in percent, after its last epoch.
        step: its last.
        pruned: was it stopped before the end?
        is_recipe: are these the recipe's own values?
        seconds: what it took.
    """

    number: int
    values: dict[str, Any]
    top1: float
    step: int
    pruned: bool
    is_recipe: bool
    seconds: float


def best_of(trials: Sequence[SearchedTrial]) -> SearchedTrial:
    """Of those that were trained to the end the one of the highest top-1, of several the first."""
    return max((trial for trial in trials if not trial.pruned), key=lambda trial: trial.top1)


def recipe_of(trials: Sequence[SearchedTrial]) -> SearchedTrial:
    """The one of the recipe's own values."""
    return next(trial for trial in trials if trial.is_recipe)


def standard_error(top1: float, images: int) -> float:
    """Of an accuracy in percent, by the choice of the images alone, in points."""
    return 100 * math.sqrt(top1 / 100 * (1 - top1 / 100) / images)


def answer(trials: Sequence[SearchedTrial], space: Sequence[Parameter], images: str, number: int) -> str:
    """The recipe's own values beside the best, as a table, and how far they can be told apart.

    Args:
        images: what top-1 was measured on, in words; `number` says how many.
    """
    recipe, best = recipe_of(trials), best_of(trials)
    rows = [["the recipe's own", recipe], [f"the best (trial {best.number})", best]]
    columns = ["values", *(parameter.key for parameter in space), "top-1"]
    table = [[name, *_cells(trial, space), f"{trial.top1:.2f}"] for name, trial in rows]
    stopped = sum(trial.pruned for trial in trials)
    error = standard_error(best.top1, number)
    lines = [
        markdown(columns, table),
        f"{len(trials)} trials, {stopped} of them stopped early. Top-1 in percent of {images}; the standard error of "
        f"one such number is {error:.2f} points, and the best of many is a little lucky.",
    ]
    if best.is_recipe:
        lines.append("No trial was better than the recipe's own values.")
    return "\n".join(lines)


def trials_markdown(trials: Sequence[SearchedTrial], space: Sequence[Parameter]) -> str:
    """Every trial, the best first, those that were stopped last."""
    columns = ["trial", *(parameter.key for parameter in space), "top-1", "step", "seconds", "note"]
    ranked = sorted(trials, key=lambda trial: (trial.pruned, -trial.top1))
    return markdown(
        columns,
        [
            [trial.number, *_cells(trial, space), f"{trial.top1:.2f}", trial.step, f"{trial.seconds:.0f}", _note(trial)]
            for trial in ranked
        ],
    )


def trials_csv(trials: Sequence[SearchedTrial], space: Sequence[Parameter]) -> str:
    """Every trial in the order in which they were begun, all digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    keys = [parameter.key for parameter in space]
    writer.writerow(["trial", *keys, "top1", "step", "seconds", "stopped_early", "recipes_own"])
    for trial in trials:
        values = [trial.values[key] for key in keys]
        measured = [trial.top1, trial.step, round(trial.seconds, 1), trial.pruned, trial.is_recipe]
        writer.writerow([trial.number, *values, *measured])
    return file.getvalue()


def _cells(trial: SearchedTrial, space: Sequence[Parameter]) -> list[str]:
    return [short(trial.values[parameter.key]) for parameter in space]


def _note(trial: SearchedTrial) -> str:
    notes = {"the recipe's own": trial.is_recipe, "stopped early": trial.pruned}
    return ", ".join(note for note, holds in notes.items() if holds)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table, padded to be read as it is."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in cells
    )


def best_recipe(
    path: Path, folder: Path, given: Mapping[str, Any], losses: Mapping[str, Any], best: SearchedTrial
) -> dict[str, Any]:
    """The searched recipe with the best values, for a file in the folder.

    It extends the searched recipe, or, where that extends one itself, its parent, beside the recipe's own lines: only
    one level is allowed.

    Args:
        path: the searched recipe.
        given: what the command line set, of which it keeps what does not make trials shorter.
        losses: those that were searched, from recipe and command line.
    """
    own = yaml.safe_load(path.read_text())
    parent = own.pop("extends", None)
    if parent is None:
        parent, own = path.name, {}
    recipe = {"extends": os.path.relpath(path.resolve().parent / parent, folder.resolve())} | own
    recipe.pop("search", None)
    recipe |= {key: value for key, value in given.items() if key not in OF_THE_TRIALS}
    recipe |= settings(best.values, losses)
    # Nobody published these values; and where the search's files lie, its run may lie as well.
    return recipe | {"published_top1": None, "output_dir": str(folder / "best")}
