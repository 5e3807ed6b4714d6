"""ShuffleNetV2 for 32 x 32 images.

Paper: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", 2018.
Difference from the paper: a 1x1 stem of stride 1 without pooling.

Parameter names: mdistiller and RepDistiller (CRD), width 1; SimKD, width 1.5. As in these, weights have PyTorch's
default initialisation.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CifarModel, build, cifar_cfg

STEM_WIDTH = 24
BLOCKS = (4, 8, 4)


class BasicBlock(nn.Module):
    """Block that keeps half of the channels, convolves the other half (1x1, 3x3 depthwise, 1x1) and shuffles all."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.act3 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = self.act1(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = self.act3(self.bn3(self.conv3(out)))
        return self.shuffle(torch.cat((kept, out), dim=1))


class DownBlock(nn.Module):
    """First block of a stage: two branches of stride 2 read the whole input, each gives half of `channels`."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.act3 = nn.ReLU()
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.act5 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = self.act2(self.bn2(self.conv2(left)))
        right = self.act3(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = self.act5(self.bn5(self.conv5(right)))
        return self.shuffle(torch.cat((left, right), dim=1))


class CifarShuffleNetV2(CifarModel):
    """Stem and three stages; `widths` are the channels of the stages and of the last 1x1 convolution."""

    stages = (("conv1", "bn1", "act1"), ("layer1",), ("layer2",), ("layer3",))
    final_layers = ("conv2", "bn2", "act2")
    reductions = (1, 2, 4, 8)
    classifier_name = "linear"

    def __init__(
        self,
        widths: tuple[int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__(in_chans, drop_rate)
        self.conv1 = nn.Conv2d(in_chans, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.act1 = nn.ReLU()
        self.layer1 = self._make_layer(STEM_WIDTH, widths[0], BLOCKS[0])
        self.layer2 = self._make_layer(widths[0], widths[1], BLOCKS[1])
        self.layer3 = self._make_layer(widths[1], widths[2], BLOCKS[2])
        self.conv2 = nn.Conv2d(widths[2], widths[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.act2 = nn.ReLU()
        self.add_head((STEM_WIDTH, *widths[:3]), widths[3], num_classes, global_pool)

    @staticmethod
    def _make_layer(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(DownBlock(in_channels, channels), *(BasicBlock(channels) for _ in range(blocks - 1)))


default_cfgs = generate_default_cfgs(
    {name: cifar_cfg(CifarShuffleNetV2.classifier_name) for name in ("cifar_shufflenetv2", "cifar_shufflenetv2_150")}
)


@register_model
def cifar_shufflenetv2(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV2:
    return build(CifarShuffleNetV2, "cifar_shufflenetv2", pretrained, widths=(116, 232, 464, 1024), **kwargs)


@register_model
def cifar_shufflenetv2_150(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV2:
    return build(CifarShuffleNetV2, "cifar_shufflenetv2_150", pretrained, widths=(176, 352, 704, 1024), **kwargs)
