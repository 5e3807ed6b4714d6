"""Sources of weights: what a name stands for, and the check that no weight of a loaded model is missing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import is_offline_mode
from timm.models import split_model_name_tag
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import HfkdError, NotFoundError, did_you_mean
from ..names import RESULTS_NAME, ROLES
from .layers import classifier_names

HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's
MAX_LISTED = 3

logger = logging.get_logger(__name__)


def resolve_name(name_or_path: str) -> str:
    """Return the folder of the model for a run's folder, and a Hub id or folder for timm's `hf-hub:` and `local-dir:`.

    Raises:
        HfkdError: for a run's folder without a model.
    """
    for prefix in HUB_PREFIXES:
        name_or_path = name_or_path.removeprefix(prefix)
    folder = Path(name_or_path).expanduser()
    if not (folder / RESULTS_NAME).is_file() or (folder / "config.json").is_file():
        return name_or_path
    exports = [folder / role for role in _roles(folder) if (folder / role / "config.json").is_file()]
    if not exports:
        raise HfkdError(
            f"{folder} is the folder of a run that has no trained model yet: neither {' nor '.join(ROLES)} in it holds "
            "one. Finish the run, or name another."
        )
    return str(exports[0])


def _roles(folder):
    """Return the roles that a run's model may have, that of its results first."""
    try:
        role = json.loads((folder / RESULTS_NAME).read_text()).get("role")
    except (ValueError, AttributeError):  # damaged: the folders tell
        role = None
    return sorted(ROLES, key=lambda each: each != role)


def has_tag(architecture: str) -> bool:
    """Return True if a timm name holds the tag of pretrained weights, as `resnet10t.c3_in1k` does.

    Raises:
        HfkdError: timm has no such weights of this architecture.
    """
    name, tag = split_model_name_tag(architecture)
    tagged = timm.list_pretrained(f"{name}.*") if tag else []
    if tag and architecture not in tagged:
        raise HfkdError(f"{name} has no pretrained weights '{tag}'.{did_you_mean(architecture, tagged)}")
    return bool(tag)


def tagged(architecture: str) -> str:
    """Return a timm name with a tag: its own, or that of timm's default weights.

    Raises:
        HfkdError: timm has no weights of this architecture.
    """
    if has_tag(architecture):
        return architecture
    default = timm.get_pretrained_cfg(architecture)
    if default is None or not default.has_weights:
        raise HfkdError(f"{architecture} has no pretrained weights in timm: leave pretrained out, or name another.")
    return f"{architecture}.{default.tag}" if default.tag else architecture


def create_pretrained(architecture: str, **settings: Any) -> nn.Module:
    """Create a timm model with the weights that its name means.

    Raises:
        TypeError: the architecture does not take the settings.
        NotFoundError: the weights cannot be fetched.
    """
    try:
        return timm.create_model(architecture, pretrained=True, **settings)
    except TypeError:
        raise
    except Exception as error:  # the Hub and the network raise their own types
        name = split_model_name_tag(architecture)[0]
        advice = f" Or name the architecture alone, {name}, with a checkpoint or, for a student, pretrained: false."
        raise not_found_error("pretrained weights", architecture, error, advice) from error


def read_config(name_or_path: str, trust_remote_code: bool, **changes: Any) -> Any:
    """Return the configuration of a folder's or a Hub id's model.

    Raises:
        NotFoundError: there is none.
    """
    try:
        # Without the last argument transformers would ask whether to run code that comes with a model.
        return AutoConfig.from_pretrained(name_or_path, **changes, trust_remote_code=trust_remote_code)
    except Exception as error:  # for a damaged file whatever transformers and timm meet in it
        raise not_found_error("model", name_or_path, error) from error


def not_found_error(part: str, name_or_path: str, error: Exception, advice: str = "") -> NotFoundError:
    """Return the error for a part of a model, such as its weights, that a name does not provide."""
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return NotFoundError(
            f"{name_or_path} comes with code of its own, which was not run. Read it, and set trust_remote_code: true "
            "to train with it if you trust it."
        )
    if os.path.isdir(name_or_path):
        reason = "Give a folder that save_pretrained or hfkd wrote, such as runs/.../student"
    elif is_offline_mode():
        reason = "HF_HUB_OFFLINE is set and the Hub's cache lacks it. Give a local folder, or unset HF_HUB_OFFLINE"
    else:
        reason = "The Hub does not provide it, and there is no such folder. Check the name and the network"
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return NotFoundError(f"{name_or_path} has no {part} that can be loaded. {reason}.{advice} ({first_line})")


def check_loaded(model: PreTrainedModel, info: dict[str, Any], name_or_path: str, new_classes: bool) -> None:
    """Check that a model's weights were in its checkpoint, and log that a student has a new classifier.

    Args:
        info: transformers' `output_loading_info`.
        new_classes: the model was loaded for other classes, so that a new classifier is expected.

    Raises:
        HfkdError: weights were missing or had another shape.
    """
    shapes = {key: (given, expected) for key, given, expected in info["mismatched_keys"]}
    counters = {key for key in info["missing_keys"] if key.endswith("num_batches_tracked")}  # PyTorch 0.4.1 added them
    absent = (set(info["missing_keys"]) | set(shapes)) - counters
    head = absent & classifier_names(model)
    if absent - head:
        raise HfkdError(
            f"{name_or_path} lacks weights of {type(model).__name__}: {_listed(absent - head)}. They would be "
            "random. Get the whole checkpoint."
        )
    if head and not new_classes:
        raise HfkdError(
            f"{name_or_path} is a network without a trained classifier: its classifier is not in the checkpoint "
            f"({_listed(head)}). Train it on the data set first, e.g. with `hfkd train-teacher`."
        )
    if head:
        given = next((f"one for {shape[0][0]}" for key, shape in sorted(shapes.items()) if key in head), "none")
        logger.warning(
            f"{name_or_path}: the student starts from these weights with a new classifier for {model.num_labels} "
            f"classes; the checkpoint has {given}."
        )


def check_backbone_loaded(model: PreTrainedModel, absent: set[str], name_or_path: str) -> None:
    """Check that the weights of a network without a classifier were in its checkpoint.

    Args:
        absent: names of weights that were missing or had another shape.

    Raises:
        HfkdError: if there are some.
    """
    if absent:
        raise HfkdError(
            f"{name_or_path} lacks weights of {type(model).__name__}: {_listed(absent)}. They would be random. Get the "
            "whole checkpoint."
        )


def _listed(names):
    names = sorted(names)
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
