"""Outputs of a teacher, kept as training computes them: files of whole batches, by epoch.

    <cache of datasets>/hfkd_teacher_outputs/<key>/about.json                      what they are the outputs of
    <cache of datasets>/hfkd_teacher_outputs/<key>/epoch-0003/<random>.safetensors
        rows (N,) int64; sizes (K,) int64, of the K batches; and for each output (N, ...); their CRC-32 as metadata

A batch is found by its rows in their order, because the last digits of an image's outputs depend on the batch around
it. Files are only ever added, each whole under a name of its own, so that any number of runs and processes read and
write one folder without locks. Deleting any of them costs only the next computation.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import logging

from ..runs.writing import write_whole, writing

ABOUT_NAME, SUFFIX = "about.json", ".safetensors"
ROWS, SIZES = "rows", "sizes"
IN_USE = 24 * 3600  # seconds since a run began to read a folder, during which no other run removes it
SPARE = 2**30  # bytes of the disk that are left to checkpoints and to everybody else

logger = logging.get_logger(__name__)


def outputs_root() -> Path:
    """Return the folder of the outputs of all teachers."""
    return Path(datasets.config.HF_DATASETS_CACHE, "hfkd_teacher_outputs")


class NoRoomError(Exception):
    """Outputs that are not kept because of the limit or the disk; the message says why."""


class KeptBatches:
    """Kept batches of one teacher and one training set, which the data set reads, in DataLoader workers too.

    Args:
        about: plain values that say what the outputs depend on; their hash names the folder.
        key: that hash.
        formats: type and shape (without the first dimension) of each output, by the name of the entry in a batch.
        limit: bytes that the outputs of all teachers may take.
    """

    epochs = sys.maxsize  # none is replayed

    def __init__(self, about: Any, key: str, formats: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int):
        self.folder = outputs_root() / key
        self.about, self.formats, self.limit = about, formats, limit
        self._epoch: int | None = None
        self._batches: dict[bytes, dict[str, Tensor]] = {}  # of that epoch, by their rows, mapped into memory
        self._opened: set[str] = set()  # names of the files that they are from
        with contextlib.suppress(OSError):
            os.utime(self.folder / ABOUT_NAME)  # so that others see that it is in use

    def __getstate__(self):
        # DataLoader workers map the files anew.
        return self.__dict__ | {"_epoch": None, "_batches": {}, "_opened": set()}

    @property
    def row_bytes(self) -> int:
        """Number of bytes of an image's outputs."""
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.formats.values())

    def read(self, epoch: int, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the outputs for the batch of the rows (B,) in an epoch; nothing if they are not kept."""
        if epoch != self._epoch:
            self._look(epoch)
        found = self._batches.get(rows.tobytes(), {})
        return {name: value.clone() for name, value in found.items()}  # in memory of their own, aligned

    def look_again(self) -> None:
        """Find, when a row is next read, what has been written since its epoch was first read."""
        self._epoch = None

    def write(self, epoch: int, batches: Sequence[tuple[np.ndarray, dict[str, Tensor]]]) -> None:
        """Keep batches, each with its rows (B,) and its outputs on the CPU, but those that are kept already.

        Raises:
            NoRoomError: if there is no room for them.
            OSError: if they cannot be written.
        """
        self._look(epoch)
        new = [(rows, outputs) for rows, outputs in batches if rows.tobytes() not in self._batches]
        if not new:
            return
        tensors = {name: torch.cat([outputs[name] for _, outputs in new]).contiguous() for name in self.formats}
        tensors[ROWS] = torch.from_numpy(np.concatenate([rows for rows, _ in new]))
        tensors[SIZES] = torch.tensor([len(rows) for rows, _ in new])
        content = save(tensors, {"crc32": _crc32(tensors)})
        self._make_room(len(content))
        folder = self._epoch_folder(epoch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / ABOUT_NAME).is_file():
            write_whole(self.folder / ABOUT_NAME, json.dumps(self.about, indent=1))
        with writing(folder / f"{secrets.token_hex(8)}{SUFFIX}") as file:
            file.write(content)

    def _epoch_folder(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04}"

    def _look(self, epoch: int) -> None:
        """Open the files of an epoch that are new; a damaged one is removed, and its batches computed again."""
        if epoch != self._epoch:
            self._epoch, self._batches, self._opened = epoch, {}, set()
        for path in sorted(self._epoch_folder(epoch).glob(f"*{SUFFIX}")):
            if path.name in self._opened:
                continue
            tensors = self._open(path)
            if tensors is None:
                logger.warning(f"{path} is damaged. It is removed, and the teacher computes its outputs again.")
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            self._batches.update(_by_rows(tensors))
            self._opened.add(path.name)

    def _open(self, path: Path) -> dict[str, Tensor] | None:
        """Return the tensors of a file, mapped into memory; None if it is not whole."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in (ROWS, SIZES, *self.formats)}
                checksum = file.metadata()["crc32"]
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        count = len(tensors[ROWS])
        expected = {name: (dtype, (count, *shape)) for name, (dtype, shape) in self.formats.items()}
        whole = all((tensors[name].dtype, tuple(tensors[name].shape)) == each for name, each in expected.items())
        return tensors if whole and _crc32(tensors) == checksum else None

    def _make_room(self, size: int) -> None:
        """Check that a file fits into the limit and on the disk, and remove outputs that nobody uses if it does not.

        Raises:
            NoRoomError: if it does not fit.
        """
        root = self.folder.parent
        root.mkdir(parents=True, exist_ok=True)
        used = {folder: _size(folder) for folder in root.iterdir() if folder.is_dir()}
        unused = [each for each in used if each != self.folder and time.time() - _last_use(each) > IN_USE]
        for folder in sorted(unused, key=_last_use):
            if sum(used.values()) + size > self.limit:
                shutil.rmtree(folder, ignore_errors=True)
                used[folder] = _size(folder)
        if sum(used.values()) + size > self.limit:
            raise NoRoomError(
                f"those of all teachers, in {root}, have reached the {self.limit / 2**30:.3g} GiB of "
                "teacher_cache_limit"
            )
        if shutil.disk_usage(root).free < size + SPARE:
            raise NoRoomError(f"less than {SPARE / 2**30:g} GiB would be left on the disk of {root}")


def _by_rows(tensors: Mapping[str, Tensor]) -> Iterator[tuple[bytes, dict[str, Tensor]]]:
    """Yield the rows of each batch in a file, as bytes, and its outputs."""
    start = 0
    rows = tensors[ROWS].numpy()
    outputs = {name: value for name, value in tensors.items() if name not in (ROWS, SIZES)}
    for size in tensors[SIZES].tolist():
        part = slice(start, start + size)
        yield rows[part].tobytes(), {name: value[part] for name, value in outputs.items()}
        start += size


def _crc32(tensors: Mapping[str, Tensor]) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _size(folder: Path) -> int:
    """Return the number of bytes of the files below a folder."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another run has removed it
            size += path.stat().st_size if path.is_file() else 0
    return size


def _last_use(folder: Path) -> float:
    """Return the time at which a run last began to use a folder."""
    for path in (folder / ABOUT_NAME, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0
