"""A data set of small images that hands over finished batches."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import default_data_collator

from .augment import StrongAugmentation, random_bits
from .columns import ImageSplit
from .decode import decode_split


def collate_batch(samples: dict[str, Tensor] | list[dict[str, Any]]) -> dict[str, Tensor]:
    """A `collate_fn`: an ImageDataset hands over whole batches, other data sets a list of samples."""
    return samples if isinstance(samples, dict) else default_data_collator(samples)


class ImageDataset(Dataset):
    """Decoded images in memory, augmented and normalised a batch at a time.

    A DataLoader hands `__getitems__` the indices of a batch and gets that batch:

        DataLoader(dataset, batch_size=64, shuffle=True, collate_fn=collate_batch)

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64 in 0 ... C - 1.
        class_names: the C names.
        transform: `WeakAugmentation()`, `NoAugmentation()` or a callable like them, see `hfkd.data.augment`.
        mean, std: three numbers each, of pixels scaled to 0 ... 1.
        seed: of the augmentation.
        views: 2 adds a strong view of each image: `transform` with another draw, RandAugment, cutout. May be
            changed until the first batch is asked for.

    Raises:
        ValueError: if there are no images, or an argument is not as above.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        transform: Callable[[Tensor, np.ndarray], Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        views: int = 1,
    ):
        _check(images, labels, mean, std, views)
        self.images = images
        self.labels = labels
        self.class_names = list(class_names)
        self.transform = transform
        self.strong_transform = StrongAugmentation(transform)
        self.seed = seed
        self.views = views
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
        self._scale, self._shift = (1 / (255 * std)).float(), (-mean / std).float()
        # In shared memory, so that DataLoader workers see the epoch change: each holds a copy of this object,
        # and a persistent one is never given a new copy.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @classmethod
    def from_split(cls, split: ImageSplit, *, image_size: int, **arguments: Any) -> "ImageDataset":
        """Decode a split of `load_image_splits`; `arguments` are the constructor's from `transform` on.

        Raises:
            ValueError: see `hfkd.data.decode.decode_split`.
        """
        labels = torch.from_numpy(split.labels())
        return cls(decode_split(split, image_size), labels, split.class_names, **arguments)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> "ImageDataset":
        """Move images and labels, and with them the making of batches; only without DataLoader workers."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    def set_epoch(self, epoch: int) -> None:
        """Change the augmentation. Call it before iterating over a DataLoader, since that may fetch ahead."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """One image: the batch of `__getitems__([i])` without its first dimension.

        Raises:
            IndexError: for i outside -N ... N - 1.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"index {i} is out of range for {len(self)} images")
        return {key: value[0] for key, value in self.__getitems__([i % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A finished batch, on the device of the images, without waiting for it.

        Args:
            indices: B numbers in 0 ... N - 1.

        Returns:
            pixel_values (B, 3, H, W) float32; with two views pixel_values_strong, the same; labels (B,)
            int64; index (B,) int64.
        """
        rows = np.array(indices, dtype=np.int64)
        index = torch.from_numpy(rows).to(self.device, non_blocking=True)
        images = self.images.index_select(0, index)
        batch = {"pixel_values": self._view(images, rows, self.transform, 0)}
        if self.views == 2:
            batch["pixel_values_strong"] = self._view(images, rows, self.strong_transform, 1)
        return batch | {"labels": self.labels.index_select(0, index), "index": index}

    def _view(self, images, rows, transform, view):
        bits = random_bits(self.seed, int(self._epoch), rows, view, transform.draws)
        # Three passes that vectorise: addcmul does not, and takes three times as long.
        return transform(images, bits).float().mul_(self._scale).add_(self._shift)


def _check(images, labels, mean, std, views):
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W) uint8, but are {tuple(images.shape)} {images.dtype}.")
    if len(images) == 0:
        raise ValueError("There are no images.")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be ({len(images)},) int64, one an image, but are {tuple(labels.shape)} "
            f"{labels.dtype}."
        )
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must be three numbers each, std positive, but are {mean} and {std}.")
    if views not in (1, 2):
        raise ValueError(f"views must be 1 or 2, but is {views}.")
