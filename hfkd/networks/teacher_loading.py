"""Loading of a teacher by name: timm architecture with weights, folder or Hub id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import timm
from torch import nn
from transformers import PreTrainedModel

from ..errors import HfkdError
from ..models.checkpoints import load_architecture
from ..names import hub_id, public_name
from .backbones import lacks_classifier, load_backbone
from .input_spec import input_spec, known_input_spec
from .loading import is_architecture, load_pretrained
from .sources import create_pretrained, has_tag, resolve_name
from .teacher import Teacher, TeacherEnsemble
from .zero_shot import load_zero_shot


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
    if is_architecture(name_or_path):
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
