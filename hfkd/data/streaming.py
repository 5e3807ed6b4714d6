"""A data set of images that is read as a stream: it need not fit into the memory, nor onto the disk."""

from __future__ import annotations

from collections.abc import Iterator
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

_UNITS, _ROWS, _BUFFER = -1, -2, -3  # `view` of the random numbers that make the order; images have 0 and 1

RowSample = tuple[int, Sample | None]  # a row in the split, and what stands there; (0, None) is padding


class StreamingImageDataset(IterableDataset, ImageSource):
    """Images that are read, decoded and augmented as an epoch goes on, and handed over in finished batches.

        dataset.shard(rank, world_size, batch_size=128, drop_last=True)
        loader = DataLoader(dataset, batch_size=None, num_workers=8)
        dataset.set_epoch(epoch)  # before each iteration over the loader

    The number of rows is known beforehand. So `len(dataset)`, the number of batches of this process, is exact, and
    the same for every process.

    Training takes every row once an epoch. The units that are read at once (a row group of a Parquet file, a file of
    a folder) are put into a random order, and so are the rows in each. This sequence is cut into equal parts for the
    processes, and each of them into runs of whole batches for the DataLoader workers. A worker reads its run, unit
    after unit, into a buffer of `shuffle_buffer_size` undecoded images, and draws its batches from there. It holds
    no more than the buffer and a unit. Files of a folder are in random order already, and skip the buffer. Where
    the processes cannot share the rows equally, the last ones repeat some; with `drop_last` the last rows that fill
    no batch are left out, other rows every epoch.

    Evaluation (a transform that does not augment) takes the rows in their order, up to that of the workers' runs. In
    place of repeated rows there are black images with index 0 and a label that does not count.

    The order of a stream is a function of seed, epoch, batch size and the numbers of processes and of DataLoader
    workers. How an image looks is a function of seed, epoch and row alone, as in `LazyImageDataset`.

    Args:
        split: of `open_streams`.
        transform: `RandomResizedCrop(...)` or `CenterCrop(...)`; says the image size, mean and std.
        seed: of the order and of the augmentation.
        views: 2 adds a strong view of each image: `transform` with another draw, RandAugment, cutout. May be changed
            until the first batch is asked for.
        shuffle_buffer_size: rows that each DataLoader worker holds; 8,192 of ImageNet are 0.9 GB.
        skip_bad_images: what to do with an image that cannot be decoded. False: raise BadImageError, which names it.
            True: warn and count it in `num_skipped`; in training the next good row of the batch takes its place, in
            evaluation it becomes a black image whose label does not count.

    Raises:
        ValueError: if `views` is not 1 or 2, or `shuffle_buffer_size` not positive.
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
        )
        if shuffle_buffer_size < 1:
            raise HfkdError(f"shuffle_buffer_size must be at least 1 (no shuffling), but is {shuffle_buffer_size}.")
        self.name = split.name
        self.transform = transform
        self.shuffle_buffer_size = shuffle_buffer_size
        self.skip_bad_images = skip_bad_images
        self._shards = split.shards
        self._first_rows = np.cumsum(split.shards.sizes) - split.shards.sizes  # (U,), of the units
        self._part: _Part | None = None
        # In shared memory, as the epoch is.
        self._skip = torch.zeros((), dtype=torch.int64).share_memory_()

    # ---- Which rows are whose ---------------------------------------------------------------------------------------

    def shard(self, rank: int, world_size: int, batch_size: int, drop_last: bool) -> None:
        """Take this process's part. Call it before a DataLoader is made.

        Args:
            rank: of this process, in 0 ... world_size - 1.
            batch_size: images a batch of this process.
            drop_last: leave out what fills no whole batch of every process.

        Raises:
            ValueError: if `drop_last` leaves nothing.
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
        """The number of batches of this process."""
        if self._part is None:
            raise RunError("Call shard(rank, world_size, batch_size, drop_last) first: it says what a batch is.")
        return self._part.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Change order and augmentation, and skip nothing. Call it before iterating, since a DataLoader may fetch
        ahead."""
        super().set_epoch(epoch)
        self._skip.fill_(0)

    def skip_batches(self, number: int) -> None:
        """In the epoch that was set last, give {} for the first batches of this process, at no cost; the others are
        what they would have been. The next `set_epoch` ends it. Call it before iterating."""
        self._skip.fill_(number)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """This process's batches, or those of them that are a DataLoader worker's.

        Raises:
            RuntimeError: if the data has become shorter since `open_streams`, or can no longer be read.
            BadImageError: for an image that cannot be decoded; with `skip_bad_images` only in training, if none of a
                batch can.
        """
        number, worker = len(self), get_worker_info()
        worker, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        skipped = len(range(worker, min(int(self._skip), number), workers))
        # A generator of its own, so that all of this is read now and not when the first batch is asked for.
        return self._batches(*self._part.run(worker, workers), skipped, self.epoch)

    def first_batch(self, size: int) -> dict[str, Tensor]:
        """The first `size` rows of the split that can be decoded, or all of fewer, as a batch: to try out what is to
        be trained."""
        rows = (row for unit in self._units(0, self.num_rows, epoch=None) for row in self._read(*unit))
        return self._batch(list(islice(filter(self._can_be_decoded, rows), size)), self.epoch)

    def _can_be_decoded(self, sample: RowSample) -> bool:
        row, (cell, _) = sample
        try:
            decode_cell(cell, self.name, row)
        except BadImageError as error:
            self._count_bad(row, error)
            return False
        return True

    # ---- Reading -----------------------------------------------------------------------------------------------------

    def _batches(self, start, rows, skipped, epoch):
        yield from ({} for _ in range(skipped))
        size = self._part.batch_size
        samples = self._samples(start, rows, skipped * size, epoch)
        while batch := list(islice(samples, size)):
            yield self._batch(batch, epoch)

    def _samples(self, start, rows, first, epoch) -> Iterator[RowSample]:
        """The rows `start` ... `start + rows` of the sequence as the buffer gives them out, from the `first` on."""
        real = rows if self.augmented else max(0, min(rows, self.num_rows - start))
        order = self._buffered_order(start, real, epoch)
        turn = np.empty_like(order)  # when each row is given out
        turn[order] = np.arange(real)
        units = self._units(start, real, epoch if self.augmented else None)
        held: dict[int, RowSample] = {}
        entered = 0
        for position in order[first:].tolist():
            while position >= entered:
                unit, within = next(units)
                due = np.flatnonzero(turn[entered : entered + len(within)] >= first)
                if len(due):  # a unit that is skipped as a whole is not read
                    held.update(zip((entered + due).tolist(), self._read(unit, within[due]), strict=True))
                entered += len(within)
            yield held.pop(position)
        yield from ((0, None) for _ in range(max(first, real), rows))

    def _units(self, start, rows, epoch) -> Iterator[tuple[int, np.ndarray]]:
        """The units of a part of the sequence and the rows in each, in the order of an epoch; None: as they are."""
        sizes = self._shards.sizes
        units = np.arange(len(sizes)) if epoch is None else self._shuffled(np.arange(len(sizes)), epoch, _UNITS)
        ends = np.cumsum(sizes[units])
        start %= self.num_rows  # repeated rows are the first of the sequence
        place = int(np.searchsorted(ends, start, side="right"))
        before = start - int(ends[place] - sizes[units[place]])
        while rows:
            unit = int(units[place % len(units)])
            within = np.arange(sizes[unit])
            if epoch is not None and len(within) > 1:
                within = self._shuffled(self._first_rows[unit] + within, epoch, _ROWS) - self._first_rows[unit]
            within = within[before : before + rows]
            yield unit, within
            before, rows, place = 0, rows - len(within), place + 1

    def _shuffled(self, values, epoch, purpose):
        return values[random_bits(self.seed, epoch, values, purpose, 1)[:, 0].argsort()]

    def _buffered_order(self, start, rows, epoch):
        """In which order the buffer gives out the rows that are read, (rows,) int64."""
        if not self.augmented or self._shards.sizes.max() == 1:  # units of one row are in random order already
            return np.arange(rows)
        bits = random_bits(self.seed, epoch, np.arange(start, start + rows), _BUFFER, 1)[:, 0]
        return buffered_order(bits, self.shuffle_buffer_size)

    def _read(self, unit, within) -> list[RowSample]:
        rows = (self._first_rows[unit] + within).tolist()
        return list(zip(rows, self._shards.read(unit, within), strict=True))

    # ---- Decoding ----------------------------------------------------------------------------------------------------

    def _batch(self, samples, epoch):
        labels: list[int] = []
        images = self._images(samples, labels)
        batch = make_views(images, len(samples), self.transform, seed=self.seed, epoch=epoch, views=self.views)
        return batch | {"labels": torch.tensor(labels)}

    def _images(self, samples, labels) -> Iterator[tuple[int, Image.Image | None]]:
        """Rows and their images, one at a time: a large one may take 100 MB once decoded. Adds to `labels`."""
        for position, (row, sample) in enumerate(samples):
            image, label = None, self.IGNORED
            if sample is not None:
                cell, label = sample
                try:
                    image = decode_cell(cell, self.name, row)
                except BadImageError as error:
                    self._count_bad(row, error)
                    following = samples[position + 1 :] + samples[:position]
                    row, image, label = self._first_good(following) if self.augmented else (row, None, self.IGNORED)
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
                continue  # its turn to be counted comes
        raise BadImageError(f"{self.name}: none of the {len(samples) + 1} images of a batch can be decoded.")


@dataclass(frozen=True)
class _Part:
    """A process's part of the sequence of rows."""

    start: int
    rows: int
    batch_size: int

    @property
    def num_batches(self) -> int:
        return -(-self.rows // self.batch_size)

    def run(self, worker: int, workers: int) -> tuple[int, int]:
        """First row and number of rows of a DataLoader worker.

        A DataLoader takes batches from its workers in turn, so that batch k comes from worker k % workers. Only the
        last one may be smaller.
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
    """The order in which a shuffle buffer gives out rows: at each step one of those it holds, and takes in the next.

    Args:
        bits: (N,) uint64, random, one for each of N rows.
        size: how many rows the buffer holds, at least 1.

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
