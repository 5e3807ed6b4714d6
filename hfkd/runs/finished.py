"""Finished runs: the folders that `hfkd distill` and `hfkd train-teacher` write."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HfkdError, NotFoundError, nearest
from ..recipe.yaml_file import read_yaml
from .folder import RECIPE_NAME, RESULTS_NAME, ROLES, WEIGHTS_NAME
from .reading import printable, read_results

BY_TOP1 = {"metric": "top1", "greater_is_better": True}  # what the best epoch is best by, unless results say otherwise
# Facts that readers of runs rely on; others may be missing.
FACTS = ("role", "recipe", "seed", "planned_steps", "parameters", "dataset", "published_top1", "devices")


@dataclass(frozen=True)
class RecipeTeacher:
    """Teacher as a recipe names it, not loaded: one network, the members of an ensemble, or none.

    Attributes:
        names: a folder, Hub id or timm architecture for each network.
        checkpoints: for each network the file of its weights, or None.
        class_indices: for each of the student's classes, the teacher's class; None: matched by name.
        image: input of a network from a file, as arguments of `load_teacher`; only those that the recipe gives.
        prompts: templates of a zero-shot classifier.
    """

    names: tuple[str, ...] = ()
    checkpoints: tuple[str | None, ...] = ()
    class_indices: list[int] | None = None
    image: Mapping[str, Any] = field(default_factory=dict)
    prompts: list[str] | None = None

    @property
    def members(self) -> list[tuple[str, str | None]]:
        """Name and checkpoint of each network."""
        return list(zip(self.names, self.checkpoints, strict=True))

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of a recipe that name this teacher."""
        return {
            "teacher_name_or_path": list(self.names) or None,
            "teacher_checkpoint": list(self.checkpoints) if any(self.checkpoints) else None,
            "teacher_class_indices": self.class_indices,
            "teacher_prompts": self.prompts,
            **{f"teacher_{name}": value for name, value in self.image.items()},
        }


def teacher_of(recipe: Mapping[str, Any]) -> RecipeTeacher:
    """Return the teacher that a recipe names; a recipe with one teacher may give a string in place of a list."""
    names, checkpoints = (recipe.get(key) or () for key in ("teacher_name_or_path", "teacher_checkpoint"))
    names, checkpoints = ((each,) if isinstance(each, str) else tuple(each) for each in (names, checkpoints))
    image = {key: recipe.get(f"teacher_{key}") for key in ("image_size", "image_mean", "image_std")}
    given = {key: value for key, value in image.items() if value is not None}
    more = recipe.get("teacher_class_indices"), given, recipe.get("teacher_prompts")
    return RecipeTeacher(names, checkpoints or (None,) * len(names), *more)


@dataclass(frozen=True)
class FinishedRun:
    """Folder of a run, or an export alone.

    Attributes:
        results: content of `results.json`.
        recipe: the resolved recipe; empty for a run from code.
    """

    folder: Path
    results: dict[str, Any]
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the recipe, or else of the folder."""
        return self.results["recipe"] or self.folder.name

    @property
    def steps(self) -> int:
        """Step of the last evaluation; 0 before the first."""
        return self.results.get("last", {}).get("step", 0)

    @property
    def is_whole(self) -> bool:
        """True if the run was evaluated after its last step."""
        return 0 < self.results["planned_steps"] <= self.steps

    @property
    def diverged(self) -> str | None:
        """Where the run diverged, in words; None for a run that did not."""
        found = self.results.get("diverged")
        return f"diverged at step {found['step']}" if found else None

    @property
    def export(self) -> Path | None:
        """Folder of the trained model; None before it is written."""
        for folder in (self.folder, self.folder / self.results["role"]):
            if (folder / WEIGHTS_NAME).is_file():
                return folder
        return None

    @property
    def teacher(self) -> RecipeTeacher:
        """Teacher named by the recipe."""
        return teacher_of(self.recipe)


def best_words(best_by: Mapping[str, Any]) -> str:
    """Return what the best epoch is best by, in words: `the lowest loss`."""
    metric = {"top1": "top-1", "top5": "top-5"}.get(best_by["metric"], best_by["metric"])
    return f"the {'highest' if best_by['greater_is_better'] else 'lowest'} {metric}"


def read_run(folder: str | Path) -> FinishedRun:
    """Read a run's folder or an export.

    Raises:
        NotFoundError: if the folder holds no run, or one that was not evaluated yet.
        HfkdError: if its files are damaged, or were written by an earlier hfkd and lack some of `FACTS`.
    """
    folder = Path(folder)
    path = folder / RESULTS_NAME
    if not path.is_file():
        raise NotFoundError(
            f"{folder} holds no {RESULTS_NAME}: give the folder of a run, which has one after its first evaluation."
        )
    results = read_results(path, FACTS)
    path = folder / RECIPE_NAME
    recipe = printable(read_yaml(path)) if path.is_file() else {}
    if not isinstance(recipe, dict):
        raise HfkdError(f"{path} is {'empty' if recipe is None else 'damaged'}: expected the recipe of the run.")
    return FinishedRun(folder, results, recipe)


def find_runs(paths: Sequence[str | Path]) -> tuple[list[FinishedRun], list[str]]:
    """Find the evaluated runs at paths or below them, each once, in the order of the paths.

    An export in `student/` or `teacher/` stands for its run. A run's folder is not searched for other runs.

    Returns:
        The runs, and a sentence on each folder without a run that can be shown.

    Raises:
        NotFoundError: if a path does not exist, or there is no run at all; the message names runs nearby.
    """
    runs: dict[Path, FinishedRun] = {}
    left_out = []
    for path in map(Path, paths):
        if not path.exists():
            raise NotFoundError(f"There is no folder {path}.{runs_nearby(path)}")
        folders = _run_folders(path)
        if not folders:
            left_out.append(f"{path} holds no run.")
        for folder in folders:
            try:
                run = read_run(folder)
            except (FileNotFoundError, ValueError) as error:
                left_out.append(str(error))
                continue
            if not run.results.get("has_classifier", True):
                left_out.append(f"{folder} trained a backbone without a classifier, which has no top-1.")
            elif run.results.get("epochs"):
                runs[folder.resolve()] = run
            elif run.diverged:
                left_out.append(f"{folder} {run.diverged}, before its first evaluation.")
            else:
                left_out.append(f"{folder} was not evaluated yet.")
    if not runs:
        reasons = "\n  ".join(left_out)
        raise NotFoundError(f"There is no run to read:\n  {reasons}{runs_nearby(Path(paths[0]))}")
    return list(runs.values()), left_out


def _run_folders(path: Path) -> list[Path]:
    """Return the folders of runs, evaluated or not, at a path or below it."""
    if path.name in ROLES and (path.parent / RESULTS_NAME).is_file():
        return [path.parent]
    found = []
    for folder, below, files in os.walk(path):
        if RESULTS_NAME in files or RECIPE_NAME in files:
            found.append(Path(folder))
            below.clear()
        below.sort()
    return found


def runs_nearby(path: Path) -> str:
    """Return a sentence that names the runs beside a path, or else in `runs`; the most similar path comes first."""
    for place in (path.parent, Path("runs")):
        found = [str(folder) for folder in _run_folders(place) if (folder / RESULTS_NAME).is_file()]
        if found and place.exists():
            near = nearest(path, found, n=4, cutoff=0.0)
            return f"\nRuns nearby: {', '.join(near)}{', ...' if len(found) > 4 else ''}."
    return " Train one with `hfkd distill recipe.yaml`; its folder then holds a results.json."
