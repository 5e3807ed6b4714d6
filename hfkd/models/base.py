"""Base of the CIFAR families: timm's model interface over a declared list of stages.

A family creates its layers under the names of the published checkpoints, and declares

- `stages`: the feature maps of the distillation literature, from the stem to the deepest. Each stage is the tuple of
  modules that run in turn between the previous map and this one. The output of the last module is the map, so a forward
  hook on that module sees the same tensor as `forward_intermediates`;
- `final_layers`: the modules between the deepest map and the pooling, if the architecture has any;
- `reductions`: stride of each map relative to the image;
- `classifier_name`: module path of the linear classifier in the published checkpoints.
"""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import HfkdError

CIFAR_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR_STD = (0.2675, 0.2565, 0.2761)


class CifarModel(nn.Module):
    """Base of the `cifar_*` families: all of timm's interface except the layers.

    The constructor of a subclass creates its layers and then calls `add_head` once, last. The order of creation is the
    order of the state dict.
    """

    stages: ClassVar[tuple[tuple[str, ...], ...]]
    final_layers: ClassVar[tuple[str, ...]] = ()
    reductions: ClassVar[tuple[int, ...]]
    classifier_name: ClassVar[str]

    def __init__(self, in_chans: int, drop_rate: float):
        super().__init__()
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

    def add_head(self, stage_channels: Sequence[int], num_features: int, num_classes: int, global_pool: str) -> None:
        """Create pooling and classifier and describe the stages.

        Args:
            stage_channels: channels of each stage's map.
            num_features: channels of the map that is pooled.
        """
        self.num_features = num_features
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": modules[-1]}
            for channels, reduction, modules in zip(stage_channels, self.reductions, self.stages, strict=True)
        ]
        if self.final_layers:  # timm's key for the width of the last map under `norm=True`
            self.feature_info[-1]["num_chs_norm"] = num_features
        self._create_head(num_classes, global_pool)

    def _create_head(self, num_classes: int, global_pool: str, **device_and_dtype: Any) -> None:
        self.num_classes = num_classes
        self.global_pool, classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **device_and_dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.set_submodule(self.classifier_name, classifier)

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier, or an identity if `num_classes` is 0."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; `num_classes=0` removes it, `global_pool=None` keeps the pooling."""
        weight = next(self.parameters())
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self._create_head(num_classes, pool_type, device=weight.device, dtype=weight.dtype)
        self.get_classifier().train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return timm's table of the layers, for `param_groups_layer_decay`: stem, blocks, and the rest with the head.

        Args:
            coarse: whether a layer is a whole module of `stages` and not a block of it.
        """
        stem, *stages = self.stages
        block = r"\." if coarse else r"\.(?:layer\.)?(\d+)"  # WRN holds its blocks in `layer`
        blocks = {name: f"^{re.escape(name)}{block}" for stage in stages for name in stage}
        return {"stem": rf"^(?:{'|'.join(map(re.escape, stem))})\."} | blocks

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute each stage in the backward pass.

        As everywhere in timm, BatchNorm then sees each batch twice, and its running statistics move faster.
        """
        self.grad_checkpointing = enable

    def _run(self, modules: tuple[str, ...], x: Tensor) -> Tensor:
        # Looked up at each call, so that modules replaced later, for example by SyncBatchNorm, are used.
        for name in modules:
            x = self.get_submodule(name)(x)
        return x

    def _run_stage(self, stage: tuple[str, ...], x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, stage, x)
        return self._run(stage, x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map that is pooled, (B, num_features, h, w), of images (B, in_chans, H, W)."""
        for stage in self.stages:
            x = self._run_stage(stage, x)
        return self._run(self.final_layers, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) or embedding (B, head_hidden_size) of the map from `forward_features`."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

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
        """Return the stage maps named by `indices`, shallow to deep; every argument has timm's meaning.

        Args:
            x: images (B, in_chans, H, W).
            indices: None for all stages, n for the last n, or a list of stages (negative: from the end).
            norm: pass the deepest map through the final layers, so that `forward_head` can read it.
            stop_early: run no stage behind the deepest requested one.
            output_fmt: "NCHW".
            intermediates_only: leave out the first of the two results.

        Returns:
            The map of `forward_features` (the deepest stage that ran, if stopped early) and the list of maps (B, C, h,
            w), sizes as in `feature_info`; or the list alone.

        Raises:
            HfkdError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise HfkdError(f"output_fmt is {output_fmt!r}; {type(self).__name__} returns maps, use 'NCHW'")
        take_indices, deepest = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: deepest + 1] if stop_early else self.stages
        intermediates = []
        for index, stage in enumerate(stages):
            x = self._run_stage(stage, x)
            if index in take_indices:
                intermediates.append(x)
        if len(stages) == len(self.stages):
            x = self._run(self.final_layers, x)
            if norm and deepest == len(self.stages) - 1:
                intermediates[-1] = x
        return intermediates if intermediates_only else (x, intermediates)


def cifar_cfg(classifier: str, first_conv: str = "conv1") -> dict[str, Any]:
    """Return timm's description of a `cifar_*` model: no weights to download, CIFAR statistics, 32 x 32 images."""
    return {
        "input_size": (3, 32, 32),
        "num_classes": 100,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": first_conv,
        "classifier": classifier,
    }


def build(model_cls: type[CifarModel], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build a registered variant as timm does, `features_only=True` included."""
    feature_cfg = {"feature_cls": "getter", "out_indices": tuple(range(len(model_cls.stages)))}
    return build_model_with_cfg(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def init_kaiming(module: nn.Module) -> None:
    """Initialise one module as the releases do, for `Module.apply`.

    Convolutions follow He et al.'s rule over the fan-out, with biases 0. BatchNorm keeps PyTorch's 1 and 0.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_small_linear(module: nn.Module) -> None:
    """Initialise a classifier as released for VGG and MobileNetV2, for `Module.apply`: N(0, 0.01), bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
