"""Libraries that hfkd does without until they are needed."""

from __future__ import annotations

import importlib.util


def require(module: str, extra: str) -> None:
    """Is a library installed that one of the extras in setup.cfg brings?

    Raises:
        ImportError: if not, with the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(f'This needs {module}, which is not installed: pip install "hfkd[{extra}]".')
