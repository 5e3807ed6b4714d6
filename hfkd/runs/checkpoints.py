"""Is a checkpoint whole? A manifest of its files, written last, says so."""

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


def seal(folder: str | Path) -> None:
    """Writes the manifest: the size in bytes and the CRC-32 of every file of a checkpoint that is finished.

    Whoever writes to the checkpoint again removes the manifest first.
    """
    folder = Path(folder)
    files = {path.name: file_facts(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_whole(folder / MANIFEST_NAME, json.dumps({"files": files}, indent=2))


def defect(folder: str | Path) -> str | None:
    """What keeps a checkpoint from being resumed, or None for one that is as it was written."""
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
            if file_facts(path) != facts:
                return f"{name} is not what was written: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The last checkpoint of a run that is whole; those behind it that are not are named in a warning."""
    for folder in checkpoints(output_dir)[::-1]:
        found = defect(folder)
        if found is None:
            return str(folder)
        logger.warning(f"{folder} is left out: {found}.")
    return None


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, in the order of their steps, whole or not."""
    output_dir = Path(output_dir)
    entries = output_dir.iterdir() if output_dir.is_dir() else []
    return sorted((path for path in entries if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The step that the name of a checkpoint says."""
    return int(CHECKPOINT_NAME.fullmatch(folder.name).group(1))


def drop_old(output_dir: str | Path, limit: int | None, keep: list[str]) -> None:
    """Removes checkpoints until `limit` are left, but none of those to keep: first what was not written to the end,
    then the oldest."""
    if not limit:
        return
    folders, kept = checkpoints(output_dir), {Path(path).resolve() for path in keep}
    old = [folder for folder in folders if folder.resolve() not in kept]
    old.sort(key=lambda folder: (folder / MANIFEST_NAME).exists())
    for folder in old[: max(0, len(folders) - limit)]:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside_later(output_dir: str | Path, step: int) -> None:
    """Renames the whole checkpoints of a run behind the step that it goes on from: a later resumption is not to find
    them."""
    for folder in checkpoints(output_dir):
        if step_of(folder) > step and defect(folder) is None:
            aside = folder.with_name(f"superseded-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            logger.warning(f"Training goes on from step {step}, so {folder} is kept as {aside.name}.")
            folder.rename(aside)


def file_facts(content: Path | bytes) -> dict[str, int]:
    """What the manifest says of a file, given its path or what is in it."""
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        checksum = size = 0
        while block := file.read(1 << 20):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}
