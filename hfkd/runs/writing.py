"""Whole writes: a file or a folder is there completely and on the disk, or not at all.

Everything is written under another name first, which no other file has, and renamed at the end. The new file is created
exclusively, so that nothing is ever written through a link that somebody put there. What is renamed is flushed to the
disk before, so that a power failure leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL, FORMER = "partial", "former"


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        OSError: if it cannot be written; then the former file is unchanged.
    """
    with writing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to, which takes the place of `path` at the end; if anything fails, `path` is unchanged."""
    partial = beside(path, PARTIAL)
    file = partial.open("xb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def writing_by_name(path: Path) -> Iterator[Path]:
    """Give a path for a library that writes its file by name; the file takes the place of `path` at the end."""
    folder = beside(path, PARTIAL)
    folder.mkdir(mode=0o700)  # nobody else can put a link where the library writes
    try:
        yield folder / path.name
        settle(folder)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync_folder(path.parent)


def beside(path: Path, state: str) -> Path:
    """Return a new name beside a path, for what is not finished (PARTIAL) or about to be removed (FORMER)."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.{state}")


def leftovers(path: Path, state: str) -> list[Path]:
    """Return what killed processes left under the names that `beside` gave; names of other programs do not match."""
    pattern = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.{state}")
    return [each for each in path.parent.glob(f"*.{state}") if pattern.fullmatch(each.name)]


def settle(folder: Path) -> None:
    """Flush the files of a folder, and the folder itself, to the disk; give the files the mode of the umask."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    use_umask(files)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def use_umask(files: Iterable[Path]) -> None:
    """Give files the mode that the umask gives to new ones; safetensors writes 0600 whatever the umask is."""
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    for path in files:
        if path.stat().st_mode & 0o777 != 0o666 & ~umask:
            path.chmod(0o666 & ~umask)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # not on Windows, and not on every network file system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
