"""Classifiers over the maps and tokens of a student's stages, as OFA-KD has them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_GRID = 7  # sides of the grid of patches to which tokens are merged


def map_head(in_channels: int, halvings: int, channels: int, classes: int) -> nn.Sequential:
    """Build the head over a map (B, C, H, W): separable blocks that halve it, average, linear layer.

    Each block doubles the channels, the last has `channels`. Without a block there is a 1 x 1 convolution.
    """
    widths = [in_channels * 2**number for number in range(halvings)] + [channels]
    blocks: list[nn.Module] = [_separable(one, following) for one, following in zip(widths, widths[1:], strict=False)]
    stem = blocks or [nn.Conv2d(in_channels, channels, 1)]
    head = nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    head.apply(_initialize)
    return head


def _separable(in_channels: int, channels: int) -> nn.Sequential:
    """Return two depthwise separable convolutions, of which the first halves the map."""
    layers: list[nn.Module] = []
    for stride, width in ((2, in_channels), (1, channels)):
        layers += [
            nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class TokenHead(nn.Module):
    """Head over tokens (B, N, C): patches are merged, then transformer blocks and a linear layer.

    Neighbouring patches are merged two by two while their grid stays at least 7 x 7. The linear layer reads the first
    token, or without a class token the average.

    Args:
        width: C.
        patches: tokens of the square image grid, the last of the N; the ones before are class tokens.
        blocks: number of transformer blocks.
        classes: of the logits.
    """

    def __init__(self, width: int, patches: int, blocks: int, classes: int):
        super().__init__()
        self.patches = patches
        grid, merges = math.isqrt(patches), 0
        while grid % 2 == 0 and grid // 2 >= LEAST_GRID:
            grid, merges = grid // 2, merges + 1
        activations = [nn.GELU() if number == 0 or number < merges - 1 else nn.Identity() for number in range(merges)]
        self.merges = nn.Sequential(*(Merge(width, activation) for activation in activations))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.classifier = nn.Linear(width, classes)
        self.apply(_initialize)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, classes)."""
        prefix = tokens.shape[1] - self.patches
        tokens = self.blocks(torch.cat([tokens[:, :prefix], self.merges(tokens[:, prefix:])], dim=1))
        return self.classifier(tokens[:, 0] if prefix else tokens.mean(dim=1))


class Merge(nn.Module):
    """Merging of the patches of each 2 x 2 square into one, as in Swin."""

    def __init__(self, width: int, activation: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, width, bias=False)
        self.activation = activation

    def forward(self, patches: Tensor) -> Tensor:
        """Return (B, N / 4, C) of patches (B, N, C)."""
        half = math.isqrt(patches.shape[1]) // 2
        squares = patches.unflatten(1, (half, 2, half, 2)).permute(0, 1, 3, 4, 2, 5)  # columns before rows
        return self.activation(self.reduction(self.norm(squares.flatten(3).flatten(1, 2))))


class Block(nn.Module):
    """Transformer block with four attention heads, or as many as divide the width, and no bias before attention."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = math.gcd(4, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)  # timm's
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, N, C) of tokens (B, N, C)."""
        query, key, value = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.proj(attended)
        return tokens + self.mlp(self.norm2(tokens))
