"""Losses from outside hfkd: a class that a recipe names as `module:Class`, and entry points of installed packages."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import HfkdError, did_you_mean
from .base import DistillationLoss

ENTRY_POINTS = "hfkd.losses"  # group, whose names are those of the methods


@functools.cache
def installed_losses() -> dict[str, EntryPoint]:
    """Return the entry point of each method of an installed package, by the method's name."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def own_loss(method: str) -> type[DistillationLoss] | None:
    """Return the class that a method outside hfkd stands for; None if the name is neither of the two kinds.

    Raises:
        HfkdError: if there is no such module or class, or if the class is no DistillationLoss.
    """
    if method in installed_losses():
        loss = installed_losses()[method].load()
    elif ":" in method:
        loss = _load(method)
    else:
        return None
    if not (isinstance(loss, type) and issubclass(loss, DistillationLoss)):
        raise HfkdError(
            f"losses.{method} is no loss: expected a subclass of hfkd.losses.DistillationLoss, got {loss!r}."
        )
    return loss


def _load(method: str) -> Any:
    module_name, _, class_name = method.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports one that is not
        raise HfkdError(
            f"losses.{method}: there is no module '{error.name}' beside the recipe, in the current folder or on "
            "Python's path."
        ) from error
    except (ValueError, TypeError) as error:  # an empty or relative name
        raise HfkdError(f"losses.{method}: expected the form module:Class, such as my_losses:LogitMSE.") from error
    if not hasattr(module, class_name):
        names = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, DistillationLoss)
        ]
        raise HfkdError(f"losses.{method}: {module_name} has no '{class_name}'.{did_you_mean(class_name, names)}")
    return getattr(module, class_name)
