"""The hfkd data set behind a subset, and the labels of its rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..errors import HfkdError
from . import ImageSource, IndexedImageSource, LazyImageDataset


def image_source(dataset) -> ImageSource | None:
    """The data set of ours that a data set is, or is a subset of."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset if isinstance(dataset, ImageSource) else None


def training_labels(dataset) -> Tensor:
    """The labels (N,) of a data set's rows, as its batches' `index` counts them; IGNORED for rows not in a subset.

    Raises:
        ValueError: for a data set that is not ours, whose batches hold no such rows, or one that is streamed.
    """
    source = image_source(dataset)
    if not isinstance(source, IndexedImageSource):
        raise HfkdError(
            "it remembers every training image, so it needs the images' rows and labels, and a "
            f"{type(source or dataset).__name__} does not know them. Set streaming to false, or take a data set of "
            "hfkd.data."
        )
    if dataset is not source and isinstance(source, LazyImageDataset) and source.skip_bad_images:
        raise HfkdError(
            "it remembers the images of a Subset, and with skip_bad_images an image beside the subset may stand in for "
            "a bad one: make the data set of the rows that are to be trained on, such as train_split: train[:10%]"
        )
    rows = torch.arange(len(dataset))
    while isinstance(dataset, Subset):
        rows, dataset = torch.as_tensor(dataset.indices)[rows], dataset.dataset
    labels = source.labels.cpu()
    return torch.full_like(labels, ImageSource.IGNORED).index_copy(0, rows, labels[rows])
