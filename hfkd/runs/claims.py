"""Claims on folders: one command at a time writes to a run's folder, and replaces only what hfkd wrote."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import HfkdError
from ..recipe.yaml_file import dump_yaml, parse_yaml
from .checkpoints import checkpoints, is_own_checkpoint
from .folder import RECIPE_NAME, RESULTS_NAME, ROLES
from .reading import is_results

LOCK_NAME = ".hfkd.lock"
RESTART_SECONDS = 60  # a launcher starts the processes of a run again while the killed ones end
STATE_NAME = "trainer_state.json"


class InUseError(HfkdError):
    """Error for a folder to which another command is writing."""


@contextlib.contextmanager
def claimed(folder: Path, key: str) -> Iterator[None]:
    """Hold the claim on a folder, which ends with the process at the latest.

    Of a distributed run only the processes that write (`should_save`) take it.

    Args:
        key: setting that names the folder, for the message.

    Raises:
        InUseError: if another command holds it.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=RESTART_SECONDS if restarted else 0)
    except Timeout as error:
        raise InUseError(
            f"{key}: another command is writing to {folder}. Wait until it ends, or give another folder."
        ) from error
    except OSError as error:
        raise HfkdError(f"{key}: {folder / LOCK_NAME} cannot be locked ({error.strerror}). Remove it.") from error
    try:
        yield
    finally:
        lock.release()


def is_claimed(folder: Path) -> bool:
    """Return True if a command is writing to a folder."""
    if not (folder / LOCK_NAME).is_file():
        return False
    try:
        with FileLock(folder / LOCK_NAME).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder of others, which cannot be locked from here
        return False


def wait_until_free(folder: Path, stop: Callable[[], bool]) -> None:
    """Wait until no command holds the claim on a folder, or until `stop` returns True."""
    lock = FileLock(folder / LOCK_NAME)
    while not stop():
        with contextlib.suppress(Timeout), lock.acquire(timeout=1):
            return


def check_own(folder: Path, names: Iterable[str], is_own: bool, key: str) -> None:
    """Check that a command replaces nothing in a folder that hfkd did not write.

    Args:
        names: files and folders that the command writes there.
        is_own: whether the folder holds what such a command wrote earlier; then it may write them again.

    Raises:
        HfkdError: if it would; the message names them.
    """
    there = [name for name in dict.fromkeys(names) if os.path.lexists(folder / name)]
    if there and not is_own:
        raise HfkdError(
            f"{key}: {folder} holds {', '.join(there)}, which hfkd did not write and would replace. Give another "
            f"folder, or move {'it' if len(there) == 1 else 'them'}."
        )


def folders_among(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names that are folders; a command that writes files of these names would fail at its end."""
    return [name for name in names if (folder / name).is_dir()]


def check_run_folder(folder: Path) -> None:
    """Check that a training run replaces nothing in its folder that hfkd did not write.

    Raises:
        HfkdError: if it would; the message names files and folders.
    """
    here = checkpoints(folder)
    foreign = [path.name for path in here if not is_own_checkpoint(path)]
    is_run = len(foreign) < len(here) or is_results(folder / RESULTS_NAME)
    if not (is_run or _is_recipe(folder / RECIPE_NAME)):
        foreign += [RECIPE_NAME, STATE_NAME]
    if not (is_run or _is_empty(folder / RESULTS_NAME)):
        foreign.append(RESULTS_NAME)
    foreign += [role for role in ROLES if not is_own_export(folder / role)]
    foreign += folders_among(folder, (RECIPE_NAME, RESULTS_NAME, STATE_NAME))
    check_own(folder, foreign, False, "output_dir")


def is_own_export(folder: Path) -> bool:
    """Return True if a folder is an export of hfkd, or is not there, or empty."""
    if not os.path.lexists(folder):
        return True
    if folder.is_symlink() or not folder.is_dir():
        return False
    return is_results(folder / RESULTS_NAME) or not any(folder.iterdir())


def _is_recipe(path: Path) -> bool:
    """Return True if a file is a resolved recipe as hfkd writes it, which has no comments to lose, or empty."""
    if _is_empty(path):
        return True
    if path.is_symlink():
        return False
    try:
        text = path.read_text(encoding="utf-8")
        value = parse_yaml(text, str(path))
        return isinstance(value, dict) and dump_yaml(value) == text
    except (OSError, ValueError):
        return False


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0
