"""Interface of hfkd's data sets, as the trainer reads it."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import HfkdError
from .columns import IGNORED

_SAMPLE = 64  # images whose bytes identify a data set


class RowCache(Protocol):
    """Store of entries for every row and epoch, which are added to batches."""

    epochs: int  # number of stored epochs, which are replayed from the first on

    def read(self, epoch: int, rows: np.ndarray) -> dict[str, Tensor]:
        """Return batch entries, on the CPU, for the rows (B,) in an epoch below `epochs`."""


class ImageSource:
    """Data set of images that are augmented and normalised for one network.

    A batch is a dictionary: pixel_values (B, 3, H, W) float32, normalised; with two views pixel_values_strong, of the
    same shape; labels (B,) int64; index (B,) int64, the rows in the split. A row without a label, or one that does not
    count in an evaluation, has the label IGNORED. If `cache` is set, its entries for the rows are added.

    Args:
        class_names: the C names; of images without labels those of the teacher, or none.
        num_rows: number of rows that `index` counts.
        image_size: H and W, in pixels.
        mean, std: three numbers each, of pixels scaled to 0 ... 1.
        seed: of the augmentation.
        views: 2 adds a strong view of each image. It may be changed before the first batch is read.
        augmented: False if an image is the same every time, as evaluation needs it.
        has_labels: False if no row has a label.

    Raises:
        HfkdError: mean, std or views are not as above.
    """

    IGNORED = IGNORED
    UNCOUNTED = IGNORED - 1

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
        has_labels: bool = True,
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
        self.has_labels = has_labels
        self.cache: RowCache | None = None
        # In shared memory, so that DataLoader workers see a new epoch: each worker holds a copy of this object, and a
        # persistent worker never gets a new copy.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.bad_rows = torch.zeros(num_rows, dtype=torch.bool).share_memory_()

    @property
    def uncounted(self) -> int:
        """Label of a row that does not count in an evaluation: UNCOUNTED where no row has a label."""
        return self.IGNORED if self.has_labels else self.UNCOUNTED

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @property
    def shown_epoch(self) -> int:
        """Epoch that determines the augmentation: `epoch`, or the epoch of the cache that is replayed in it."""
        return self.epoch if self.cache is None else self.epoch % self.cache.epochs

    def set_epoch(self, epoch: int) -> None:
        """Change the augmentation. Call it before iterating over a DataLoader, which may fetch batches ahead."""
        self._epoch.fill_(epoch)

    def note_bad(self, row: int, error: Exception) -> None:
        """Count a row that cannot be decoded, and warn of it once."""
        if not self.bad_rows[row]:
            self.bad_rows[row] = True
            warnings.warn(str(error), stacklevel=3)

    @property
    def num_skipped(self) -> int:
        """Number of images that this process has left out so far because they cannot be decoded."""
        return int(self.bad_rows.sum())


class IndexedImageSource(Dataset, ImageSource):
    """`ImageSource` with a length, whose `__getitems__` makes whole batches for a DataLoader.

    Attributes:
        labels: (N,) int64, of every row that `index` counts.
    """

    labels: Tensor
    transform: Any

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """Return one image: the batch of `__getitems__([i])` without its first dimension.

        Raises:
            IndexError: i is outside -N ... N - 1.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"index {i} is out of range for {len(self)} images")
        return {key: value[0] for key, value in self.__getitems__([i % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a finished batch of B images.

        Args:
            indices: B numbers in 0 ... N - 1.
        """
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Return plain values that are equal for two data sets with the same image in each row and epoch.

        Of the images themselves, only a sample is read.
        """
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
        """Return the bytes of a row's image, decoded or not."""
        raise NotImplementedError


def pixel_scale(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return two (3, 1, 1) float32 so that bytes * scale + shift is (bytes / 255 - mean) / std."""
    means, stds = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    return (1 / (255 * stds)).float(), (-means / stds).float()
