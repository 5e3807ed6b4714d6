"""Students and teachers by name: timm architectures, local folders, Hub ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.pit import ConvEmbedding
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.models.timm_wrapper import TimmWrapperForImageClassification

from ..errors import HfkdError, nearest
from ..models.checkpoints import load_architecture
from ..names import hub_id, public_name
from .features import InputSpec, timm_model_of
from .sharding import gathered
from .teacher import Teacher, TeacherEnsemble

# Entries of timm's pretrained_cfg: where it gets weights, perhaps a path of this machine, while a saved model has its
# own; and what it says of an architecture's published weights, which a new student does not have.
WEIGHT_SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"}
OF_PUBLISHED_WEIGHTS = ("tag", "license", "origin_url", "test_input_size", "test_pool_size", "test_crop_pct")


def load_student(
    name_or_path: str,
    class_names: list[str] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    *,
    patch_size: int | None = None,
    drop_path_rate: float | None = None,
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
) -> PreTrainedModel:
    """A transformers image classifier to train, with the classes of the data set.

    A timm architecture (`cifar_resnet20`, `deit_tiny_distilled_patch16_224`) starts from random weights; a folder or
    a Hub id from its own weights, with a new classifier where the number of classes differs.

    Args:
        name_or_path: timm architecture, folder written by `save_pretrained`, or Hub id.
        class_names: names of the classes, in the order of the labels; they travel with the saved model.
        num_classes: in place of `class_names`.
        image_size: side of the square input in pixels, for a timm architecture; by default its own.
        patch_size: side of a ViT's patches in pixels, likewise.
        drop_path_rate: stochastic depth, likewise.
        crop_pct, interpolation: how images are prepared for evaluation, which travels with the saved model; for a model
            of transformers' own its image processor says so.

    Raises:
        ValueError: without classes, for a name that is no architecture, folder or Hub id, for what the architecture
            does not take, an image size that its patches do not divide, or a setting of an architecture where the
            weights come with their own.
    """
    if class_names is None:
        if num_classes is None:
            raise HfkdError("load_student needs class_names or num_classes: how many classes has the data set?")
        class_names = [str(index) for index in range(num_classes)]
    preparation = {"crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": "center"}
    if _is_architecture(name_or_path):
        return _new_student(name_or_path, class_names, image_size, patch_size, drop_path_rate, preparation)
    settings = {"image_size": image_size, "patch_size": patch_size, "drop_path_rate": drop_path_rate}
    for key, value in settings.items():
        if value is not None:
            raise HfkdError(
                f"{key}={value} goes with a timm architecture; {name_or_path} comes with its own. Leave it out."
            )
    student = load_pretrained(name_or_path, class_names)
    if isinstance(student, TimmWrapperForImageClassification):
        student.config.pretrained_cfg |= preparation
    return student


def _new_student(architecture, class_names, image_size, patch_size, drop_path_rate, preparation):
    """A wrapped timm architecture with random weights."""
    overlay = dict.fromkeys(OF_PUBLISHED_WEIGHTS) | preparation
    if image_size is not None:
        overlay["input_size"] = (3, image_size, image_size)
    shape = {} if patch_size is None else {"patch_size": patch_size}
    settings = shape if drop_path_rate is None else shape | {"drop_path_rate": drop_path_rate}
    try:
        model = timm.create_model(
            architecture, num_classes=len(class_names), pretrained_cfg_overlay=overlay, **settings
        )
    except TypeError as error:  # an argument that the architecture's constructor does not know
        raise HfkdError(f"{architecture} does not take {', '.join(settings)}: {error}.") from error
    _check_patches(architecture, model)
    _wake_zero_heads(model)
    if image_size is not None and model.pretrained_cfg.get("fixed_input_size"):
        shape["img_size"] = image_size
    return wrap_timm(model, class_names, shape)


def _check_patches(architecture: str, model: nn.Module) -> None:
    """timm's ViTs do not look at the pixels beyond the last whole patch: raises ValueError if there are any."""
    for module in model.modules():
        if isinstance(module, (PatchEmbed, ConvEmbedding)) and module.img_size is not None:
            patch, side = module.patch_size[0], module.img_size[0]
            stride = module.conv.stride[0] if isinstance(module, ConvEmbedding) else patch  # PiT's patches overlap
            rest = (side - patch) % stride
            if rest or side < patch:
                below, above = side - rest, side - rest + stride
                sizes = f"{below} or {above}" if below >= patch else str(max(above, patch))
                raise HfkdError(
                    f"image_size: {architecture} cuts its input into patches of {patch} pixels, every {stride}, which "
                    f"do not divide {side}. Take {sizes}, or another patch_size."
                )
            return  # later ones cut maps, not images


