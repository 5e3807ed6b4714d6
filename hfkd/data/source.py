"""What our data sets have in common: what the trainer reads of any of them."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


class ImageSource:
    """A data set of labelled images that are augmented and normalised for one network.

    A batch is a dictionary: pixel_values (B, 3, H, W) float32, normalised; with two views pixel_values_strong, the
    same; labels (B,) int64; index (B,) int64, the rows in the split. A row that does not count in an evaluation has
    the label IGNORED.

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
            raise ValueError(f"mean and std must be three numbers each, std positive, but are {mean} and {std}.")
        if views not in (1, 2):
            raise ValueError(f"views must be 1 or 2, but is {views}.")
        self.class_names = list(class_names)
        self.num_rows = num_rows
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.seed = seed
        self.views = views
        self.augmented = augmented
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


def pixel_scale(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Two (3, 1, 1) float32 with which bytes * scale + shift is (bytes / 255 - mean) / std."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    return (1 / (255 * std)).float(), (-mean / std).float()
