"""Wide residual networks: pre-activation blocks, three stages.

Paper: Zagoruyko, Komodakis, "Wide Residual Networks", 2016. `wrn_D_K` has depth D = 6n + 4, width factor K and no
dropout inside the blocks.

Parameter names: mdistiller and RepDistiller (CRD). As in these, the map of a stage is the sum that leaves its last
block. The last BatchNorm and ReLU come after the deepest map (`norm=True` applies them).
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CifarModel, build, cifar_cfg, init_kaiming


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, and a shortcut.

    If the width changes, the shortcut is a 1x1 convolution of the normalised input, otherwise it is the input.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.changes_width = in_channels != channels
        if self.changes_width:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.act1(self.bn1(x))
        out = self.conv2(self.act2(self.bn2(self.conv1(normed))))
        return out + (self.convShortcut(normed) if self.changes_width else x)


class Stage(nn.Module):
    """Blocks of a stage, under the name `layer` that the published checkpoints use."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int):
        super().__init__()
        first = PreActBlock(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *(PreActBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class CifarWideResNet(CifarModel):
    """Wide ResNet of the given `depth` and width factor `widen`."""

    stages = (("conv1",), ("block1",), ("block2",), ("block3",))
    final_layers = ("bn1", "act1")
    reductions = (1, 1, 2, 4)
    classifier_name = "fc"

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ):
        super().__init__(in_chans, drop_rate)
        blocks = (depth - 4) // 6
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.block1 = Stage(widths[0], widths[1], blocks, stride=1)
        self.block2 = Stage(widths[1], widths[2], blocks, stride=2)
        self.block3 = Stage(widths[2], widths[3], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.act1 = nn.ReLU()
        self.add_head(widths, widths[-1], num_classes, global_pool)
        self.apply(init_kaiming)


default_cfgs = generate_default_cfgs(
    {f"cifar_wrn_{size}": cifar_cfg(CifarWideResNet.classifier_name) for size in ("16_1", "16_2", "40_1", "40_2")}
)


@register_model
def cifar_wrn_16_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    return build(CifarWideResNet, "cifar_wrn_16_1", pretrained, depth=16, widen=1, **kwargs)


@register_model
def cifar_wrn_16_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    return build(CifarWideResNet, "cifar_wrn_16_2", pretrained, depth=16, widen=2, **kwargs)


@register_model
def cifar_wrn_40_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    return build(CifarWideResNet, "cifar_wrn_40_1", pretrained, depth=40, widen=1, **kwargs)


@register_model
def cifar_wrn_40_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    return build(CifarWideResNet, "cifar_wrn_40_2", pretrained, depth=40, widen=2, **kwargs)
