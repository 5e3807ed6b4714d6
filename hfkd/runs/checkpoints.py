"""Checkpoint manifest: sizes and checksums of a checkpoint's files.

The manifest is written last, and by renaming, so that a checkpoint with a manifest was written to the end. The
checksums find damage that came later: a power failure or a full disk may leave a file of the right size and wrong
content.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import zlib
from pathlib import Path

from transformers.utils import logging

from ..errors import RunError
from .reading import read_json
from .writing import settle, sync_folder, write_whole

logger = logging.get_logger(__name__)

MANIFEST_NAME = "checkpoint.json"
BEGUN_NAME = "checkpoint.begun"  # in a checkpoint that is being written, or was when its process was killed
UNLOGGED_NAME = "unlogged.json"
OWN_NAMES = (MANIFEST_NAME, BEGUN_NAME, UNLOGGED_NAME)  # one of them is in every checkpoint of hfkd
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def write_manifest(folder: str | Path) -> None:
    """Write the manifest of a finished checkpoint: the size in bytes and the CRC-32 of every file.

    Code that writes to the checkpoint again must remove the manifest first.
    """
    folder = Path(folder)
    settle(folder)  # a manifest must not reach the disk before the files that it vouches for
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != BEGUN_NAME]
    files = {path.name: size_and_checksum(path) for path in paths}
    write_whole(folder / MANIFEST_NAME, json.dumps({"files": files}, indent=2))
    (folder / BEGUN_NAME).unlink(missing_ok=True)
    sync_folder(folder.parent)


def begin_checkpoint(folder: Path) -> None:
    """Make the folder of a checkpoint, in place of an earlier attempt, and mark it as one of hfkd.

    Raises:
        RunError: if there is a folder that hfkd did not write.
    """
    remove_checkpoint(folder)
    if os.path.lexists(folder):
        raise RunError(f"{folder} is in the way of a checkpoint, and hfkd did not write it: move it, and resume.")
    folder.mkdir(parents=True)
    (folder / BEGUN_NAME).touch(exist_ok=False)


def is_own_checkpoint(folder: Path) -> bool:
    """Return True if hfkd wrote a checkpoint, whole or not, or if it is an empty folder."""
    return any((folder / name).is_file() for name in OWN_NAMES) or not any(folder.iterdir())


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, if there is one that hfkd wrote."""
    if folder.is_dir() and is_own_checkpoint(folder):
        shutil.rmtree(folder, ignore_errors=True)


def defect(folder: str | Path) -> str | None:
    """Return the reason why a checkpoint cannot be resumed, or None if it is whole."""
    folder = Path(folder)
    manifest = folder / MANIFEST_NAME
    if not folder.is_dir():
        return "there is no such folder"
    if not manifest.is_file():
        return f"it was not written to the end: {MANIFEST_NAME} is missing"
    try:
        files = {name: (facts["bytes"], facts) for name, facts in read_json(manifest)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} cannot be read"
    for name, (size, facts) in files.items():
        path = folder / name
        if name != path.name:
            return f"{MANIFEST_NAME} names a file elsewhere, {name}"
        try:
            if path.exists() and not path.is_file():  # reading a pipe or a device might never end
                return f"{name} cannot be read: it is no file"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if size_and_checksum(path) != facts:
                return f"{name} is damaged: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the last whole checkpoint of a run, or None; later checkpoints that are not whole are logged."""
    for folder in checkpoints(output_dir)[::-1]:
        found = defect(folder)
        if found is None:
            return str(folder)
        logger.warning(f"{folder} is left out: {found}.")
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders `checkpoint-<step>` of a run in the order of their steps, whole or not."""
    output_dir = Path(output_dir)
    entries = output_dir.iterdir() if output_dir.is_dir() else []
    return sorted((path for path in entries if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(CHECKPOINT_NAME.fullmatch(folder.name).group(1))


def drop_old(output_dir: str | Path, limit: int | None, keep: list[str]) -> None:
    """Remove checkpoints until `limit` are left, except those in `keep` and those that hfkd did not write.

    Checkpoints without a manifest are removed first, then the oldest.
    """
    if not limit:
        return
    folders = [folder for folder in checkpoints(output_dir) if is_own_checkpoint(folder)]
    kept = {Path(path).resolve() for path in keep}
    old = [folder for folder in folders if folder.resolve() not in kept]
    old.sort(key=lambda folder: (folder / MANIFEST_NAME).exists())
    for folder in old[: max(0, len(folders) - limit)]:
        remove_checkpoint(folder)


def set_aside_newer(output_dir: str | Path, step: int) -> None:
    """Rename the whole checkpoints that are newer than the step from which a run is resumed.

    The resumed run replaces their steps, and a later resumption must not find them.
    """
    for folder in checkpoints(output_dir):
        if step_of(folder) > step and defect(folder) is None:
            aside = _free_name(folder.with_name(f"superseded-{folder.name}"))
            logger.warning(f"Training resumes from step {step}, so {folder} is renamed to {aside.name}.")
            folder.rename(aside)


def _free_name(folder: Path) -> Path:
    """Return the name, or the first of those with a number behind it that is not taken by another's files."""
    remove_checkpoint(folder)
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def size_and_checksum(content: Path | bytes) -> dict[str, int]:
    """Return the manifest's entry for a file, given its path or its content."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        checksum = size = 0
        while block := file.read(1 << 20):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}
