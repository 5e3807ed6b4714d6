"""ResNet-18 and ResNet-50 for 32 x 32 images: as for ImageNet, with a 3x3 stem of stride 1 and no max pooling.

Paper: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016. The stride of the bottleneck is in its
3x3 convolution.

Parameter names: `ResNet18` and `ResNet50` of mdistiller and RepDistiller (CRD).
"""

from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CifarModel, build, cifar_cfg, init_kaiming


def _make_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ReLU after the sum."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _make_shortcut(in_channels, channels, stride)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, four times wider at the end, and a shortcut; ReLU after the sum."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _make_shortcut(in_channels, out_channels, stride)
        self.act3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        return self.act3(self.bn3(self.conv3(out)) + self.shortcut(x))


class CifarWideStemResNet(CifarModel):
    """Stem of 64 channels and four stages of `blocks` blocks of class `block`."""

    stages = (("conv1", "bn1", "act1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
    reductions = (1, 1, 2, 4, 8)
    classifier_name = "linear"

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__(in_chans, drop_rate)
        widths = [64] + [block.expansion * channels for channels in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU()
        self.layer1 = self._make_layer(block, widths[0], 64, blocks[0], stride=1)
        self.layer2 = self._make_layer(block, widths[1], 128, blocks[1], stride=2)
        self.layer3 = self._make_layer(block, widths[2], 256, blocks[2], stride=2)
        self.layer4 = self._make_layer(block, widths[3], 512, blocks[3], stride=2)
        self.add_head(widths, widths[-1], num_classes, global_pool)
        self.apply(init_kaiming)

    @staticmethod
    def _make_layer(
        block: type[BasicBlock] | type[Bottleneck], in_channels: int, channels: int, blocks: int, stride: int
    ) -> nn.Sequential:
        first = block(in_channels, channels, stride)
        rest = (block(block.expansion * channels, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(first, *rest)


default_cfgs = generate_default_cfgs(
    {f"cifar_resnet{depth}": cifar_cfg(CifarWideStemResNet.classifier_name) for depth in (18, 50)}
)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarWideStemResNet:
    return build(CifarWideStemResNet, "cifar_resnet18", pretrained, block=BasicBlock, blocks=(2, 2, 2, 2), **kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> CifarWideStemResNet:
    return build(CifarWideStemResNet, "cifar_resnet50", pretrained, block=Bottleneck, blocks=(3, 4, 6, 3), **kwargs)
