"""Students that end in their teacher's classifier, for losses that ask for one."""

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
from .loading import known_input_spec, wrap_timm
from .simkd_student import SimKDStudent, remove_modules, trunk_map
from .teacher import Teacher, TeacherEnsemble

logger = logging.get_logger(__name__)

# What a timm student's configuration says of its images, and its successor's should.
PREPARATION = ("input_size", "mean", "std", "interpolation", "crop_pct")


def with_teacher_classifier(
    model: nn.Module,
    teacher: Teacher | TeacherEnsemble | None,
    losses: nn.ModuleDict,
    source: ImageSource | None,
) -> nn.Module:
    """The student that the losses ask for: `model`, or a wrapped `simkd_student` made of a copy of it.

    The copy keeps its weights and loses what lies behind the stage; the teacher's classifier, with the student's
    classes, is frozen.

    Args:
        model: a transformers classifier, wrapped timm models among them.
        source: the data set, whose images and classes the student has.

    Raises:
        ValueError: several losses ask, or student, teacher and layers do not allow it.
    """
    asking: dict[str, DistillationLoss] = {
        name: loss for name, loss in losses.items() if loss.reuses_classifier is not None
    }
    if not asking:
        return model
    if len(asking) > 1:
        raise HfkdError(f"The losses {sorted(asking)} each give the student a projector and a classifier: keep one.")
    ((name, loss),) = asking.items()
    try:
        return _rebuilt(model, teacher, loss.reuses_classifier, source)
    except ValueError as error:
        raise HfkdError(f"losses.{name}: {error}") from error


def _rebuilt(
    model: nn.Module, teacher: Teacher | TeacherEnsemble, wanted: ReusedClassifier, source: ImageSource | None
) -> TimmWrapperForImageClassification:
    origin = _origin(model, wanted.student_layer)
    spec = known_input_spec(model) if source is None else InputSpec(source.image_size, source.mean, source.std)
    if spec is None:
        raise HfkdError(
            f"neither the data nor the student ({type(model).__name__}) says what size the images have: take a data "
            "set of hfkd.data, or a student saved with its image processor"
        )
    images = torch.zeros(2, 3, spec.image_size, spec.image_size)
    classes = model.config.num_labels
    names = class_names_of(model) if source is None else source.class_names
    taught = _teacher_outputs(
        teacher, wanted, spec, names if len(names) == classes else list(map(str, range(classes))), images
    )
    trunk = copy.deepcopy(timm_model_of(model) if "stage" in origin else model.base_model)
    student_map, unread = _dry_run(trunk, origin.get("stage"), images)
    teacher_map = taught.features[wanted.teacher_layer]
    arguments = origin | {
        "student_width": student_map.shape[1],
        "teacher_width": taught.classifier.in_features,
        "teacher_size": [1, 1] if wanted.teacher_layer == EMBEDDING else list(as_map(teacher_map).shape[2:]),
        "factor": wanted.factor,
        "removed": unread,
    }
    student = timm.create_model(
        "simkd_student", num_classes=classes, pretrained_cfg_overlay=_preparation(model, spec), **arguments
    )
    remove_modules(trunk, unread)
    student.backbone = trunk
    _fill(student.classifier, taught.classifier)
    student.to(next(trunk.parameters()))
    logger.warning(
        f"The student is {type(trunk).__name__} up to a map of {student_map.shape[1]} channels, a projector and the "
        f"teacher's classifier: {student.extra_parameters:,} parameters beyond the trunk."
    )
    return wrap_timm(student.train(model.training), class_names_of(model), arguments)


@torch.no_grad()
def _fill(classifier: nn.Linear, given: nn.Linear) -> None:
    """The given weights, frozen; a bias of zeros where there is none."""
    classifier.requires_grad_(False)
    classifier.weight.copy_(given.weight)
    if given.bias is None:
        classifier.bias.zero_()
    else:
        classifier.bias.copy_(given.bias)


