"""Tokens-to-Token vision transformers.

Paper: Yuan, Chen, Wang, Yu, Shi, Jiang, Tay, Feng, Yan, "Tokens-to-Token ViT: Training Vision Transformers from Scratch
on ImageNet", 2021. The tokens-to-token module of these variants is made of Performer layers: Choromanski et al.,
"Rethinking Attention with Performers", 2021.

Names in the state dict: the official release. The random features `w` of the Performers and the sinusoid position table
are saved but never trained. The release has frozen parameters; here they are buffers, since transformers'
`from_pretrained` makes every parameter trainable. Height and width may be any multiples of 16.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .tokens import IMAGENET_CFG, Block, TokenClassifier, to_map

TOKEN_WIDTH = 64  # inside the tokens-to-token module
RANDOM_FEATURES = 32
NORM_EPS = 1e-5


class Performer(nn.Module):
    """Attention of linear cost with one head, from `in_width` to `width` channels, and a small perceptron.

    softmax(q k') is approximated by f(q) f(k)', where f(x) = exp(w x - |x|^2 / 2) / sqrt(features). The shortcut around
    the attention is the values, since its input has another width.
    """

    def __init__(self, in_width: int, width: int, features: int):
        super().__init__()
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(features, width)) * features**0.5)
        self.kqv = nn.Linear(in_width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(in_width, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def _random_features(self, x: Tensor) -> Tensor:
        exponent = x @ self.w.to(x.dtype).T - x.square().sum(dim=-1, keepdim=True) / 2
        return exponent.exp() / self.w.shape[0] ** 0.5

    def _attend(self, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        # Sums of exponentials over thousands of tokens are inaccurate in half precision.
        with torch.autocast(k.device.type, enabled=False):
            k, q, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (k, q, v))
            k, q = self._random_features(k), self._random_features(q)
            total = q @ k.sum(dim=1).unsqueeze(-1)
            return q @ (k.transpose(1, 2) @ v) / (total + 1e-8)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        x = v + self.proj(self._attend(k, q, v).to(v.dtype))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Three overlapping soft splits that turn images (B, in_chans, H, W) into tokens (B, H/16 * W/16, embed_dim)."""

    def __init__(self, in_chans: int, embed_dim: int, img_size: tuple[int, int]):
        super().__init__()
        self.img_size = img_size
        self.attention1 = Performer(in_chans * 7 * 7, TOKEN_WIDTH, RANDOM_FEATURES)
        self.attention2 = Performer(TOKEN_WIDTH * 3 * 3, TOKEN_WIDTH, RANDOM_FEATURES)
        self.project = nn.Linear(TOKEN_WIDTH * 3 * 3, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.img_size
        x = self.attention1(_soft_split(x, 7, 4, 2))
        x = self.attention2(_soft_split(to_map(x, height // 4, width // 4), 3, 2, 1))
        return self.project(_soft_split(to_map(x, height // 8, width // 8), 3, 2, 1))


def _soft_split(x: Tensor, side: int, stride: int, padding: int) -> Tensor:
    """Return overlapping windows (B, H/stride * W/stride, C * side * side) of a map (B, C, H, W)."""
    return F.unfold(x, side, stride=stride, padding=padding).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention without biases on queries, keys and values."""

    def __init__(self, width: int, num_heads: int, qk_scale: float | None):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


def sinusoid_table(count: int, width: int) -> Tensor:
    """Return the position table (1, count, width) of "Attention Is All You Need": alternating sines and cosines."""
    exponents = torch.arange(width).div(2, rounding_mode="floor") * (2 / width)
    angles = torch.arange(count, dtype=torch.float64).unsqueeze(1) / 10000 ** exponents.double()
    table = torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())
    return table.float().unsqueeze(0)


class T2TViT(TokenClassifier):
    """Tokens-to-token module and `depth` transformer blocks of width `embed_dim`.

    Args:
        qk_scale: factor of the attention logits, by default 1 / sqrt(width of a head). The t2t_vit_14 weights of the
            release need `384**-0.5`.
    """

    def __init__(
        self,
        depth: int,
        embed_dim: int = 256,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qk_scale: float | None = None,
    ):
        super().__init__(img_size, 16, in_chans, drop_rate)
        height, width = self.img_size
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.register_buffer("pos_embed", sinusoid_table(1 + height // 16 * (width // 16), embed_dim))
        self.tokens_to_token = TokensToToken(in_chans, embed_dim, self.img_size)
        self.blocks = nn.ModuleList(
            Block(embed_dim, Attention(embed_dim, num_heads, qk_scale), mlp_ratio, rate, NORM_EPS)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        info = {"num_chs": embed_dim, "reduction": 16}
        feature_info = [{**info, "module": f"blocks.{index}"} for index in range(depth)]
        self.add_head(feature_info, NORM_EPS, num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's table of the layers, as its ViTs have it; `coarse` changes nothing."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^(?:cls_token|tokens_to_token)", "blocks": blocks}

    def enter_block(self, index: int, x: Tensor) -> Tensor:
        """Turn images into tokens with class token and positions before block 0; return later tokens unchanged."""
        if index > 0:
            return x
        x = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x + self.pos_embed


default_cfgs = generate_default_cfgs({f"t2t_vit_{depth}": IMAGENET_CFG for depth in (7, 10, 12, 14)})


def _build(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    feature_cfg = {"feature_cls": "getter", "out_indices": 3}  # the last three, as timm does for plain ViTs
    return build_model_with_cfg(T2TViT, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def t2t_vit_7(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    return _build("t2t_vit_7", pretrained, depth=7, **kwargs)


@register_model
def t2t_vit_10(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    return _build("t2t_vit_10", pretrained, depth=10, **kwargs)


@register_model
def t2t_vit_12(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    return _build("t2t_vit_12", pretrained, depth=12, **kwargs)


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    sizes = {"embed_dim": 384, "num_heads": 6, "mlp_ratio": 3.0}
    return _build("t2t_vit_14", pretrained, depth=14, **sizes, **kwargs)
