"""Cells of the published tables: recipe, seed, length and folder of each training."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..errors import HfkdError, NotFoundError, did_you_mean
from ..losses import LOSSES
from ..recipe.arguments import DataArguments, DistillationConfig, ModelArguments
from ..recipe.differences import recipe_differences
from ..recipe.reading import load_recipe, parse_recipe, recipe_name
from .checkpoints import last_checkpoint
from .claims import is_claimed
from .finished import FinishedRun, read_run, teacher_of
from .folder import RECIPE_NAME, RESULTS_NAME, WEIGHTS_NAME
from .published import published_runs

logger = logging.get_logger(__name__)

CHECKOUT = Path(__file__).parents[2]
RUNS = Path("runs")  # where recipes expect their teachers
DEFAULTS = {field: DistillationConfig.__dataclass_fields__[field].default for field in ("num_train_epochs", "seed")}


@dataclass(frozen=True)
class Cell:
    """Training of a recipe with one seed, or of the teacher that it needs.

    Attributes:
        name: name of the recipe.
        role: "student" or "teacher".
        settings: result of `parse_recipe`.
    """

    name: str
    role: str
    settings: tuple[ModelArguments, DataArguments, DistillationConfig, dict[str, Any]]

    @property
    def config(self) -> DistillationConfig:
        """Configuration of the training."""
        return self.settings[2]

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.config.output_dir)

    @property
    def title(self) -> str:
        """Recipe and seed, for a person."""
        return f"{self.name}, seed {self.config.seed}"

    @property
    def published_top1(self) -> float | None:
        """Top-1 of the paper, at the published schedule."""
        published = published_runs().get(self.name)
        return None if published is None else published.top1

    def run(self) -> FinishedRun | None:
        """Read the run as far as it went; None before the first evaluation, and where its results are damaged."""
        if not (self.folder / RESULTS_NAME).is_file():
            return None
        try:
            run = read_run(self.folder)
        except HfkdError as error:
            logger.warning_once(f"{error} Its checkpoints are used.")
            return None
        return run if run.results["epochs"] else None

    def is_done(self) -> bool:
        """Return True if the training ended and the model was written.

        A teacher's model is enough: it may have been copied without its run.
        """
        run = self.run()
        if run is None:
            return self.role == "teacher" and (self.folder / self.role / WEIGHTS_NAME).is_file()
        return run.is_whole and run.export is not None

    def state(self) -> str:
        """Return how far the training is, for a person."""
        if self.is_done():
            return "done"
        checkpoint = last_checkpoint(self.folder)
        if checkpoint is None:
            begun = (self.folder / RECIPE_NAME).is_file()
            return "ended before its first checkpoint" if begun else "not begun"
        state = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())
        word = "under way," if is_claimed(self.folder) else "stopped"
        return f"{word} at step {state['global_step']:,} of {state['max_steps']:,}"

    def check_folder(self) -> None:
        """Check that the folder holds no run with other settings, unless `allow_recipe_change` is set.

        Raises:
            HfkdError: if it does; the message names the settings.
        """
        try:
            different = recipe_differences(self.folder / RECIPE_NAME, self.settings[3])
        except HfkdError:
            return  # damaged: training says so
        if different and not self.config.allow_recipe_change:
            way_out = "Give another --output_dir, or remove the folder"
            if self.role == "teacher":
                way_out += f", or take the teacher as it is: --teacher_name_or_path {self.folder / self.role}"
            lines = "\n  ".join(different)
            raise HfkdError(f"{self.folder} holds a run with other settings:\n  {lines}\n{way_out}.")


def recipe_folder(pair: str) -> Path:
    """Find the recipes of a pair: below `recipes` in the current folder, else in the checkout that hfkd runs from.

    Args:
        pair: `resnet32x4-resnet8x4`, `imagenet/resnet34-resnet18` or the folder's path.

    Raises:
        NotFoundError: if there are no recipes.
        HfkdError: if the pair is unknown; the message names the nearest.
    """
    folders = {}
    for place in (CHECKOUT / "recipes", Path("recipes")):
        folders |= {f"{path.parent.name}/{path.name}": path for path in sorted(place.glob("*/*-*")) if path.is_dir()}
    if not folders:
        raise NotFoundError(
            "There is no folder `recipes` here. The recipes of the published tables are in hfkd's repository, and pip "
            "does not install them: start in a checkout of it, or copy its folder `recipes` to here."
        )
    name = pair.strip("/").removeprefix("recipes/")
    for full_name, folder in folders.items():
        if name in (full_name, folder.name):
            return folder
    names = folders if "/" in name else [folder.name for folder in folders.values()]
    raise HfkdError(f"There are no recipes of the pair '{pair}'.{did_you_mean(name, names)}")


def recipes_of(folder: Path, methods: Sequence[str]) -> list[Path]:
    """Return a pair's recipes of some methods; without methods, all recipes with a published top-1.

    Raises:
        HfkdError: for a method without a recipe; the message names the nearest.
    """
    recipes = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if not methods:
        return [path for path in recipes.values() if recipe_name(path) in published_runs()]
    for method in methods:
        if method not in recipes:
            raise HfkdError(f"There is no recipe '{method}' of {folder.name}.{did_you_mean(method, recipes)}")
    return [recipes[method] for method in dict.fromkeys(methods)]


def planned_cells(
    recipes: Sequence[Path], seeds: int, scale: float, root: Path, overrides: Sequence[str]
) -> list[Cell]:
    """Return the trainings in order: the teachers, then all recipes with their own seed, then with the next, ...

    Args:
        scale: share of the recipes' epochs.
        root: folder in place of `runs`.
        overrides: `--key value ...` for all trainings.

    Raises:
        HfkdError: for less than one epoch, or an override that no recipe takes.
    """
    keys = {token.lstrip("-").partition("=")[0].replace("-", "_") for token in overrides if token.startswith("--")}
    given = not keys.isdisjoint({"teacher_name_or_path", "teacher_cache"})
    teachers, students = {}, []
    for number in range(seeds):
        for path in recipes:
            recipe, argv = load_recipe(path), []
            teacher = None if given else _own_teacher(recipe)
            if teacher is not None:
                teacher_path = path.parents[2] / teacher.with_suffix(".yaml")
                teachers[teacher] = _cell("teacher", teacher_path, scale, root, overrides)
                argv = ["--teacher_name_or_path", str(root / teacher / "teacher")]
            students.append(_cell("student", path, scale, root, [*argv, *overrides], number))
    return [*teachers.values(), *students]


def _own_teacher(recipe: Mapping[str, Any]) -> Path | None:
    """Return the recipe of a recipe's teacher, as a path below `recipes` without its ending, or None.

    Only a teacher that another recipe trains has one.
    """
    names = teacher_of(recipe).names
    path = Path(names[0]) if len(names) == 1 else Path()
    return path.parent.relative_to(RUNS) if path.parts[:1] == RUNS.parts and path.name == "teacher" else None


def _cell(role: str, path: Path, scale: float, root: Path, overrides: Sequence[str], number: int = 0) -> Cell:
    """Return a recipe with its own seed, or with the `number`-th after it."""
    recipe, name = load_recipe(path), recipe_name(path)
    seed = recipe.get("seed", DEFAULTS["seed"]) + number
    folder = root / (f"{name}-seed{seed}" if number else name)
    argv = [*shortened(recipe, scale, name), "--output_dir", str(folder)]
    if number:  # the first run has the recipe's seed, as with `hfkd distill`
        argv += ["--seed", str(seed)]
    if (folder / RECIPE_NAME).is_file():
        argv += ["--resume_from_checkpoint", "true"]
    return Cell(name, role, parse_recipe([str(path), *argv, *overrides]))


def shortened(recipe: Mapping[str, Any], scale: float, name: str) -> list[str]:
    """Return the command-line tokens that shorten a recipe's schedule: its epochs, and all keys counted in epochs.

    Epochs are rounded to whole ones, and the other keys keep their ratio to them. A `warmup_steps` below 1 is a share
    of all steps and needs no change.

    Raises:
        HfkdError: if less than one epoch is left.
    """
    if scale == 1:
        return []
    epochs = recipe.get("num_train_epochs", DEFAULTS["num_train_epochs"])
    if round(scale * epochs, 6) < 1:
        raise HfkdError(
            f"epochs_scale {scale:g} leaves {scale * epochs:.2g} of the {epochs:g} epochs of {name}: give at least "
            f"{1 / epochs:.4g}, which is one."
        )
    ratio = round(scale * epochs) / epochs
    argv = ["--num_train_epochs", str(round(scale * epochs))]
    if recipe.get("lr_milestones"):
        argv += ["--lr_milestones", *(f"{ratio * epoch:.10g}" for epoch in recipe["lr_milestones"])]
    if recipe.get("warmup_steps", 0) >= 1:
        argv += ["--warmup_steps", str(round(ratio * recipe["warmup_steps"]))]
    for method, parameters in (recipe.get("losses") or {}).items():
        for key, parameter in inspect.signature(LOSSES[method]).parameters.items():
            if key.endswith("_epochs"):
                value = (parameters or {}).get(key, parameter.default)
                argv += [f"--losses.{method}.{key}", f"{ratio * value:.10g}"]
    return argv
