"""Files of a run's folder: their names, whole writes, and the environment that they record."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import HfkdError
from ..names import RESULTS_NAME as RESULTS_NAME
from ..names import ROLES as ROLES

RECIPE_NAME = "recipe.yaml"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"  # files of an export
LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "datasets", "timm", "evaluate", "numpy")


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that nobody ever sees it half-written."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def strict_json(value: Any, **settings: Any) -> str:
    """Return a value as JSON text; JSON has no NaN and no infinity, so null stands for them."""
    return json.dumps(finite_or_none(value), allow_nan=False, **settings)


def finite_or_none(value: Any) -> Any:
    """Return a plain value with None in place of every number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    return [finite_or_none(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def check_writable(folder: Path, key: str) -> None:
    """Check that files can be written to a folder, or where it will be made: what is refused later leaves no folder.

    Raises:
        HfkdError: if they cannot.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return  # told where the files are written, which says what to do
        raise HfkdError(f"{key}: {folder} cannot be written ({error.strerror}). Give another folder.") from error


def environment() -> dict[str, Any]:
    """Return the versions of the libraries, and the commit of hfkd if it runs from a git checkout."""
    versions = {"python": platform.python_version(), "hfkd": version("hfkd")}
    versions |= {name: version(name) for name in LIBRARIES}
    return {"versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None  # installed from a wheel, or a machine without git
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or None