def _origin(model: nn.Module, student_layer: int) -> dict:
    """The arguments of a `SimKDStudent` that say where its trunk comes from.

    Raises:
        ValueError: for a student without stages, or without this one.
    """
    if isinstance(timm_model_of(model), SimKDStudent):
        raise HfkdError(
            "the student ends in a teacher's classifier already: train it with other losses, or start from the "
            "architecture that it is made of"
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
            f"the student is a {type(model).__name__}, which has no stages to cut it at: take a model of timm or of "
            "transformers"
        )
    if student_layer != -1:
        raise HfkdError(
            f"student_layer is {student_layer}, and a {type(model).__name__} has no stage indices, which are timm's: "
            "leave it at -1, its last hidden state"
        )
    # DeiT has two classifiers, of which the architecture names one.
    names = {"model_type": model.config.model_type, "architectures": [type(model).__name__]}
    config = model.config.to_diff_dict() | names
    left_out = ("id2label", "label2id", "dtype")
    return {"student_config": {key: value for key, value in config.items() if key not in left_out}}


def _check_layer(key: str, model: nn.Module, layer: Layer) -> None:
    """Raises `find_layer`'s ValueError under the name of the loss's parameter: the networks may be of one family."""
    try:
        find_layer(model, layer)
    except ValueError as error:
        raise HfkdError(f"{key}: {error}") from error


def _preparation(model: nn.Module, spec: InputSpec) -> dict:
    if isinstance(model, TimmWrapperForImageClassification):
        known = model.config.pretrained_cfg
        return {key: known[key] for key in PREPARATION if key in known}
    return {"input_size": (3, spec.image_size, spec.image_size), "mean": spec.mean, "std": spec.std}


def _teacher_outputs(
    teacher: Teacher | TeacherEnsemble,
    wanted: ReusedClassifier,
    student_input: InputSpec,
    student_names: list[str],
    images: Tensor,
) -> Outputs:
    """What the teacher gives, in float32, with its classifier for the student's classes.

    A copy of it is asked: it cannot be prepared twice.

    Raises:
        ValueError: for an ensemble, a teacher spread over devices, or one whose logits are not those of one linear
            layer.
    """
    if isinstance(teacher, TeacherEnsemble):
        raise HfkdError(f"an ensemble ({teacher.name}) has no classifier of its own to reuse: give one teacher")
    if teacher.dispatched or teacher.shared_out:
        raise HfkdError(f"it copies the teacher, and {teacher.name} is spread over devices: give one that fits one")
    if wanted.teacher_layer != EMBEDDING:
        _check_layer("teacher_layer", teacher.model, wanted.teacher_layer)
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
            "it needs a teacher whose classifier is one linear layer over its embedding; that of "
            f"{teacher.name} is " + ("more than one" if kind == "Linear" else f"a {kind}")
        )
    return outputs


def _dry_run(trunk: nn.Module, stage: int | None, images: Tensor) -> tuple[Tensor, list[str]]:
    """The trunk's map for some images, and the paths of the modules whose parameters it does not depend on.

    What it does not depend on in other modules is frozen: DDP waits for the gradients of everything else.
    """
    probe = copy.deepcopy(trunk).requires_grad_(True).eval()
    weights = dict(probe.named_parameters())
    with torch.enable_grad():
        feature_map = trunk_map(probe, stage, images.to(next(probe.parameters())))
        gradients = torch.autograd.grad(feature_map.sum(), list(weights.values()), allow_unused=True)
    unread = {name for name, gradient in zip(weights, gradients, strict=True) if gradient is None}
    removed: list[str] = []
    for path, module in trunk.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if own and own <= unread and not path.startswith(tuple(f"{parent}." for parent in removed)):
            removed.append(path)
    for name in unread:
        trunk.get_parameter(name).requires_grad_(False)
    return feature_map, removed
