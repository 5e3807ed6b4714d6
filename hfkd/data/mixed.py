"""Data set of images with labels whose batches end in images without labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import HfkdError
from .source import IndexedImageSource


class MixedImageDataset(IndexedImageSource):
    """Images with labels, to each batch of which a fixed number of images without labels is added.

    Rows and epochs are those of the labelled images: a DataLoader draws from them, and an epoch takes each of them
    once. The images without labels follow one another in a random order, in which each comes once before any comes
    again (but for `unlabelled_images` that is no multiple of the labelled ones). Which ones a batch gets is a function
    of seed, epoch and the batch's labelled rows, so that it depends neither on workers nor on an interruption.

    Args:
        labelled, unlabelled: `ImageDataset` or `LazyImageDataset`, both of the same size and normalisation; labels of
            the latter are not read.
        unlabelled_images: in each batch.
        batch_size: images in a batch of both kinds, of which the labelled ones are drawn.

    Raises:
        HfkdError: a batch would hold only images of one kind, or the sizes differ.
    """

    def __init__(
        self, labelled: IndexedImageSource, unlabelled: IndexedImageSource, *, unlabelled_images: int, batch_size: int
    ):
        if not 0 < unlabelled_images < batch_size:
            raise HfkdError(
                f"A batch of {batch_size} images would hold {unlabelled_images} without labels: give another "
                "unlabelled_share, or a larger batch."
            )
        if (labelled.image_size, labelled.mean, labelled.std) != (
            unlabelled.image_size,
            unlabelled.mean,
            unlabelled.std,
        ):
            raise HfkdError("Images with and without labels must have the same size and normalisation.")
        self.labelled, self.unlabelled = labelled, unlabelled
        super().__init__(
            labelled.class_names,
            num_rows=labelled.num_rows + unlabelled.num_rows,
            image_size=labelled.image_size,
            mean=labelled.mean,
            std=labelled.std,
            seed=labelled.seed,
            views=labelled.views,
            augmented=labelled.augmented,
        )
        # One mask, so that bad images of both are counted.
        self.bad_rows = torch.cat([labelled.bad_rows, unlabelled.bad_rows]).share_memory_()
        labelled.bad_rows, unlabelled.bad_rows = self.bad_rows.split([len(labelled.bad_rows), len(unlabelled.bad_rows)])
        self.unlabelled_images = unlabelled_images
        self.labelled_images = batch_size - unlabelled_images
        self._orders: dict[int, np.ndarray] = {}  # of the passes that an epoch comes to, by their numbers
        self._orders_epoch = -1

    @property
    def parts(self) -> tuple[IndexedImageSource, IndexedImageSource]:
        return self.labelled, self.unlabelled

    def describe(self) -> str:
        """Return the numbers of images in words."""
        return (
            f"{self.labelled.num_rows:,} training images and {self.unlabelled.num_rows:,} without labels "
            f"({self.labelled_images} and {self.unlabelled_images} in a batch)"
        )

    @property
    def labels(self) -> Tensor:  # type: ignore[override]  # of the rows that a DataLoader draws from
        return self.labelled.labels

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.labelled.set_epoch(epoch)
        self.unlabelled.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of the labelled images, followed by images without labels; see `ImageSource`.

        `index` counts the images without labels behind all labelled ones.
        """
        batch = self.labelled.__getitems__(indices)
        rows = self._unlabelled_rows(np.array(indices, dtype=np.int64))
        others = self.unlabelled.__getitems__(rows.tolist())
        others["labels"] = torch.full_like(others["labels"], self.IGNORED)
        others["index"] = others["index"] + self.labelled.num_rows
        return {name: torch.cat([value, others[name]]) for name, value in batch.items()}

    def _unlabelled_rows(self, labelled_rows: np.ndarray) -> np.ndarray:
        """Return the rows of the images without labels in a batch.

        Each labelled row of each epoch has its own places in the endless sequence of images without labels.
        """
        slots = np.arange(self.unlabelled_images)
        each = -(-self.unlabelled_images // self.labelled_images)  # places of one labelled row
        rows = labelled_rows[slots % len(labelled_rows)]
        places = (self.epoch * len(self) + rows) * each + slots // len(labelled_rows)
        number = len(self.unlabelled)
        passes = places // number
        if self._orders_epoch != self.epoch:
            self._orders, self._orders_epoch = {}, self.epoch
        found = np.empty_like(places)
        for one in np.unique(passes).tolist():
            found[passes == one] = self._pass(one)[places[passes == one] % number]
        return found

    def _pass(self, number: int) -> np.ndarray:
        """Return the order of the images without labels in one pass over them."""
        if number not in self._orders:
            generator = np.random.default_rng([self.seed, number])
            self._orders[number] = generator.permutation(len(self.unlabelled))
        return self._orders[number]
