"""Transforms of single large images: timm's augmentation and evaluation, from an opened image to a normalised tensor.

timm draws from the global generators of Python, numpy and torch. So all three are seeded before every image and view
from numbers that are a pure function of (seed, epoch, row, view), see `hfkd.data.augment`, and are restored after a
batch. An image then looks the same in any batch, in any order and with any number of workers or processes.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import auto_augment as timm_augment
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms import Compose

from ..errors import HfkdError
from .augment import NoAugmentation, StrongAugmentation, random_bits
from .source import pixel_scale

INTERPOLATIONS = ("bicubic", "bilinear")
NUM_SEEDS = 3  # one for each generator that timm draws from
_STRONG = StrongAugmentation(NoAugmentation())  # only RandAugment's operations and cutout


def make_views(
    images: Iterable[tuple[int, Image.Image | None]],
    count: int,
    transform: "ImageTransform",
    *,
    seed: int,
    epoch: int,
    views: int,
) -> dict[str, Tensor]:
    """Return a batch of images without its labels. `images` may decode them one by one.

    Args:
        images: B pairs of a row and its image; None for an image that cannot be read.
        count: B.

    Returns:
        pixel_values (B, 3, H, W) float32, 0 for a missing image; with two views pixel_values_strong, of the same shape;
        index (B,) int64, the rows.
    """
    shape = (count, 3, transform.image_size, transform.image_size)
    batch = [_new_batch(shape) for _ in range(views)]
    index = torch.empty(count, dtype=torch.int64)
    with _preserved_generators():
        for position, (row, image) in enumerate(images):
            index[position] = row
            for view, pixels in enumerate(batch):
                if image is None:
                    pixels[position] = 0
                else:
                    bits = random_bits(seed, epoch, np.array([row]), view, transform.draws)[0]
                    transform(image, bits, view, out=pixels[position])
    return dict(zip(("pixel_values", "pixel_values_strong"), batch, strict=False)) | {"index": index}


class ImageTransform:
    """Base of the transforms from an opened image to a normalised square.

    Args:
        image_size: side of the square, in pixels.
        mean, std: three numbers each, of pixels scaled to 0 ... 1.
    """

    augmented: bool
    settings: dict[str, Any]  # parameters besides size and normalisation
    draws = NUM_SEEDS + _STRONG.draws  # 64-bit numbers for each image and view

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float]):
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self._scale, self._shift = pixel_scale(mean, std)

    def __call__(self, image: Image.Image, bits: np.ndarray, view: int = 0, out: Tensor | None = None) -> Tensor:
        """Return one view of an image. The generators of Python, numpy and torch are left in an arbitrary state.

        Args:
            image: RGB, of any size.
            bits: (draws,) uint64, from `random_bits`.
            view: 1 for the strong view: the same transform, then two of RandAugment's operations and cutout, as in
                `StrongAugmentation`.
            out: (3, H, W) float32, receives the result.

        Returns:
            (3, H, W) float32.
        """
        _seed_generators(bits[:NUM_SEEDS])
        pixels = self._to_pixels(image)
        if view == 1:
            pixels = _STRONG(pixels[None], bits[None, NUM_SEEDS:])[0]
        out = torch.empty(pixels.shape) if out is None else out
        return self._postprocess(out.copy_(pixels).mul_(self._scale).add_(self._shift))

    def _to_pixels(self, image):
        """Return the image as (3, H, W) uint8, before normalisation."""
        raise NotImplementedError

    def _postprocess(self, normalised):
        """Apply the steps after normalisation."""
        return normalised


class CenterCrop(ImageTransform):
    """Evaluation transform of timm: the shorter side resized to image_size / crop_pct, rounded down, then the centre.

    Args:
        crop_pct: share of the resized side that is kept, above 0; 1 keeps the whole shorter side.
        interpolation: "bicubic" or "bilinear", both antialiased.
    """

    augmented = False

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
    ):
        super().__init__(image_size, mean, std)
        _check_interpolation(interpolation)
        self.settings = {"crop_pct": crop_pct, "interpolation": interpolation}
        transform = create_transform(image_size, crop_pct=crop_pct, interpolation=interpolation, normalize=False)
        self._resize_and_crop = transform

    def _to_pixels(self, image):
        return self._resize_and_crop(image)


class RandomResizedCrop(ImageTransform):
    """Training transforms of timm: a random part of the image, resized, and the requested augmentations.

    Args:
        interpolation: "bicubic" or "bilinear", both antialiased.
        flip: mirror half of the images.
        color_jitter: brightness, contrast and saturation change by up to this share. As everywhere in timm, it has no
            effect together with `auto_augment`, except for a "3a" policy.
        auto_augment: a policy in timm's notation, e.g. "rand-m9-mstd0.5-inc1".
        random_erasing: probability that a box is replaced by noise.

    Raises:
        HfkdError: timm does not know the interpolation or the policy.
    """

    augmented = True

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        interpolation: str = "bicubic",
        flip: bool = True,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
    ):
        super().__init__(image_size, mean, std)
        _check_interpolation(interpolation)
        self.settings = {
            "interpolation": interpolation,
            "flip": flip,
            "color_jitter": color_jitter,
            "auto_augment": auto_augment,
            "random_erasing": random_erasing,
        }
        try:
            crop, policy, final = create_transform(
                image_size,
                is_training=True,
                separate=True,
                hflip=0.5 if flip else 0.0,
                color_jitter=color_jitter or None,  # type: ignore[arg-type]  # timm's hint lacks None
                auto_augment=auto_augment,
                interpolation=interpolation,
                mean=self.mean,
                re_prob=random_erasing,
                re_mode="pixel",
            )
        except (AssertionError, KeyError, ValueError) as error:
            if auto_augment is None:
                raise
            raise HfkdError(
                f"auto_augment: timm does not know the policy '{auto_augment}' ({error}); for example, it writes "
                "RandAugment as rand-m9-mstd0.5-inc1."
            ) from error
        resize, *flips = crop.transforms
        resize = _FastRandomResizedCrop(image_size, resize.scale, resize.ratio, interpolation)
        self._crop_and_flip = Compose([resize, *flips])
        self._policy = [_allow_zero_bits(step) for step in policy.transforms]
        self._erase = [step for step in final.transforms if isinstance(step, RandomErasing)]

    def _to_pixels(self, image):
        pixels = self._crop_and_flip(image)
        if not self._policy:
            return pixels
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        for step in self._policy:
            image = step(image)
        return _to_tensor(image)

    def _postprocess(self, normalised):
        for step in self._erase:
            normalised = step(normalised)
        return normalised


class _FastRandomResizedCrop(RandomResizedCropAndInterpolation):
    """RandomResizedCrop of timm, resized by torch.

    Pillow's resizing takes more time than decoding a JPEG; torch takes a quarter of it. Crop and filter are the same,
    and so are the bytes, up to rounding: both work with whole numbers, in another precision, and Pillow does the
    columns first if that is less work.
    """

    def __call__(self, image: Image.Image) -> Tensor:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        pixels = _to_tensor(image.crop((left, top, left + width, top + height)))
        mode = self.interpolation.value
        return F.interpolate(pixels[None], self.size, mode=mode, antialias=True)[0]


def _to_tensor(image):
    """Return an RGB image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _allow_zero_bits(step):
    """Let a step of timm posterize to 0 bits, which Pillow used to allow and now refuses.

    "rand-m9-mstd0.5-inc1" asks for 0 bits in one image of 700.
    """
    if isinstance(step, timm_augment.AutoAugment):
        operations = itertools.chain(*step.policy)
    elif isinstance(step, timm_augment.RandAugment | timm_augment.AugMixAugment):
        operations = step.ops
    else:  # colour jitter
        operations = ()
    for operation in operations:
        if operation.aug_fn is timm_augment.posterize:
            operation.aug_fn = _posterize
    return step


