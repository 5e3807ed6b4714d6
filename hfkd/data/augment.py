"""Batched, stateless image augmentation.

Every random number is a pure function of (seed, epoch, index, view, draw): a splitmix64 generator (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", 2014) whose key is made of the first four and whose counter is
the fifth. A generator with a state would tie the look of an image to all images drawn before it. Without a state, an
image looks the same in any batch, in any order and with any number of workers or processes. A resumed run sees the
batches of an uninterrupted one without replaying them, and a teacher's outputs can be stored and read back.

The numbers are drawn on the CPU, a dozen for each image, and only pixels are processed on their device. So CPU and CUDA
give the same images, and Python can branch on the numbers without waiting for a device.

A transform is a callable `transform(images, bits)`: images (B, C, H, W) uint8 and bits (B, transform.draws) uint64 give
(B, C, H, W) uint8 on the device of `images`. Its mapping `settings` distinguishes it from other transforms of its
class.
"""

from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .randaugment import OPERATIONS, rand_augment

PADDING = 4  # pixels of black around an image before it is cropped back to its own size
NUM_OPERATIONS = 2  # n of FixMatch's RandAugment
CUTOUT_MAX = 0.5  # largest side of the cut-out square, as a share of the image's width
CUTOUT_COLOUR = (125, 123, 114)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK64 = 2**64 - 1


def mix(bits: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64, a bijection of uint64: every input bit changes half of the output bits."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@lru_cache(maxsize=8)  # the same for every batch of an epoch, and as expensive as hashing 64 indices
def _stream_key(seed: int, epoch: int, view: int) -> np.ndarray:
    key = np.zeros(1, dtype=np.uint64)  # an array: for scalars numpy warns of overflow, which is intended here
    for value in (seed, epoch, view):
        key = mix(key + _GOLDEN + np.array([value & _MASK64], dtype=np.uint64))
    return key


def random_bits(seed: int, epoch: int, index: np.ndarray, view: int, draws: int) -> np.ndarray:
    """Return independent uniform 64-bit integers for each image.

    Args:
        seed, epoch, view: any integers.
        index: (B,) int64, the images' positions in the data set.
        draws: number of integers for each image.

    Returns:
        (B, draws) uint64. Column k does not depend on `draws`.
    """
    state = mix(_stream_key(seed, epoch, view) + _GOLDEN * (index.astype(np.uint64) + np.uint64(1)))
    return mix(state[:, None] + _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64))


