"""Recipes compared: which settings of two runs differ, where a key at its default counts as one that is not set."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HfkdError
from ..losses import LOSSES
from .keys import AUTO_CACHE, WITHOUT_EFFECT, public_value
from .reading import ARGUMENT_CLASSES
from .yaml_file import read_yaml


def _default(field: dataclasses.Field) -> Any:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        return None
    return getattr(default, "value", default)  # some of transformers' are enumerations


DEFAULTS = {field.name: _default(field) for cls in ARGUMENT_CLASSES for field in dataclasses.fields(cls) if field.init}


def settings_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved recipe without the keys, and without the parameters of losses, that have their defaults."""
    settings = {key: value for key, value in recipe.items() if not _same(value, DEFAULTS.get(key))}
    if settings.get("teacher_cache") == AUTO_CACHE:  # the student is the same to the bit
        del settings["teacher_cache"]
    if isinstance(settings.get("losses"), dict):
        settings["losses"] = {method: _parameters(method, given) for method, given in settings["losses"].items()}
    return settings


def _parameters(method: str, given: Any) -> Any:
    if method not in LOSSES or not isinstance(given, dict):
        return given or {}
    declared = inspect.signature(LOSSES[method]).parameters
    return {name: value for name, value in given.items() if name not in declared or value != declared[name].default}


def _same(value: Any, default: Any) -> bool:
    """Return whether a value is the default; an empty list or mapping is none."""
    return (value or None if isinstance(value, (list, dict)) else value) == default


def recipe_differences(path: Path, recipe: dict[str, Any]) -> list[str]:
    """Return the keys on which the recipe of an earlier run, if there is one, has another value, with both values.

    Keys that do not change the student are left out.

    Raises:
        HfkdError: if the file is damaged.
    """
    if not path.is_file():
        return []
    former = read_yaml(path)
    if not isinstance(former, dict):
        raise HfkdError(f"{path} is {'empty' if former is None else 'damaged'}: expected the recipe of a run.")
    there, here = settings_of(former), settings_of(recipe)
    # The workers of a stream share out its rows, so that another number of them trains on another order.
    without_effect = WITHOUT_EFFECT - ({"dataloader_num_workers"} if recipe.get("streaming") else set())
    return [
        f"{key}: {_shown(key, there)} there, {_shown(key, here)} here"
        for key in sorted({*there, *here} - without_effect)
        # Beside a checkpoint from the Hub lies the public recipe.
        if there.get(key) not in (here.get(key), public_value(key, here.get(key)))
    ]


def _shown(key: str, settings: dict[str, Any]) -> str:
    return repr(settings.get(key, DEFAULTS.get(key)))
