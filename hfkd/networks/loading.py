"""Loading of students and teachers by name: timm architectures, local folders, Hub ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, overload

import timm
import torch
from safetensors import SafetensorError
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.pit import ConvEmbedding
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, TimmWrapperConfig
from transformers.models.timm_wrapper import TimmWrapperForImageClassification, TimmWrapperModel
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

from ..errors import HfkdError, nearest
from ..models.checkpoints import load_architecture
from ..names import hub_id, public_name
from .backbones import is_backbone, lacks_classifier, load_backbone
from .features import timm_model_of
from .input_spec import input_spec, known_input_spec
from .int8 import restore_int8, unreported_ranges
from .sharding import gathered
from .sources import (
    check_loaded,
    create_pretrained,
    has_tag,
    not_found_error,
    read_config,
    resolve_name,
    tagged,
)
from .teacher import Teacher, TeacherEnsemble
from .zero_shot import load_zero_shot

# Entries of timm's pretrained_cfg that a student does not keep. The first name the source of the weights, perhaps a
# path on this machine; a saved model brings its own weights. The others describe an architecture's published weights,
# which a new student does not have.
WEIGHT_SOURCE_KEYS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"}
PUBLISHED_WEIGHT_KEYS = ("tag", "license", "origin_url", "test_input_size", "test_pool_size", "test_crop_pct")


def load_student(
    name_or_path: str,
    class_names: list[str] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    *,
    pretrained: bool = False,
    patch_size: int | None = None,
    drop_path_rate: float | None = None,
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return a transformers image classifier to train, with the classes of the data set.

    A timm architecture (`cifar_resnet20`, `deit_tiny_distilled_patch16_224`) starts from random weights, or from timm's
    default ones if `pretrained`, and one with a tag (`resnet10t.c3_in1k`) from the weights of that tag. A folder or a
    Hub id starts from its own weights. Where the number of classes differs, or there is no classifier, it is new. With
    no classes at all the student is a backbone without a classifier, of a timm architecture.

    Args:
        name_or_path: timm architecture, folder written by `save_pretrained`, a run's folder, or Hub id.
        class_names: names of the classes, in the order of the labels; they are saved with the model.
        num_classes: number of classes, in place of `class_names`.
        image_size: side of the square input in pixels, for a timm architecture; by default its own.
        pretrained: whether an architecture without a tag starts from timm's default weights.
        patch_size: side of a ViT's patches in pixels, for a timm architecture; by default its own.
        drop_path_rate: rate of stochastic depth, for a timm architecture; by default its own.
        crop_pct, interpolation: preprocessing for evaluation, saved with the model. A model of transformers' own has an
            image processor instead.
        trust_remote_code: run the code that comes with a folder or a Hub id.

    Raises:
        HfkdError: without classes; for a name that is no architecture, folder or Hub id; for an argument that the
            architecture does not take; for an image size that its patches do not divide; for a setting of an
            architecture with a name that comes with weights.
    """
    if class_names is None:
        if num_classes is None:
            raise HfkdError("load_student needs the classes of the data set: give class_names or num_classes.")
        class_names = [str(index) for index in range(num_classes)]
    name_or_path = resolve_name(name_or_path)
    preparation = {"crop_pct": crop_pct, "interpolation": interpolation, "crop_mode": "center"}
    if _is_architecture(name_or_path):
        architecture = tagged(name_or_path) if pretrained else name_or_path
        return _new_student(architecture, class_names, image_size, patch_size, drop_path_rate, preparation)
    settings = {"image_size": image_size, "patch_size": patch_size, "drop_path_rate": drop_path_rate}
    for key, value in settings.items():
        if value is not None:
            raise HfkdError(
                f"{key}={value} is for a timm architecture, and {name_or_path} has its own value: leave {key} out."
            )
    if class_names:
        student = load_pretrained(name_or_path, class_names, trust_remote_code=trust_remote_code)
    else:
        student = _load_headless_student(name_or_path, trust_remote_code)
    if isinstance(student, TimmWrapperPreTrainedModel):
        student.config.pretrained_cfg |= preparation
    return student


