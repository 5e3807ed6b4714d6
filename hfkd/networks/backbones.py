"""Backbones, networks without a classifier, of a folder or the Hub."""

from __future__ import annotations

from typing import Any

import timm
import torch
from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedModel, TimmWrapperConfig

from ..errors import HfkdError
from .sources import check_backbone_loaded, not_found_error, read_config, resolve_name


def lacks_classifier(name_or_path: str, checkpoint: str | None = None, trust_remote_code: bool = False) -> bool:
    """Return True for the name of a network without a classifier, as far as its configuration tells.

    The vision towers of CLIP and SigLIP are such networks.

    Args:
        name_or_path: folder, run's folder, Hub id or timm architecture.
        checkpoint: file with the weights of an architecture, which tells by itself.

    Raises:
        NotFoundError: there is no configuration of a model at the folder or the Hub id.
    """
    name_or_path = resolve_name(name_or_path)
    if timm.is_model(name_or_path):
        published = timm.get_pretrained_cfg(name_or_path)
        return checkpoint is None and published is not None and published.num_classes == 0
    return is_backbone(read_config(name_or_path, trust_remote_code))


def is_backbone(config: Any) -> bool:
    """Return True for the configuration of a network without a classifier."""
    if isinstance(config, TimmWrapperConfig):
        return config.num_labels == 0
    own_code = getattr(config, "auto_map", None) or {}  # for each of transformers' Auto classes
    if "AutoModelForImageClassification" in own_code:
        return False
    architectures = config.architectures or own_code.keys() & {"AutoModel"}
    return bool(architectures) and not any("ForImageClassification" in name for name in architectures)


def load_backbone(
    name_or_path: str,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a transformers model without a classifier from a folder or the Hub, in float32.

    A timm model of a folder loses its classifier, if it has one, and CLIP and SigLIP all but their vision tower.

    Raises:
        HfkdError: there is no such model, or weights are not in its checkpoint.
    """
    name_or_path = resolve_name(name_or_path)
    config = read_config(name_or_path, trust_remote_code)
    if isinstance(config, TimmWrapperConfig):
        config.num_labels, config.label_names = 0, []
        if config.model_args:
            config.model_args.pop("num_classes", None)
    try:
        model, info = AutoModel.from_pretrained(
            name_or_path,
            config=getattr(config, "vision_config", config),
            dtype=torch.float32,
            device_map=device_map,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, SafetensorError) as error:  # no weights, or damaged ones
        raise not_found_error("weights", name_or_path, error) from error
    except ValueError as error:
        if "trust_remote_code" in str(error) or device_map is None:  # code of its own, or a type without a backbone
            raise not_found_error("backbone", name_or_path, error) from error
        raise HfkdError(f"teacher_device_map: {error}") from error
    absent = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    if absent and all(key.startswith("pooler.") for key in absent):  # DINO's ViTs are published without a pooler
        model.pooler, absent = None, set()
    check_backbone_loaded(model, absent, name_or_path)
    return model
