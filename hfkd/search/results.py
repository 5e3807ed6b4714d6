"""Results of a search: tables, and the recipe with the best values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..recipe.finding import RecipeSource
from ..recipe.keys import SCHEDULE_KEYS
from ..runs.tables import csv_table, markdown_table
from .space import TRIAL_SETTINGS, Parameter, settings, short

DATABASE_NAME = "study.db"  # trials of a search, in its folder
# Keys of the command line that the best recipe does not get: they make trials shorter than the run that they are for,
# or concern trials alone, or the search gives them other values. A given warm-up is kept.
TRIAL_ONLY_KEYS = {
    *(key for key in SCHEDULE_KEYS if key != "warmup_steps"),
    *TRIAL_SETTINGS,
    *("train_split", "teacher_cache", "published_top1", "output_dir", "losses"),
}


@dataclass(frozen=True)
class SearchedTrial:
    """Trial of a search and its measurement.

    Attributes:
        number: position in the order in which the trials were begun, from 1.
        values: searched values by the key of their parameter.
        top1: top-1 in percent after the last epoch.
        step: last step.
        pruned: the trial was stopped before the end.
        is_recipe: the values are the recipe's own.
        seconds: duration.
    """

    number: int
    values: dict[str, Any]
    top1: float
    step: int
    pruned: bool
    is_recipe: bool
    seconds: float

    @property
    def diverged(self) -> bool:
        """True if the trial has no top-1, because it diverged."""
        return math.isnan(self.top1)

    @property
    def measured(self) -> str:
        """Top-1 for a table."""
        return "diverged" if self.diverged else f"{self.top1:.2f}"


def best_of(trials: Sequence[SearchedTrial]) -> SearchedTrial:
    """Return the first trial with the highest top-1, among those that were trained to the end.

    Raises:
        RunError: if there is none, as where all have diverged.
    """
    whole = [trial for trial in trials if not (trial.pruned or trial.diverged)]
    if not whole:
        diverged = sum(trial.diverged for trial in trials)
        raise RunError(
            f"No trial was trained to the end: {diverged} of {len(trials)} diverged. Try a lower learning_rate, in "
            "another --search_dir."
        )
    return max(whole, key=lambda trial: trial.top1)


def recipe_of(trials: Sequence[SearchedTrial]) -> SearchedTrial:
    """Return the trial of the recipe's own values."""
    return next(trial for trial in trials if trial.is_recipe)


def standard_error(top1: float, images: int) -> float:
    """Return the standard error, in points, that the choice of the images gives an accuracy in percent."""
    return 100 * math.sqrt(top1 / 100 * (1 - top1 / 100) / images)


def summary_table(trials: Sequence[SearchedTrial], space: Sequence[Parameter], images: str, number: int) -> str:
    """Return the recipe's own values beside the best in a table, and the standard error of the numbers.

    Args:
        images: the images on which top-1 was measured, in words.
        number: the number of these images.
    """
    recipe, best = recipe_of(trials), best_of(trials)
    rows = [["the recipe's own", recipe], [f"the best (trial {best.number})", best]]
    columns = ["values", *(parameter.key for parameter in space), "top-1"]
    table = [[name, *_cells(trial, space), trial.measured] for name, trial in rows]
    stopped = sum(trial.pruned for trial in trials)
    error = standard_error(best.top1, number)
    lines = [
        markdown_table(columns, table, padded=True),
        f"{len(trials)} trials, {stopped} of them stopped early. Top-1 in percent of {images}; the standard error of "
        f"one such number is {error:.2f} points, and the best of many is a little lucky.",
    ]
    if best.is_recipe:
        lines.append("No trial was better than the recipe's own values.")
    return "\n".join(lines)


def trials_markdown(trials: Sequence[SearchedTrial], space: Sequence[Parameter]) -> str:
    """Return every trial as a Markdown table, the best first, the stopped ones last."""
    columns = ["trial", *(parameter.key for parameter in space), "top-1", "step", "seconds", "note"]
    ranked = sorted(trials, key=lambda trial: (trial.diverged, trial.pruned, 0 if trial.diverged else -trial.top1))
    rows = [
        [trial.number, *_cells(trial, space), trial.measured, trial.step, f"{trial.seconds:.0f}", _note(trial)]
        for trial in ranked
    ]
    return markdown_table(columns, rows, padded=True)


def trials_csv(trials: Sequence[SearchedTrial], space: Sequence[Parameter]) -> str:
    """Return every trial as CSV with all digits, in the order in which they were begun."""
    keys = [parameter.key for parameter in space]
    rows = []
    for trial in trials:
        values = [trial.values[key] for key in keys]
        measured = [
            "" if trial.diverged else trial.top1,
            trial.step,
            round(trial.seconds, 1),
            trial.pruned,
            trial.is_recipe,
        ]
        rows.append([trial.number, *values, *measured])
    return csv_table(["trial", *keys, "top1", "step", "seconds", "stopped_early", "recipes_own"], rows)


def _cells(trial: SearchedTrial, space: Sequence[Parameter]) -> list[str]:
    return [short(trial.values[parameter.key]) for parameter in space]


def _note(trial: SearchedTrial) -> str:
    notes = {"the recipe's own": trial.is_recipe, "stopped early": trial.pruned and not trial.diverged}
    return ", ".join(note for note, holds in notes.items() if holds)


def best_recipe(
    source: RecipeSource, folder: Path, given: Mapping[str, Any], losses: Mapping[str, Any], best: SearchedTrial
) -> dict[str, Any]:
    """Return the searched recipe with the best values, for a file in the folder.

    The new recipe extends the searched one.

    Args:
        source: the searched recipe.
        folder: folder of the new recipe.
        given: keys of the command line; keys that make trials shorter are left out.
        losses: losses of recipe and command line before the search.
        best: trial with the best values.
    """
    recipe: dict[str, Any] = {"extends": source.reference(folder)}
    recipe |= {key: value for key, value in given.items() if key not in TRIAL_ONLY_KEYS}
    recipe |= settings(best.values, losses)
    # The published top-1 was measured with other values. The run goes into the folder of the search.
    return recipe | {"search": None, "published_top1": None, "output_dir": str(folder / "best")}
