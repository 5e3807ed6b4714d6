"""Data set of streamed images, which need not fit into memory or onto the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import HfkdError, RunError
from .augment import random_bits, random_integers
from .decode import BadImageError, decode_cell
from .shards import Sample, StreamSplit
from .source import ImageSource
from .transforms import ImageTransform, make_views

_UNITS, _ROWS, _BUFFER = -1, -2, -3  # `view` of the random numbers of the order; images use 0 and 1

RowSample = tuple[int, Sample | None]  # a row in the split and its sample; (0, None) is padding


class StreamingImageDataset(IterableDataset, ImageSource):
    """Images that are read, decoded and augmented during an epoch, and returned in finished batches.

        dataset.shard(rank, world_size, batch_size=128, drop_last=True)
        loader = DataLoader(dataset, batch_size=None, num_workers=8)
        dataset.set_epoch(epoch)  # before each iteration over the loader

    The number of rows is known beforehand. So `len(dataset)`, the number of batches of this process, is exact, and it
    is the same for every process.

    Training takes every row once an epoch. The units that are read at once (a row group of a Parquet file, a file of a
    folder) are put into a random order, and so are the rows in each. This sequence is cut into equal parts for the
    processes, and each part into runs of whole batches for the DataLoader workers. A worker reads the units of its run
    one after the other into a buffer of `shuffle_buffer_size` undecoded images, and draws its batches from the buffer.
    It holds at most the buffer and one unit. Files of a folder are already in random order, and skip the buffer. If the
    processes cannot share the rows equally, the last ones repeat some. With `drop_last` the last rows, which fill no
    batch, are left out; they are other rows every epoch.

    Evaluation (a transform that does not augment) takes the rows in order, except that batches of different workers
    alternate. Black images with index 0 and a label that does not count replace repeated rows.

    The order of a stream is a function of seed, epoch, batch size and the numbers of processes and of DataLoader
    workers. How an image looks is a function of seed, epoch and row alone, as in `LazyImageDataset`.

    Args:
        split: from `open_streams`.
        transform: `RandomResizedCrop(...)` or `CenterCrop(...)`; sets the image size, mean and std.
        seed: of the order and of the augmentation.
        views: 2 adds a strong view of each image: `transform` with other draws, RandAugment, cutout. It may be changed
            before the first batch is read.
        shuffle_buffer_size: rows that each DataLoader worker holds; 8,192 of ImageNet are 0.9 GB.
        skip_bad_images: treatment of an image that cannot be decoded. False: raise BadImageError, which names it. True:
            warn and count it in `num_skipped`. In training the next good row of the batch replaces it. In evaluation it
            becomes a black image whose label does not count.

    Raises:
        HfkdError: `views` is not 1 or 2, or `shuffle_buffer_size` is not positive.
    """

    def __init__(
        self,
        split: StreamSplit,
        *,
        transform: ImageTransform,
        seed: int = 0,
        views: int = 1,
        shuffle_buffer_size: int = 8192,
        skip_bad_images: bool = False,
    ):
        super().__init__(
            split.class_names,
            num_rows=split.num_rows,
            image_size=transform.image_size,
            mean=transform.mean,
            std=transform.std,
            seed=seed,
            views=views,
            augmented=transform.augmented,
            has_labels=split.has_labels,
        )
        if shuffle_buffer_size < 1:
            raise HfkdError(f"shuffle_buffer_size must be at least 1 (no shuffling), but is {shuffle_buffer_size}.")
        self.name = split.name
        self.transform = transform
        self.shuffle_buffer_size = shuffle_buffer_size
        self.skip_bad_images = skip_bad_images
        self._shards = split.shards
        self._first_rows = np.cumsum(split.shards.sizes) - split.shards.sizes  # (U,), the first row of each unit
        self._part: _Part | None = None
        # In shared memory, as the epoch, so that DataLoader workers see it.
        self._skip = torch.zeros((), dtype=torch.int64).share_memory_()

    # ---- Sharding ---------------------------------------------------------------------------------------

    def shard(self, rank: int, world_size: int, batch_size: int, drop_last: bool) -> None:
        """Select this process's part. Call it before a DataLoader is made.

        Args:
            rank: of this process, in 0 ... world_size - 1.
            batch_size: images in a batch of this process.
            drop_last: leave out rows that fill no whole batch of every process.

        Raises:
            HfkdError: `drop_last` leaves no rows.
        """
        rows = -(-self.num_rows // world_size)
        if drop_last:
            rows = self.num_rows // (world_size * batch_size) * batch_size
            if rows == 0:
                raise HfkdError(
                    f"{self.name}: {self.num_rows} rows fill no batch of {batch_size} for each of {world_size} "
                    "processes. Set a smaller batch size, or dataloader_drop_last: false."
                )
        self._part = _Part(rank * rows, rows, batch_size)

    def __len__(self) -> int:
        """Return the number of batches of this process."""
        return self._own_part().num_batches

    def _own_part(self) -> _Part:
        if self._part is None:
            raise RunError("Call shard(rank, world_size, batch_size, drop_last) first: it sets the size of a batch.")
        return self._part

    def set_epoch(self, epoch: int) -> None:
        """Change order and augmentation, and skip no batches.

        Call it before iterating, since a DataLoader may fetch batches ahead.
        """
        super().set_epoch(epoch)
        self._skip.fill_(0)

    def skip_batches(self, number: int) -> None:
        """Return {} for the first batches of this process in the current epoch, without reading them.

        The other batches are the same as without skipping. The next `set_epoch` ends it. Call it before iterating.
        """
        self._skip.fill_(number)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Iterate over this process's batches, in a DataLoader worker over the worker's share of them.

        Raises:
            RunError: the data has become shorter since `open_streams`, or can no longer be read.
            BadImageError: an image cannot be decoded. With `skip_bad_images` only in training, if no image of a batch
                can be decoded.
        """
        number, info = len(self), get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        skipped = len(range(worker, min(int(self._skip), number), workers))
        # A separate generator: epoch and skipped batches are read now and not when the first batch is requested.
        return self._batches(*self._own_part().run(worker, workers), skipped, self.epoch)

    def first_batch(self, size: int) -> dict[str, Tensor]:
        """Return the first `size` decodable rows of the split, or all of fewer, as a batch for a trial step."""
        rows = (row for unit in self._units(0, self.num_rows, epoch=None) for row in self._read(*unit))
        decodable = filter(self._can_be_decoded, rows)
        return self._batch(list(islice(decodable, size)), self.epoch)

    def _can_be_decoded(self, sample: tuple[int, Sample]) -> bool:
        row, (cell, _) = sample
        try:
            decode_cell(cell, self.name, row)
        except BadImageError as error:
            self._count_bad(row, error)
            return False
        return True

    # ---- Reading -----------------------------------------------------------------------------------------------------

    def _batches(self, start, rows, skipped, epoch):
        # Resuming within an epoch: the DataLoader must count skipped batches to take its workers in turn, so they are
        # yielded empty. The order is computed from the start of the epoch, so the other batches stay the same.
        yield from ({} for _ in range(skipped))
        size = self._part.batch_size
        samples = self._samples(start, rows, skipped * size, epoch)
        while batch := list(islice(samples, size)):
            yield self._batch(batch, epoch)

    def _samples(self, start, rows, first, epoch) -> Iterator[RowSample]:
        """Yield the rows `start` ... `start + rows` of the sequence in the buffer's order, from the `first` on."""
        num_real = rows if self.augmented else max(0, min(rows, self.num_rows - start))
        order = self._buffered_order(start, num_real, epoch)
        step_of = np.empty_like(order)  # the step at which the buffer gives out each row
        step_of[order] = np.arange(num_real)
        units = self._units(start, num_real, epoch if self.augmented else None)
        buffer: dict[int, RowSample] = {}
        num_read = 0
        for position in order[first:].tolist():
            while position >= num_read:
                unit, unit_rows = next(units)
                needed = np.flatnonzero(step_of[num_read : num_read + len(unit_rows)] >= first)
                if len(needed):  # a unit whose rows are all skipped is not read
                    buffer.update(zip((num_read + needed).tolist(), self._read(unit, unit_rows[needed]), strict=True))
                num_read += len(unit_rows)
            yield buffer.pop(position)
        yield from ((0, None) for _ in range(max(first, num_real), rows))

    def _units(self, start, rows, epoch) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the units of a part of the sequence and the rows in each, in an epoch's order; None: unshuffled."""
        sizes = self._shards.sizes
        units = np.arange(len(sizes)) if epoch is None else self._shuffled(np.arange(len(sizes)), epoch, _UNITS)
        ends = np.cumsum(sizes[units])
        start %= self.num_rows  # rows beyond the end repeat the first of the sequence
        place = int(np.searchsorted(ends, start, side="right"))
        offset = start - int(ends[place] - sizes[units[place]])
        while rows:
            unit = int(units[place % len(units)])
            unit_rows = np.arange(sizes[unit])
            if epoch is not None and len(unit_rows) > 1:
                unit_rows = self._shuffled(self._first_rows[unit] + unit_rows, epoch, _ROWS) - self._first_rows[unit]
            unit_rows = unit_rows[offset : offset + rows]
            yield unit, unit_rows
            offset, rows, place = 0, rows - len(unit_rows), place + 1

    def _shuffled(self, values, epoch, purpose):
        return values[random_bits(self.seed, epoch, values, purpose, 1)[:, 0].argsort()]

    def _buffered_order(self, start, rows, epoch):
        """Return the order in which the buffer gives out the rows that are read, (rows,) int64."""
        if not self.augmented or self._shards.sizes.max() == 1:  # units of one row are already in random order
            return np.arange(rows)
        bits = random_bits(self.seed, epoch, np.arange(start, start + rows), _BUFFER, 1)[:, 0]
        return buffered_order(bits, self.shuffle_buffer_size)

    def _read(self, unit, unit_rows) -> list[tuple[int, Sample]]:
        rows = (self._first_rows[unit] + unit_rows).tolist()
        return list(zip(rows, self._shards.read(unit, unit_rows), strict=True))

    # ---- Decoding ----------------------------------------------------------------------------------------------------

    def _batch(self, samples: Sequence[RowSample], epoch: int) -> dict[str, Tensor]:
        labels: list[int] = []
        images = self._images(samples, labels)
        batch = make_views(images, len(samples), self.transform, seed=self.seed, epoch=epoch, views=self.views)
        return batch | {"labels": torch.tensor(labels)}

    def _images(self, samples, labels) -> Iterator[tuple[int, Image.Image | None]]:
        """Yield rows and their images one at a time, since a large one may take 100 MB; append to `labels`."""
        for position, (row, sample) in enumerate(samples):
            image, label = None, self.uncounted
            if sample is not None:
                cell, label = sample
                try:
                    image = decode_cell(cell, self.name, row)
                except BadImageError as error:
                    self._count_bad(row, error)
                    following = samples[position + 1 :] + samples[:position]
                    row, image, label = self._first_good(following) if self.augmented else (row, None, self.uncounted)
            labels.append(label)
            yield row, image

    def _count_bad(self, row, error):
        if not self.skip_bad_images:
            raise error
        self.note_bad(row, error)

    def _first_good(self, samples):
        for row, (cell, label) in samples:
            try:
                return row, decode_cell(cell, self.name, row), label
            except BadImageError:
                continue  # it is counted when its own row is decoded
        raise BadImageError(f"{self.name}: none of the {len(samples) + 1} images of a batch can be decoded.")


