"""Search space: the `search` section of a recipe, or a default that follows from its losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import HfkdError, did_you_mean
from ..losses import build_losses
from ..recipe.config import DistillationConfig
from ..recipe.keys import SEARCHABLE_KEYS

if TYPE_CHECKING:
    from optuna import Trial

# Settings of every trial: it is measured after every epoch, and leaves nothing but its numbers.
TRIAL_SETTINGS = {
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "push_to_hub": "false",
    "resume_from_checkpoint": "false",
}
EXAMPLE = "`search: {losses.kd.temperature: {low: 1, high: 8, log: true}, learning_rate: {choices: [0.05, 0.1]}}`"
RANGE_FACTOR = 3.0  # the default range is from a third of the recipe's value to three times the value


@dataclass(frozen=True)
class Parameter:
    """Searched parameter.

    Attributes:
        key: key of the recipe, such as `learning_rate` or `losses.kd.temperature`.
        default: the recipe's own value, whose type the values have.
        low, high: ends of the range, both included; None with choices.
        log: True for a logarithmic scale.
        choices: values in place of a range.
    """

    key: str
    default: Any
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple | None = None

    def entry(self) -> dict[str, Any]:
        """Return the entry of the parameter in a recipe."""
        if self.choices is not None:
            return {"choices": list(self.choices)}
        return {"low": self.low, "high": self.high, "log": self.log}

    def suggest(self, trial: Trial) -> Any:
        """Return the value of the parameter in a trial."""
        if self.choices is not None:
            return trial.suggest_categorical(self.key, self.choices)
        suggest = trial.suggest_int if isinstance(self.default, int) else trial.suggest_float
        return suggest(self.key, self.low, self.high, log=self.log)


def search_space(section: Mapping[str, Any] | None, config: DistillationConfig) -> list[Parameter]:
    """Return the searched parameters of a recipe.

    Args:
        section: `search` section of the recipe. None: temperature and weight of each loss on logits, weight of each
            other loss, and the learning rate, from a third to three times the recipe's value.

    Raises:
        HfkdError: for an empty section; for an unknown key, with the nearest valid one; for a range or choices that are
            empty, not allowed for the key, or without the recipe's own value, with which a search begins.
    """
    losses = build_losses(config.losses, config.logit_standardization)
    if section is None:
        return _default_space(losses, config)
    if not isinstance(section, Mapping) or not section:
        raise HfkdError(f"search is {section!r}: give keys with their values, such as {EXAMPLE}, or leave it out.")
    defaults = _searchable(losses, config)
    space = []
    for key, entry in section.items():
        if key not in defaults:
            raise HfkdError(f"search: '{key}' cannot be searched.{did_you_mean(key, defaults)}.")
        space.append(_parameter(key, defaults[key], entry))
    for parameter in space:
        for value in parameter.choices or (parameter.low, parameter.high):
            if parameter.key in SEARCHABLE_KEYS and value < 0:
                raise HfkdError(f"search: {parameter.key} must not be negative, got {value:g}.")
            build_losses(settings({parameter.key: value}, config.losses)["losses"], config.logit_standardization)
    return space


def _searchable(losses: nn.ModuleDict, config: DistillationConfig) -> dict[str, Any]:
    """Return every key that can be searched, with the recipe's value."""
    values = {
        f"losses.{method}.{parameter}": value
        for method, loss in zip(config.losses, losses.values(), strict=True)
        for parameter, value in loss.arguments.items()
        if isinstance(value, (float, int, bool, str))
    }
    return values | {key: float(getattr(config, key)) for key in SEARCHABLE_KEYS}


