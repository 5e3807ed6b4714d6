"""Errors written for people, the nearest valid name, and libraries that may be missing."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable


class HfkdError(ValueError):
    """Error whose message is written for a person; the command line prints it without a traceback.

    Attributes:
        exit_code: exit code of the command line: 2 for a mistake in what was given, 1 for what failed later.
    """

    exit_code = 2


class NotFoundError(HfkdError, FileNotFoundError):
    """Error for a file, folder or model that does not exist."""


class RunError(HfkdError, RuntimeError):
    """Error for what fails while a command runs, such as a full disk."""

    exit_code = 1


class MissingLibraryError(HfkdError, ImportError):
    """Error for a library that is not installed."""

    exit_code = 1


class WrongTypeError(HfkdError, TypeError):
    """Error for a model whose outputs are not of the expected type."""

    exit_code = 1


class RendezvousError(HfkdError, TimeoutError):
    """Error for processes of a run that did not join in time."""

    exit_code = 1


def require(module: str, extra: str) -> None:
    """Check that a library from one of the extras in setup.cfg is installed.

    Raises:
        MissingLibraryError: if it is not, with the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingLibraryError(f'This needs {module}, which is not installed: pip install "hfkd[{extra}]".')


def nearest(name: object, valid: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return up to `n` valid names close to a given one, the closest first; case does not count.

    Names of which the given one is a whole part come first: `cifar_resnet56` for `resnet56`.
    """
    by_lower_case = {each.lower(): each for each in valid}
    given = str(name).lower()
    part = re.compile(rf"(?<![a-z0-9]){re.escape(given)}(?![a-z0-9])")
    found = [each for each in by_lower_case if given and part.search(each)]
    found += difflib.get_close_matches(given, by_lower_case, n=n, cutoff=cutoff)
    return [by_lower_case[each] for each in dict.fromkeys(found)][:n]


def did_you_mean(name: object, valid: Iterable[str], listed: bool = True) -> str:
    """Return the end of a message about an unknown name: the nearest valid one and, if `listed`, all valid ones."""
    valid = list(valid)
    hint = "".join(f" Did you mean '{close}'?" for close in nearest(name, valid))
    return f"{hint} Valid: {', '.join(valid)}" if listed else hint


def unknown_key_error(key: str, valid: Iterable[str], where: str) -> HfkdError:
    """Return the error for an unknown key of a recipe or a command line."""
    hint = did_you_mean(key, valid, listed=False) or " `--help` lists the valid keys."
    return HfkdError(f"Unknown key '{key}' in {where}.{hint}")
