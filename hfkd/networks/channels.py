"""Number of channels of the images that a network takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import HfkdError
from .layers import timm_model_of


def check_channels(model: nn.Module) -> None:
    """Raise HfkdError for a network that, as far as its configuration tells, does not take images of three channels."""
    channels = _channels_of(model)
    if channels != 3:
        raise HfkdError(
            f"{type(timm_model_of(model)).__name__} takes images of {channels} channel(s), and hfkd gives every "
            "network three (RGB; a grey image has its one three times): take a network of three channels."
        )


def _channels_of(model: nn.Module) -> int:
    cfg: Any = getattr(timm_model_of(model), "pretrained_cfg", None)
    if cfg is None:
        return getattr(getattr(model, "config", None), "num_channels", 3)  # of most of transformers' networks
    first = cfg.get("first_conv")
    name = first[0] if isinstance(first, (tuple, list)) else first
    layer = dict(timm_model_of(model).named_modules()).get(name)
    # Only 1 tells: TResNet folds 4 x 4 pixels into 48 channels before its first convolution.
    return 1 if getattr(layer, "in_channels", 3) == 1 else 3
