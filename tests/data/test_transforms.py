"""timm's transforms: the same images as timm's own, from numbers of our own."""

import pickle
import random

import numpy as np
import pytest
import torch
from pictures import photo
from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision.transforms import Compose

from hfkd.data import CenterCrop, RandomResizedCrop
from hfkd.data.augment import NoAugmentation, StrongAugmentation, random_bits
from hfkd.data.transforms import NUM_SEEDS, ImageTransform, make_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY = "rand-m9-mstd0.5-inc1"
KEYS = {"seed": 0, "epoch": 0, "views": 1}


def bits(row=0, epoch=0, view=0):
    return random_bits(0, epoch, np.array([row]), view, ImageTransform.draws)[0]


def levels(normalised):
    """(..., 3, H, W) float32 -> 0 ... 255, as float32."""
    return (normalised * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


def seeded(transform, image, numbers):
    """One of timm's transforms with the generators seeded as ours are."""
    for_python, for_numpy, for_torch = numbers[:NUM_SEEDS].tolist()
    random.seed(for_python)
    np.random.seed(for_numpy % 2**32)
    torch.manual_seed(for_torch // 2)
    return transform(image)


# ---- Against timm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop_pct", "size"), [(1.0, 32), (0.875, 32), (0.9, 31)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_is_timms(crop_pct, size, interpolation):
    arguments = {"crop_pct": crop_pct, "interpolation": interpolation}
    theirs = create_transform(size, mean=MEAN, std=STD, **arguments)
    ours = CenterCrop(size, MEAN, STD, **arguments)
    for image in (photo(48, 64), photo(70, 41), photo(20, 22)):
        torch.testing.assert_close(ours(image, bits()), theirs(image), atol=1e-6, rtol=0)


def test_crop_pct_is_the_share_of_the_shorter_side():
    square = np.zeros((40, 60, 3), dtype=np.uint8)
    square[10:30, 20:40] = 255  # half of the height, in the centre
    half = CenterCrop(20, MEAN, STD, crop_pct=0.5)(Image.fromarray(square), bits())
    assert levels(half).round().eq(255).all()
    whole = CenterCrop(20, MEAN, STD)(Image.fromarray(square), bits())
    assert levels(whole)[0, 0].round().eq(0).all() and 0.2 < (levels(whole) > 127).float().mean() < 0.3


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_is_timms(flip, interpolation):
    arguments = {"interpolation": interpolation, "color_jitter": None}
    theirs = create_transform(
        32, is_training=True, hflip=0.5 if flip else 0.0, mean=MEAN, std=STD, re_prob=0.5, re_mode="pixel", **arguments
    )
    ours = RandomResizedCrop(32, MEAN, STD, interpolation=interpolation, flip=flip, random_erasing=0.5)
    differences = []
    for row in range(40):
        image = photo(48, 64, seed=row)
        a, b = ours(image, bits(row)), seeded(theirs, image, bits(row))
        differences.append((levels(a) - levels(b)).abs())
    # Torch and Pillow round differently. Another crop, flip or filter would show everywhere.
    differences = torch.stack(differences)
    assert differences.max() < 3.5 and differences.mean() < 0.1


def test_normalisation_and_erasing_are_timms():
    """Without the resize, to float rounding."""
    image = photo(32, 32)
    crop, _, final = create_transform(
        32, is_training=True, separate=True, scale=(1.0, 1.0), ratio=(1.0, 1.0), color_jitter=None, mean=MEAN, std=STD,
        re_prob=1.0, re_mode="pixel",
    )  # fmt: skip
    ours = RandomResizedCrop(32, MEAN, STD, random_erasing=1.0)
    ours._crop_and_flip.transforms[0].scale = ours._crop_and_flip.transforms[0].ratio = (1.0, 1.0)
    for row in range(5):
        expected = seeded(Compose([crop, final]), image, bits(row))
        torch.testing.assert_close(ours(image, bits(row)), expected, atol=1e-6, rtol=0)
        assert not torch.equal(expected, ours(image, bits(row + 1)))


@pytest.mark.parametrize("policy", [POLICY, "augmix-m3", "original-mstd0.5", "3a"])
def test_policies_are_timms(policy):
    image = photo(32, 32)
    _, step, final = create_transform(
        32, is_training=True, separate=True, auto_augment=policy, color_jitter=0.4, mean=MEAN, std=STD,
        interpolation="bicubic",
    )  # fmt: skip
    ours = RandomResizedCrop(32, MEAN, STD, auto_augment=policy, color_jitter=0.4)
    ours._crop_and_flip = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)
    changed = 0
    for row in range(30):
        expected = seeded(Compose([step, final]), image, bits(row))
        torch.testing.assert_close(ours(image, bits(row)), expected, atol=1e-6, rtol=0)
        changed += not torch.equal(expected, final(image))
    assert changed > 5


def test_auto_augment_switches_colour_jitter_off():
    image = photo(32, 32)
    plain = RandomResizedCrop(32, MEAN, STD, auto_augment=POLICY)
    with_jitter = RandomResizedCrop(32, MEAN, STD, auto_augment=POLICY, color_jitter=0.4)
    jitter_alone = RandomResizedCrop(32, MEAN, STD, color_jitter=0.4)
    assert all(torch.equal(plain(image, bits(row)), with_jitter(image, bits(row))) for row in range(10))
    crop = RandomResizedCrop(32, MEAN, STD)
    assert not any(torch.equal(crop(image, bits(row)), jitter_alone(image, bits(row))) for row in range(10))


def test_posterize_may_keep_no_bit():
    """Pillow refuses to, and the policy of DeiT asks for it once in 700 images."""
    transform = RandomResizedCrop(8, MEAN, STD, auto_augment="rand-m10-inc1-p1.0")
    (policy,) = transform._policy
    posterize = next(op for op in policy.ops if op.name == "PosterizeIncreasing")
    assert posterize.level_fn(10, posterize.hparams) == (0,)
    assert np.asarray(posterize(photo())).max() == 0
    policy.ops = [posterize]
    assert levels(transform(photo(), bits())).abs().max() < 1e-3
    posterize.magnitude = 5
    expected = auto_augment.posterize(photo(), 2)
    assert np.array_equal(np.asarray(posterize(photo())), np.asarray(expected))


# ---- Random numbers ------------------------------------------------------------------------------------------------


FULL = {"auto_augment": POLICY, "random_erasing": 0.5}


def test_one_image_is_a_function_of_its_numbers():
    transform = RandomResizedCrop(24, MEAN, STD, **FULL)
    image = photo()
    first = [transform(image, bits(row), view) for view in (0, 1) for row in range(8)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    again = [transform(image, bits(row), view) for view in (0, 1) for row in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


def test_the_flip_and_the_crop_are_uniform():
    ramp = np.zeros((40, 40, 3), dtype=np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(40) * 6, (np.arange(40) * 6)[:, None]
    transform = RandomResizedCrop(16, (0, 0, 0), (1 / 255,) * 3)
    views = torch.stack([transform(Image.fromarray(ramp), bits(row)) for row in range(400)])
    mirrored = views[:, 0, 8, 0] > views[:, 0, 8, -1]
    assert abs(mirrored.float().mean() - 0.5) < 0.1
    area = (views[:, 0, 8, -1] - views[:, 0, 8, 0]).abs() * (views[:, 1, -1, 8] - views[:, 1, 0, 8]) / (39 * 6) ** 2
    assert 0.04 < area.min() < 0.12 and area.max() > 0.8 and abs(area.mean() - 0.5) < 0.1
    no_flip = RandomResizedCrop(16, (0, 0, 0), (1, 1, 1), flip=False)
    views = torch.stack([no_flip(Image.fromarray(ramp), bits(row)) for row in range(50)])
    assert (views[:, 0, 8, 0] < views[:, 0, 8, -1]).all()


def test_generators_are_put_back():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(1).item()

    def breaks_off():
        yield 3, photo()
        raise ZeroDivisionError

    transform = RandomResizedCrop(24, MEAN, STD, **FULL)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    make_views([(3, photo()), (4, photo())], 2, transform, **KEYS)
    with pytest.raises(ZeroDivisionError):
        make_views(breaks_off(), 2, transform, **KEYS)
    assert draw() == expected


# ---- Views ---------------------------------------------------------------------------------------------------------


def test_views_of_a_batch():
    transform = RandomResizedCrop(24, MEAN, STD, **FULL)
    batch = make_views([(7, photo(seed=1)), (2, None)], 2, transform, seed=5, epoch=3, views=2)
    assert batch["index"].tolist() == [7, 2]
    for view, key in enumerate(("pixel_values", "pixel_values_strong")):
        expected = transform(photo(seed=1), random_bits(5, 3, np.array([7]), view, transform.draws)[0], view)
        assert torch.equal(batch[key][0], expected)
        assert batch[key].shape == (2, 3, 24, 24) and (batch[key][1] == 0).all()


@pytest.mark.parametrize("transform", [RandomResizedCrop(24, MEAN, STD), CenterCrop(24, MEAN, STD)])
def test_strong_view_is_the_operations_on_another_weak_one(transform):
    """As `StrongAugmentation` does it in memory."""
    operations = StrongAugmentation(NoAugmentation())
    for row in range(5):
        weak = levels(transform(photo(), bits(row, view=1))).round().to(torch.uint8)
        expected = operations(weak[None], bits(row, view=1)[None, NUM_SEEDS:])[0]
        strong = levels(transform(photo(), bits(row, view=1), 1)).round().to(torch.uint8)
        assert torch.equal(strong, expected) and not torch.equal(strong, weak)


def test_transforms_travel_to_workers():
    for policy in (POLICY, "augmix-m3", "original"):
        transform = RandomResizedCrop(24, MEAN, STD, auto_augment=policy, random_erasing=0.5)
        copy = pickle.loads(pickle.dumps(transform))
        assert torch.equal(copy(photo(), bits()), transform(photo(), bits()))


# ---- Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["rand-m9-x3", "rand-m9-n1.5", "DeiT"])
def test_unknown_policies(policy):
    with pytest.raises(ValueError, match=f"auto_augment: timm does not know the policy '{policy}'.*rand-m9-mstd0.5"):
        RandomResizedCrop(24, MEAN, STD, auto_augment=policy)


@pytest.mark.parametrize("transform", [RandomResizedCrop, CenterCrop])
def test_unknown_interpolation(transform):
    with pytest.raises(ValueError, match="interpolation must be one of bicubic, bilinear, but is 'cubic'"):
        transform(24, MEAN, STD, interpolation="cubic")
