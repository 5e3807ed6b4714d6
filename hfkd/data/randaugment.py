"""The 14 operations of FixMatch's RandAugment, on batches of uint8 images.

Papers: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2020; Sohn et
al., "FixMatch", 2020, for the list, the ranges and a magnitude drawn for each image.

The reference calls PIL, one image at a time. Here each operation is two functions. `prepare` turns the magnitudes of n
images into at most 6 integers each, with numpy on the CPU. `apply` uses them to change n images on the images' device,
without waiting for the device. Both follow PIL's arithmetic, including its fixed-point coordinates and its truncations,
and give PIL's bytes. Only autocontrast differs, by one grey level in about 0.1 % of the bytes, where PIL's
floating-point product is slightly below a whole number.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NUM_COEFFICIENTS = 6
_FIXED_POINT = 1 << 16  # PIL follows an affine map in 16.16 fixed point


# prepare(magnitude (n,) float64, height, width) -> (n, k) int32, k <= NUM_COEFFICIENTS


def no_coefficients(magnitude, height, width):
    return np.empty((len(magnitude), 0), dtype=np.int32)


def blend_factor(magnitude, height, width):
    """Return the magnitude as float32, PIL's type for it, with its bits stored as int32 like other coefficients."""
    return magnitude[:, None].astype(np.float32).view(np.int32)


def posterize_mask(magnitude, height, width):
    """Return a mask of the upper int(magnitude) bits; as in the reference, 4-8 bits truncate to 4, 5, 6 or 7."""
    return 256 - (1 << (8 - magnitude[:, None].astype(np.int32)))


def solarize_threshold(magnitude, height, width):
    """Return the smallest byte that is not below the threshold."""
    return np.ceil(magnitude[:, None]).astype(np.int32)


def _affine_coefficients(a, b, c, d, e, f):
    """Return fixed-point coefficients of the source pixel (a x + b y + c, d x + e y + f) of (x, y), at pixel centres.

    Arguments are scalars or (n,); at least one is (n,). Returns (n, 6) int32.
    """
    terms = np.broadcast_arrays(a, b, c + (a + b) * 0.5, d, e, f + (d + e) * 0.5)
    return np.floor(np.stack(terms, axis=1) * _FIXED_POINT + 0.5).astype(np.int32)