def _posterize(image, bits_to_keep, **_):
    if bits_to_keep == 0:
        return image.point(lambda value: 0)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


def _seed_generators(seeds: np.ndarray) -> None:
    """Seed the generators of Python, numpy and torch with (3,) uint64."""
    for_python, for_numpy, for_torch = seeds.tolist()
    random.seed(for_python)
    np.random.seed(for_numpy & 0xFFFFFFFF)
    # Not torch.manual_seed, which also seeds every accelerator and takes 100 times as long.
    torch.default_generator.manual_seed(for_torch >> 1)


@contextmanager
def _preserved_generators() -> Iterator[None]:
    """Context that restores the generators of Python, numpy and torch, which other code of the process may use."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _new_batch(shape):
    """Return an uninitialised float32 tensor, in a DataLoader worker in shared memory.

    A DataLoader would copy a worker's batch into shared memory anyway.
    """
    if get_worker_info() is None:
        return torch.empty(shape)
    number = torch.Size(shape).numel()
    storage = torch.UntypedStorage._new_shared(number * torch.float32.itemsize)  # as in torch's default_collate
    return torch.empty(0).set_(storage, 0, (number,)).view(shape)


def _check_interpolation(interpolation):
    if interpolation not in INTERPOLATIONS:
        raise HfkdError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, but is '{interpolation}'.")
