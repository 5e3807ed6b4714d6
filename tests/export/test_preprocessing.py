"""What a file says of preparing images is what the model's image processor does."""

import json
import math

import pytest
import torch
from data.pictures import photo
from PIL import Image
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    MobileNetV1ImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from hfkd import load_student
from hfkd.export.preprocessing import preprocessing_of
from hfkd.networks.loading import load_pretrained

NORMAL = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
MODEL = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
PROCESSORS = {
    "vit": (ViTImageProcessor(size={"height": 32, "width": 32}, resample=BILINEAR, **NORMAL), (1.0, "squash")),
    "convnext": (ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8, **NORMAL), (0.8, "center")),
    "large convnext": (ConvNextImageProcessor(size={"shortest_edge": 384}, crop_pct=0.8, **NORMAL), (1.0, "squash")),
    "mobilenet": (
        MobileNetV1ImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, **NORMAL),
        (0.8, "center"),
    ),
}


def saved(processor=None):
    """A model from the folder `model`, with the image processor beside it."""
    ResNetForImageClassification(MODEL).save_pretrained("model")
    if processor is not None:
        processor.save_pretrained("model")
    return load_pretrained("model")


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(60, 40), (40, 60)])  # whose margins are even
def test_processors_of_transformers(name, size):
    processor, resizing = PROCESSORS[name]
    found = preprocessing_of(saved(processor))
    assert (found.crop_pct, found.crop_mode) == resizing and found.mean == (0.1, 0.2, 0.3)
    assert found.interpolation == {BICUBIC: "bicubic", BILINEAR: "bilinear"}[processor.resample]
    expected = processor(photo(*size), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found(photo(*size)), expected, rtol=0, atol=2.01 / 255 / 0.4)


def test_timm():
    load_student("test_resnet", ["a", "b"], image_size=64, crop_pct=0.875, interpolation="bilinear").save_pretrained(
        "m"
    )
    found = preprocessing_of(load_pretrained("m"))
    assert (found.image_size, found.crop_pct, found.crop_mode, found.interpolation) == (64, 0.875, "center", "bilinear")
    assert f"its shorter side to {math.floor(64 / 0.875)} pixels (bilinear" in found.text
    expected = AutoImageProcessor.from_pretrained("m")(photo(90, 70))["pixel_values"][0]
    assert torch.equal(found(photo(90, 70)), expected)


@pytest.mark.parametrize(
    "change",
    [{"do_resize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}, {"crop_pct": 0.7}],
    ids=lambda change: next(iter(change)),
)
def test_what_cannot_be_said_is_refused(change):
    """The last is a setting that its class does not know: it does not do what it says."""
    model = saved(PROCESSORS["vit"][0])
    path = "model/preprocessor_config.json"
    settings = json.loads(open(path).read())
    open(path, "w").write(json.dumps(settings | change))
    with pytest.raises(ValueError, match="image processor of model .ViT.* cannot be written.*Nearest: Resize"):
        preprocessing_of(model)


def test_without_an_image_processor():
    with pytest.raises(ValueError, match="model has no image processor .preprocessor_config.json"):
        preprocessing_of(saved())
