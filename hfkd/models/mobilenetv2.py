"""MobileNetV2 for 32 x 32 images.

Paper: Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018.
Differences from the paper: the second group keeps its resolution (stride 1), ReLU replaces ReLU6, the first block has a
1x1 convolution (of factor 1) before its depthwise one, and the last width is 1280 at every width factor.

Parameter names: mdistiller and RepDistiller (CRD), width 0.5; SimKD, width 1.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CifarModel, build, cifar_cfg, init_kaiming, init_small_linear

HEAD_WIDTH = 1280
# expansion, channels at width 1, blocks, stride of the first block: one row a group
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and 1x1 linear projection; the input is added if the shape allows it."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.adds_input = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds_input else self.conv(x)


def _make_group(in_channels: int, channels: int, blocks: int, stride: int, expansion: int) -> nn.Sequential:
    first = InvertedResidual(in_channels, channels, stride, expansion)
    return nn.Sequential(first, *(InvertedResidual(channels, channels, 1, expansion) for _ in range(blocks - 1)))


class CifarMobileNetV2(CifarModel):
    """MobileNetV2 with a width factor; a stage ends before the resolution changes."""

    stages = (
        ("conv1",),
        ("blocks.0", "blocks.1"),
        ("blocks.2",),
        ("blocks.3", "blocks.4"),
        ("blocks.5", "blocks.6"),
    )
    final_layers = ("conv2",)
    reductions = (2, 2, 4, 8, 16)
    classifier_name = "classifier.0"

    def __init__(
        self,
        width: float,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__(in_chans, drop_rate)
        stem = int(32 * width)
        widths = [int(channels * width) for _, channels, _, _ in GROUPS]
        self.conv1 = nn.Sequential(nn.Conv2d(in_chans, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.blocks = nn.Sequential()
        in_channels = stem
        for channels, (expansion, _, blocks, stride) in zip(widths, GROUPS, strict=True):
            self.blocks.append(_make_group(in_channels, channels, blocks, stride, expansion))
            in_channels = channels
        self.conv2 = nn.Sequential(
            nn.Conv2d(widths[-1], HEAD_WIDTH, 1, bias=False), nn.BatchNorm2d(HEAD_WIDTH), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.Identity())  # add_head puts the linear layer in its place
        stage_channels = (stem, widths[1], widths[2], widths[4], widths[6])
        self.add_head(stage_channels, HEAD_WIDTH, num_classes, global_pool)
        self.apply(init_kaiming)
        self.apply(init_small_linear)


default_cfgs = generate_default_cfgs(
    {
        f"cifar_mobilenetv2_{width}": cifar_cfg(CifarMobileNetV2.classifier_name, first_conv="conv1.0")
        for width in ("050", "100")
    }
)


@register_model
def cifar_mobilenetv2_050(pretrained: bool = False, **kwargs: Any) -> CifarMobileNetV2:
    return build(CifarMobileNetV2, "cifar_mobilenetv2_050", pretrained, width=0.5, **kwargs)


@register_model
def cifar_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> CifarMobileNetV2:
    return build(CifarMobileNetV2, "cifar_mobilenetv2_100", pretrained, width=1.0, **kwargs)
