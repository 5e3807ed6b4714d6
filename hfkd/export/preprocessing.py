"""Preprocessing of a trained model's images, in a few numbers that any program can follow."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

from ..errors import HfkdError
from ..networks.input_spec import input_spec


@dataclass(frozen=True)
class Preprocessing:
    """Steps from an RGB image of any size to the model's input, in timm's terms.

    Attributes:
        image_size: side of the square input, in pixels.
        crop_pct: an image is resized to image_size / crop_pct, rounded down, before it is cropped.
        crop_mode: "center": the shorter side is resized to that size, keeping the aspect ratio; "squash": both sides.
        interpolation: filter of the resizing, such as "bicubic" or "bilinear"; antialiased.
        mean, std: normalisation of each channel, RGB, for pixels scaled to 0 ... 1.
    """

    image_size: int
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def text(self) -> str:
        """The steps in words."""
        size = math.floor(self.image_size / self.crop_pct)
        sides = f"its {'shorter side' if self.crop_mode == 'center' else 'height and width'} to {size} pixels"
        return (
            f"Resize an RGB image, {sides} ({self.interpolation}, antialiased), cut out the middle "
            f"{self.image_size} x {self.image_size}, scale to 0 ... 1, subtract mean, divide by std: pixel_values "
            f"(batch, 3, {self.image_size}, {self.image_size}), float32."
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Prepare an image: the result is (3, image_size, image_size), float32."""
        settings = dataclasses.asdict(self)
        return create_transform(settings.pop("image_size"), **settings)(image)


def preprocessing_of(model: PreTrainedModel) -> Preprocessing:
    """Read the preprocessing of a model from a folder or the Hub, and compare it with its image processor on a picture.

    Raises:
        ValueError: if the model has no image processor, or one that `Preprocessing` cannot describe.
    """
    name = model.name_or_path
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except OSError as error:
        raise HfkdError(
            f"{name} has no image processor (preprocessor_config.json): save it there with processor.save_pretrained."
        ) from error
    spec = input_spec(model)
    wrapped = isinstance(model, TimmWrapperPreTrainedModel)
    resizing = _resizing_of_timm(processor) if wrapped else _resizing_of_processor(processor, spec.image_size)
    found = Preprocessing(**resizing, **vars(spec))
    picture = _slopes(spec.image_size)
    expected, given = processor(picture, return_tensors="pt")["pixel_values"][0], found(picture)
    # Libraries round an odd margin of the crop to either side, which is one pixel, and round to 8 bits.
    tolerance = (1.5 / spec.image_size + 2 / 255) / min(spec.std)
    if expected.shape != given.shape or (expected - given).abs().max() > tolerance:
        raise HfkdError(
            f"The image processor of {name} ({type(processor).__name__}) prepares images in a way that cannot be "
            f"written into the file. Nearest: {found.text} Set it to that, or export the model with optimum."
        )
    return found


def _slopes(image_size: int) -> Image.Image:
    """Return a picture, higher than wide, that is different at each place and in each channel."""
    height, width = np.mgrid[0 : 1 : 3j * image_size, 0 : 1 : 2j * image_size]
    return Image.fromarray(np.uint8(255 * np.stack([width, height, (2 - width - height) / 2], axis=-1)))


def _resizing_of_timm(processor) -> dict[str, float | str]:
    return {key: processor.data_config[key] for key in ("crop_pct", "crop_mode", "interpolation")}


def _resizing_of_processor(processor, image_size: int) -> dict[str, float | str]:
    # Processors differ in their attributes, as in `input_spec`. The comparison finds any that are missed here.
    squash = not processor.size.get("shortest_edge")
    resized = processor.size.get("height") or processor.size.get("shortest_edge")
    crop_pct = image_size / resized
    own = getattr(processor, "crop_pct", None)  # of ConvNeXT's processor, which ResNet uses, too
    if own is not None:
        squash = image_size >= 384
        crop_pct = 1.0 if squash else own
    interpolation = Image.Resampling(int(processor.resample)).name.lower()
    return {"crop_pct": crop_pct, "crop_mode": "squash" if squash else "center", "interpolation": interpolation}
