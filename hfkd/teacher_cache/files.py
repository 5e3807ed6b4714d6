"""Files of a teacher cache: `cache.json`, and the rows of every epoch in memory-mapped shards.

    <folder>/cache.json                    description of the rows, the images and the teacher
    <folder>/evaluation.bin                the teacher's class for every row of the evaluation split, int32
    <folder>/epoch-0000/shard-00000.bin    rows in the format of `rows.RowFormat`

A `.bin` file is a header (magic, number of rows, CRC-32 of the rows) and its rows. It is written under another name and
then renamed, so it is either whole or missing.
"""

from __future__ import annotations

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
from ..runs.reading import printable, read_json
from ..runs.writing import PARTIAL, leftovers, writing
from .rows import RowFormat

CACHE_NAME, EVALUATION_NAME = "cache.json", "evaluation.bin"
MAGIC = b"hfkdrows"
HEADER = struct.Struct("<8sQI")
OPEN_SHARDS = 256  # largest number that a process keeps open: each takes a file descriptor
MANY_SHARDS = 100_000  # more are counted before they are listed
CHOICE_DTYPE = np.dtype("<i4")


class CacheFiles:
    """Files of a cache, from which a data set reads rows, in DataLoader workers too.

    Args:
        folder: folder of the cache.
        facts: content of its `cache.json`.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any]):
        self.folder = Path(folder)
        self.facts = facts
        self.epochs: int = facts["epochs"]
        self.num_rows: int = facts["train"]["rows"]
        self.rows_a_shard: int = facts["rows_a_shard"]
        row = facts["row"]
        settings = row["classes"], row["views"], row["top_k"], tuple(row["temperatures"]), row.get("width")
        self.format = RowFormat(*settings)
        self._dtype = self.format.dtype
        self._open: dict[tuple[int, int], np.ndarray] = {}
        self._checked: set[tuple[int, int]] = set()

    def __getstate__(self):
        # DataLoader workers get a pickled copy, which would hold the content of all open shards. They map them anew.
        return self.__dict__ | {"_open": {}}

    # ---- List of the files -----------------------------------------------------------------------------------------

    def shards(self) -> list[tuple[int, int]]:
        """Return (epoch, number) of all shards, in order."""
        number = math.ceil(self.num_rows / self.rows_a_shard)
        return [(epoch, shard) for epoch in range(self.epochs) for shard in range(number)]

    def path(self, epoch: int, shard: int) -> Path:
        """Return the path of a shard."""
        return self.folder / f"epoch-{epoch:04}" / f"shard-{shard:05}.bin"

    def rows_of(self, shard: int) -> range:
        """Return the rows of the data set that a shard holds."""
        start = shard * self.rows_a_shard
        return range(start, min(start + self.rows_a_shard, self.num_rows))

    def bytes_of(self, shard: int) -> int:
        """Return the size of a shard's file."""
        return HEADER.size + len(self.rows_of(shard)) * self._dtype.itemsize

    def check_complete(self) -> None:
        """Check the size of every file, without reading its content.

        Raises:
            HfkdError: if a file is missing or has another size; the message names it.
        """
        self._check_number()
        expected = {self.path(*shard): self.bytes_of(shard[1]) for shard in self.shards()}
        expected[self.folder / EVALUATION_NAME] = HEADER.size + self.facts["evaluation"]["rows"] * CHOICE_DTYPE.itemsize
        sizes = {path: path.stat().st_size if path.is_file() else None for path in expected}
        missing = [path for path, size in sizes.items() if size is None]
        if missing:
            raise HfkdError(
                f"The teacher cache {self.folder} is not finished: {len(missing)} of its {len(expected)} files are "
                f"missing, such as {missing[0]}. The command that began it completes it."
            )
        for path, size in sizes.items():
            if size != expected[path]:
                raise HfkdError(damage_message(path, f"it has {size:,} bytes instead of {expected[path]:,}"))

    def _check_number(self) -> None:
        """Check that many shards are there before they are listed: a stranger's description may say any number.

        Raises:
            HfkdError: if there are fewer.
        """
        expected = self.epochs * math.ceil(self.num_rows / self.rows_a_shard)
        found = sum(1 for _ in self.folder.glob("epoch-*/shard-*.bin"))
        if found < expected and expected > MANY_SHARDS:
            raise HfkdError(
                f"The teacher cache {self.folder} is not finished: {expected - found:,} of its {expected:,} shards are "
                "missing. The command that began it completes it."
            )

    def finish(self) -> bool:
        """Return True if every file is there; then remove the partial files that killed processes left."""
        paths = [self.folder / EVALUATION_NAME, *(self.path(*shard) for shard in self.shards())]
        whole = all(path.is_file() for path in paths)
        for path in (self.folder / CACHE_NAME, *paths) if whole else ():
            for partial in leftovers(path, PARTIAL):
                partial.unlink(missing_ok=True)
        return whole

    # ---- Reading ---------------------------------------------------------------------------------------------------

    def read(self, epoch: int, rows: np.ndarray) -> dict[str, Tensor]:
        """Return batch entries for the rows (B,) in an epoch below `epochs`.

        Raises:
            HfkdError: if a shard is missing or damaged. A shard is checked when it is first read.
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
        """Return the teacher's class (N,) for every row of the evaluation split.

        Raises:
            HfkdError: if the file is missing or damaged.
        """
        return np.array(map_rows(self.folder / EVALUATION_NAME, CHOICE_DTYPE, self.facts["evaluation"]["rows"]))


def map_rows(path: Path, dtype: np.dtype, count: int, check: bool = True) -> np.ndarray:
    """Return the rows (N,) of a file, mapped into memory.

    Raises:
        HfkdError: if the file is missing, has another number of rows or, with `check`, another checksum.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
            if size != HEADER.size + count * dtype.itemsize:
                raise HfkdError(damage_message(path, f"it has {size:,} bytes for {count:,} rows of {dtype.itemsize}"))
            magic, rows, checksum = HEADER.unpack(header)
            if (magic, rows) != (MAGIC, count):
                raise HfkdError(damage_message(path, "its header is not a cache's"))
            mapped = np.memmap(file, dtype, "r", offset=HEADER.size, shape=(count,))
    except FileNotFoundError as error:
        raise HfkdError(damage_message(path, "it is missing")) from error
    if check and zlib.crc32(mapped.view(np.uint8).data) != checksum:
        raise HfkdError(damage_message(path, "its checksum differs from the one that was written"))
    return np.asarray(mapped)  # indexing of a memmap takes several times as long


