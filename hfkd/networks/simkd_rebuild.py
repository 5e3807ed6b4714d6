"""Rebuilding of a student that ends in its teacher's classifier, for losses that request one.

The rebuilt student is a timm architecture of its own, `simkd_student`, whose arguments hold all that is needed to build
it again. A saved student then loads without its teacher.
"""

from __future__ import annotations

import copy

import timm
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.timm_wrapper import TimmWrapperForImageClassification
from transformers.utils import logging

from ..data import ImageSource
from ..errors import HfkdError
from ..losses import DistillationLoss
from ..losses.base import ReusedClassifier
from ..losses.feature_maps import as_map
from .class_matching import class_names_of
from .features import EMBEDDING, InputSpec, Layer, Outputs, find_classifier, find_layer, stages_of, timm_model_of
from .input_spec import known_input_spec
from .simkd_student import SimKDStudent, remove_modules, trunk_map
from .teacher import Teacher, TeacherEnsemble
from .wrapping import wrap_timm

logger = logging.get_logger(__name__)

# Entries of a timm student's configuration on preprocessing, which the rebuilt student takes over.
PREPROCESSING_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct")


def with_teacher_classifier(
    model: nn.Module,
    teacher: Teacher | TeacherEnsemble | None,
    losses: nn.ModuleDict,
    source: ImageSource | None,
) -> nn.Module:
    """Return the student that the losses request: `model`, or a wrapped `simkd_student` made from a copy of it.

    The copy keeps its weights and loses the modules behind the stage. The teacher's classifier, reduced to the
    student's classes, is frozen.

    Args:
        model: a transformers classifier, perhaps a wrapped timm model.
        source: data set with the student's images and classes.

    Raises:
        HfkdError: if several losses request a classifier, or student, teacher and layers do not fit.
    """
    requesting: dict[str, DistillationLoss] = {
        name: loss for name, loss in losses.items() if loss.reuses_classifier is not None
    }
    if not requesting:
        return model
    if len(requesting) > 1:
        raise HfkdError(
            f"The losses {sorted(requesting)} each replace the student's classifier by the teacher's: keep one of them."
        )
    ((name, loss),) = requesting.items()
    try:
        return _rebuild_student(model, teacher, loss.reuses_classifier, source)
    except ValueError as error:
        raise HfkdError(f"losses.{name}: {error}") from error


def _rebuild_student(
    model: nn.Module, teacher: Teacher | TeacherEnsemble, wanted: ReusedClassifier, source: ImageSource | None
) -> TimmWrapperForImageClassification:
    """Return the rebuilt student for a loss that reuses the teacher's classifier.

    Raises:
        HfkdError: if student, teacher and layers do not fit.
    """
    trunk_arguments = _trunk_arguments(model, wanted.student_layer)
    spec = known_input_spec(model) if source is None else InputSpec(source.image_size, source.mean, source.std)
    if spec is None:
        raise HfkdError(
            f"the size of the images is not known from the data or from the student ({type(model).__name__}): take a "
            "data set of hfkd.data, or a student saved with its image processor"
        )
    images = torch.zeros(2, 3, spec.image_size, spec.image_size)
    classes = model.config.num_labels
    names = class_names_of(model) if source is None else source.class_names
    teacher_outputs = _teacher_outputs(
        teacher, wanted, spec, names if len(names) == classes else list(map(str, range(classes))), images
    )
    # A copy, since the trunk loses modules: the caller's model stays whole.
    trunk = copy.deepcopy(timm_model_of(model) if "stage" in trunk_arguments else model.base_model)
    student_map, unused = _dry_run(trunk, trunk_arguments.get("stage"), images)
    teacher_map = teacher_outputs.features[wanted.teacher_layer]
    arguments = trunk_arguments | {
        "student_width": student_map.shape[1],
        "teacher_width": teacher_outputs.classifier.in_features,
        "teacher_size": [1, 1] if wanted.teacher_layer == EMBEDDING else list(as_map(teacher_map).shape[2:]),
        "factor": wanted.factor,
        "removed": unused,
    }
    student = timm.create_model(
        "simkd_student", num_classes=classes, pretrained_cfg_overlay=_preprocessing(model, spec), **arguments
    )
    # timm builds a student with random weights from the arguments that its configuration will hold. So the arguments
    # are seen to work now, and the trained trunk then takes the place of the random one.
    remove_modules(trunk, unused)
    student.backbone = trunk
    _copy_classifier(student.classifier, teacher_outputs.classifier)
    student.to(next(trunk.parameters()))
    logger.warning(
        f"The student is {type(trunk).__name__} up to a map of {student_map.shape[1]} channels, a projector and the "
        f"teacher's classifier: {student.extra_parameters:,} parameters beyond the trunk."
    )
    return wrap_timm(student.train(model.training), class_names_of(model), arguments)


@torch.no_grad()
def _copy_classifier(classifier: nn.Linear, given: nn.Linear) -> None:
    """Copy weights and bias into a classifier and freeze it; a missing bias becomes zeros."""
    classifier.requires_grad_(False)
    classifier.weight.copy_(given.weight)
    if given.bias is None:
        classifier.bias.zero_()
    else:
        classifier.bias.copy_(given.bias)


