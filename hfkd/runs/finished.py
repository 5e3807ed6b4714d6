"""Runs as they lie on disk: what distill.py and train_teacher.py leave."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import HfkdError, NotFoundError, nearest
from .folder import RECIPE_NAME, RESULTS_NAME

ROLES = ("student", "teacher")
FACTS = ("role", "recipe", "seed", "planned_steps")  # what readers of runs rely on; others may be missing


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, or an export alone.

    Attributes:
        results: what `results.json` holds.
        recipe: the resolved recipe; empty for a run from code.
    """

    folder: Path
    results: dict[str, Any]
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        """The recipe's, else the folder's."""
        return self.results["recipe"] or self.folder.name

    @property
    def steps(self) -> int:
        """Those of the last evaluation; 0 before the first."""
        return self.results.get("last", {}).get("step", 0)

    @property
    def is_whole(self) -> bool:
        """Was it evaluated after its last step?"""
        return 0 < self.results["planned_steps"] <= self.steps

    @property
    def export(self) -> Path | None:
        """The folder of the trained model; None where there is none yet."""
        for folder in (self.folder, self.folder / self.results["role"]):
            if (folder / "model.safetensors").is_file():
                return folder
        return None


def read_run(folder: str | Path) -> FinishedRun:
    """Reads a run's folder or an export.

    Raises:
        FileNotFoundError: if the folder holds no run, or one that was not evaluated yet.
        ValueError: if its files are damaged, or those of an earlier hfkd, which say less.
    """
    folder = Path(folder)
    path = folder / RESULTS_NAME
    if not path.is_file():
        raise NotFoundError(
            f"{folder} holds no {RESULTS_NAME}: give the folder of a run, which has one after its first evaluation."
        )
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise HfkdError(f"{path} is damaged: {error}") from error
    missing = [name for name in FACTS if name not in results]
    if missing:
        raise HfkdError(f"{path} is that of another program or an earlier hfkd: it lacks {', '.join(missing)}.")
    recipe = folder / RECIPE_NAME
    return FinishedRun(folder, results, _read_recipe(recipe) if recipe.is_file() else {})


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise HfkdError(f"{path} is damaged: {error}") from error


def find_runs(paths: Sequence[str | Path]) -> tuple[list[FinishedRun], list[str]]:
    """The evaluated runs that paths name or that lie below them, each once, in this order.

    A run's `student/` or `teacher/` stands for the run. Below a run's folder no others are looked for.

    Returns:
        The runs, and a sentence on each folder that holds none that can be shown.

    Raises:
        FileNotFoundError: if a path does not exist, or there is no run at all; it names runs that there are.
    """
    runs: dict[Path, FinishedRun] = {}
    left_out = []
    for path in map(Path, paths):
        if not path.exists():
            raise NotFoundError(f"There is no folder {path}.{_runs_nearby(path)}")
        folders = _run_folders(path)
        if not folders:
            left_out.append(f"{path} holds no run.")
        for folder in folders:
            try:
                run = read_run(folder)
            except (FileNotFoundError, ValueError) as error:
                left_out.append(str(error))
                continue
            if run.results.get("epochs"):
                runs[folder.resolve()] = run
            else:
                left_out.append(f"{folder} was not evaluated yet.")
    if not runs:
        reasons = "\n  ".join(left_out)
        raise NotFoundError(f"There is no run to read:\n  {reasons}{_runs_nearby(Path(paths[0]))}")
    return list(runs.values()), left_out


def _run_folders(path: Path) -> list[Path]:
    """The folders of runs, evaluated or not, at a path or below it."""
    if path.name in ROLES and (path.parent / RESULTS_NAME).is_file():
        return [path.parent]
    found = []
    for folder, below, files in os.walk(path):
        if RESULTS_NAME in files or RECIPE_NAME in files:
            found.append(Path(folder))
            below.clear()
        below.sort()
    return found


def _runs_nearby(path: Path) -> str:
    """A sentence that names runs beside a path or, where there are none, in `runs`; the most alike first."""
    for place in (path.parent, Path("runs")):
        found = [str(folder) for folder in _run_folders(place) if (folder / RESULTS_NAME).is_file()]
        if found and place.exists():
            near = nearest(path, found, n=4, cutoff=0.0)
            return f"\nRuns that there are: {', '.join(near)}{', ...' if len(found) > 4 else ''}."
    return " Train one with `hfkd distill recipe.yaml`; its folder then holds a results.json."
