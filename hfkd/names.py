"""Names of models and data sets: Hub ids, architectures and local paths; nouns with their numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

DIGITS = "digits"  # scikit-learn's data set, even if a folder has the same name
NO_LABELS = "none"  # as the name of a label column: images are read without labels
RESULTS_NAME = "results.json"  # in a run's folder
ROLES = ("student", "teacher")  # folders of the trained models in it


def is_local(name_or_path: str) -> bool:
    """Return whether a name is a path on this machine, and not the name of an architecture or a Hub id."""
    written_as_path = os.path.isabs(name_or_path) or name_or_path.startswith(("~", ".", "runs/"))
    return written_as_path or ("/" in name_or_path and os.path.exists(name_or_path))


def hub_id(name_or_path: str) -> str | None:
    """Return the name if it is a Hub id (`owner/name`), else None."""
    return name_or_path if name_or_path.count("/") == 1 and not is_local(name_or_path) else None


def public_name(name_or_path: str, model: nn.Module) -> str:
    """Return the name of a model in results: its Hub id, or else its architecture."""
    return hub_id(name_or_path) or architecture_of(model)


def architecture_of(model: nn.Module) -> str:
    """Return timm's name of the architecture, the model type of transformers, or the name of the class."""
    # Here and not above: most users of this module have names and no models, and these take seconds to import.
    from transformers import PreTrainedModel
    from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

    if isinstance(model, TimmWrapperPreTrainedModel):
        return model.config.architecture
    if isinstance(model, PreTrainedModel):
        return model.config.model_type
    if hasattr(model, "pretrained_cfg"):  # a timm model
        return model.pretrained_cfg["architecture"]
    return type(model).__name__


def last_part(path: str) -> str:
    """Return the last part of a path, also if it is written as `.`."""
    return Path(path).resolve().name


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number and its noun, by default with an s for several: `1 image`, `2,000 images`."""
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"
