"""Images: loading by name, decoding once, augmenting a batch at a time."""

from .augment import NoAugmentation, StrongAugmentation, WeakAugmentation
from .columns import ImageSplit
from .datasets import load_image_splits
from .image_dataset import ImageDataset, collate_batch

__all__ = [
    "ImageDataset",
    "ImageSplit",
    "NoAugmentation",
    "StrongAugmentation",
    "WeakAugmentation",
    "collate_batch",
    "load_image_splits",
]
