"""Checks of what a recipe gives to a loss: names, types and ranges, each failing with the way out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, get_type_hints

from ..errors import HfkdError, did_you_mean


def positive(key: str, value: float) -> float:
    """value, if it is a finite number above 0; ValueError if not."""
    if not (_is_finite_number(value) and value > 0):
        raise HfkdError(f"{key} is {value!r}: give a finite number above 0")
    return float(value)


def not_negative(key: str, value: float) -> float:
    """value, if it is a finite number, 0 or above; ValueError if not."""
    if not (_is_finite_number(value) and value >= 0):
        raise HfkdError(f"{key} is {value!r}: give a finite number, 0 or above")
    return float(value)


def finite(key: str, value: float) -> float:
    """Return value, if it is a finite number; ValueError if not."""
    if not _is_finite_number(value):
        raise HfkdError(f"{key} is {value!r}: give a finite number")
    return float(value)


def fraction(key: str, value: float) -> float:
    """Return value, if it is a number from 0 to 1; ValueError if not."""
    if not (_is_finite_number(value) and 0 <= value <= 1):
        raise HfkdError(f"{key} is {value!r}: give a finite number from 0 to 1")
    return float(value)


def count(key: str, value: int, least: int = 1) -> int:
    """value, if it is a whole number, `least` or above; ValueError if not."""
    if type(value) is not int or value < least:
        raise HfkdError(f"{key} is {value!r}: give a whole number, {least} or above")
    return value


def layers_of(key: str, value: list[int | str]) -> list[int | str]:
    """value, if it is a list of stage indices and module paths, one at least; ValueError if not."""
    if not isinstance(value, list) or not value or not all(type(layer) in (int, str) for layer in value):
        raise HfkdError(f"{key} is {value!r}: give a list of stage indices or module paths, such as [0, blocks.6]")
    return value


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def checked_arguments(method: str, loss_class: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of loss_class's constructor: those given, numbers that YAML left as strings converted, or the
    defaults.

    Only float, int, bool and str annotations are checked here; what is annotated otherwise, the constructor
    checks itself.

    Raises:
        ValueError: a parameter the constructor does not take, one it requires and does not get, or a value of
            another type than the annotation says.
    """
    parameters = inspect.signature(loss_class).parameters
    hints = get_type_hints(loss_class.__init__)
    for key in arguments:
        if key not in parameters:
            raise HfkdError(f"losses.{method} takes no parameter {key!r}.{did_you_mean(key, parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise HfkdError(f"losses.{method} needs the parameter {key!r}. Add losses.{method}.{key}")
    given = {key: _converted(f"losses.{method}.{key}", value, hints.get(key)) for key, value in arguments.items()}
    return {key: given.get(key, parameter.default) for key, parameter in parameters.items()}


def _converted(key: str, value: Any, wanted: Any) -> Any:
    if wanted is float or wanted is int:
        number = _parsed_number(value)
        if number is None or (wanted is int and not number.is_integer()):
            raise HfkdError(f"{key} is {value!r} ({type(value).__name__}): give a number ({wanted.__name__})")
        return wanted(number)
    if wanted in (bool, str) and not isinstance(value, wanted):
        example = "true or false" if wanted is bool else "a string"
        raise HfkdError(f"{key} is {value!r} ({type(value).__name__}): give {example}")
    return value


def _parsed_number(value: Any) -> float | None:
    """A number, or the string of one: YAML 1.1 reads 5e-1 and 1e3, which lack a dot or a sign, as strings."""
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
