"""Pictures, encoded, and undecoded splits of them."""

import io

import datasets
import numpy as np
from PIL import Image

from hfkd.data import ImageSplit


def pixels(height=8, width=8, seed=0):
    """Noise: (height, width, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(height=48, width=64, seed=0):
    """An RGB image that is smooth, as photographs are."""
    coarse = Image.fromarray(pixels(5, 7, seed))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **arguments):
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return buffer.getvalue()


def split_of(*cells, labels=None, class_names=("a",)):
    """A split of {"bytes", "path"} cells, given so or as bytes."""
    cells = [{"bytes": cell, "path": None} if isinstance(cell, bytes) else cell for cell in cells]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(class_names))})
    columns = {"image": cells, "label": labels or [0] * len(cells)}
    rows = datasets.Dataset.from_dict(columns, features=features)
    return ImageSplit(rows, "pets", "train", "image", "label", list(class_names))
