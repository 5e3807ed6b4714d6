"""Checks of the names, types and ranges of loss parameters; each error names the fix."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, get_type_hints

from ..errors import HfkdError, did_you_mean


def positive(key: str, value: float) -> float:
    """Return the value if it is a finite number above 0.

    Raises:
        HfkdError: if it is not.
    """
    if not (_is_finite_number(value) and value > 0):
        raise HfkdError(f"{key} is {value!r}: give a finite number above 0")
    return float(value)


def not_negative(key: str, value: float) -> float:
    """Return the value if it is a finite number, 0 or above.

    Raises:
        HfkdError: if it is not.
    """
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
    """Return the value if it is a whole number, `least` or above.

    Raises:
        HfkdError: if it is not.
    """
    if type(value) is not int or value < least:
        raise HfkdError(f"{key} is {value!r}: give a whole number, {least} or above")
    return value


def layers_of(key: str, value: list[int | str]) -> list[int | str]:
    """Return the value if it is a non-empty list of stage indices and module paths.

    Raises:
        HfkdError: if it is not.
    """
    if not isinstance(value, list) or not value or not all(type(layer) in (int, str) for layer in value):
        raise HfkdError(f"{key} is {value!r}: give a list of stage indices or module paths, such as [0, blocks.6]")
    return value


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def checked_arguments(method: str, loss_class: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return every argument of a loss's constructor: the given values, and defaults for the rest.

    Numbers that YAML left as strings are converted. Only float, int, bool and str annotations are checked here. The
    constructor checks parameters with other annotations.

    Raises:
        HfkdError: a parameter that the constructor does not take, a required one that is missing, or a value of another
            type than its annotation.
    """
    parameters = inspect.signature(loss_class).parameters
    hints = get_type_hints(loss_class.__init__)  # type: ignore[misc]  # of this very class, not of a subclass
    for key in arguments:
        if key not in parameters:
            raise HfkdError(f"losses.{method} takes no parameter {key!r}.{did_you_mean(key, parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise HfkdError(f"losses.{method} needs the parameter {key!r}. Add losses.{method}.{key}")
    given = {key: _convert(f"losses.{method}.{key}", value, hints.get(key)) for key, value in arguments.items()}
    return {key: given.get(key, parameter.default) for key, parameter in parameters.items()}


def _convert(key: str, value: Any, annotation: Any) -> Any:
    if annotation is float or annotation is int:
        number = _parse_number(value)
        if number is None or (annotation is int and not number.is_integer()):
            raise HfkdError(f"{key} is {value!r} ({type(value).__name__}): give a number ({annotation.__name__})")
        return annotation(number)
    if annotation in (bool, str) and not isinstance(value, annotation):
        example = "true or false" if annotation is bool else "a string"
        raise HfkdError(f"{key} is {value!r} ({type(value).__name__}): give {example}")
    return value


def _parse_number(value: Any) -> float | None:
    """Return a number, or the number that a string spells, or None.

    Most readers of YAML, which is not hfkd's own, take 5e-1 and 1e3 for strings.
    """
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