def random_integers(bits: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Return int64 in 0 ... bound - 1 from uint64 of the same shape, uniform up to bound / 2**32."""
    return (((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def random_floats(bits: np.ndarray) -> np.ndarray:
    """Return float64 uniform in [0, 1) from uint64 of the same shape."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def crop_flip(images: Tensor, top: np.ndarray, left: np.ndarray, flip: np.ndarray) -> Tensor:
    """Zero-pad by PADDING, crop back to the original size, and mirror the chosen images horizontally.

    Args:
        images: (B, C, H, W) uint8.
        top, left: (B,) int64 in 0 ... 2 * PADDING, the crop's first row and column in the padded image.
        flip: (B,) int64, 1 to mirror.

    Returns:
        (B, C, H, W) uint8, contiguous.
    """
    batch, channels, height, width = images.shape
    inner = slice(PADDING, -PADDING)
    # Each image is stored with its mirror image. A mirrored crop is then a plain crop of the mirror image, and crop
    # and flip are one gather. Selecting the images to mirror and writing them back takes 1.6 times as long.
    padded = images.new_zeros(2, batch, channels, height + 2 * PADDING, width + 2 * PADDING)
    padded[0, :, :, inner, inner] = images
    padded[1, :, :, inner, inner] = images.flip(-1)

    left = np.where(flip, 2 * PADDING - left, left)
    first = ((flip * batch + np.arange(batch)) * channels * padded.shape[-2] + top) * padded.shape[-1] + left
    starts = torch.from_numpy(first[:, None, None] + _row_offsets(channels, height, width))
    # Row k of this overlapping view is the W pixels from pixel k on, so one index copies a whole row, by memcpy. A
    # gather of pixels needs W times as many indices, and computing them alone takes as long as this whole gather.
    rows = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
    crops = rows.index_select(0, starts.view(-1).to(images.device, non_blocking=True))
    return crops.view(batch, channels, height, width)


@lru_cache(maxsize=8)
def _row_offsets(channels: int, height: int, width: int) -> np.ndarray:
    """Return the start of each row of a crop in a padded image, from the crop's first pixel: (channels, height)."""
    padded_width = width + 2 * PADDING
    plane = (height + 2 * PADDING) * padded_width
    return np.arange(channels)[:, None] * plane + np.arange(height) * padded_width


def cutout(images: Tensor, boxes: np.ndarray) -> Tensor:
    """Paint a grey box into each image (DeVries & Taylor, "Improved Regularization of CNNs with Cutout", 2017).

    Args:
        images: (B, 3, H, W) uint8.
        boxes: (B, 4) int64, first column, first row, last column, last row; the last ones are painted too.

    Returns:
        (B, 3, H, W) uint8.
    """
    device = images.device
    x0, y0, x1, y1 = torch.from_numpy(boxes).to(device, non_blocking=True).view(-1, 4, 1, 1, 1).unbind(1)
    x = torch.arange(images.shape[3], device=device)
    y = torch.arange(images.shape[2], device=device)[:, None]
    box = ((x >= x0) & (x <= x1)).to(torch.uint8) * ((y >= y0) & (y <= y1)).to(torch.uint8)
    colour = torch.tensor(CUTOUT_COLOUR, dtype=torch.uint8).view(3, 1, 1).to(device, non_blocking=True)
    # Unsigned bytes wrap around, so this is exact. It vectorises; torch.where takes 3.8 times as long.
    return images + box * (colour - images)


def cutout_boxes(bits: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return boxes (B, 4) int64 for `cutout` from bits (B, 3) uint64, drawn as FixMatch's CutoutAbs draws them.

    The side is uniform in 0 ... CUTOUT_MAX of the width, the centre uniform in the image. As in the reference, near
    edges are clipped to the image, and far edges are counted from the clipped near edges. So a box is shifted at the
    left and upper borders and cut at the right and lower ones. The last row and column belong to the box.
    """
    side, x, y = (random_floats(bits) * (CUTOUT_MAX * width, width, height)).T
    x0 = np.floor(np.maximum(0.0, x - side / 2))
    y0 = np.floor(np.maximum(0.0, y - side / 2))
    x1, y1 = np.minimum(width, x0 + side), np.minimum(height, y0 + side)
    return np.stack([x0, y0, x1, y1], axis=1).astype(np.int64)


class BatchTransform(Protocol):
    """Transform of a batch, as above."""

    draws: int

    def __call__(self, images: Tensor, bits: np.ndarray) -> Tensor: ...


class NoAugmentation:
    """Transform that returns images unchanged, for evaluation."""

    draws = 0
    settings: dict[str, Any] = {}

    def __call__(self, images: Tensor, bits: np.ndarray) -> Tensor:
        return images


class WeakAugmentation:
    """Usual CIFAR augmentation: zero-pad by 4, crop at a uniform offset, mirror with probability 1/2.

    Args:
        flip: False never mirrors, as digits and letters need.
    """

    draws = 3

    def __init__(self, flip: bool = True):
        self.flip = flip
        self.settings = {"flip": flip, "padding": PADDING}

    def parameters(self, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return top and left in 0 ... 2 * PADDING and flip in 0, 1, each (B,) int64, from bits (B, 3) uint64."""
        top, left = random_integers(bits[:, :2], 2 * PADDING + 1).T
        return top, left, random_integers(bits[:, 2], 2) * self.flip

    def __call__(self, images: Tensor, bits: np.ndarray) -> Tensor:
        return crop_flip(images, *self.parameters(bits))


class StrongAugmentation:
    """Strong view of FixMatch (Sohn et al., "FixMatch", 2020), the second view of MLKD.

    It applies `weak` with its own draws, then two of the 14 RandAugment operations (Cubuk et al., "RandAugment", 2020),
    drawn with replacement, each with a magnitude uniform in its range, then cutout. No operation is ever skipped.

    Args:
        weak: the transform that runs first, usually the weak view's transform.
    """

    def __init__(self, weak: BatchTransform):
        self.weak = weak
        self.draws = weak.draws + 2 * NUM_OPERATIONS + 3

    def parameters(self, bits: np.ndarray, height: int, width: int) -> tuple[np.ndarray, ...]:
        """Return the arguments of `rand_augment` and `cutout`; the first columns of `bits` belong to `weak`.

        Args:
            bits: (B, draws) uint64.

        Returns:
            operations (B, 2) int64, levels (B, 2) float64 in [0, 1), boxes (B, 4) int64.
        """
        bits = bits[:, self.weak.draws :]
        operations = random_integers(bits[:, :NUM_OPERATIONS], len(OPERATIONS))
        levels = random_floats(bits[:, NUM_OPERATIONS : 2 * NUM_OPERATIONS])
        return operations, levels, cutout_boxes(bits[:, 2 * NUM_OPERATIONS :], height, width)

    def __call__(self, images: Tensor, bits: np.ndarray) -> Tensor:
        operations, levels, boxes = self.parameters(bits, *images.shape[2:])
        images = self.weak(images, bits[:, : self.weak.draws])
        return cutout(rand_augment(images, operations, levels), boxes)
