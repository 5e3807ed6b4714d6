"""Pyramid vision transformers (version 1), and the interface that they share with T2T-ViT.

Paper: Wang, Xie, Li, Fan, Song, Liang, Lu, Luo, Shao, "Pyramid Vision Transformer: A Versatile Backbone for Dense
Prediction without Convolutions", 2021. Parameter names: the official release.

Blocks are counted over all four stages: in pvt_tiny, 0 and 1 are `block1.0` and `block1.1` (stride 4), 2 and 3 stage 2
(8), 4 and 5 stage 3 (16), 6 and 7 stage 4 (32); the module of each is in `feature_info`. Height and width may be any
multiples of 32, but at 32 the attention of the first three stages sees one key, so their queries learn nothing.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

NORM_EPS = 1e-6  # of the blocks and the last norm; the norms of patches and of reduced maps have PyTorch's 1e-5


class TokenClassifier(nn.Module):
    """Base of `t2t_vit_*` and `pvt_*`: everything of timm's interface except the layers.

    A subclass's constructor creates its layers, then calls `add_head` once, last; `enter_block` does what precedes a
    block. The tokens (B, N, C) that a block gives are those of an image grid, after a class token or without one.
    `img_size`, one side or (height, width) in pixels, raises ValueError unless both are multiples of `multiple`.
    """

    def __init__(self, img_size: int | tuple[int, int], multiple: int, in_chans: int, drop_rate: float):
        super().__init__()
        self.img_size = tuple(to_2tuple(img_size))
        if any(side < multiple or side % multiple for side in self.img_size):
            below = tuple(max(1, side // multiple) * multiple for side in self.img_size)
            above = tuple(max(1, -(-side // multiple)) * multiple for side in self.img_size)
            raise ValueError(
                f"img_size is {img_size}; {type(self).__name__} needs height and width in multiples of {multiple}. "
                f"Nearest (height, width): {below}" + (f" or {above}" if above != below else "")
            )
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    def add_head(self, feature_info: list[dict[str, Any]], norm_eps: float, num_classes: int, global_pool: str) -> None:
        """Create the last norm and the classifier and initialise every linear layer as the releases do.

        `feature_info`: timm's description of each block, in the order in which they run.
        """
        self.feature_info = feature_info
        self.num_features = self.head_hidden_size = feature_info[-1]["num_chs"]
        self.norm = nn.LayerNorm(self.num_features, eps=norm_eps)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)

    def enter_block(self, index: int, x: Tensor) -> Tensor:
        """What the block before `index` gave (before block 0: the images) -> tokens for block `index`."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Parameters that the official training code leaves without weight decay, besides all vectors."""
        return {"cls_token"}

    def get_classifier(self) -> nn.Module:
        """The linear classifier, or an identity when `num_classes` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a fresh classifier; `num_classes=0` removes it, `global_pool=None` keeps the pooling.

        Raises:
            ValueError: `global_pool` is not "token" (the class token), "avg" (of the others) or "" (none).
        """
        if global_pool not in (None, "token", "avg", ""):
            raise ValueError(f"global_pool is {global_pool!r}; {type(self).__name__} takes 'token', 'avg' or ''")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = {"device": self.norm.weight.device, "dtype": self.norm.weight.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes > 0 else nn.Identity()
        init_linear(self.head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def _run_blocks(self, x: Tensor, count: int, take: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Images through the first `count` blocks -> the last tokens, and the tokens of the blocks in `take`."""
        expected = (self.in_chans, *self.img_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"images are {tuple(x.shape[1:])}, this {type(self).__name__} takes {expected}: "
                "resize them, or build the model with their img_size and in_chans"
            )
        taken = []
        for index, info in enumerate(self.feature_info[:count]):
            x, block = self.enter_block(index, x), self.get_submodule(info["module"])
            x = checkpoint(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
            if index in take:
                taken.append(x)
        return x, taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normalised tokens (B, 1 + N, num_features), the class token first."""
        return self.norm(self._run_blocks(x, len(self.feature_info))[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The tokens of `forward_features` -> logits (B, num_classes) or embedding (B, num_features)."""
        if self.global_pool:
            x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(dim=1)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What the blocks named by `indices` give, without the class token, shallow to deep.

        Args:
            x: images (B, in_chans, H, W).
            indices: None for all blocks, n for the last n, or a list (negative: from the end); position in
                `feature_info`, which in PVT counts the blocks of all stages.
            norm: pass them through the last norm, those of its width (in PVT, the last stage's).
            stop_early: run no block deeper than the deepest asked for.
            output_fmt: "NCHW" for maps (B, C, h, w), "NLC" for tokens (B, h * w, C).
            intermediates_only: leave out the first of the two results.

        Returns:
            The tokens of `forward_features` (the deepest block's, unnormalised, if stopped before the last), and the
            list of maps or tokens, sizes as in `feature_info`; or the list alone.

        Raises:
            ValueError: another `output_fmt`, or images of another size than the model's.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; {type(self).__name__} gives 'NCHW' or 'NLC'")
        depth = len(self.feature_info)
        take, deepest = feature_take_indices(depth, indices)
        count = deepest + 1 if stop_early else depth
        x, taken = self._run_blocks(x, count, take)
        intermediates = []
        for index, tokens in zip(sorted(set(take)), taken, strict=True):
            height, width = (side // self.feature_info[index]["reduction"] for side in self.img_size)
            if norm and tokens.shape[-1] == self.num_features:
                tokens = self.norm(tokens)
            tokens = tokens[:, -height * width :]  # without the class token
            intermediates.append(to_map(tokens, height, width) if output_fmt == "NCHW" else tokens)
        if intermediates_only:
            return intermediates
        return self.norm(x) if count == depth else x, intermediates


class Block(nn.Module):
    """Pre-norm transformer block around a given attention module."""

    def __init__(self, width: int, attn: nn.Module, mlp_ratio: float, drop_path: float, norm_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, C) -> (B, C, height, width)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as both releases do, for `Module.apply`: truncated N(0, 0.02), bias 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Beside timm's defaults: 1000 classes, 224 x 224, ImageNet mean and std, bicubic. The input size being fixed, timm
# builds the model for the one that the configuration names.
IMAGENET_CFG = {"fixed_input_size": True, "crop_pct": 0.9, "classifier": "head"}


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values are those of the map shrunk `sr_ratio` times.

    `grid`: height and width of the map. With an `sr_ratio` of 1 the tokens may hold a class token.
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
    """Four stages of `depths` blocks, each opened by patch embedding; the class token joins in the last."""

    widths = (64, 128, 320, 512)
    num_heads = (1, 2, 5, 8)
    mlp_ratios = (8, 8, 4, 4)
    sr_ratios = (8, 4, 2, 1)
    patch_sizes = (4, 2, 2, 2)
    reductions = (4, 8, 16, 32)  # times sr_ratio: 32 everywhere, which images must be multiples of

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
        self.stage_opened_by = {sum(depths[:stage]): stage for stage in range(4)}
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
        positions = torch.empty(1, height * width + (stage == 3), channels)  # the class token has one too
        self.register_parameter(f"pos_embed{stage + 1}", nn.Parameter(trunc_normal_(positions, std=0.02)))
        patch_embed = PatchEmbed(None, self.patch_sizes[stage], in_channels, channels, norm_layer=nn.LayerNorm)
        self.add_module(f"patch_embed{stage + 1}", patch_embed)
        attention = partial(SpatialReductionAttention, channels, self.num_heads[stage], self.sr_ratios[stage], grid)
        blocks = [Block(channels, attention(), self.mlp_ratios[stage], rate, NORM_EPS) for rate in drop_paths]
        self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))

    def enter_block(self, index: int, x: Tensor) -> Tensor:
        """Tokens as they are, or the next stage's where block `index` opens one."""
        if index not in self.stage_opened_by:
            return x
        stage = self.stage_opened_by[index]
        map_or_images = to_map(x, *self.grids[stage - 1]) if stage else x
        x = self.get_submodule(f"patch_embed{stage + 1}")(map_or_images)
        if stage == 3:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x + self.get_parameter(f"pos_embed{stage + 1}")


PVT_CFG = {**IMAGENET_CFG, "first_conv": "patch_embed1.proj"}
default_cfgs = generate_default_cfgs({"pvt_tiny": PVT_CFG, "pvt_small": PVT_CFG})


def _build(variant: str, pretrained: bool, depths: tuple[int, int, int, int], **kwargs: Any) -> nn.Module:
    # timm's `features_only` then gives the last map of each stage.
    feature_cfg = {"feature_cls": "getter", "out_indices": tuple(sum(depths[: last + 1]) - 1 for last in range(4))}
    return build_model_with_cfg(PVT, variant, pretrained, feature_cfg=feature_cfg, depths=depths, **kwargs)


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> PVT:
    return _build("pvt_tiny", pretrained, depths=(2, 2, 2, 2), **kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> PVT:
    return _build("pvt_small", pretrained, depths=(3, 4, 6, 3), **kwargs)
