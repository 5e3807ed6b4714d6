"""What our data sets have in common: what the trainer reads of any of them."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import HfkdError

_SAMPLE = 64  # images that stand for all of a data set


class RowCache(Protocol):
    """What is stored for every row and epoch, and comes with the batches."""

    epochs: int  # that are stored; they are replayed from the first one on

    def read(self, epoch: int, rows: np.ndarray) -> dict[str, Tensor]:
        """Batch entries, on the CPU, for the rows (B,) in an epoch below `epochs`."""


class ImageSource:
    """A data set of labelled images that are augmented and normalised for one network.

    A batch is a dictionary: pixel_values (B, 3, H, W) float32, normalised; with two views pixel_values_strong, the
    same; labels (B,) int64; index (B,) int64, the rows in the split. A row that does not count in an evaluation has
    the label IGNORED. Where `cache` is set, what that holds for the rows comes with them.

    Args:
        class_names: the C names.
        num_rows: how many rows `index` counts.
        image_size: H and W, in pixels.
        mean, std: three numbers each, of pixels scaled to 0 ... 1.
        seed: of the augmentation.
        views: 2 adds a strong view of each image; may be changed until the first batch is asked for.
        augmented: False if an image is the same every time, as evaluation needs it.

    Raises:
        ValueError: if mean, std or views are not as above.
    """

    IGNORED = -100  # what torch's cross-entropy leaves out, too

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        num_rows: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        views: int,
        augmented: bool,
    ):
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise HfkdError(f"mean and std must be three numbers each, std positive, but are {mean} and {std}.")
        if views not in (1, 2):
            raise HfkdError(f"views must be 1 or 2, but is {views}.")
        self.class_names = list(class_names)
        self.num_rows = num_rows
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.seed = seed
        self.views = views
        self.augmented = augmented
        self.cache: RowCache | None = None
        # In shared memory, so that DataLoader workers see the epoch change: each holds a copy of this object,
        # and a persistent one is never given a new copy.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.bad_rows = torch.zeros(num_rows, dtype=torch.bool).share_memory_()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @property
    def shown_epoch(self) -> int:
        """Whose augmentation the images have: that of `epoch`, or the one of the cache that is replayed in it."""
        return self.epoch if self.cache is None else self.epoch % self.cache.epochs

    def set_epoch(self, epoch: int) -> None:
        """Change the augmentation. Call it before iterating over a DataLoader, since that may fetch ahead."""
        self._epoch.fill_(epoch)

    def note_bad(self, row: int, error: Exception) -> None:
        """Count a row that cannot be decoded, and warn of it once."""
        if not self.bad_rows[row]:
            self.bad_rows[row] = True
            warnings.warn(str(error), stacklevel=3)

    @property
    def num_skipped(self) -> int:
        """How many images this process has left out so far because they cannot be decoded."""
        return int(self.bad_rows.sum())


class IndexedImageSource(Dataset, ImageSource):
    """An `ImageSource` with a length, whose `__getitems__` makes whole batches for a DataLoader.

    Attributes:
        labels: (N,) int64, of every row that `index` counts.
    """

    labels: Tensor
    transform: Any

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """One image: the batch of `__getitems__([i])` without its first dimension.

        Raises:
            IndexError: for i outside -N ... N - 1.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"index {i} is out of range for {len(self)} images")
        return {key: value[0] for key, value in self.__getitems__([i % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A finished batch of B images.

        Args:
            indices: B numbers in 0 ... N - 1.
        """
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What another data set must have in common for the same row of the same epoch to be the same image, in plain
        values; of the images themselves a sample is looked at."""
        return {
            "rows": self.num_rows,
            "class_names": self.class_names,
            "labels": hashlib.sha256(self.labels.cpu().numpy().tobytes()).hexdigest(),
            "images": self._sample_digest(),
            "image_size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "transform": {"name": type(self.transform).__name__, **self.transform.settings},
            "seed": self.seed if self.augmented else None,
        }

    def _sample_digest(self) -> str:
        digest = hashlib.sha256()
        for row in np.linspace(0, len(self) - 1, min(len(self), _SAMPLE), dtype=np.int64).tolist():
            digest.update(self._image_bytes(row))
        return digest.hexdigest()

    def _image_bytes(self, row: int) -> bytes:
        """What a row holds, decoded or not."""
        raise NotImplementedError


def pixel_scale(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Two (3, 1, 1) float32 with which bytes * scale + shift is (bytes / 255 - mean) / std."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    return (1 / (255 * std)).float(), (-mean / std).float()
