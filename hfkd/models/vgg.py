"""VGG with BatchNorm for 32 x 32 images and a single linear classifier.

Paper: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015. Differences from
the paper: BatchNorm; no pooling between the last two blocks and only global pooling after them; one linear layer
instead of three.

Parameter names: mdistiller and RepDistiller (CRD), which also added vgg8, with one convolution a block. Their max
pooling before the last block, which only runs for 64 x 64 images, is left out.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from .base import CifarModel, build, cifar_cfg, init_kaiming, init_small_linear

WIDTHS = (64, 128, 256, 512, 512)


def _make_block(in_channels: int, channels: int, convs: int) -> nn.Sequential:
    layers = []
    for _ in range(convs):
        layers += [nn.Conv2d(in_channels, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers)


class CifarVGG(CifarModel):
    """Five blocks of `convs` convolutions each."""

    # Max pooling is first in a stage, not last: distillation uses the map before the pooling.
    stages = (("block0",), ("pool0", "block1"), ("pool1", "block2"), ("pool2", "block3"), ("block4",))
    reductions = (1, 2, 4, 8, 8)
    classifier_name = "classifier"

    def __init__(
        self,
        convs: tuple[int, int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__(in_chans, drop_rate)
        self.block0 = _make_block(in_chans, WIDTHS[0], convs[0])
        self.pool0 = nn.MaxPool2d(2)
        self.block1 = _make_block(WIDTHS[0], WIDTHS[1], convs[1])
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _make_block(WIDTHS[1], WIDTHS[2], convs[2])
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _make_block(WIDTHS[2], WIDTHS[3], convs[3])
        self.block4 = _make_block(WIDTHS[3], WIDTHS[4], convs[4])
        self.add_head(WIDTHS, WIDTHS[-1], num_classes, global_pool)
        self.apply(init_kaiming)
        self.apply(init_small_linear)


default_cfgs = generate_default_cfgs(
    {f"cifar_vgg{depth}": cifar_cfg(CifarVGG.classifier_name, first_conv="block0.0") for depth in (8, 11, 13, 16, 19)}
)


@register_model
def cifar_vgg8(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    return build(CifarVGG, "cifar_vgg8", pretrained, convs=(1, 1, 1, 1, 1), **kwargs)


@register_model
def cifar_vgg11(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    return build(CifarVGG, "cifar_vgg11", pretrained, convs=(1, 1, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    return build(CifarVGG, "cifar_vgg13", pretrained, convs=(2, 2, 2, 2, 2), **kwargs)


@register_model
def cifar_vgg16(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    return build(CifarVGG, "cifar_vgg16", pretrained, convs=(2, 2, 3, 3, 3), **kwargs)


@register_model
def cifar_vgg19(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    return build(CifarVGG, "cifar_vgg19", pretrained, convs=(2, 2, 4, 4, 4), **kwargs)