def _new_student(architecture, class_names, image_size, patch_size, drop_path_rate, preparation):
    """Return a wrapped timm architecture with random weights, or with those that its tag names."""
    overlay = dict.fromkeys(PUBLISHED_WEIGHT_KEYS) | preparation
    if image_size is not None:
        overlay["input_size"] = (3, image_size, image_size)
    shape = {} if patch_size is None else {"patch_size": patch_size}
    settings = shape if drop_path_rate is None else shape | {"drop_path_rate": drop_path_rate}
    create = create_pretrained if has_tag(architecture) else timm.create_model
    try:
        model = create(architecture, num_classes=len(class_names), pretrained_cfg_overlay=overlay, **settings)
    except TypeError as error:  # the architecture's constructor does not have this argument
        raise HfkdError(f"{architecture} does not take {', '.join(settings)}: {error}.") from error
    _check_patches(architecture, model)
    _reinitialize_zero_classifier(model)
    if image_size is not None and model.pretrained_cfg.get("fixed_input_size"):
        shape["img_size"] = image_size
    return wrap_timm(model, class_names, shape)


def _load_headless_student(name_or_path: str, trust_remote_code: bool) -> PreTrainedModel:
    if not isinstance(read_config(name_or_path, trust_remote_code), TimmWrapperConfig):
        raise HfkdError(
            f"No loss reads logits of the student, and without a classifier it must be a timm architecture, such as "
            f"resnet18, or a folder that hfkd wrote of one: {name_or_path} is neither. Or set ce_weight above 0."
        )
    return load_backbone(name_or_path, trust_remote_code=trust_remote_code)


def _check_patches(architecture: str, model: nn.Module) -> None:
    """Check that the patches of a ViT divide its input: timm's ViTs ignore the pixels beyond the last whole patch.

    Raises:
        HfkdError: if they do not; the message names the nearest sizes.
    """
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
            return  # only the first one cuts images; later ones cut feature maps


def _reinitialize_zero_classifier(model: Any) -> None:
    """Give a classifier that starts at zero, such as MLP-Mixer's, small random weights.

    All logits of such a classifier are equal at first, and nearly equal after one step. The Z-score divides by their
    standard deviation and would scale the first gradients up without bound.
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
    image_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    trust_remote_code: bool = False,
    prompts: Sequence[str] | None = None,
    class_names: Sequence[str] = (),
) -> Teacher:
    """Load a teacher and freeze it.

    The student's images are converted to the teacher's own size and normalisation.

    Args:
        name_or_path: folder written by `save_pretrained`, a run's folder, Hub id, or timm architecture. An architecture
            takes its weights from `checkpoint`, or else timm's pretrained ones. A network without a classifier teaches
            its features; of CLIP and SigLIP this is the vision tower.
        checkpoint: file for an architecture, see `hfkd.models.load_checkpoint`.
        class_indices: for each of the student's classes, the teacher's; by default they are matched by name.
        device_map: transformers' `device_map`, for a teacher that does not fit one device; for a folder or a Hub id.
        image_size, image_mean, image_std: input that the network in `checkpoint` was trained with, where it is not the
            architecture's own: side in pixels, mean and standard deviation (RGB, images in [0, 1]).
        trust_remote_code: run the code that comes with a folder or a Hub id.
        prompts: templates such as "a photo of a {}", with which CLIP or SigLIP classifies: see `load_zero_shot`.
        class_names: names of the student's classes, for prompts.

    Raises:
        HfkdError: for an unknown name, for weights that do not fit, for an architecture without weights or with a
            device_map, or for prompts that make no classifier.
    """
    name_or_path = resolve_name(name_or_path)
    if prompts:
        network, whole = load_zero_shot(name_or_path, class_names, prompts)
        return Teacher(network, public_name(name_or_path, whole), input_spec(whole), hub_id=hub_id(name_or_path))
    if _is_architecture(name_or_path):
        if device_map is not None:
            raise HfkdError(
                f"teacher_device_map is for models of transformers, and {name_or_path} is a timm architecture: name a "
                "folder or a Hub id."
            )
        model, origin = _architecture_with_weights(name_or_path, checkpoint)
        if checkpoint is not None:
            _set_input(model, name_or_path, image_size, image_mean, image_std)
        has_classifier = None  # the model tells
    elif checkpoint is not None:
        raise HfkdError(
            f"teacher_checkpoint={checkpoint} is for a timm architecture, but teacher_name_or_path={name_or_path} "
            "holds its own weights. Name an architecture such as cifar_resnet56, or leave teacher_checkpoint out."
        )
    else:
        has_classifier = not lacks_classifier(name_or_path, trust_remote_code=trust_remote_code)
        load = load_pretrained if has_classifier else load_backbone
        model = load(name_or_path, device_map=device_map, trust_remote_code=trust_remote_code)
        origin = hub_id(name_or_path)
    return Teacher(model, public_name(name_or_path, model), input_spec(model), class_indices, origin, has_classifier)


def _architecture_with_weights(name: str, checkpoint: str | None) -> tuple[nn.Module, str | None]:
    """Return a timm architecture with the weights of a file or timm's own, and the Hub id of the latter."""
    if checkpoint is not None:
        return load_architecture(name, checkpoint), None
    if has_tag(name) or ((published := timm.get_pretrained_cfg(name)) is not None and published.has_weights):
        model: Any = create_pretrained(name)
        return model, model.pretrained_cfg.get("hf_hub_id")
    raise HfkdError(
        f"The architecture {name} has no pretrained weights to teach with. Give teacher_checkpoint, or train it with "
        "`hfkd train-teacher` and give the folder that it writes."
    )


