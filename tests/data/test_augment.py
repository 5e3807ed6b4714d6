"""Random numbers, weak view, cutout, strong view."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from hfkd.data import NoAugmentation, StrongAugmentation, WeakAugmentation
from hfkd.data.augment import (
    CUTOUT_COLOUR,
    PADDING,
    crop_flip,
    cutout,
    cutout_boxes,
    mix,
    random_bits,
    random_floats,
    random_integers,
)
from hfkd.data.randaugment import rand_augment


def random_images(count, height=32, width=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def chi_square(values, cells):
    """Pearson's statistic of (N,) integers against uniform on 0 ... cells - 1, as a z-score."""
    counts = np.bincount(values, minlength=cells)
    assert len(counts) == cells
    expected = len(values) / cells
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - (cells - 1)) / np.sqrt(2 * (cells - 1))


# ---- Random numbers ------------------------------------------------------------------------------


def test_mix_is_splitmix64():
    # The first three outputs of the reference implementation with seed 0.
    state = np.uint64(0x9E3779B97F4A7C15) * np.arange(1, 4, dtype=np.uint64)
    assert mix(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_bits_depend_on_nothing_but_their_key():
    bits = random_bits(1, 2, np.arange(100), 0, 5)
    order = np.random.default_rng(0).permutation(100)
    assert np.array_equal(random_bits(1, 2, order, 0, 5), bits[order])
    assert np.array_equal(random_bits(1, 2, np.array([7]), 0, 5), bits[7:8])
    assert np.array_equal(random_bits(1, 2, np.arange(100), 0, 9)[:, :5], bits)


def test_seed_may_be_any_integer():
    keys = [-1, 0, 2**31, 2**64 + 1]
    first = {random_bits(seed, 0, np.zeros(1, dtype=np.int64), 0, 1).item() for seed in keys}
    assert len(first) == len(keys)


def test_streams_are_independent():
    """Neighbouring seeds, epochs, views, indices and draws are uncorrelated, and no two share a number."""
    index = np.arange(20_000)
    base = random_bits(0, 0, index, 0, 2)
    others = {
        "draw": base[:, 1],
        "seed": random_bits(1, 0, index, 0, 1)[:, 0],
        "epoch": random_bits(0, 1, index, 0, 1)[:, 0],
        "view": random_bits(0, 0, index, 1, 1)[:, 0],
        "index": random_bits(0, 0, index + 1, 0, 1)[:, 0],
        "seed and epoch swapped": random_bits(0, 2, index, 1, 1)[:, 0],
    }
    for name, bits in others.items():
        correlation = np.corrcoef(random_floats(base[:, 0]), random_floats(bits))[0, 1]
        assert abs(correlation) < 4 / np.sqrt(len(index)), name
        pairs = random_integers(base[:, 0], 9) * 9 + random_integers(bits, 9)
        assert abs(chi_square(pairs, 81)) < 4, name
    distinct = [base[:, 0], *(bits for name, bits in others.items() if name != "index")]
    assert len(np.unique(np.concatenate(distinct))) == len(distinct) * len(index)


def test_integers_and_floats_are_uniform():
    bits = random_bits(3, 0, np.arange(50_000), 0, 1)[:, 0]
    for bound in (2, 9, 14):
        assert abs(chi_square(random_integers(bits, bound), bound)) < 4
    floats = random_floats(bits)
    assert 0 <= floats.min() and floats.max() < 1
    assert abs(chi_square((floats * 50).astype(np.int64), 50)) < 4
    assert random_integers(np.array([0, 2**64 - 1], dtype=np.uint64), 9).tolist() == [0, 8]
    assert random_floats(np.array([2**64 - 1], dtype=np.uint64)).item() < 1


# ---- Weak view -----------------------------------------------------------------------------------


def slow_crop_flip(image, top, left, flip):
    """(3, H, W) array, padded, cropped, mirrored."""
    padded = np.pad(image, ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    crop = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
    return crop[:, :, ::-1] if flip else crop


@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
def test_weak_view_equals_a_slow_one(size):
    images = random_images(300, *size)
    weak = WeakAugmentation()
    bits = random_bits(0, 0, np.arange(300), 0, weak.draws)
    parameters = weak.parameters(bits)
    expected = [slow_crop_flip(*sample) for sample in zip(images.numpy(), *parameters, strict=True)]
    views = weak(images, bits)
    assert np.array_equal(views.numpy(), np.stack(expected))
    assert views.is_contiguous()


def test_crop_reaches_every_corner():
    images = random_images(8)
    top, left, flip = (a.ravel() for a in np.meshgrid([0, 2 * PADDING], [0, 2 * PADDING], [0, 1]))
    expected = [slow_crop_flip(*sample) for sample in zip(images.numpy(), top, left, flip, strict=True)]
    assert np.array_equal(crop_flip(images, top, left, flip).numpy(), np.stack(expected))


def test_weak_parameters_are_uniform_and_independent():
    top, left, flip = WeakAugmentation().parameters(random_bits(0, 0, np.arange(60_000), 0, 3))
    assert abs(chi_square((top * 9 + left) * 2 + flip, 9 * 9 * 2)) < 4


def test_flip_can_be_switched_off():
    bits = random_bits(0, 0, np.arange(1000), 0, 3)
    top, left, flip = WeakAugmentation(flip=False).parameters(bits)
    assert not flip.any()
    assert np.array_equal(np.stack([top, left]), np.stack(WeakAugmentation().parameters(bits)[:2]))


def test_no_augmentation_leaves_images_alone():
    images = random_images(4)
    assert torch.equal(NoAugmentation()(images, random_bits(0, 0, np.arange(4), 0, 0)), images)


# ---- Cutout and the strong view ------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (20, 31)])
def test_cutout_equals_pil(size):
    height, width = size
    images = random_images(400, height, width)
    bits = random_bits(0, 0, np.arange(400), 0, 3)
    views = cutout(images, cutout_boxes(bits, height, width)).permute(0, 2, 3, 1).numpy()
    uniform = random_floats(bits)
    for image, view, (u, x, y) in zip(images.permute(0, 2, 3, 1).numpy(), views, uniform, strict=True):
        side, x, y = u * 0.5 * width, x * width, y * height
        x0, y0 = int(max(0, x - side / 2)), int(max(0, y - side / 2))
        expected = Image.fromarray(image)
        corners = (x0, y0, min(width, x0 + side), min(height, y0 + side))
        ImageDraw.Draw(expected).rectangle(corners, CUTOUT_COLOUR)
        assert np.array_equal(view, np.asarray(expected))


def test_strong_view_is_weak_then_two_operations_then_cutout():
    images = random_images(64)
    strong = StrongAugmentation(WeakAugmentation())
    bits = random_bits(0, 0, np.arange(64), 1, strong.draws)
    operations, levels, boxes = strong.parameters(bits, 32, 32)
    assert operations.shape == levels.shape == (64, 2)
    expected = WeakAugmentation()(images, bits[:, :3])
    expected = rand_augment(expected, operations[:, :1], levels[:, :1])
    expected = rand_augment(expected, operations[:, 1:], levels[:, 1:])
    assert torch.equal(strong(images, bits), cutout(expected, boxes))


def test_strong_parameters_are_uniform_and_independent():
    strong = StrongAugmentation(WeakAugmentation())
    bits = random_bits(0, 0, np.arange(60_000), 1, strong.draws)
    operations, levels, boxes = strong.parameters(bits, 32, 32)
    assert abs(chi_square(operations[:, 0] * 14 + operations[:, 1], 14 * 14)) < 4
    for column in levels.T:
        assert abs(chi_square((column * 40).astype(np.int64), 40)) < 4
    weak = WeakAugmentation().parameters(bits[:, :3])
    assert abs(chi_square(weak[0] * 14 + operations[:, 0], 9 * 14)) < 4
    assert boxes.min() == 0 and boxes.max() == 32
    assert ((boxes[:, 2:] - boxes[:, :2]).max(axis=0) == 15).all()  # a side below 16, the last pixel included
