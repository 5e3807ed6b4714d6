"""Cells of the published tables: recipe, seed, length and folder of each training."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import HfkdError, did_you_mean
from ..losses import loss_class
from ..recipe.config import DistillationConfig
from ..recipe.finding import LOCAL, find_recipe, names_below, packaged_names
from ..recipe.reading import load_recipe
from .planned import PlannedRun, plan_run
from .published import published_runs

DEFAULTS = {field: DistillationConfig.__dataclass_fields__[field].default for field in ("num_train_epochs", "seed")}


def find_pair(pair: str) -> str:
    """Return the full name of a pair whose recipes come with hfkd or lie below `recipes` in the current folder.

    Args:
        pair: `resnet32x4-resnet8x4`, `imagenet/resnet34-resnet18` or the path of its file or folder.

    Raises:
        HfkdError: if the pair is unknown; the message names the nearest.
    """
    pairs = sorted({name.rpartition("/")[0] for name in _all_names() if re.fullmatch("[^/]+/[^/]+-[^/]+/[^/]+", name)})
    given = pair.strip("/").removeprefix("recipes/").removesuffix(".yaml")
    for name in pairs:
        if given in (name, name.rpartition("/")[2]):
            return name
    valid = pairs if "/" in given else [name.rpartition("/")[2] for name in pairs]
    raise HfkdError(f"There are no recipes of the pair '{pair}'.{did_you_mean(given, valid)}")


def _all_names() -> list[str]:
    return [*packaged_names(), *names_below(LOCAL)]


def recipes_of(pair: str, methods: Sequence[str]) -> list[str]:
    """Return the names of a pair's recipes of some methods; without methods, of all that have a published top-1.

    Raises:
        HfkdError: for a method without a recipe; the message names the nearest.
    """
    recipes = {name.rpartition("/")[2]: name for name in sorted(_all_names()) if name.rpartition("/")[0] == pair}
    if not methods:
        return [name for name in recipes.values() if name in published_runs()]
    for method in methods:
        if method not in recipes:
            short = pair.rpartition("/")[2]
            raise HfkdError(f"There is no recipe '{method}' of {short}.{did_you_mean(method, recipes)}")
    return [recipes[method] for method in dict.fromkeys(methods)]


def planned_cells(
    recipes: Sequence[str], seeds: int, scale: float, root: Path, overrides: Sequence[str]
) -> list[PlannedRun]:
    """Return the trainings in order: the teachers, then all recipes with their own seed, then with the next, ...

    Args:
        scale: share of the recipes' epochs.
        root: folder in place of `runs`.
        overrides: `--key value ...` for all trainings.

    Raises:
        HfkdError: for less than one epoch, or an override that no recipe takes.
    """
    keys = {token.lstrip("-").partition("=")[0].replace("-", "_") for token in overrides if token.startswith("--")}
    given = not keys.isdisjoint({"teacher_name_or_path", "teacher", "teacher_cache"})
    teachers, students = {}, []
    for number in range(seeds):
        for name in recipes:
            argv, teacher = [], None if given else load_recipe(name).get("teacher_recipe")
            if teacher is not None:
                planned = teachers[teacher] = _cell("teacher", teacher, scale, root, overrides)
                argv = ["--teacher_name_or_path", str(planned.folder / planned.role)]
            students.append(_cell("student", name, scale, root, [*argv, *overrides], number))
    return [*teachers.values(), *students]


def _cell(role: str, name: str, scale: float, root: Path, overrides: Sequence[str], number: int = 0) -> PlannedRun:
    """Return a recipe with its own seed, or with the `number`-th after it."""
    recipe, name = load_recipe(name), find_recipe(name).name
    seed = recipe.get("seed", DEFAULTS["seed"]) + number
    folder = root / (f"{name}-seed{seed}" if number else name)
    argv = shortened(recipe, scale, name)
    if number:  # the first run has the recipe's seed, as with `hfkd distill`
        argv += ["--seed", str(seed)]
    return plan_run(name, role, folder, [*argv, *overrides])


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
        for key, parameter in inspect.signature(loss_class(method)).parameters.items():
            if key.endswith("_epochs"):
                value = (parameters or {}).get(key, parameter.default)
                argv += [f"--losses.{method}.{key}", f"{ratio * value:.10g}"]
    return argv
