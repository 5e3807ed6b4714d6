"""Pyramid vision transformers (version 1).

Paper: Wang, Xie, Li, Fan, Song, Liang, Lu, Luo, Shao, "Pyramid Vision Transformer: A Versatile Backbone for Dense
Prediction without Convolutions", 2021. Parameter names: the official release.

Blocks are counted over all four stages. In pvt_tiny, blocks 0 and 1 are `block1.0` and `block1.1` (stride 4), 2 and 3
are stage 2 (8), 4 and 5 are stage 3 (16), 6 and 7 are stage 4 (32). The module of each block is in `feature_info`.
Height and width may be any multiples of 32. At 32, the attention of the first three stages sees a single key, so their
queries learn nothing.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .tokens import IMAGENET_CFG, Block, TokenClassifier, to_map

NORM_EPS = 1e-6  # of the blocks and the last norm; norms of patches and of reduced maps use PyTorch's 1e-5


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values come from the map reduced `sr_ratio` times.

    Args:
        grid: height and width of the map. With an `sr_ratio` of 1 the tokens may hold a class token.
    """

    def __init__(self, width: int, num_heads: int, sr_ratio: int, grid: tuple[int, int]):
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.grid = grid
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(width, width, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        source = x
        if self.sr_ratio > 1:
            source = self.norm(self.sr(to_map(x, *self.grid)).flatten(2).transpose(1, 2))
        k, v = self.kv(source).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PVT(TokenClassifier):
    """Four stages of `depths` blocks, each with a patch embedding first; the last stage adds the class token."""

    widths = (64, 128, 320, 512)
    num_heads = (1, 2, 5, 8)
    mlp_ratios = (8, 8, 4, 4)
    sr_ratios = (8, 4, 2, 1)
    patch_sizes = (4, 2, 2, 2)
    reductions = (4, 8, 16, 32)  # reduction * sr_ratio is 32 in every stage, so sides must be multiples of 32

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__(img_size, 32, in_chans, drop_rate)
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        self.grids = [tuple(side // reduction for side in self.img_size) for reduction in self.reductions]
        self.stage_of_first_block = {sum(depths[:stage]): stage for stage in range(4)}
        feature_info = []
        for stage, depth in enumerate(depths):
            self._add_stage(stage, [next(drop_paths) for _ in range(depth)])
            info = {"num_chs": self.widths[stage], "reduction": self.reductions[stage]}
            feature_info += [{**info, "module": f"block{stage + 1}.{index}"} for index in range(depth)]
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, self.widths[-1]), std=0.02))
        self.add_head(feature_info, NORM_EPS, num_classes, global_pool)

    def _add_stage(self, stage: int, drop_paths: list[float]) -> None:
        height, width = grid = self.grids[stage]
        channels, in_channels = self.widths[stage], self.widths[stage - 1] if stage else self.in_chans
        positions = torch.empty(1, height * width + (stage == 3), channels)  # one more for the class token
        self.register_parameter(f"pos_embed{stage + 1}", nn.Parameter(trunc_normal_(positions, std=0.02)))
        patch_embed = PatchEmbed(None, self.patch_sizes[stage], in_channels, channels, norm_layer=nn.LayerNorm)
        self.add_module(f"patch_embed{stage + 1}", patch_embed)
        attention = partial(SpatialReductionAttention, channels, self.num_heads[stage], self.sr_ratios[stage], grid)
        blocks = [Block(channels, attention(), self.mlp_ratios[stage], rate, NORM_EPS) for rate in drop_paths]
        self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return timm's table of the layers: patch embedding and blocks of each stage, then norm and head.

        Args:
            coarse: whether the blocks of a stage are one layer.
        """
        table = {}
        for stage in range(1, 5):
            table[f"patch_embed{stage}"] = rf"^(?:patch_embed|pos_embed){stage}" + ("|^cls_token" if stage == 4 else "")
            table[f"block{stage}"] = rf"^block{stage}" + ("" if coarse else r"\.(\d+)")
        return table

    def enter_block(self, index: int, x: Tensor) -> Tensor:
        """Return the tokens for block `index`: unchanged, or the next stage's tokens if the block is its first."""
        if index not in self.stage_of_first_block:
            return x
        stage = self.stage_of_first_block[index]
        map_or_images = to_map(x, *self.grids[stage - 1]) if stage else x
        x = self.get_submodule(f"patch_embed{stage + 1}")(map_or_images)
        if stage == 3:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x + self.get_parameter(f"pos_embed{stage + 1}")


PVT_CFG = {**IMAGENET_CFG, "first_conv": "patch_embed1.proj"}
default_cfgs = generate_default_cfgs({"pvt_tiny": PVT_CFG, "pvt_small": PVT_CFG})


def _build(variant: str, pretrained: bool, depths: tuple[int, int, int, int], **kwargs: Any) -> nn.Module:
    # With these indices timm's `features_only` returns the last map of each stage.
    feature_cfg = {"feature_cls": "getter", "out_indices": tuple(sum(depths[: last + 1]) - 1 for last in range(4))}
    return build_model_with_cfg(PVT, variant, pretrained, feature_cfg=feature_cfg, depths=depths, **kwargs)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PVT:
    return _build("pvt_tiny", pretrained, depths=(2, 2, 2, 2), **kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PVT:
    return _build("pvt_small", pretrained, depths=(3, 4, 6, 3), **kwargs)
