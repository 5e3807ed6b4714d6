"""ShuffleNetV1 for 32 x 32 images, three groups.

Paper: Zhang, Zhou, Lin, Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
2018. Differences from the paper: a 1x1 stem of stride 1 without pooling, and a ReLU after the depthwise convolution.

Parameter names: mdistiller and RepDistiller (CRD). As in these, weights have PyTorch's default initialisation.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CifarModel, build, cifar_cfg

STEM_WIDTH = 24


class Bottleneck(nn.Module):
    """Grouped 1x1, channel shuffle, 3x3 depthwise and grouped 1x1 convolutions.

    With stride 1 the input is added. With stride 2 the average-pooled input is concatenated and counts among the
    `channels`. The first convolution of the network's first block is not grouped: 24 channels are too few.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int):
        super().__init__()
        self.concatenates = stride == 2
        branch = channels - in_channels if self.concatenates else channels
        middle = branch // 4
        first_groups = 1 if in_channels == STEM_WIDTH else groups
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.act1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(middle, branch, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.shortcut = nn.AvgPool2d(3, stride, 1) if self.concatenates else nn.Identity()
        self.act3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle(self.act1(self.bn1(self.conv1(x))))
        out = self.act2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = self.shortcut(x)
        return self.act3(torch.cat((out, shortcut), dim=1) if self.concatenates else out + shortcut)


class CifarShuffleNetV1(CifarModel):
    """Stem and three stages of `blocks` blocks; `widths` are the channels of the stages."""

    stages = (("conv1", "bn1", "act1"), ("layer1",), ("layer2",), ("layer3",))
    reductions = (1, 2, 4, 8)
    classifier_name = "linear"

    def __init__(
        self,
        blocks: tuple[int, int, int] = (4, 8, 4),
        widths: tuple[int, int, int] = (240, 480, 960),
        groups: int = 3,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__(in_chans, drop_rate)
        self.conv1 = nn.Conv2d(in_chans, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.act1 = nn.ReLU()
        self.layer1 = self._make_layer(STEM_WIDTH, widths[0], blocks[0], groups)
        self.layer2 = self._make_layer(widths[0], widths[1], blocks[1], groups)
        self.layer3 = self._make_layer(widths[1], widths[2], blocks[2], groups)
        self.add_head((STEM_WIDTH, *widths), widths[-1], num_classes, global_pool)

    @staticmethod
    def _make_layer(in_channels: int, channels: int, blocks: int, groups: int) -> nn.Sequential:
        first = Bottleneck(in_channels, channels, 2, groups)
        return nn.Sequential(first, *(Bottleneck(channels, channels, 1, groups) for _ in range(blocks - 1)))


default_cfgs = generate_default_cfgs({"cifar_shufflenetv1": cifar_cfg(CifarShuffleNetV1.classifier_name)})


@register_model
def cifar_shufflenetv1(pretrained: bool = False, **kwargs: Any) -> CifarShuffleNetV1:
    return build(CifarShuffleNetV1, "cifar_shufflenetv1", pretrained, **kwargs)
