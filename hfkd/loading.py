"""Students and teachers by name: timm architectures, local folders, Hub ids."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.models.timm_wrapper import TimmWrapperForImageClassification

from .models.checkpoints import load_checkpoint
from .teacher import Teacher


@dataclass(frozen=True)
class InputSpec:
    """What a network expects of its input: side in pixels, and the mean and std (RGB, images in [0, 1])."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_student(
    name_or_path: str,
    class_names: list[str] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
) -> PreTrainedModel:
    """A transformers image classifier to train, with the classes of the data set.

    A timm architecture (`cifar_resnet20`, `deit_tiny_distilled_patch16_224`) starts from random weights; a folder or
    a Hub id from its own weights, with a new classifier where the number of classes differs.

    Args:
        name_or_path: timm architecture, folder written by `save_pretrained`, or Hub id.
        class_names: names of the classes, in the order of the labels; they travel with the saved model.
        num_classes: in place of `class_names`.
        image_size: side of the square input in pixels, for a timm architecture; by default its own.

    Raises:
        ValueError: without classes, for a name that is no architecture, folder or Hub id, or for an image_size where
            the weights come with their own.
    """
    if class_names is None:
        if num_classes is None:
            raise ValueError("load_student needs class_names or num_classes: how many classes has the data set?")
        class_names = [str(index) for index in range(num_classes)]
    if _is_architecture(name_or_path):
        overlay = {"crop_pct": 1.0, "interpolation": "bicubic"}  # how hfkd prepares images; travels with the student
        if image_size is not None:
            overlay["input_size"] = (3, image_size, image_size)
        model = timm.create_model(name_or_path, num_classes=len(class_names), pretrained_cfg_overlay=overlay)
        fixed = image_size is not None and model.pretrained_cfg.get("fixed_input_size")
        return wrap_timm(model, class_names, {"img_size": image_size} if fixed else None)
    if image_size is not None:
        raise ValueError(
            f"image_size={image_size} goes with a timm architecture; {name_or_path} comes with its own. Leave it out."
        )
    return AutoModelForImageClassification.from_pretrained(
        name_or_path,
        num_labels=len(class_names),
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
        ignore_mismatched_sizes=True,
    )


def load_teacher(name_or_path: str, checkpoint: str | None = None, num_classes: int | None = None) -> Teacher:
    """A frozen teacher.

    Args:
        name_or_path: a folder written by `save_pretrained` (an earlier run's `teacher/`), a Hub id, or a timm
            architecture, which takes its weights from `checkpoint` or else timm's pretrained ones.
        checkpoint: `.safetensors`, or a published `.pth` holding `{"model": state_dict}`, for an architecture.
        num_classes: classes in `checkpoint`; by default the architecture's own number.

    Raises:
        ValueError: for an unknown name, weights that do not fit, or an architecture without any weights.
    """
    if not _is_architecture(name_or_path):
        if checkpoint is not None:
            raise ValueError(
                f"teacher_checkpoint={checkpoint} goes with a timm architecture, but teacher_name_or_path="
                f"{name_or_path} holds its own weights. Name an architecture such as cifar_resnet56, or drop it."
            )
        return Teacher(AutoModelForImageClassification.from_pretrained(name_or_path), name_or_path)
    if checkpoint is not None:
        classes = {} if num_classes is None else {"num_classes": num_classes}
        model = timm.create_model(name_or_path, **classes)
        load_checkpoint(model, checkpoint)
        return Teacher(model, name_or_path)
    if not timm.get_pretrained_cfg(name_or_path).has_weights:
        raise ValueError(
            f"The architecture {name_or_path} has no pretrained weights to teach with. Give teacher_checkpoint, or "
            "train it with scripts/train_teacher.py and give the folder that it writes."
        )
    return Teacher(timm.create_model(name_or_path, pretrained=True), name_or_path)


def _is_architecture(name_or_path: str) -> bool:
    """True for a timm architecture, False for a folder or a Hub id, an error for neither."""
    if timm.is_model(name_or_path):
        return True
    if os.path.isdir(name_or_path):
        return False
    looks_like_hub_id = name_or_path.count("/") == 1 and not name_or_path.startswith((".", "/", "runs/"))
    if looks_like_hub_id:
        return False
    nearest = difflib.get_close_matches(name_or_path, timm.list_models(), n=3)
    raise ValueError(
        f"'{name_or_path}' is no timm architecture, no existing folder and no Hub id."
        + (f" Near are {', '.join(nearest)}." if nearest else "")
        + (" Train it first with scripts/train_teacher.py." if name_or_path.startswith("runs/") else "")
    )


def wrap_timm(
    model: nn.Module, class_names: list[str], model_args: dict[str, Any] | None = None
) -> TimmWrapperForImageClassification:
    """The transformers model around a timm one; both share the weights.

    Args:
        model: made by `timm.create_model`.
        class_names: as many as the model has classes.
        model_args: the keywords that the model was made with beside `num_classes`, such as `img_size`: without them
            a saved model could not be built again.

    Raises:
        ValueError: if architecture, classes and `model_args` give a model of other shapes.
    """
    pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if value not in (None, "", ())}
    config = TimmWrapperConfig(
        architecture=pretrained_cfg["architecture"],
        model_args=model_args or {},
        pretrained_cfg=pretrained_cfg,
        num_labels=len(class_names),
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
        num_features=model.num_features,  # timm's own config.json carries it
    )
    wrapper = TimmWrapperForImageClassification(config)
    expected = {name: value.shape for name, value in wrapper.timm_model.state_dict().items()}
    given = {name: value.shape for name, value in model.state_dict().items()}
    if expected != given:
        name = next(name for name in (expected | given) if expected.get(name) != given.get(name))
        raise ValueError(
            f"{config.architecture} with {len(class_names)} classes and model_args={model_args or {}} has another "
            f"shape at '{name}' ({expected.get(name)}) than the model given ({given.get(name)}), so it could not be "
            "loaded again. Pass the keywords it was made with: wrap_timm(model, class_names, {'img_size': ...})."
        )
    wrapper.timm_model = model  # the wrapper re-initialises the model that it builds; keep timm's initialisation
    return wrapper


def class_names_of(model: nn.Module) -> list[str]:
    """The names of a transformers classifier's classes, in order; none for other models."""
    if not isinstance(model, PreTrainedModel):
        return []
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


def input_spec(model: nn.Module) -> InputSpec:
    """Input size and normalisation of a timm model, or of a transformers one that came from a folder or the Hub."""
    if isinstance(model, TimmWrapperForImageClassification):
        cfg = model.config.pretrained_cfg  # not the timm model's own, which timm makes anew when the folder is loaded
    elif isinstance(model, PreTrainedModel):
        processor = AutoImageProcessor.from_pretrained(model.name_or_path)
        side = processor.size.get("height") or processor.size.get("shortest_edge")
        return InputSpec(side, tuple(processor.image_mean), tuple(processor.image_std))
    else:
        cfg = model.pretrained_cfg
    return InputSpec(cfg["input_size"][-1], tuple(cfg["mean"]), tuple(cfg["std"]))


def exported_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights to save: a wrapped timm model's under timm's own names, which both timm and transformers read.

    Contiguous, since safetensors refuses channels_last strides.
    """
    inner = model.timm_model if isinstance(model, TimmWrapperForImageClassification) else model
    return {name: value.contiguous() for name, value in inner.state_dict().items()}
