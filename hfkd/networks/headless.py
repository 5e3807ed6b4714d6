"""Networks without a classifier: transformers and timm backbones that return tokens, a map or a vector."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel

from ..errors import WrongTypeError


class HeadlessNetwork(nn.Module):
    """Backbone whose logits are (B, 0), with the features that losses name.

    Stage -1 is the last map (B, C, H, W), for tokens without their prefix, and "embedding" the pooled features (B, D).

    Args:
        backbone: a transformers or timm model without a classifier.
    """

    feature_info = ({"module": "last_map"},)  # timm's table of stages
    num_classes = 0

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.last_map = nn.Identity()
        self.no_classifier = _NoClassifier()
        self._options: dict[str, Any] = {}
        if isinstance(backbone, PreTrainedModel) and _takes(backbone, "interpolate_pos_encoding"):
            self._options = {"interpolate_pos_encoding": True}

    def get_classifier(self) -> nn.Module:
        """Return the module whose input is the embedding, as timm's models do."""
        return self.no_classifier

    def forward(self, pixel_values: Tensor) -> Tensor:
        if hasattr(self.backbone, "forward_features"):  # timm's
            features = self.backbone.forward_features(pixel_values)
            pooled = self.backbone.forward_head(features)
            if getattr(self.backbone, "output_fmt", None) == "NHWC":
                features = features.permute(0, 3, 1, 2)
        else:
            output = self.backbone(pixel_values, **self._options)
            features, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        last_map = self.last_map(self._as_map(features, pixel_values))
        pooled = last_map.mean(dim=(2, 3)) if pooled is None else pooled.flatten(1)
        return self.no_classifier(pooled)

    def _as_map(self, features: Tensor, pixel_values: Tensor) -> Tensor:
        if features.ndim == 4:
            return features
        patch = self._patch_size()
        if features.ndim != 3 or patch is None:
            raise WrongTypeError(
                f"{type(self.backbone).__name__} gives features {tuple(features.shape)}: expected a map (B, C, H, W), "
                "or the tokens (B, N, C) of a network that states its patch size."
            )
        height, width = (side // patch for side in pixel_values.shape[2:])
        patches = features[:, features.shape[1] - height * width :]  # class and register tokens come first
        return patches.transpose(1, 2).unflatten(2, (height, width))

    def _patch_size(self) -> int | None:
        if isinstance(self.backbone, PreTrainedModel):
            size = getattr(self.backbone.config, "patch_size", None)
        else:
            size = getattr(getattr(self.backbone, "patch_embed", None), "patch_size", None)
        return size[0] if isinstance(size, (tuple, list)) else size


class _NoClassifier(nn.Module):
    """Classifier of no classes: (B, D) -> (B, 0)."""

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding[:, :0]


def is_headless(model: nn.Module) -> bool:
    """Return True for a transformers or timm model without a classifier."""
    if isinstance(model, PreTrainedModel):
        return type(model) is MODEL_MAPPING.get(type(model.config), None)
    return hasattr(model, "forward_features") and getattr(model, "num_classes", None) == 0


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