def _trunk_arguments(model: nn.Module, student_layer: int) -> dict:
    """Return the arguments of a `SimKDStudent` that describe its trunk.

    Raises:
        HfkdError: for a student without stages, or without this stage.
    """
    if isinstance(timm_model_of(model), SimKDStudent):
        raise HfkdError(
            "the student already ends in a teacher's classifier: train it with other losses, or start from the "
            "architecture of its trunk"
        )
    if isinstance(model, TimmWrapperForImageClassification):
        _check_layer("student_layer", model, student_layer)
        stage = student_layer % len(stages_of(model))
        return {
            "architecture": model.config.architecture,
            "architecture_args": model.config.model_args or {},
            "stage": stage,
        }
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        raise HfkdError(
            f"the student is a {type(model).__name__}, which has no stages: take a model of timm or transformers"
        )
    if student_layer != -1:
        raise HfkdError(
            f"student_layer is {student_layer}, and a {type(model).__name__} has no stage indices, which only timm "
            "models have: leave it at -1, the last hidden state"
        )
    # DeiT has a classifier with one head and one with two. `architectures` tells which of them it is.
    names = {"model_type": model.config.model_type, "architectures": [type(model).__name__]}
    config = model.config.to_diff_dict() | names
    left_out = ("id2label", "label2id", "dtype")
    return {"student_config": {key: value for key, value in config.items() if key not in left_out}}


def _check_layer(key: str, model: nn.Module, layer: Layer) -> None:
    """Check that a network has a layer, and name the loss's parameter in the error.

    The two networks may be of one family, so that the network's name alone would not tell which layer is wrong.

    Raises:
        HfkdError: as `find_layer`.
    """
    try:
        find_layer(model, layer)
    except ValueError as error:
        raise HfkdError(f"{key}: {error}") from error


def _preprocessing(model: nn.Module, spec: InputSpec) -> dict:
    if isinstance(model, TimmWrapperForImageClassification):
        known = model.config.pretrained_cfg
        return {key: known[key] for key in PREPROCESSING_KEYS if key in known}
    return {"input_size": (3, spec.image_size, spec.image_size), "mean": spec.mean, "std": spec.std}


def _teacher_outputs(
    teacher: Teacher | TeacherEnsemble,
    wanted: ReusedClassifier,
    student_input: InputSpec,
    student_names: list[str],
    images: Tensor,
) -> Outputs:
    """Return the teacher's outputs in float32, with its classifier for the student's classes.

    Raises:
        HfkdError: for an ensemble, a teacher spread over devices, or one whose logits are not one linear layer over the
            embedding.
    """
    if isinstance(teacher, TeacherEnsemble):
        raise HfkdError(f"an ensemble ({teacher.name}) has no classifier of its own to reuse: give one teacher")
    if teacher.dispatched or teacher.is_sharded:
        raise HfkdError(f"{teacher.name} is spread over devices and cannot be copied: give a teacher that fits one")
    if wanted.teacher_layer != EMBEDDING:
        _check_layer("teacher_layer", teacher.model, wanted.teacher_layer)
    # A copy is run: `prepare` rounds the teacher's weights, and the trainer prepares the teacher itself later, with
    # other layers and on its own device.
    probe = copy.deepcopy(teacher)
    probe.model.float()
    device = next(probe.model.parameters()).device
    batch = {"pixel_values": images.to(device)}
    probe.prepare(device, None, False, student_input, [wanted.teacher_layer, EMBEDDING])
    probe.align_classes(student_names, batch)
    outputs = probe(batch)
    if outputs.classifier is None:
        kind = type(find_classifier(teacher.model)).__name__
        raise HfkdError(
            "it needs a teacher whose classifier is one linear layer over its embedding; the classifier of "
            f"{teacher.name} is " + ("more than one" if kind == "Linear" else f"a {kind}")
        )
    return outputs


def _dry_run(trunk: nn.Module, stage: int | None, images: Tensor) -> tuple[Tensor, list[str]]:
    """Return the trunk's map for some images, and the paths of the modules whose parameters do not affect the map.

    Parameters in other modules that do not affect the map are frozen: DDP waits for the gradients of all that are not.
    """
    # Gradients of the map tell which parameters it depends on. Module names would not: architectures name and order
    # their modules differently, and a stage may end in the middle of the network.
    probe = copy.deepcopy(trunk).requires_grad_(True).eval()
    weights = dict(probe.named_parameters())
    with torch.enable_grad():
        feature_map = trunk_map(probe, stage, images.to(next(probe.parameters())))
        gradients = torch.autograd.grad(feature_map.sum(), list(weights.values()), allow_unused=True)
    unused = {name for name, gradient in zip(weights, gradients, strict=True) if gradient is None}
    removed: list[str] = []
    for path, module in trunk.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if own and own <= unused and not path.startswith(tuple(f"{parent}." for parent in removed)):
            removed.append(path)
    for name in unused:
        trunk.get_parameter(name).requires_grad_(False)
    return feature_map, removed