def _set_input(
    model: nn.Module,
    architecture: str,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    """Set the input of a timm model that was trained with another one than its architecture's.

    Raises:
        HfkdError: for a size that the architecture does not take.
    """
    cfg: Any = model.pretrained_cfg
    own = cfg["input_size"][-1]
    if image_size not in (None, own) and cfg.get("fixed_input_size"):
        raise HfkdError(f"teacher_image_size is {image_size}, and {architecture} takes images of {own} pixels only.")
    given = {"input_size": None if image_size is None else (3, image_size, image_size), "mean": mean, "std": std}
    cfg.update({key: tuple(value) for key, value in given.items() if value is not None})


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


@overload
def as_teacher(given: Teacher | nn.Module | str, standardized: bool) -> Teacher: ...


@overload
def as_teacher(
    given: Teacher | TeacherEnsemble | nn.Module | str | Sequence[Teacher | nn.Module | str] | None, standardized: bool
) -> Teacher | TeacherEnsemble | None: ...


def as_teacher(
    given: Teacher | TeacherEnsemble | nn.Module | str | Sequence[Teacher | nn.Module | str] | None, standardized: bool
) -> Teacher | TeacherEnsemble | None:
    """Return the trainer's `teacher` argument as one teacher: names are loaded, and several become an ensemble.

    Raises:
        HfkdError: if it is none of these, or as `load_teacher`.
    """
    if isinstance(given, str):
        return load_teacher(given)
    if isinstance(given, nn.Module):
        # The model's configuration holds the size and normalisation that it was trained with.
        origin = hub_id(given.name_or_path or "") if isinstance(given, PreTrainedModel) else None
        return Teacher(given, input_spec=known_input_spec(given), hub_id=origin)
    if isinstance(given, Sequence):
        members = [as_teacher(member, standardized) for member in given]
        return members[0] if len(members) == 1 else TeacherEnsemble(members, standardized)
    if not (given is None or isinstance(given, (Teacher, TeacherEnsemble))):
        raise HfkdError(
            f"The teacher must be a model, a Teacher, a name or a list of them, got {type(given).__name__}: "
            "DistillationTrainer(student, teacher, args)."
        )
    return given


def check_model(name_or_path: str, trust_remote_code: bool = False) -> None:
    """Check that a model can be loaded, as far as its name and its configuration show it.

    Raises:
        HfkdError: if the name is no architecture, folder or Hub id, or has a tag of weights that timm lacks.
        NotFoundError: if there is no configuration of a model at the folder or the Hub id.
    """
    name_or_path = resolve_name(name_or_path)
    if _is_architecture(name_or_path):
        has_tag(name_or_path)
    else:
        read_config(name_or_path, trust_remote_code)


def _is_architecture(name_or_path: str) -> bool:
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