@dataclass(frozen=True)
class _Part:
    """Part of the sequence of rows that belongs to one process."""

    start: int
    rows: int
    batch_size: int

    @property
    def num_batches(self) -> int:
        return -(-self.rows // self.batch_size)

    def run(self, worker: int, workers: int) -> tuple[int, int]:
        """Return the first row and the number of rows of a DataLoader worker.

        A DataLoader takes batches from its workers in turn, so batch k comes from worker k % workers. Each worker gets
        one contiguous run of rows: with every k-th batch of the sequence, every worker would read every unit. Only the
        last batch may be smaller.
        """
        missing = self.num_batches * self.batch_size - self.rows
        last = (self.num_batches - 1) % workers
        start = self.start
        for other in range(worker + 1):
            rows = len(range(other, self.num_batches, workers)) * self.batch_size - missing * (other == last)
            if other < worker:
                start += rows
        return start, rows


def buffered_order(bits: np.ndarray, size: int) -> np.ndarray:
    """Return the order in which a shuffle buffer gives out rows: at each step one of its rows, replaced by the next.

    Args:
        bits: (N,) uint64, random, one for each of N rows.
        size: number of rows that the buffer holds, at least 1.

    Returns:
        (N,) int64, a permutation of 0 ... N - 1; position k holds one of 0 ... k + size - 1.
    """
    number = len(bits)
    choices = random_integers(bits, np.minimum(size, number - np.arange(number))).tolist()
    buffer = list(range(min(size, number)))
    order = []
    for step, slot in enumerate(choices):
        order.append(buffer[slot])
        if step + size < number:
            buffer[slot] = step + size
        else:
            buffer[slot] = buffer[-1]
            buffer.pop()
    return np.array(order, dtype=np.int64)
