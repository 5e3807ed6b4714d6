"""Image data sets: loading by name, decoding, streaming, augmentation of batches.

A data set of this room returns finished batches, and the look of an image depends only on seed, epoch, index and view.
The room imports only errors, names and plots; it never imports networks, training, recipe, losses or models.
"""

from .augment import NoAugmentation, StrongAugmentation, WeakAugmentation
from .columns import ImageSplit
from .datasets import load_image_splits
from .image_dataset import ImageDataset, collate_batch
from .lazy import LazyImageDataset
from .mixed import MixedImageDataset
from .shards import StreamSplit, open_streams
from .source import ImageSource, IndexedImageSource
from .streaming import StreamingImageDataset
from .transforms import CenterCrop, RandomResizedCrop

__all__ = [
    "CenterCrop",
    "ImageDataset",
    "ImageSource",
    "ImageSplit",
    "IndexedImageSource",
    "LazyImageDataset",
    "MixedImageDataset",
    "NoAugmentation",
    "RandomResizedCrop",
    "StreamSplit",
    "StreamingImageDataset",
    "StrongAugmentation",
    "WeakAugmentation",
    "collate_batch",
    "load_image_splits",
    "open_streams",
]