def damage_message(path: Path, problem: str) -> str:
    """Return the error message for a file that cannot be used."""
    return f"{path} is damaged: {problem}. Run the command that wrote the cache again: it replaces the file."


# ---- Writing -------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: np.ndarray) -> None:
    """Write a file of rows, whole or not at all.

    Raises:
        RunError: if the disk is full, or the file cannot be written for another reason.
    """
    content = rows.view(np.uint8).data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as file:
            file.write(HEADER.pack(MAGIC, len(rows), zlib.crc32(content)))
            file.write(content)
    except FileNotFoundError:  # another process wrote the same file, finished the cache and removed partial files
        if not path.is_file():
            raise
    except OSError as error:
        free = shutil.disk_usage(path.parents[1]).free / 2**20
        raise RunError(
            f"{path} could not be written ({error}); {free:,.0f} MiB are free on its disk. Free space and run the "
            "same command again: it goes on from the files that are whole."
        ) from error


def is_whole(path: Path, dtype: np.dtype, count: int) -> bool:
    """Return True if a file is there and unchanged since it was written."""
    try:
        map_rows(path, dtype, count)
    except ValueError:
        return False
    return True


def read_facts(folder: str | Path, whole: bool = False) -> dict[str, Any]:
    """Return the content of `cache.json`.

    Args:
        whole: check all of it, for a reader of more than the row format.

    Raises:
        HfkdError: if it is missing or cannot be read.
    """
    path = Path(folder, CACHE_NAME)
    if not os.path.isfile(path):  # unlike Path.is_file it also takes a name that is too long
        raise HfkdError(f"{folder} holds no teacher cache: {path} is missing. `hfkd cache-teacher RECIPE` writes one.")
    try:
        facts = printable(read_json(path))
        facts["row"]["top_k"]
        if whole:
            _check_facts(facts)
    except (HfkdError, LookupError, TypeError) as error:
        message = f"{path} cannot be read ({error}): remove it, and run the command that wrote it again."
        raise HfkdError(message) from error
    return facts


def _check_facts(facts: dict[str, Any]) -> None:
    """Check the numbers of a description, which may be a stranger's, before memory is taken for what they say.

    Raises:
        HfkdError: for a number out of range; LookupError and TypeError for a description of another form.
    """
    row = facts["row"]
    numbers = {
        "epochs": (facts["epochs"], 10**4),  # as many as the names of their folders can tell apart
        "rows_a_shard": (facts["rows_a_shard"], 2**40),
        "train.rows": (facts["train"]["rows"], 2**40),
        "evaluation.rows": (facts["evaluation"]["rows"], 2**40),
        "row.views": (row["views"], 2),
        "the number of row.temperatures": (len(row["temperatures"]) + 1, 1000),
    }
    if row.get("width") is not None:
        numbers["row.width"] = row["width"], 2**24
    if row.get("width") is None or row["classes"] != 0 or row["top_k"] is not None:  # with logits
        numbers["row.classes"] = row["classes"], 2**24
        numbers["row.top_k"] = row["classes"] if row["top_k"] is None else row["top_k"], row["classes"]
    for name, (number, most) in numbers.items():
        if type(number) is not int or not 1 <= number <= most:
            raise HfkdError(f"{name} is {number!r}, expected 1 to {most:,}")
    for name in ("teacher", "appearance", "given"):
        facts[name]
    teacher = facts["teacher"]
    for member in teacher["members"]:
        member["name"], member["hub_id"]
    teacher["name"], teacher["parameters"]
