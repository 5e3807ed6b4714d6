"""Data loaders: small images on the device, streams shared out among the processes, no evaluation image dropped."""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..data import ImageDataset, ImageSource, MixedImageDataset, StreamingImageDataset, collate_batch
from ..data.source import RowCache
from ..data.subsets import image_source
from ..errors import HfkdError
from ..recipe.config import DistillationConfig
from .preemption import end_workers_at_exit, ignore_signals


def data_sets(given: Any) -> list[Any]:
    """Return a data set, or those of a dictionary, as a list; an empty one for None."""
    if given is None:
        return []
    return list(given.values()) if isinstance(given, dict) else [given]


def first_set(given: Any) -> Any:
    """Return a data set, or the first one of a dictionary."""
    return next(iter(data_sets(given)), None)


def place_images(
    train_dataset, eval_sets: Sequence[Any], views: int, cache: RowCache | None, args: DistillationConfig
) -> ImageSource | None:
    """Move small images to the training device, where they are augmented.

    Args:
        eval_sets: the evaluation data sets.
        views: augmented views of each training image.
        cache: teacher logits that batches of the training data carry along.

    Returns:
        The hfkd data set that is trained on, None for another one.
    """
    for dataset in (*_parts(train_dataset), *map(image_source, eval_sets)):
        if isinstance(dataset, ImageDataset) and args.dataloader_num_workers == 0:
            dataset.to(args.device)
            args.dataloader_pin_memory = False  # the batches are on the device already
    claim_images(train_dataset, views, cache)
    return image_source(train_dataset)


def claim_images(train_dataset, views: int, cache: RowCache | None) -> None:
    """Have the batches of training images carry what this trainer reads, where another one may have set its own.

    Args:
        views: augmented views of each image.
        cache: a teacher's outputs that the batches carry along.
    """
    for dataset in _parts(train_dataset):
        if dataset is not None:
            dataset.views, dataset.cache = views, cache


def _parts(train_dataset) -> Sequence[ImageSource | None]:
    """Return the hfkd data sets that a training reads; None for another one."""
    images = image_source(train_dataset)
    return images.parts if isinstance(images, MixedImageDataset) else (images,)


def first_images(dataset, collate: Callable) -> dict[str, Tensor] | None:
    """Return a batch of the first and the last image, of a stream the first two; None for no data set.

    Raises:
        HfkdError: if the images do not make a batch that hfkd can read.
    """
    source = image_source(dataset)
    if isinstance(source, StreamingImageDataset):
        return source.first_batch(2)
    if dataset is None:
        return None
    if isinstance(dataset, IterableDataset):
        samples = list(itertools.islice(dataset, 2))
    else:
        pair = [0, len(dataset) - 1]
        samples = [dataset[i] for i in pair] if source is None else dataset.__getitems__(pair)
    try:
        return collate(samples)
    except HfkdError:
        raise
    except Exception as error:  # whatever a data set of the user's makes a collator raise
        raise HfkdError(
            f"The data set's items make no batch ({type(error).__name__}: {error}). Each must hold pixel_values, a "
            "float tensor (3, H, W), and labels; remove_unused_columns=True leaves out other columns. With a data set "
            "of hfkd.data give no data_collator."
        ) from error


def check_batch(batch: Any) -> None:
    """Check that a batch holds images and labels.

    Raises:
        HfkdError: if it does not.
    """
    found = dict(batch) if isinstance(batch, Mapping) else {}
    pixels, labels = found.get("pixel_values"), found.get("labels")
    images = isinstance(pixels, Tensor) and pixels.ndim == 4 and pixels.is_floating_point()
    if not images or not isinstance(labels, Tensor) or labels.shape != pixels.shape[:1]:
        parts = [f"{name} {tuple(each.shape)} {each.dtype}" for name, each in found.items() if isinstance(each, Tensor)]
        raise HfkdError(
            f"A batch must hold pixel_values (B, 3, H, W), float, and labels (B,); this one holds "
            f"{', '.join(parts) or type(batch).__name__}."
        )


def stream_loader(dataset: StreamingImageDataset, args: DistillationConfig, is_training: bool) -> DataLoader:
    """Return a loader of this process's share of a stream, in finished batches.

    accelerate must not prepare it: that would share the batches out among the processes a second time.
    """
    workers = args.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        # The workers of an evaluation would wait through the training that follows.
        persistent_workers=is_training and workers > 0 and args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        # transformers has this key since 5.16.
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
    )


def plain_loader(dataset: ImageSource, batch_size: int, num_workers: int) -> DataLoader:
    """Return a loader of all images in order, in finished batches, for one process and no trainer."""
    if isinstance(dataset, StreamingImageDataset):
        dataset.shard(0, 1, batch_size, drop_last=False)
        return DataLoader(dataset, batch_size=None, num_workers=num_workers)
    return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_batch)


def evaluation_share(
    dataset: StreamingImageDataset, args: DistillationConfig, batch_size: int, is_trained_on: bool
) -> StreamingImageDataset:
    """Share out a stream for an evaluation, a copy of it if it is also trained on and has its share there."""
    dataset = copy.copy(dataset) if is_trained_on else dataset
    dataset.shard(args.process_index, args.world_size, batch_size, drop_last=False)
    return dataset


def without_signals(loader: DataLoader) -> DataLoader:
    """Let the workers of a loader ignore SIGTERM, SIGINT and SIGHUP while this process lives, and return the loader."""
    if loader.num_workers:
        end_workers_at_exit(os.getpid())
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper holds the loader that has the workers
    inner.worker_init_fn = functools.partial(ignore_signals, inner.worker_init_fn)
    return loader


def skipped_images(key: str, dataset, args: DistillationConfig) -> dict[str, int]:
    """Return {key: images of all processes that could not be decoded}, or nothing if all could."""
    source = image_source(dataset)
    if source is None:
        return {}
    bad = source.bad_rows.to(args.device, torch.int32)
    if args.world_size > 1:
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
    return {key: int(bad.sum())} if bad.any() else {}
