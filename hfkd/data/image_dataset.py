"""Data set of small images in memory that returns finished batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import default_data_collator

from ..errors import HfkdError
from .augment import BatchTransform, NoAugmentation, StrongAugmentation, random_bits
from .columns import ImageSplit
from .decode import decode_split
from .decoded import kept_images
from .source import IndexedImageSource, pixel_scale

# Entries of a batch that hfkd reads, and the names that transformers' collator turns into `labels`.
BATCH_ENTRIES = ("pixel_values", "pixel_values_strong", "labels", "label", "label_ids", "index")


def collate_batch(samples: dict[str, Tensor] | list[Any]) -> dict[str, Tensor]:
    """Return a batch, as a `collate_fn`: an ImageDataset gives whole batches, other data sets a list of samples.

    A sample is a dictionary or, as in torchvision, a pair of image and label.

    Raises:
        HfkdError: a sample is a tuple of another length.
    """
    if isinstance(samples, dict):
        return samples
    if isinstance(samples[0], (tuple, list)):
        if len(samples[0]) != 2:
            raise HfkdError(f"An item of the data set must be a pair (image, label), not {len(samples[0])} values.")
        samples = [{"pixel_values": image, "labels": label} for image, label in samples]
    return default_data_collator(samples)


class ImageDataset(IndexedImageSource):
    """Decoded images in memory, augmented and normalised a batch at a time.

    A DataLoader passes the indices of a batch to `__getitems__` and gets that batch:

        DataLoader(dataset, batch_size=64, shuffle=True, collate_fn=collate_batch)

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64 in 0 ... C - 1, or all IGNORED for images without labels.
        class_names: the C names.
        transform: `WeakAugmentation()`, `NoAugmentation()` or a similar callable, see `hfkd.data.augment`.
        mean, std: three numbers each, of pixels scaled to 0 ... 1.
        seed: of the augmentation.
        views: 2 adds a strong view of each image: `transform` with other draws, RandAugment, cutout. It may be changed
            before the first batch is read.

    Raises:
        HfkdError: there are no images, or an argument is not as above.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        transform: BatchTransform,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        views: int = 1,
    ):
        _check(images, labels)
        super().__init__(
            class_names,
            num_rows=len(images),
            image_size=images.shape[-1],
            mean=mean,
            std=std,
            seed=seed,
            views=views,
            augmented=not isinstance(transform, NoAugmentation),
            has_labels=bool((labels != self.IGNORED).any()),
        )
        self.images = images
        self.labels = labels
        self.transform = transform
        self.strong_transform = StrongAugmentation(transform)
        self._scale, self._shift = pixel_scale(mean, std)

    @classmethod
    def from_split(
        cls,
        split: ImageSplit,
        *,
        image_size: int,
        skip_bad_images: bool = False,
        decoded_cache: bool = False,
        **arguments: Any,
    ) -> "ImageDataset":
        """Decode a split of `load_image_splits`.

        Args:
            skip_bad_images: leave out images that cannot be decoded; `index` counts the remaining images.
            decoded_cache: keep the decoded images in a file for later runs, see `hfkd.data.decoded`.
            **arguments: the constructor's from `transform` on.

        Raises:
            HfkdError: see `hfkd.data.decode.decode_split`.
        """
        decode = kept_images if decoded_cache else decode_split
        images, rows = decode(split, image_size, skip_bad_images)
        dataset = cls(images, torch.from_numpy(split.labels()[rows]), split.class_names, **arguments)
        dataset.bad_rows = torch.ones(len(split), dtype=torch.bool)
        dataset.bad_rows[torch.from_numpy(rows)] = False
        return dataset

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> "ImageDataset":
        """Move images and labels to a device, where batches are then made; only without DataLoader workers."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a finished batch on the device of the images, without waiting for the device.

        Args:
            indices: B numbers in 0 ... N - 1.

        Returns:
            pixel_values (B, 3, H, W) float32; with two views pixel_values_strong, of the same shape; labels (B,) int64;
            index (B,) int64; and the entries of `cache` for these rows.
        """
        rows = np.array(indices, dtype=np.int64)
        index = torch.from_numpy(rows).to(self.device, non_blocking=True)
        images = self.images.index_select(0, index)
        batch = {"pixel_values": self._make_view(images, rows, self.transform, 0)}
        if self.views == 2:
            batch["pixel_values_strong"] = self._make_view(images, rows, self.strong_transform, 1)
        batch |= {"labels": self.labels.index_select(0, index), "index": index}
        if self.cache is None:
            return batch
        cached = self.cache.read(self.shown_epoch, rows)
        return batch | {key: value.to(self.device, non_blocking=True) for key, value in cached.items()}

    def _make_view(self, images, rows, transform, view):
        bits = random_bits(self.seed, self.shown_epoch, rows, view, transform.draws)
        # Three passes that vectorise. addcmul does not vectorise and takes three times as long.
        return transform(images, bits).float().mul_(self._scale).add_(self._shift)

    def _image_bytes(self, row):
        return self.images[row].cpu().numpy().tobytes()


def _check(images, labels):
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise HfkdError(f"images must be (N, 3, H, W) uint8, but are {tuple(images.shape)} {images.dtype}.")
    if len(images) == 0:
        raise HfkdError("There are no images: images must be (N, 3, H, W) with N at least 1.")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise HfkdError(
            f"labels must be ({len(images)},) int64, one an image, but are {tuple(labels.shape)} {labels.dtype}."
        )
