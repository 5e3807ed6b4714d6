"""Data set of large images that are decoded on demand."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .columns import ImageSplit
from .decode import BadImageError, cell_bytes, decode_cell
from .source import IndexedImageSource
from .transforms import ImageTransform, make_views

_MAX_BAD_RUN = 100  # consecutive bad rows after which the data set, and not a few files, is broken


class LazyImageDataset(IndexedImageSource):
    """Images decoded anew each time, in DataLoader workers, and returned in finished batches.

        DataLoader(dataset, batch_size=128, shuffle=True, num_workers=8, collate_fn=collate_batch)

    Args:
        split: from `load_image_splits`.
        transform: `RandomResizedCrop(...)` or `CenterCrop(...)`; sets the image size, mean and std.
        seed: of the augmentation.
        views: 2 adds a strong view of each image: `transform` with other draws, RandAugment, cutout. It may be changed
            before the first batch is read.
        skip_bad_images: treatment of an image that cannot be decoded. False: raise BadImageError, which names it. True:
            warn and count it in `num_skipped`. In training the next good row replaces it. In evaluation it becomes a
            black image whose label does not count.

    Raises:
        HfkdError: a label is no class, or `views` is not 1 or 2.
    """

    def __init__(
        self,
        split: ImageSplit,
        *,
        transform: ImageTransform,
        seed: int = 0,
        views: int = 1,
        skip_bad_images: bool = False,
    ):
        super().__init__(
            split.class_names,
            num_rows=len(split),
            image_size=transform.image_size,
            mean=transform.mean,
            std=transform.std,
            seed=seed,
            views=views,
            augmented=transform.augmented,
            has_labels=split.has_labels,
        )
        self.name = split.name
        self.labels = torch.from_numpy(split.labels())
        self.transform = transform
        self.skip_bad_images = skip_bad_images
        self._column = split.image_column
        self._rows = split.dataset.select_columns(split.image_column).with_format("arrow")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a finished batch, see `ImageSource`.

        Args:
            indices: B numbers in 0 ... N - 1.

        Raises:
            BadImageError: an image cannot be decoded. With `skip_bad_images` only in training, after 100 consecutive
                bad images.
        """
        images = self._images(np.array(indices, dtype=np.int64))
        transform, views = self.transform, self.views
        batch = make_views(images, len(indices), transform, seed=self.seed, epoch=self.shown_epoch, views=views)
        rows = batch["index"]
        if self.cache is not None:
            batch |= self.cache.read(self.shown_epoch, rows.numpy())
        labels = self.labels[rows]
        # In training a good row replaces a bad one, so every label counts.
        return batch | {
            "labels": labels if self.augmented else labels.masked_fill_(self.bad_rows[rows], self.uncounted)
        }

    def _images(self, rows: np.ndarray) -> Iterator[tuple[int, Image.Image | None]]:
        """Yield rows and their images one at a time, since a large one may take 100 MB once decoded."""
        for row, cell in zip(rows.tolist(), self._cells(rows), strict=True):
            try:
                yield row, decode_cell(cell, self.name, row)
            except BadImageError as error:
                if not self.skip_bad_images:
                    raise
                yield self._substitute(row, error)

    def _cells(self, rows):
        """Return the undecoded cells of rows, {"bytes", "path"} each."""
        return self._rows[rows][self._column].to_pylist()

    def _image_bytes(self, row):
        try:
            return cell_bytes(self._cells([row])[0])
        except OSError:  # a bad image as any other; reading it for a batch reports it
            return b""

    def _substitute(self, row, error):
        for _ in range(_MAX_BAD_RUN):
            self.note_bad(row, error)
            if not self.augmented:
                return row, None
            row = (row + 1) % len(self)
            try:
                return row, decode_cell(self._cells([row])[0], self.name, row)
            except BadImageError as next_error:
                error = next_error
        raise error
