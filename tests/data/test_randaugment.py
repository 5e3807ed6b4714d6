"""Each operation against PIL."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from hfkd.data.randaugment import OPERATIONS, rand_augment

NAMES = [operation.name for operation in OPERATIONS]
# PIL blends in float32, on some processors with fused multiply-add; autocontrast: see the module's docstring.
ROUNDED = {"autocontrast", "brightness", "color", "contrast", "sharpness"}


def _transform(image, *coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


# The operations of the FixMatch reference, in PIL.
PIL_OPERATIONS = {
    "autocontrast": lambda image, v: ImageOps.autocontrast(image),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "identity": lambda image, v: image,
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "rotate": lambda image, v: image.rotate(v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "shear_x": lambda image, v: _transform(image, 1, v, 0, 0, 1, 0),
    "shear_y": lambda image, v: _transform(image, 1, 0, 0, v, 1, 0),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
    "translate_x": lambda image, v: _transform(image, 1, 0, v * image.width, 0, 1, 0),
    "translate_y": lambda image, v: _transform(image, 1, 0, 0, 0, 1, v * image.height),
}


def images_of_many_kinds(count, height, width):
    """(count, height, width, 3) uint8: noise, noise of low contrast, gradients, single colours."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, height, width, 3))
    low, span = rng.integers(0, 200, (2, count, 1, 1, 3))
    images[1::4] = (low + images * np.minimum(span, 255 - low) // 256)[1::4]
    ramp = np.linspace(0, 1, height)[:, None, None] + np.linspace(0, 1, width)[:, None]
    images[2::4] = (low / 2 + ramp * span / 4)[2::4]
    images[3::16] = low[3::16]
    return images.astype(np.uint8)


def levels_of_many_kinds(count):
    levels = np.random.default_rng(1).random(count)
    levels[:2] = 0, np.nextafter(1, 0)
    return levels


@pytest.mark.parametrize("size", [(32, 32), (23, 40)])
@pytest.mark.parametrize("name", NAMES)
def test_operation_equals_pil(name, size):
    position = NAMES.index(name)
    operation = OPERATIONS[position]
    images, levels = images_of_many_kinds(300, *size), levels_of_many_kinds(300)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    result = rand_augment(batch, np.full((300, 1), position), levels[:, None]).permute(0, 2, 3, 1).numpy()
    magnitudes = operation.low + levels * (operation.high - operation.low)
    pil = PIL_OPERATIONS[name]
    expected = [np.asarray(pil(Image.fromarray(i), m)) for i, m in zip(images, magnitudes, strict=True)]
    difference = np.abs(result.astype(int) - np.stack(expected))
    assert difference.max() <= (name in ROUNDED)
    assert (difference > 0).mean() < 0.005


def test_ranges_are_those_of_fixmatch():
    ranges = {operation.name: (operation.low, operation.high) for operation in OPERATIONS}
    enhance, geometric = (0.05, 0.95), (-0.3, 0.3)
    assert {name: r for name, r in ranges.items() if r != (0, 0)} == {
        **dict.fromkeys(["brightness", "color", "contrast", "sharpness"], enhance),
        **dict.fromkeys(["shear_x", "shear_y", "translate_x", "translate_y"], geometric),
        "posterize": (4, 8),
        "rotate": (-30, 30),
        "solarize": (0, 256),
    }
    assert {name for name, r in ranges.items() if r == (0, 0)} == {"autocontrast", "equalize", "identity"}


def test_a_mixed_batch_is_each_image_on_its_own():
    """All pairs of operations in one batch, in the order asked for, each image in its place."""
    first, second = np.divmod(np.arange(14 * 14), 14)
    operations = np.stack([first, second], axis=1)
    levels = np.random.default_rng(2).random(operations.shape)
    images = torch.from_numpy(images_of_many_kinds(len(operations), 32, 32)).permute(0, 3, 1, 2).contiguous()
    together = rand_augment(images, operations, levels)
    for i in range(0, len(operations), 5):
        alone = images[i : i + 1]
        for step in range(2):
            alone = rand_augment(alone, operations[i : i + 1, step, None], levels[i : i + 1, step, None])
        assert torch.equal(together[i : i + 1], alone), operations[i]


def test_images_given_are_not_changed():
    images = torch.from_numpy(images_of_many_kinds(14, 32, 32)).permute(0, 3, 1, 2).contiguous()
    before = images.clone()
    rand_augment(images, np.arange(14)[:, None], np.full((14, 1), 0.7))
    assert torch.equal(images, before)