def _wake_zero_heads(model: nn.Module) -> None:
    """Gives a classifier that starts at zero (MLP-Mixer's, say) small random weights.

    Its first logits would all be equal, and after one step nearly so: the Z-score divides by their standard deviation
    and would scale the first gradients up without bound.
    """
    classifiers = model.get_classifier()
    for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
        for module in classifier.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.any():
                trunc_normal_(module.weight, std=0.02)


def load_teacher(
    name_or_path: str,
    checkpoint: str | None = None,
    class_indices: Sequence[int] | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> Teacher:
    """A frozen teacher, which sees the student's images at its own size and normalisation.

    Args:
        name_or_path: a folder written by `save_pretrained` (an earlier run's `teacher/`), a Hub id, or a timm
            architecture, which takes its weights from `checkpoint` or else timm's pretrained ones.
        checkpoint: `.safetensors`, or a published `.pth` holding `{"model": state_dict}`, for an architecture.
        class_indices: for each of the student's classes, the teacher's; by default they are matched by name.
        device_map: transformers', for one that a device does not hold; for a folder or a Hub id.

    Raises:
        ValueError: for an unknown name, weights that do not fit, or an architecture without any weights, or with a
            device_map.
    """
    origin = None
    if device_map is not None and _is_architecture(name_or_path):
        raise HfkdError(
            f"teacher_device_map is transformers', and {name_or_path} is an architecture of timm's: name a folder or a "
            "Hub id."
        )
    if not _is_architecture(name_or_path):
        if checkpoint is not None:
            raise HfkdError(
                f"teacher_checkpoint={checkpoint} goes with a timm architecture, but teacher_name_or_path="
                f"{name_or_path} holds its own weights. Name an architecture such as cifar_resnet56, or drop it."
            )
        model, origin = load_pretrained(name_or_path, device_map=device_map), hub_id(name_or_path)
    elif checkpoint is not None:
        model = load_architecture(name_or_path, checkpoint)
    elif timm.get_pretrained_cfg(name_or_path).has_weights:
        model = timm.create_model(name_or_path, pretrained=True)
        origin = model.pretrained_cfg.get("hf_hub_id")
    else:
        raise HfkdError(
            f"The architecture {name_or_path} has no pretrained weights to teach with. Give teacher_checkpoint, or "
            "train it with `hfkd train-teacher` and give the folder that it writes."
        )
    return Teacher(model, public_name(name_or_path, model), input_spec(model), class_indices, origin)


def load_pretrained(
    name_or_path: str, class_names: list[str] | None = None, device_map: str | dict[str, Any] | None = None
) -> PreTrainedModel:
    """A transformers image classifier from a folder or the Hub, in float32 whatever it is stored in.

    Args:
        class_names: the classes that it is to have, with a new classifier where they are more or fewer; by default
            its own.
        device_map: transformers'.
    """
    classes = {}
    if class_names is not None:
        label2id = {name: index for index, name in enumerate(class_names)}
        classes = {"num_labels": len(class_names), "id2label": dict(enumerate(class_names)), "label2id": label2id}
    config = AutoConfig.from_pretrained(name_or_path, **classes)
    if isinstance(config, TimmWrapperConfig):
        if config.model_args:
            config.model_args.pop("num_classes", None)  # timm's push_to_hf_hub writes it; transformers refuses it
        if class_names is not None:
            config.label_names = list(class_names)  # else timm's own key keeps the folder's, and is what is saved
    return AutoModelForImageClassification.from_pretrained(
        name_or_path,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=class_names is not None,
        device_map=device_map,
    )


def as_teacher(
    given: Teacher | TeacherEnsemble | nn.Module | Sequence[Teacher | nn.Module] | None, standardized: bool
) -> Teacher | TeacherEnsemble | None:
    """What the trainer's caller gave as the teacher, as one: models are frozen, several are an ensemble."""
    if isinstance(given, nn.Module):
        # What a timm or transformers model was trained with stands in its configuration.
        origin = hub_id(given.name_or_path) if isinstance(given, PreTrainedModel) else None
        return Teacher(given, input_spec=known_input_spec(given), hub_id=origin)
    if isinstance(given, Sequence):
        members = [as_teacher(member, standardized) for member in given]
        return members[0] if len(members) == 1 else TeacherEnsemble(members, standardized)
    return given


def _is_architecture(name_or_path: str) -> bool:
    """True for a timm architecture, False for a folder or a Hub id, an error for neither."""
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
    pretrained_cfg = {
        key: value
        for key, value in model.pretrained_cfg.items()
        if key not in WEIGHT_SOURCES and value not in (None, "", ())
    }
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
        raise HfkdError(
            f"{config.architecture} with {len(class_names)} classes and model_args={model_args or {}} has another "
            f"shape at '{name}' ({expected.get(name)}) than the model given ({given.get(name)}), so it could not be "
            "loaded again. Pass the keywords it was made with: wrap_timm(model, class_names, {'img_size': ...})."
        )
    wrapper.timm_model = model  # the wrapper re-initialises the model that it builds; keep timm's initialisation
    return wrapper


def input_spec(model: nn.Module) -> InputSpec:
    """Input size and normalisation of a timm model, or of a transformers one that came from a folder or the Hub.

    Raises:
        ValueError: for a transformers model whose image processor prepares images in a way that cannot be followed.
    """
    if isinstance(model, TimmWrapperForImageClassification):
        cfg = model.config.pretrained_cfg  # not the timm model's own, which timm makes anew when the folder is loaded
    elif isinstance(model, PreTrainedModel):
        return _spec_of_processor(AutoImageProcessor.from_pretrained(model.name_or_path), model.name_or_path)
    else:
        cfg = model.pretrained_cfg
    return InputSpec(cfg["input_size"][-1], tuple(cfg["mean"]), tuple(cfg["std"]))


def _spec_of_processor(processor, name_or_path: str) -> InputSpec:
    # Processors differ in what they have; what one lacks it does not do.
    crops = getattr(processor, "do_center_crop", False)
    size = (getattr(processor, "crop_size", None) if crops else None) or processor.size
    side = size.get("height") or size.get("shortest_edge")
    if side is None or getattr(processor, "do_flip_channel_order", False):
        raise HfkdError(
            f"The image processor of {name_or_path} prepares images in a way that is not supported (size "
            f"{dict(size)}, BGR: {bool(getattr(processor, 'do_flip_channel_order', False))}): expected a side and RGB."
        )
    if not getattr(processor, "do_normalize", False):
        return InputSpec(side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return InputSpec(side, tuple(processor.image_mean), tuple(processor.image_std))


def known_input_spec(model: nn.Module) -> InputSpec | None:
    """`input_spec`, or None for a model that says nothing of its input."""
    if isinstance(model, PreTrainedModel) and not isinstance(model, TimmWrapperForImageClassification):
        try:
            return input_spec(model)
        except OSError:  # made from a configuration, or saved without its image processor
            return None
    says = isinstance(model, TimmWrapperForImageClassification) or hasattr(model, "pretrained_cfg")  # timm's
    return input_spec(model) if says else None


def exported_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights to save: a wrapped timm model's under timm's own names, which both timm and transformers read.

    Contiguous, since safetensors refuses channels_last strides.
    """
    return {name: value.contiguous() for name, value in gathered(timm_model_of(model).state_dict()).items()}


def load_exported(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts what `exported_state_dict` gave back into the model."""
    timm_model_of(model).load_state_dict(state)