def rotation(degrees, height, width):
    """Return coefficients of a counter-clockwise rotation about the centre of the image."""
    angle = -np.radians(degrees)
    cos, sin = np.cos(angle).round(15), np.sin(angle).round(15)
    x, y = width / 2, height / 2
    return _affine_coefficients(cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def shear_x(magnitude, height, width):
    return _affine_coefficients(1.0, magnitude, 0.0, 0.0, 1.0, 0.0)


def shear_y(magnitude, height, width):
    return _affine_coefficients(1.0, 0.0, 0.0, magnitude, 1.0, 0.0)


def translate_x(magnitude, height, width):
    """Return coefficients of a horizontal shift; the magnitude is a share of the width.

    The shift is in whole pixels, since PIL does not use fixed point for a pure shift.
    """
    return _affine_coefficients(1.0, 0.0, np.floor(magnitude * width + 0.5), 0.0, 1.0, 0.0)


def translate_y(magnitude, height, width):
    return _affine_coefficients(1.0, 0.0, 0.0, 0.0, 1.0, np.floor(magnitude * height + 0.5))


# apply(images (n, 3, H, W) uint8, coefficients (n, NUM_COEFFICIENTS) int32) -> (n, 3, H, W) uint8


def identity(images, coefficients):
    return images


def _blend(base, images, coefficients):
    """Return base + factor * (images - base), truncated, as ImageEnhance; `base` is float32."""
    factor = coefficients[:, 0].view(torch.float32).view(-1, 1, 1, 1)
    return (images - base).mul_(factor).add_(base).to(torch.uint8)


def _grey(images):
    """Return images (n, 3, H, W) uint8 in PIL's mode L, (n, 1, H, W) int32."""
    red, green, blue = images.to(torch.int32).split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def brightness(images, coefficients):
    return _blend(images.new_zeros((), dtype=torch.float32), images, coefficients)


def color(images, coefficients):
    return _blend(_grey(images).float(), images, coefficients)


def contrast(images, coefficients):
    pixels = images.shape[2] * images.shape[3]
    total = _grey(images).sum(dim=(2, 3), keepdim=True)
    return _blend(((2 * total + pixels) // (2 * pixels)).float(), images, coefficients)


def sharpness(images, coefficients):
    """Blend with ImageFilter.SMOOTH, a 3 x 3 mean whose centre counts 5 times; PIL keeps the border."""
    base = images.float()
    rows = base[:, :, :-2] + base[:, :, 1:-1] + base[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    total.add_(base[:, :, 1:-1, 1:-1], alpha=4).add_(6.5).div_(13).floor_()
    base[:, :, 1:-1, 1:-1] = total
    return _blend(base, images, coefficients)


def autocontrast(images, coefficients):
    """Stretch each channel to 0 ... 255; a channel of one value stays."""
    pixels = images.float()
    low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    flat = low == high
    span = (high - low).masked_fill_(flat, 255)
    # Quotients of small integers: float32 division is exact for whole results, so truncation is safe.
    return pixels.sub_(low.masked_fill_(flat, 0)).mul_(255).div_(span).to(torch.uint8)


def equalize(images, coefficients):
    """Map each channel through the lookup table of ImageOps.equalize; a channel too flat for a table stays."""
    channels = images.shape[0] * images.shape[1]
    table_start = torch.arange(0, 256 * channels, 256, device=images.device)[:, None]
    pixels = (images.reshape(channels, -1) + table_start).view(-1)
    # One flat scatter_add_: bincount would wait for the device, and a 2-D scatter_add_ is not deterministic.
    histogram = table_start.new_zeros(256 * channels).scatter_add_(0, pixels, torch.ones_like(pixels))
    histogram = histogram.view(channels, 256)
    brightest = pixels.view(channels, -1).amax(dim=1, keepdim=True) - table_start
    step = (histogram.sum(dim=1, keepdim=True) - histogram.gather(1, brightest)) // 255
    below = histogram.cumsum(dim=1) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table).to(torch.uint8)
    return table.view(-1).index_select(0, pixels).view(images.shape)


def posterize(images, coefficients):
    return images & coefficients[:, 0].to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images, coefficients):
    """Invert bytes at or above the threshold; x ^ 255 is 255 - x."""
    inverted = images >= coefficients[:, 0].view(-1, 1, 1, 1)
    return images ^ (inverted.to(torch.uint8) * 255)


def affine(images, coefficients):
    """Apply Image.transform(AFFINE) with nearest resampling; pixels from outside the image are black."""
    n, channels, height, width = images.shape
    a, b, c, d, e, f = coefficients.view(n, NUM_COEFFICIENTS, 1, 1).unbind(1)
    x = torch.arange(width, dtype=torch.int32, device=images.device)
    y = torch.arange(height, dtype=torch.int32, device=images.device)[:, None]
    source_x = (a * x + (b * y + c)) >> 16
    source_y = (d * x + (e * y + f)) >> 16
    # Inside the image none of the four values is negative, so none sets the sign bit: one comparison replaces four.
    inside = (source_x | (width - 1 - source_x) | source_y | (height - 1 - source_y)) >= 0
    source = ((source_y * width + source_x) * inside).long().view(n, 1, -1).expand(-1, channels, -1)
    return images.view(n, channels, -1).gather(2, source).view(images.shape) * inside[:, None]


class Operation(NamedTuple):
    """Operation with a magnitude uniform in low ... high; the module explains `prepare` and `apply`."""

    name: str
    low: float
    high: float
    prepare: Callable
    apply: Callable


OPERATIONS = (
    Operation("autocontrast", 0, 0, no_coefficients, autocontrast),
    Operation("brightness", 0.05, 0.95, blend_factor, brightness),
    Operation("color", 0.05, 0.95, blend_factor, color),
    Operation("contrast", 0.05, 0.95, blend_factor, contrast),
    Operation("equalize", 0, 0, no_coefficients, equalize),
    Operation("identity", 0, 0, no_coefficients, identity),
    Operation("posterize", 4, 8, posterize_mask, posterize),
    Operation("rotate", -30, 30, rotation, affine),
    Operation("sharpness", 0.05, 0.95, blend_factor, sharpness),
    Operation("shear_x", -0.3, 0.3, shear_x, affine),
    Operation("shear_y", -0.3, 0.3, shear_y, affine),
    Operation("solarize", 0, 256, solarize_threshold, solarize),
    Operation("translate_x", -0.3, 0.3, translate_x, affine),
    Operation("translate_y", -0.3, 0.3, translate_y, affine),
)

# The five geometric operations differ in their coefficients only and run as one: 10 groups instead of 14.
_APPLY = tuple(dict.fromkeys(operation.apply for operation in OPERATIONS))
_GROUP = np.array([_APPLY.index(operation.apply) for operation in OPERATIONS])
_LOW = np.array([operation.low for operation in OPERATIONS], dtype=np.float64)
_SPAN = np.array([operation.high for operation in OPERATIONS], dtype=np.float64) - _LOW


def rand_augment(images: Tensor, operations: np.ndarray, levels: np.ndarray) -> Tensor:
    """Apply to each image its own operations, one after the other.

    Args:
        images: (B, 3, H, W) uint8.
        operations: (B, n) int64, positions in OPERATIONS.
        levels: (B, n) float64 in [0, 1]; the magnitude is low + level * (high - low) of the operation.

    Returns:
        (B, 3, H, W) uint8 on the images' device.
    """
    magnitudes = _LOW[operations] + levels * _SPAN[operations]
    coefficients = _coefficients(operations, magnitudes, images.shape[2], images.shape[3])
    for step in range(operations.shape[1]):
        images = _apply_one(images, operations[:, step], coefficients[:, step])
    return images


def _apply_one(images, operations, coefficients):
    """Apply one operation to each image: operations (B,), coefficients (B, NUM_COEFFICIENTS), both numpy."""
    groups = _GROUP[operations]
    order = np.argsort(groups, kind="stable")
    # Sorted by group, each group is a slice. So no index sets are sent to the device, and two index_selects replace a
    # gather and a scatter for every group.
    moves = torch.from_numpy(np.stack([order, np.argsort(order)])).to(images.device, non_blocking=True)
    coefficients = torch.from_numpy(coefficients[order]).to(images.device, non_blocking=True)
    counts = np.bincount(groups, minlength=len(_APPLY)).tolist()
    image_groups = images.index_select(0, moves[0]).split(counts)
    parts = zip(_APPLY, counts, image_groups, coefficients.split(counts), strict=True)
    return torch.cat([apply(*part) for apply, count, *part in parts if count]).index_select(0, moves[1])


def _coefficients(operations, magnitudes, height, width):
    """Return coefficients (B, n, NUM_COEFFICIENTS) int32, zero where an operation has fewer, for (B, n) inputs."""
    coefficients = np.zeros((*operations.shape, NUM_COEFFICIENTS), dtype=np.int32)
    for position, operation in enumerate(OPERATIONS):
        chosen = operations == position
        values = operation.prepare(magnitudes[chosen], height, width)
        coefficients[chosen, : values.shape[1]] = values
    return coefficients
