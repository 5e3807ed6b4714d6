"""Data loaders: small images on the device, streams shared out among the processes, no evaluation image dropped."""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..data import ImageDataset, ImageSource, StreamingImageDataset
from ..data.source import RowCache
from ..data.subsets import image_source
from ..recipe.arguments import DistillationConfig
from .preemption import end_workers_at_exit, ignore_signals


def place_images(
    train_dataset, eval_dataset, views: int, cache: RowCache | None, args: DistillationConfig
) -> ImageSource | None:
    """Move small images to the training device, where they are augmented.

    Args:
        views: augmented views of each training image.
        cache: teacher logits that batches of the training data carry along.

    Returns:
        The hfkd data set that is trained on, None for another one.
    """
    for dataset in (image_source(train_dataset), image_source(eval_dataset)):
        if isinstance(dataset, ImageDataset) and args.dataloader_num_workers == 0:
            dataset.to(args.device)
            args.dataloader_pin_memory = False  # the batches are on the device already
    train_images = image_source(train_dataset)
    if train_images is not None:
        train_images.views, train_images.cache = views, cache
    return train_images


def first_images(dataset, collate: Callable) -> dict[str, Tensor] | None:
    """Return a batch of the first and the last image, of a stream the first two; None for a dict or no data set."""
    source = image_source(dataset)
    if isinstance(source, StreamingImageDataset):
        return source.first_batch(2)
    if dataset is None or isinstance(dataset, dict):
        return None
    if isinstance(dataset, IterableDataset):
        samples = list(itertools.islice(dataset, 2))
    else:
        pair = [0, len(dataset) - 1]
        samples = [dataset[i] for i in pair] if source is None else dataset.__getitems__(pair)
    return collate(samples)


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
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


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
