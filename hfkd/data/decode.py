"""Decoding of images: one cell of a column, or a whole split into one tensor."""

import io
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import HfkdError
from .columns import ImageSplit

# Image.open tries its plugins in this order. Without this list, opening a WebP takes 55 us instead of 8, as long as
# decoding a 32 x 32 one. The list also excludes formats that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_CHUNK = 256  # images a task: enough to hide the cost of a task, few enough to balance large images
_MAX_THREADS = 8  # more threads would mostly wait for the interpreter
_GIB = 2**30


class BadImageError(HfkdError):
    """Error for an image that is missing or cannot be decoded."""


def decode_split(split: ImageSplit, image_size: int, skip_bad_images: bool = False) -> tuple[Tensor, np.ndarray]:
    """Decode every image of a split into one tensor, made square by `to_square`.

    Small images are decoded once, before training: they fit into memory, no epoch decodes them again, and a batch is
    gathered and augmented in a few operations on the device of the tensor.

    Args:
        skip_bad_images: leave out images that cannot be decoded, with a single warning.

    Returns:
        (M, 3, image_size, image_size) uint8, RGB; and their rows, (M,) int64, ascending.

    Raises:
        BadImageError: an image cannot be decoded; the message names the split, the row and the file, if any. With
            `skip_bad_images` only if no image can be decoded.
        HfkdError: the tensor does not fit into the available memory.
    """
    shape = (len(split), 3, image_size, image_size)
    _check_memory(split.name, shape)
    images = np.empty(shape, dtype=np.uint8)
    rows = split.dataset.select_columns(split.image_column).with_format("arrow")
    bad: dict[int, BadImageError] = {}

    def decode_row(cell, row):
        try:
            return to_square(decode_cell(cell, split.name, row), image_size).tobytes()
        except BadImageError as error:
            if not skip_bad_images:
                raise
            bad[row] = error
            return bytes(image_size * image_size * 3)

    def decode_chunk(start):
        cells = rows[start : start + _CHUNK][split.image_column].to_pylist()
        pixels = [decode_row(cell, start + i) for i, cell in enumerate(cells)]
        chunk = np.frombuffer(b"".join(pixels), dtype=np.uint8).reshape(-1, image_size, image_size, 3)
        images[start : start + _CHUNK] = chunk.transpose(0, 3, 1, 2)

    # Threads, since PIL releases the interpreter lock while it decodes a JPEG and while it resizes: two are twice as
    # fast on large images, and 10 % slower on 32 x 32. Torch's number of threads, so that the processes of one machine,
    # which all decode at the same time, do not compete for cores.
    with ThreadPoolExecutor(min(_MAX_THREADS, torch.get_num_threads())) as pool:
        for _ in pool.map(decode_chunk, range(0, len(split), _CHUNK)):
            pass
    return _remove_rows(images, bad, split.name)


def _remove_rows(images, bad, where):
    """Return `images` without the rows in `bad`, and the rows of the remaining images."""
    rows = np.delete(np.arange(len(images)), list(bad))
    if bad:
        first = bad[min(bad)]
        if len(rows) == 0:
            raise first
        warnings.warn(f"{where}: {len(bad)} of {len(images)} images are left out. The first: {first}", stacklevel=4)
        for position, row in enumerate(rows):  # in place: memory may not hold a second copy
            images[position] = images[row]
    return torch.from_numpy(images[: len(rows)]), rows


def decode_cell(cell: dict | None, where: str, row: int) -> Image.Image:
    """Decode one cell of a column of images, {"bytes", "path"}, to RGB with `to_rgb`.

    Args:
        where, row: for the message, e.g. "uoft-cs/cifar100, split 'train'" and 17.

    Raises:
        BadImageError: there is no image, or it cannot be decoded.
    """
    file = f", file {cell['path']}" if cell and cell["path"] else ""
    hint = "skip_bad_images: true leaves such images out."
    if cell is None or (cell["bytes"] is None and not file):
        raise BadImageError(f"{where}, row {row}: there is no image. {hint}")
    try:
        with Image.open(io.BytesIO(cell_bytes(cell)), formats=FORMATS) as image:
            return to_rgb(image)
    except Exception as error:  # for damaged files PIL raises OSError, SyntaxError, struct.error and others
        raise BadImageError(f"{where}, row {row}{file}: the image cannot be decoded: {error}. {hint}") from error


def cell_bytes(cell: dict | None) -> bytes:
    """Return the bytes of a cell, or of the file that it names; no bytes for an empty cell."""
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        return b""
    if cell["bytes"] is not None:
        return cell["bytes"]
    path = Path(cell["path"])
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise OSError(f"{path} is no regular file")
    return path.read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image to RGB.

    The EXIF orientation is applied. Grey, palette and CMYK become RGB. Transparency is dropped.

    Raises:
        HfkdError: the image has more than 8 bits a channel, which PIL would clip to white.
    """
    if image.mode.startswith(("I", "F")):
        raise HfkdError(f"mode {image.mode} has more than 8 bits a channel; convert it to 8 bits")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_square(image: Image.Image, image_size: int) -> Image.Image:
    """Resize and crop an RGB image to image_size x image_size; an image of this size is returned unchanged.

    The shorter side is resized to `image_size` (bicubic, antialiased), then the centre is cropped.
    """
    if image.size == (image_size, image_size):
        return image
    width, height = image.size
    shorter = min(width, height)
    width, height = width * image_size // shorter, height * image_size // shorter
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)  # as timm rounds
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + image_size, top + image_size))


def _check_memory(where, shape):
    needed, available = math.prod(shape), psutil.virtual_memory().available
    if needed > available:
        raise HfkdError(
            f"{where}: {shape[0]} images of {shape[2]} x {shape[3]} take {needed / _GIB:.3g} GiB once "
            f"decoded, and {available / _GIB:.3g} GiB of memory are available. Choose a smaller "
            "image_size or fewer rows."
        )