def _default_space(losses: nn.ModuleDict, config: DistillationConfig) -> list[Parameter]:
    """Return the default search space of some losses."""
    values = {}
    for method, loss in zip(config.losses, losses.values(), strict=True):
        searched = ("temperature", "weight") if loss.reads_logits else ("weight",)
        values |= {f"losses.{method}.{key}": loss.arguments[key] for key in searched if key in loss.arguments}
    values["learning_rate"] = config.learning_rate
    return [
        Parameter(key, value, value / RANGE_FACTOR, value * RANGE_FACTOR, log=True)
        for key, value in values.items()
        if value > 0
    ]


def _parameter(key: str, default: Any, entry: Any) -> Parameter:
    """Return a checked entry of the section.

    Raises:
        HfkdError: if the entry is no valid range and no valid choices.
    """
    keys = set(entry) if isinstance(entry, Mapping) else set()
    if keys == {"choices"}:
        return Parameter(key, default, choices=_choices(key, default, entry["choices"]))
    if not {"low", "high"} <= keys <= {"low", "high", "log"}:
        raise HfkdError(
            f"search: {key} is {entry!r}: give `low` and `high`, with `log: true` for a log scale, or `choices`."
        )
    if isinstance(default, (bool, str)):
        raise HfkdError(f"search: {key} is {default!r} in the recipe, not a number: give `choices`, not a range.")
    low, high = (_converted(key, default, entry[end]) for end in ("low", "high"))
    log = entry.get("log", False)
    if not isinstance(log, bool):
        raise HfkdError(f"search: log of {key} must be true or false, got {log!r}.")
    if low >= high:
        raise HfkdError(f"search: {key} has low {low:g} and high {high:g}: low must be below high.")
    if log and low <= 0:
        raise HfkdError(f"search: {key} has low {low:g}: a logarithmic scale needs a low above 0.")
    if not low <= default <= high:
        raise HfkdError(
            f"search: {key} has low {low:g} and high {high:g}, and the recipe's own value {default:g} lies outside. "
            "The search begins with it: widen the range, or change the recipe."
        )
    return Parameter(key, default, low, high, log)


def _choices(key: str, default: Any, given: Any) -> tuple:
    """Return the checked values of `choices`, each once."""
    if not isinstance(given, list) or len(given) < 2:
        raise HfkdError(f"search: choices of {key} must be a list of two values or more, got {given!r}.")
    choices = tuple(dict.fromkeys(_converted(key, default, value) for value in given))
    if default not in choices:
        raise HfkdError(
            f"search: choices of {key} are {', '.join(map(str, choices))}, and the recipe's own value {default} is not "
            "among them. The search begins with it: add it, or change the recipe."
        )
    return choices


def _converted(key: str, default: Any, value: Any) -> Any:
    """Return a value in the type of the recipe's value; YAML reads some numbers, such as 5e-4, as strings."""
    kind = type(default)
    if kind in (bool, str):
        if type(value) is not kind:
            raise HfkdError(f"search: {key} takes {'true or false' if kind is bool else 'names'}, got {value!r}.")
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if (
        number is None
        or not math.isfinite(number)
        or isinstance(value, bool)
        or (kind is int and not number.is_integer())
    ):
        raise HfkdError(f"search: {key} takes {'whole ' if kind is int else ''}numbers, got {value!r}.")
    return kind(number)


def settings(values: Mapping[str, Any], losses: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys of a recipe with searched values; `losses` is copied and gets its values."""
    losses = {method: dict(parameters or {}) for method, parameters in copy.deepcopy(dict(losses)).items()}
    recipe = {}
    for key, value in values.items():
        if key in SEARCHABLE_KEYS:
            recipe[key] = value
        else:
            method, _, parameter = key.removeprefix("losses.").rpartition(".")
            losses[method][parameter] = value
    return recipe | {"losses": losses}


def text(values: Mapping[str, Any], space: Sequence[Parameter]) -> str:
    """Return the searched values in one line: `temperature 2, weight 9, ...`."""
    return ", ".join(f"{parameter.key.removeprefix('losses.')} {short(values[parameter.key])}" for parameter in space)


def short(value: Any) -> str:
    """Return a number with four digits, any other value as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
