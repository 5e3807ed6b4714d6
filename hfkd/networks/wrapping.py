"""The transformers model around a timm model, and its weights under timm's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TimmWrapperConfig
from transformers.models.timm_wrapper import TimmWrapperForImageClassification, TimmWrapperModel

from ..errors import HfkdError
from .features import timm_model_of
from .sharding import gathered

# Entries of timm's pretrained_cfg that a wrapped model does not keep. They name the source of the weights, perhaps a
# path on this machine; a saved model brings its own weights.
WEIGHT_SOURCE_KEYS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"}


def wrap_timm(
    model: nn.Module, class_names: list[str], model_args: dict[str, Any] | None = None
) -> TimmWrapperForImageClassification | TimmWrapperModel:
    """Return the transformers model around a timm model; both share the weights. Without classes it is a backbone.

    Args:
        model: made by `timm.create_model`.
        class_names: one name for each of the model's classes.
        model_args: keywords with which the model was made, except `num_classes`, such as `img_size`. A saved model is
            built from them.

    Raises:
        HfkdError: if architecture, classes and `model_args` give a model of other shapes.
    """
    timm_cfg: Any = model.pretrained_cfg
    pretrained_cfg = {
        key: value for key, value in timm_cfg.items() if key not in WEIGHT_SOURCE_KEYS and value not in (None, "", ())
    }
    settings: dict[str, Any] = {
        "architecture": pretrained_cfg["architecture"],
        "model_args": model_args or {},
        "pretrained_cfg": pretrained_cfg,
        "num_labels": len(class_names),
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "num_features": model.num_features,  # timm's own config.json has it
    }
    config = TimmWrapperConfig(**settings)
    wrapper = (TimmWrapperForImageClassification if class_names else TimmWrapperModel)(config)
    expected = {name: value.shape for name, value in wrapper.timm_model.state_dict().items()}
    given = {name: value.shape for name, value in model.state_dict().items()}
    if expected != given:
        name = next(name for name in (expected | given) if expected.get(name) != given.get(name))
        raise HfkdError(
            f"{config.architecture} with {len(class_names)} classes and model_args={model_args or {}} has another "
            f"shape at '{name}' ({expected.get(name)}) than the model given ({given.get(name)}), so it could not be "
            "loaded again. Pass the keywords that it was made with: wrap_timm(model, class_names, {'img_size': ...})."
        )
    # The wrapper builds a model and initialises it in transformers' way. The given model keeps timm's initialisation.
    wrapper.timm_model = model
    return wrapper


def exported_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights to save; for a wrapped timm model under timm's names, which timm and transformers both read.

    They are contiguous, since safetensors refuses channels_last strides.
    """
    state = gathered(timm_model_of(model).state_dict())
    return with_own_memory({name: value.contiguous() for name, value in state.items()})


def with_own_memory(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state in which weights that share memory, as tied ones do, are copies: safetensors refuses others."""
    seen: set[int] = set()
    own = {}
    for name, value in state.items():
        place = value.untyped_storage().data_ptr()
        own[name] = value.clone() if place in seen else value
        seen.add(place)
    return own


def load_exported(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load the weights from `exported_state_dict` back into the model."""
    timm_model_of(model).load_state_dict(state)
