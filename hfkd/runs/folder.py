"""Files of a run's folder: their names, and the environment that they record."""

from __future__ import annotations

import errno
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import HfkdError
from ..names import RESULTS_NAME as RESULTS_NAME
from ..names import ROLES as ROLES

RECIPE_NAME = "recipe.yaml"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"  # files of an export
LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "datasets", "timm", "numpy")


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
    versions = {"python": platform.python_version(), "hfkd": __version__}
    versions |= {name: version(name) for name in LIBRARIES}
    return {"versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None  # installed from a wheel, or a machine without git
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or None
