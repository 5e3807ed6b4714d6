"""What others may see of a run: names in place of local paths, the recipe without what concerns one machine alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import timm
from torch import nn
from transformers import PreTrainedModel
from transformers.models.timm_wrapper import TimmWrapperForImageClassification

PATH_KEYS = {"dataset_name", "student_name_or_path", "teacher_name_or_path", "teacher_checkpoint", "teacher_cache"}
DIGITS = "digits"  # a data set by its name, whatever lies there

# Where a run writes, and to whom it reports and pushes, says nothing of its student.
PRIVATE_KEYS = {
    "output_dir",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
}


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


def public_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe for others: `path/to/<name>` in place of a local path, nothing of `PRIVATE_KEYS`."""
    return {key: public_value(key, value) for key, value in recipe.items() if key not in PRIVATE_KEYS}


def public_value(key: str, value: Any) -> Any:
    """The value of one key for others."""
    if isinstance(value, dict):
        return {name: public_value(name, entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [public_value(key, entry) for entry in value]
    if not isinstance(value, str):
        return value
    bare_folder = key in PATH_KEYS and os.path.exists(value) and not timm.is_model(value) and value != DIGITS
    return f"path/to/{last_part(value)}" if bare_folder or is_local(value) else value


def last_part(path: str) -> str:
    """The last part of a path, also where it is written as `.`."""
    return Path(path).resolve().name
