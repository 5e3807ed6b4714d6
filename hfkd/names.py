"""Names that others may see: Hub ids, architectures and local paths."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.models.timm_wrapper import TimmWrapperForImageClassification

DIGITS = "digits"  # scikit-learn's data set, even if a folder has the same name


def is_local(name_or_path: str) -> bool:
    """Is it a path on this machine rather than the name of an architecture or a Hub id?"""
    written_as_path = os.path.isabs(name_or_path) or name_or_path.startswith(("~", ".", "runs/"))
    return written_as_path or ("/" in name_or_path and os.path.exists(name_or_path))


def hub_id(name_or_path: str) -> str | None:
    """The name, if it is that of a repository (`owner/name`) on the Hub."""
    return name_or_path if name_or_path.count("/") == 1 and not is_local(name_or_path) else None


def public_name(name_or_path: str, model: nn.Module) -> str:
    """What to call a model in results: a Hub id as it is, else the architecture."""
    return hub_id(name_or_path) or architecture_of(model)


def architecture_of(model: nn.Module) -> str:
    """timm's name of the architecture, the model type of transformers, or the name of the class."""
    if isinstance(model, TimmWrapperForImageClassification):
        return model.config.architecture
    if isinstance(model, PreTrainedModel):
        return model.config.model_type
    if hasattr(model, "pretrained_cfg"):  # timm's
        return model.pretrained_cfg["architecture"]
    return type(model).__name__


def last_part(path: str) -> str:
    """The last part of a path, also where it is written as `.`."""
    return Path(path).resolve().name
