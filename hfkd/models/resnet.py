"""ResNets for 32 x 32 images with three stages.

Paper: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016 (section 4.2). The depth is 6n + 2.
Difference from the paper: a shortcut that changes the shape is a 1x1 convolution with BatchNorm. The x4 variants have
four times the width in the stages and twice in the stem, so their first stage also has a convolutional shortcut.

Parameter names: mdistiller and RepDistiller (CRD); resnet38, resnet14x4 and resnet38x4: SimKD.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CifarModel, build, cifar_cfg, init_kaiming


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ReLU after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(out)) + self.downsample(x))


class CifarResNet(CifarModel):
    """Stem and three stages of `blocks` blocks; `widths` are the channels of stem and stages."""

    stages = (("conv1", "bn1", "act1"), ("layer1",), ("layer2",), ("layer3",))
    reductions = (1, 1, 2, 4)
    classifier_name = "fc"

    def __init__(
        self,
        blocks: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__(in_chans, drop_rate)
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU()
        self.layer1 = self._make_layer(widths[0], widths[1], blocks, stride=1)
        self.layer2 = self._make_layer(widths[1], widths[2], blocks, stride=2)
        self.layer3 = self._make_layer(widths[2], widths[3], blocks, stride=2)
        self.add_head(widths, widths[-1], num_classes, global_pool)
        self.apply(init_kaiming)

    @staticmethod
    def _make_layer(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


WIDE = (32, 64, 128, 256)

default_cfgs = generate_default_cfgs(
    {
        f"cifar_resnet{depth}": cifar_cfg(CifarResNet.classifier_name)
        for depth in (8, 14, 20, 32, 38, 44, 56, 110, "8x4", "14x4", "32x4", "38x4")
    }
)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet8", pretrained, blocks=1, **kwargs)


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet14", pretrained, blocks=2, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet20", pretrained, blocks=3, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet32", pretrained, blocks=5, **kwargs)


@register_model
def cifar_resnet38(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet38", pretrained, blocks=6, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet44", pretrained, blocks=7, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet56", pretrained, blocks=9, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet110", pretrained, blocks=18, **kwargs)


@register_model
def cifar_resnet8x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet8x4", pretrained, blocks=1, widths=WIDE, **kwargs)


@register_model
def cifar_resnet14x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet14x4", pretrained, blocks=2, widths=WIDE, **kwargs)


@register_model
def cifar_resnet32x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet32x4", pretrained, blocks=5, widths=WIDE, **kwargs)


@register_model
def cifar_resnet38x4(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build(CifarResNet, "cifar_resnet38x4", pretrained, blocks=6, widths=WIDE, **kwargs)
