"""Libraries that hfkd does without until they are needed."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Collection


def require(module: str, extra: str) -> None:
    """Is a library installed that one of the extras in setup.cfg brings?

    Raises:
        ImportError: if not, with the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(f'This needs {module}, which is not installed: pip install "hfkd[{extra}]".')


def did_you_mean(name: str, valid: Collection[str]) -> str:
    """The end of an error message: the nearest valid name, if one is near, and all of them."""
    nearest = difflib.get_close_matches(str(name).lower(), valid, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{hint} Valid: {', '.join(valid)}"


def unknown_key_error(key: str, valid: list[str], where: str) -> ValueError:
    """The error for a name that nobody knows, with the nearest one that somebody does."""
    nearest = difflib.get_close_matches(key, valid, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else " `--help` lists the valid keys."
    return ValueError(f"Unknown key '{key}' in {where}.{hint}")
