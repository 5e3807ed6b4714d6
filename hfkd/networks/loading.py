"""Loading of trained networks from folders and the Hub, and checks of their names before."""

from __future__ import annotations

import os
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageClassification, PreTrainedModel, TimmWrapperConfig

from ..errors import HfkdError, nearest
from ..names import hub_id
from .backbones import is_backbone, lacks_classifier, load_backbone
from .int8 import restore_int8, unreported_ranges
from .sources import check_loaded, has_tag, not_found_error, read_config, resolve_name


def load_pretrained(
    name_or_path: str,
    class_names: list[str] | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a transformers image classifier from a folder or the Hub, in float32.

    Args:
        class_names: classes of the model, with a new classifier if their number differs; by default its own.
        device_map: transformers' `device_map`.
        trust_remote_code: run the code that comes with the model.

    Raises:
        HfkdError: there is no such model, weights other than a new classifier's are not in its checkpoint, or it has no
            classifier and there are no `class_names`.
    """
    classes = {}
    if class_names is not None:
        label2id = {name: index for index, name in enumerate(class_names)}
        classes = {"num_labels": len(class_names), "id2label": dict(enumerate(class_names)), "label2id": label2id}
    name_or_path = resolve_name(name_or_path)
    config = read_config(name_or_path, trust_remote_code, **classes)
    if class_names is None and isinstance(config, TimmWrapperConfig) and is_backbone(config):
        raise HfkdError(
            f"{name_or_path} has no classifier. Fine-tune it on labelled images first: `hfkd train-teacher "
            f"--dataset_name DATA --student {name_or_path}`, or `hfkd distill` with a teacher."
        )
    if isinstance(config, TimmWrapperConfig):
        if config.model_args:
            config.model_args.pop("num_classes", None)  # timm's push_to_hf_hub writes it; transformers refuses it
        if class_names is not None:
            # timm reads its own key. Without this line it would keep the names from the folder and save them again.
            config.label_names = list(class_names)
    try:
        with unreported_ranges(config):
            model, info = AutoModelForImageClassification.from_pretrained(
                name_or_path,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=class_names is not None,
                device_map=device_map,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, SafetensorError) as error:  # no weights, or damaged ones
        raise not_found_error("weights", name_or_path, error) from error
    except ValueError as error:
        if "trust_remote_code" in str(error):  # code of its own
            raise not_found_error("weights", name_or_path, error) from error
        if device_map is None:
            raise
        raise HfkdError(f"teacher_device_map: {error}") from error
    check_loaded(model, info, name_or_path, new_classes=class_names is not None)
    restore_int8(model, name_or_path)
    return model


def load_network(name_or_path: str) -> PreTrainedModel:
    """Load a trained network from a folder or the Hub as it is, a classifier or a backbone without one.

    Raises:
        HfkdError: see `load_pretrained`.
    """
    return load_backbone(name_or_path) if lacks_classifier(name_or_path) else load_pretrained(name_or_path)


def check_model(name_or_path: str, trust_remote_code: bool = False) -> None:
    """Check that a model can be loaded, as far as its name and its configuration show it.

    Raises:
        HfkdError: if the name is no architecture, folder or Hub id, or has a tag of weights that timm lacks.
        NotFoundError: if there is no configuration of a model at the folder or the Hub id.
    """
    name_or_path = resolve_name(name_or_path)
    if is_architecture(name_or_path):
        has_tag(name_or_path)
    else:
        read_config(name_or_path, trust_remote_code)


def is_architecture(name_or_path: str) -> bool:
    """Return True for a timm architecture, False for a folder or a Hub id.

    Raises:
        HfkdError: if the name is none of these.
    """
    if timm.is_model(name_or_path):
        return True
    if os.path.isdir(name_or_path) or hub_id(name_or_path):
        return False
    near = nearest(name_or_path, timm.list_models(), n=3)
    raise HfkdError(
        f"'{name_or_path}' is no timm architecture, no existing folder and no Hub id."
        + (f" Near are {', '.join(near)}." if near else "")
        + (" Train it first with `hfkd train-teacher`." if name_or_path.startswith("runs/") else "")
    )
