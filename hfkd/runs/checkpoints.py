"""Checkpoint manifest: sizes and checksums of a checkpoint's files.

The manifest is written last, and by renaming, so that a checkpoint with a manifest was written to the end. The
checksums find damage that came later: a power failure or a full disk may leave a file of the right size and wrong
content.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import zlib
from pathlib import Path

from transformers.utils import logging

from .folder import write_whole

logger = logging.get_logger(__name__)

MANIFEST_NAME = "checkpoint.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def write_manifest(folder: str | Path) -> None:
    """Write the manifest of a finished checkpoint: the size in bytes and the CRC-32 of every file.

    Code that writes to the checkpoint again must remove the manifest first.
    """
    folder = Path(folder)
    files = {path.name: size_and_checksum(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_whole(folder / MANIFEST_NAME, json.dumps({"files": files}, indent=2))


def defect(folder: str | Path) -> str | None:
    """Return the reason why a checkpoint cannot be resumed, or None if it is whole."""
    folder = Path(folder)
    manifest = folder / MANIFEST_NAME
    if not folder.is_dir():
        return "there is no such folder"
    if not manifest.is_file():
        return f"it was not written to the end: {MANIFEST_NAME} is missing"
    try:
        files = {name: (facts["bytes"], facts) for name, facts in json.loads(manifest.read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} cannot be read"
    for name, (size, facts) in files.items():
        path = folder / name
        try:
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
    """Remove checkpoints until `limit` are left, except those in `keep`.

    Checkpoints without a manifest are removed first, then the oldest.
    """
    if not limit:
        return
    folders, kept = checkpoints(output_dir), {Path(path).resolve() for path in keep}
    old = [folder for folder in folders if folder.resolve() not in kept]
    old.sort(key=lambda folder: (folder / MANIFEST_NAME).exists())
    for folder in old[: max(0, len(folders) - limit)]:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside_newer(output_dir: str | Path, step: int) -> None:
    """Rename the whole checkpoints that are newer than the step from which a run is resumed.

    The resumed run replaces their steps, and a later resumption must not find them.
    """
    for folder in checkpoints(output_dir):
        if step_of(folder) > step and defect(folder) is None:
            aside = folder.with_name(f"superseded-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            logger.warning(f"Training resumes from step {step}, so {folder} is renamed to {aside.name}.")
            folder.rename(aside)


def size_and_checksum(content: Path | bytes) -> dict[str, int]:
    """Return the manifest's entry for a file, given its path or its content."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        checksum = size = 0
        while block := file.read(1 << 20):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}
