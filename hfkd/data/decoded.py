"""Decoded images of a split, kept in one file that later runs, trials and processes map into memory.

    <cache of datasets>/hfkd_decoded/<key>.safetensors    `images` (N, 3, S, S) uint8, with their CRC-32 as metadata

Decoding takes seconds before the first step, and each process of a machine would hold its own copy of the images. The
key is a hash of all that the pixels depend on; the file is written under another name and then renamed, so it is either
whole or missing. Deleting it costs only the next decoding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from pathlib import Path

import datasets
import numpy as np
import PIL
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from .columns import ImageSplit
from .decode import decode_cell, decode_split, to_square

LARGEST = 2**30  # bytes; a larger file would fill the disk of a person who did not ask for it
_FORMAT = 1  # rises when `decode.py` gives other pixels
_PROBES = 8  # rows that are decoded again and compared when a file is opened

logger = logging.get_logger(__name__)


def kept_images(split: ImageSplit, image_size: int, skip_bad_images: bool) -> tuple[Tensor, np.ndarray]:
    """Return the decoded images of a split from their file, which is written where there is none yet.

    Nothing is kept of data that `datasets` does not store, such as image folders, of more than 1 GiB of pixels, nor
    where bad images were left out. A file that is damaged or that shows other images is written anew. A line says
    where it lies and how large it is when it is written.

    Returns:
        images and their rows, as `decode_split` returns them.

    Raises:
        HfkdError: see `decode_split`.
    """
    path = _path(split, image_size)
    if path is None:
        return decode_split(split, image_size, skip_bad_images)
    with _locked(path) as may_write:
        images = _read(path, split, image_size)
        if images is not None:
            return images, np.arange(len(images))
        images, rows = decode_split(split, image_size, skip_bad_images)
        if len(rows) < len(split) or not may_write or not _write(path, images):
            return images, rows
        print(f"The decoded images of {split.name} are kept for later runs: {path}, {images.nbytes / 2**20:,.0f} MiB.")
    kept = _read(path, split, image_size)  # mapped, so that the decoded copy can be freed
    return (images if kept is None else kept), rows


def _path(split: ImageSplit, image_size: int) -> Path | None:
    """Return the file of a split's images; None where they are not kept."""
    stored = split.dataset.cache_files
    if not stored or len(split) * 3 * image_size**2 > LARGEST:
        return None
    first = split.dataset.select_columns(split.image_column).with_format("arrow")[:1][split.image_column][0].as_py()
    if first is None or first["bytes"] is None:  # a file beside the data set may change without a trace here
        return None
    depends_on = [_FORMAT, PIL.__version__, split.dataset._fingerprint, split.image_column, image_size, len(split)]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE, "hfkd_decoded", f"{key}.safetensors")


@contextlib.contextmanager
def _locked(path: Path):
    """Hold the lock of a file, so that one process decodes and the others wait; yield whether it can be written."""
    with contextlib.ExitStack() as held:
        may_write = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(f"{path}.lock"))
        except (OSError, NotImplementedError) as error:  # a read-only folder, or a file system without locks
            _tell_not_kept(error)
            may_write = False
        yield may_write


def _read(path: Path, split: ImageSplit, image_size: int) -> Tensor | None:
    """Return the images of a file, mapped into memory; None if there is no whole file that shows this split."""
    try:
        with safe_open(path, framework="pt") as file:
            images, checksum = file.get_tensor("images"), file.metadata()["crc32"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, TypeError):  # truncated, foreign, or without metadata
        images, checksum = None, None
    wanted = (len(split), 3, image_size, image_size)
    if images is None or tuple(images.shape) != wanted or _crc32_of(path) != checksum or not _shows(images, split):
        logger.warning(f"{path} is damaged or shows other images. It is written anew.")
        return None
    return images


def _shows(images: Tensor, split: ImageSplit) -> bool:
    """Return True if a few of the images are equal to their rows, decoded again."""
    places = np.unique(np.linspace(0, len(split) - 1, _PROBES, dtype=np.int64))
    cells = split.dataset.select_columns(split.image_column).with_format("arrow")[places][split.image_column]
    for row, cell in zip(places.tolist(), cells.to_pylist(), strict=True):
        pixels = np.asarray(to_square(decode_cell(cell, split.name, row), images.shape[-1]))
        if not np.array_equal(pixels.transpose(2, 0, 1), images[row].numpy()):
            return False
    return True


def _write(path: Path, images: Tensor) -> bool:
    """Write the file, whole or not at all; return whether it was written."""
    partial = path.with_suffix(".partial")
    try:
        save_file({"images": images}, partial, metadata={"crc32": _crc32(images)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:  # the disk is full, or the folder read-only
        partial.unlink(missing_ok=True)
        _tell_not_kept(error)
        return False
    return True


def _crc32(images: Tensor) -> str:
    return f"{zlib.crc32(images.numpy().data):08x}"


def _crc32_of(path: Path) -> str:
    """Return the checksum of the images in a file, which are read a block at a time.

    Over the mapped images it would bring all of them into the memory of every process before the first step.
    """
    checksum = 0
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))  # the header of safetensors and its length
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def _tell_not_kept(error: Exception) -> None:
    logger.warning(f"The decoded images are not kept for later runs: {error}")
