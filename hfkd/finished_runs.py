"""Runs as they lie on disk: what distill.py and train_teacher.py leave."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .results import RESULTS_NAME
from .saving import RECIPE_NAME


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
    """
    folder = Path(folder)
    path = folder / RESULTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RESULTS_NAME}: give the folder of a run, which has one after its first evaluation."
        )
    recipe = folder / RECIPE_NAME
    return FinishedRun(folder, json.loads(path.read_text()), _read_recipe(recipe) if recipe.is_file() else {})


def _read_recipe(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())
