"""Data set behind a subset, and the labels of its rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..errors import HfkdError
from . import ImageSource, IndexedImageSource, LazyImageDataset


def image_source(dataset) -> ImageSource | None:
    """Return the hfkd data set behind a (Subset of a) data set, or None."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset if isinstance(dataset, ImageSource) else None


def training_labels(dataset) -> Tensor:
    """Return the labels (N,) of a data set's rows, as `index` counts them; IGNORED for rows outside a subset.

    Raises:
        HfkdError: the data set is not from hfkd.data, so its batches hold no rows, or it is streamed.
    """
    source = image_source(dataset)
    if not isinstance(source, IndexedImageSource):
        raise HfkdError(
            "it remembers every training image, so it needs the images' rows and labels, and a "
            f"{type(source or dataset).__name__} does not know them. Set streaming to false, or use a data set of "
            "hfkd.data."
        )
    if dataset is not source and isinstance(source, LazyImageDataset) and source.skip_bad_images:
        raise HfkdError(
            "it remembers the images of a Subset, but with skip_bad_images an image outside the subset may replace a "
            "bad one. Select the training rows by a split instead, such as train_split: train[:10%]"
        )
    rows = torch.arange(len(dataset))
    while isinstance(dataset, Subset):
        rows, dataset = torch.as_tensor(dataset.indices)[rows], dataset.dataset
    labels = source.labels.cpu()
    return torch.full_like(labels, ImageSource.IGNORED).index_copy(0, rows, labels[rows])
