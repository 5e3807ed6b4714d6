"""Networks without a classifier: backbones that return tokens, a map or a vector."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers.models.timm_wrapper import TimmWrapperModel

from ..errors import HfkdError, WrongTypeError

LAST_MAP = "last_map"
MAX_PREFIX = 8  # class, distillation and register tokens of a network that does not state its patches


class HeadlessNetwork(nn.Module):
    """Backbone whose logits are (B, 0), with the features that losses name.

    Its stages are those of a timm backbone, else the blocks of the backbone, followed by "last_map": what the backbone
    returns. "embedding" is the pooled features (B, D): the backbone's own, else its class token, else the average of
    the last map. Layers are named as in the backbone. Tokens are recorded as maps (B, C, H, W) without their prefix
    (class and register tokens).

    Args:
        backbone: a transformers or timm model without a classifier, or a module that returns tokens (B, N, C), a map
            (B, C, H, W) or a vector (B, D) for images.
    """

    num_classes = 0

    def __init__(self, backbone: nn.Module):
        super().__init__()
        if isinstance(backbone, TimmWrapperModel):
            backbone = backbone.timm_model
        if isinstance(backbone, PreTrainedModel):
            _check_takes_images(backbone)
        self.backbone = backbone
        self.last_map = nn.Identity()
        self.no_classifier = _NoClassifier()
        self.feature_info = [{"module": path} for path in [*_stages(backbone), LAST_MAP]]  # timm's table of stages
        self._is_timm = hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head")
        self._sides: Sequence[int] = (0, 0)  # of the images of the latest forward pass
        self._options: dict[str, Any] = {}
        if isinstance(backbone, PreTrainedModel) and _takes(backbone, "interpolate_pos_encoding"):
            self._options = {"interpolate_pos_encoding": True}

    def get_classifier(self) -> nn.Module:
        """Return the module whose input is the embedding, as timm's models do."""
        return self.no_classifier

    def named_layers(self) -> dict[str, nn.Module]:
        """Return the modules that a loss can name: the backbone's own, and "last_map"."""
        return dict(self.backbone.named_modules()) | {LAST_MAP: self.last_map}

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.no_classifier(self.embed(pixel_values))

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the embedding (B, D) of images."""
        self._sides = pixel_values.shape[2:]
        if min(self._sides) < (_patch_size(self.backbone) or 1):
            raise WrongTypeError(
                f"{type(self.backbone).__name__} cuts images into patches of {_patch_size(self.backbone)} pixels, and "
                f"these have {tuple(self._sides)}: give larger images."
            )
        features, pooled = self._features(pixel_values)
        features = self.last_map(features[..., None, None] if features.ndim == 2 else features)
        return self._average(features) if pooled is None else pooled.flatten(1)

    def _features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the backbone's features and its pooled output, if it has one."""
        if self._is_timm:
            features = self.backbone.forward_features(pixel_values)
            return features, self.backbone.forward_head(features)
        output = self.backbone(pixel_values, **self._options)
        if isinstance(output, Tensor):
            return output, None
        features = getattr(output, "last_hidden_state", None)
        if not isinstance(features, Tensor):
            raise WrongTypeError(
                f"{type(self.backbone).__name__} must return features: tokens (B, N, C), a map (B, C, H, W), a vector "
                f"(B, D), or an output with such `.last_hidden_state`; got {type(output).__name__}."
            )
        return features, getattr(output, "pooler_output", None)

    def _average(self, features: Tensor) -> Tensor:
        if features.ndim == 3 and self._prefix(features):
            return features[:, 0]
        return self.as_map(features).mean(dim=(2, 3))

    def as_map(self, features: Tensor) -> Tensor:
        """Return tokens (B, N, C) or a map in the backbone's layout as a map (B, C, H, W), other tensors as they are.

        Raises:
            WrongTypeError: for tokens that form no grid.
        """
        if features.ndim == 4 and getattr(self.backbone, "output_fmt", None) == "NHWC":  # such as timm's Swin
            return features.permute(0, 3, 1, 2)
        if features.ndim != 3:
            return features
        return features[:, self._prefix(features) :].transpose(1, 2).unflatten(2, self._grid(features))

    def _prefix(self, tokens: Tensor) -> int:
        height, width = self._grid(tokens)
        return tokens.shape[1] - height * width

    def _grid(self, tokens: Tensor) -> tuple[int, int]:
        """Return height and width of the grid that tokens (B, N, C) form behind their prefix."""
        patch = _patch_size(self.backbone)
        if patch is not None:
            height, width = (side // patch for side in self._sides)
            if 0 < height * width <= tokens.shape[1]:
                return height, width
        side = math.isqrt(tokens.shape[1])  # of a network with stages, whose tokens become fewer
        if tokens.shape[1] - side * side > MAX_PREFIX:
            raise WrongTypeError(
                f"{type(self.backbone).__name__} gives {tokens.shape[1]} tokens for an image: expected those of a "
                f"square grid behind at most {MAX_PREFIX} others."
            )
        return side, side


class _NoClassifier(nn.Module):
    """Classifier of no classes: (B, D) -> (B, 0)."""

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding[:, :0]


def is_headless(model: nn.Module) -> bool:
    """Return True for a transformers or timm model without a classifier, or the network around one."""
    if isinstance(model, (TimmWrapperModel, HeadlessNetwork)):
        return True
    if isinstance(model, PreTrainedModel):
        return type(model) is MODEL_MAPPING.get(type(model.config), None)
    return hasattr(model, "forward_features") and getattr(model, "num_classes", None) == 0


def embed(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return the embedding (B, D) that a network without a classifier gives for images."""
    if isinstance(model, TimmWrapperModel):
        return model(pixel_values).pooler_output
    return (model if isinstance(model, HeadlessNetwork) else HeadlessNetwork(model)).embed(pixel_values)


def _stages(backbone: nn.Module) -> list[str]:
    """Return the paths of a backbone's stages: timm's, else the members of its outermost list of blocks."""
    if hasattr(backbone, "feature_info"):
        return [stage["module"] for stage in backbone.feature_info]
    for path, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            return [f"{path}.{index}" for index in range(len(module))]
    return []


def _patch_size(backbone: nn.Module) -> int | None:
    if isinstance(backbone, PreTrainedModel):
        size = getattr(backbone.config, "patch_size", None)
    else:
        size = getattr(getattr(backbone, "patch_embed", backbone), "patch_size", None)
    return size[0] if isinstance(size, (tuple, list)) else size


def _check_takes_images(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if model.main_input_name != "pixel_values":
        raise HfkdError(
            f"{name} takes more than images: give its vision tower, such as CLIPVisionModel.from_pretrained(...)."
        )
    if getattr(model.config, "mask_ratio", None):
        raise HfkdError(f"{name} leaves patches out at random: save its weights as a ViTModel and give that.")
    if _takes(model, "spatial_shapes"):
        raise HfkdError(f"{name} takes patches of images of any shape, which is not supported: give a model of SigLIP.")


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
