"""A teacher cache on the disk: `cache.json`, and every epoch's rows in shards that are mapped into the memory.

    <folder>/cache.json                    what is stored, of which images and teacher
    <folder>/evaluation.bin                the teacher's class for every row of the evaluation split, int32
    <folder>/epoch-0000/shard-00000.bin    the rows of `cache_rows.RowFormat`

A `.bin` file is a header (magic, number of rows, CRC-32 of what follows) and its rows. It is written under another name
and then renamed, so it is whole or not there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import HfkdError, RunError
from .rows import RowFormat

CACHE_NAME, EVALUATION_NAME = "cache.json", "evaluation.bin"
MAGIC = b"hfkdrows"
HEADER = struct.Struct("<8sQI")
OPEN_SHARDS = 256  # at most, by one process: each takes a file descriptor
CHOICE = np.dtype("<i4")


class CacheFiles:
    """The files of a cache. A data set reads rows from them; in DataLoader workers, too, which map them anew.

    Args:
        folder: of the cache.
        facts: what its `cache.json` holds.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any]):
        self.folder = Path(folder)
        self.facts = facts
        self.epochs: int = facts["epochs"]
        self.num_rows: int = facts["train"]["rows"]
        self.rows_a_shard: int = facts["rows_a_shard"]
        row = facts["row"]
        self.format = RowFormat(row["classes"], row["views"], row["top_k"], tuple(row["temperatures"]))
        self._dtype = self.format.dtype
        self._open: dict[tuple[int, int], np.ndarray] = {}
        self._checked: set[tuple[int, int]] = set()

    def __getstate__(self):
        return self.__dict__ | {"_open": {}}  # else pickling would copy what is mapped

    # ---- Which files there are -------------------------------------------------------------------------------------

    def shards(self) -> list[tuple[int, int]]:
        """(epoch, number) of all, in order."""
        number = math.ceil(self.num_rows / self.rows_a_shard)
        return [(epoch, shard) for epoch in range(self.epochs) for shard in range(number)]

    def path(self, epoch: int, shard: int) -> Path:
        return self.folder / f"epoch-{epoch:04}" / f"shard-{shard:05}.bin"

    def rows_of(self, shard: int) -> range:
        """The rows of the data set that a shard holds."""
        start = shard * self.rows_a_shard
        return range(start, min(start + self.rows_a_shard, self.num_rows))

    def bytes_of(self, shard: int) -> int:
        """The size of a shard's file."""
        return HEADER.size + len(self.rows_of(shard)) * self._dtype.itemsize

    def check_complete(self) -> None:
        """Looks at the size of every file, and at no content.

        Raises:
            ValueError: if one is missing or of another size, naming it.
        """
        expected = {self.path(*shard): self.bytes_of(shard[1]) for shard in self.shards()}
        expected[self.folder / EVALUATION_NAME] = HEADER.size + self.facts["evaluation"]["rows"] * CHOICE.itemsize
        sizes = {path: path.stat().st_size if path.is_file() else None for path in expected}
        missing = [path for path, size in sizes.items() if size is None]
        if missing:
            raise HfkdError(
                f"The teacher cache {self.folder} is not finished: {len(missing)} of its {len(expected)} files are "
                f"missing, {missing[0]} for one. The command that began it completes it."
            )
        for path, size in sizes.items():
            if size != expected[path]:
                raise HfkdError(damaged(path, f"it has {size:,} bytes instead of {expected[path]:,}"))

    def finish(self) -> bool:
        """Is every file there? Then what killed processes left half-written is removed."""
        paths = [self.folder / EVALUATION_NAME, *(self.path(*shard) for shard in self.shards())]
        whole = all(path.is_file() for path in paths)
        for path in self.folder.rglob("*.partial") if whole else ():
            path.unlink(missing_ok=True)
        return whole

    # ---- Reading ---------------------------------------------------------------------------------------------------

    def read(self, epoch: int, rows: np.ndarray) -> dict[str, Tensor]:
        """Batch entries for the rows (B,) in an epoch below `epochs`.

        Raises:
            ValueError: if a shard is missing or damaged, which is found when it is first read from.
        """
        found = np.empty(len(rows), self._dtype)
        shards = rows // self.rows_a_shard
        for shard in np.unique(shards).tolist():
            here = shards == shard
            found[here] = self._shard(epoch, shard)[rows[here] - shard * self.rows_a_shard]
        return self.format.tensors(found)

    def _shard(self, epoch: int, shard: int) -> np.ndarray:
        key = (epoch, shard)
        if key not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            rows = map_rows(self.path(*key), self._dtype, len(self.rows_of(shard)), check=key not in self._checked)
            self._open[key] = rows
            self._checked.add(key)
        return self._open[key]

    def read_choices(self) -> np.ndarray:
        """The teacher's class (N,) for every row of the evaluation split.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        return np.array(map_rows(self.folder / EVALUATION_NAME, CHOICE, self.facts["evaluation"]["rows"]))


def map_rows(path: Path, dtype: np.dtype, count: int, check: bool = True) -> np.ndarray:
    """The rows (N,) of a file, mapped into the memory.

    Raises:
        ValueError: if it is missing, has not this many rows, or, where `check` is set, is not what was written.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
            if size != HEADER.size + count * dtype.itemsize:
                raise HfkdError(damaged(path, f"it has {size:,} bytes for {count:,} rows of {dtype.itemsize}"))
            magic, rows, checksum = HEADER.unpack(header)
            if (magic, rows) != (MAGIC, count):
                raise HfkdError(damaged(path, "its header is not one of a cache"))
            mapped = np.memmap(file, dtype, "r", offset=HEADER.size, shape=(count,))
    except FileNotFoundError as error:
        raise HfkdError(damaged(path, "it is missing")) from error
    if check and zlib.crc32(mapped.view(np.uint8).data) != checksum:
        raise HfkdError(damaged(path, "it is not what was written: its checksum differs"))
    return np.asarray(mapped)  # a memmap's own indexing takes several times as long


def damaged(path: Path, problem: str) -> str:
    """What to say of a file that cannot be used."""
    return f"{path} is damaged: {problem}. The command that wrote the cache finds and replaces it when it is run again."


# ---- Writing -------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: np.ndarray) -> None:
    """Writes a file of rows whole or not at all.

    Raises:
        RuntimeError: if there is no room, or it cannot be written for another reason.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several processes may write the same cache
    content = rows.view(np.uint8).data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(HEADER.pack(MAGIC, len(rows), zlib.crc32(content)))
            file.write(content)
        os.replace(partial, path)
    except FileNotFoundError:  # another process has written the same, finished the cache and cleaned up
        if not path.is_file():
            raise
    except OSError as error:
        free = shutil.disk_usage(path.parents[1]).free / 2**20
        raise RunError(
            f"{path} could not be written ({error}); {free:,.0f} MiB are free on its disk. What was written before is "
            "whole: the same command goes on from there once there is room."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def is_whole(path: Path, dtype: np.dtype, count: int) -> bool:
    """Is it there, and what was written?"""
    try:
        map_rows(path, dtype, count)
    except ValueError:
        return False
    return True


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What `cache.json` holds.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    path = Path(folder, CACHE_NAME)
    if not path.is_file():
        raise HfkdError(f"{folder} holds no teacher cache: {path} is missing. `hfkd cache-teacher RECIPE` writes one.")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        message = f"{path} cannot be read ({error}): remove it, and run the command again that wrote it."
        raise HfkdError(message) from error
