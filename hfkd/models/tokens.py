"""Base of the transformers over token sequences (T2T-ViT, PVT): timm's interface, blocks and initialisation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import HfkdError


class TokenClassifier(nn.Module):
    """Base of `t2t_vit_*` and `pvt_*`: all of timm's interface except the layers.

    The constructor of a subclass creates its layers and then calls `add_head` once, last. `enter_block` runs the
    operations before a block. The tokens (B, N, C) of a block form an image grid, with or without a class token in
    front.

    Args:
        img_size: one side or (height, width), in pixels.
        multiple: number that both sides must be multiples of.

    Raises:
        HfkdError: a side is no multiple of `multiple`.
    """

    def __init__(self, img_size: int | tuple[int, int], multiple: int, in_chans: int, drop_rate: float):
        super().__init__()
        self.img_size = tuple(to_2tuple(img_size))
        if any(side < multiple or side % multiple for side in self.img_size):
            below = tuple(max(1, side // multiple) * multiple for side in self.img_size)
            above = tuple(max(1, -(-side // multiple)) * multiple for side in self.img_size)
            raise HfkdError(
                f"img_size is {img_size}; {type(self).__name__} needs height and width in multiples of {multiple}. "
                f"Nearest (height, width): {below}" + (f" or {above}" if above != below else "")
            )
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    def add_head(self, feature_info: list[dict[str, Any]], norm_eps: float, num_classes: int, global_pool: str) -> None:
        """Create the last norm and the classifier and initialise every linear layer as the releases do.

        Args:
            feature_info: timm's description of each block, in the order in which they run.
        """
        self.feature_info = feature_info
        self.num_features = self.head_hidden_size = feature_info[-1]["num_chs"]
        self.norm = nn.LayerNorm(self.num_features, eps=norm_eps)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)

    def enter_block(self, index: int, x: Tensor) -> Tensor:
        """Return the tokens for block `index`, from the tokens of the block before it or, for block 0, the images."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the official code trains without weight decay, besides all vectors."""
        return {"cls_token"}

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier, or an identity if `num_classes` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; `num_classes=0` removes it, `global_pool=None` keeps the pooling.

        Raises:
            HfkdError: `global_pool` is not "token" (the class token), "avg" (mean of the other tokens) or "" (none).
        """
        if global_pool not in (None, "token", "avg", ""):
            raise HfkdError(f"global_pool is {global_pool!r}; {type(self).__name__} takes 'token', 'avg' or ''")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        factory_kwargs = {"device": self.norm.weight.device, "dtype": self.norm.weight.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **factory_kwargs) if num_classes > 0 else nn.Identity()
        init_linear(self.head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def _run_blocks(self, x: Tensor, count: int, take: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Run images through the first `count` blocks; return the last tokens and all tokens of blocks in `take`."""
        expected = (self.in_chans, *self.img_size)
        if tuple(x.shape[1:]) != expected:
            raise HfkdError(
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
        """Return normalised tokens (B, 1 + N, num_features), class token first, of images (B, in_chans, H, W)."""
        return self.norm(self._run_blocks(x, len(self.feature_info))[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) or embedding (B, num_features) of the tokens from `forward_features`."""
        if self.global_pool:
            x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(dim=1)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, in_chans, H, W)."""
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
        """Return the outputs of the blocks named by `indices`, without the class token, shallow to deep.

        Args:
            x: images (B, in_chans, H, W).
            indices: None for all blocks, n for the last n, or a list (negative: from the end) of positions in
                `feature_info`, which in PVT counts the blocks of all stages.
            norm: pass the outputs with the width of the last norm through it (in PVT, the last stage's outputs).
            stop_early: run no block behind the deepest requested one.
            output_fmt: "NCHW" for maps (B, C, h, w), "NLC" for tokens (B, h * w, C).
            intermediates_only: leave out the first of the two results.

        Returns:
            The tokens of `forward_features` (if stopped before the last block, the deepest block's, unnormalised), and
            the list of maps or tokens, sizes as in `feature_info`; or the list alone.

        Raises:
            HfkdError: another `output_fmt`, or images of another size than the model's.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise HfkdError(f"output_fmt is {output_fmt!r}; {type(self).__name__} returns 'NCHW' or 'NLC'")
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
    """Return tokens (B, height * width, C) as a map (B, C, height, width)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as both releases do, for `Module.apply`: truncated N(0, 0.02), bias 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Added to timm's defaults: 1000 classes, 224 x 224, ImageNet mean and std, bicubic. With a fixed input size, timm
# passes the size of the configuration to the model as `img_size`.
IMAGENET_CFG = {"fixed_input_size": True, "crop_pct": 0.9, "classifier": "head"}
