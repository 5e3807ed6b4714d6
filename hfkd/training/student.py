"""The student of a run: wrapped, rebuilt where a loss asks for it, and the teacher made ready beside it."""

from __future__ import annotations

import timm
import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from ..data import ImageSource
from ..data.subsets import image_source
from ..errors import HfkdError
from ..networks.features import InputSpec, remove_taps, settle_layers
from ..networks.loading import known_input_spec, load_student, wrap_timm
from ..networks.simkd_rebuild import with_teacher_classifier
from ..networks.teacher import Teacher, TeacherEnsemble, check_placement
from ..recipe.arguments import DistillationConfig
from ..teacher_cache.teacher import CachedTeacher
from .checks import check_ensemble


def named_student(name: str, train_dataset, eval_dataset, args: DistillationConfig) -> PreTrainedModel:
    """Load a student by its name (see `load_student`), for the classes and the image size of an hfkd data set.

    Raises:
        HfkdError: without such a data set, or for a name that cannot be loaded.
    """
    source = image_source(eval_dataset if train_dataset is None else train_dataset)
    if source is None:
        raise HfkdError(
            f"The student '{name}' needs the classes of a data set of hfkd.data: give a model in its place."
        )
    set_seed(args.seed)
    return load_student(name, source.class_names, image_size=source.image_size if timm.is_model(name) else None)


def fit_student(
    model: nn.Module,
    teacher: Teacher | TeacherEnsemble | CachedTeacher | None,
    losses: nn.ModuleDict,
    args: DistillationConfig,
    train_dataset,
    eval_dataset,
) -> nn.Module:
    """Return the network to train: the model given, wrapped if timm made it, or rebuilt for a loss that asks for it.

    Raises:
        HfkdError: if student, teacher, losses and a teacher cache do not fit one another.
    """
    remove_taps(model)  # of an earlier trainer
    source = image_source(train_dataset)
    if hasattr(model, "pretrained_cfg"):  # a bare timm model
        model = _wrap(model, source)
    if isinstance(teacher, CachedTeacher):
        teacher.fit(source, losses, args)
    set_seed(args.seed)  # SimKD's projector must not depend on whether a teacher has just been loaded
    dataset = eval_dataset if train_dataset is None else train_dataset
    model = with_teacher_classifier(model, teacher, losses, image_source(dataset))
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def _wrap(model: nn.Module, source: ImageSource | None) -> PreTrainedModel:
    """Wrap a bare timm model for transformers, its classes named by the data set as far as that has names."""
    names = [] if source is None else source.class_names
    return wrap_timm(model, [*names, *map(str, range(len(names), model.num_classes))][: model.num_classes])


def prepare_teacher(
    teacher: Teacher | TeacherEnsemble | CachedTeacher,
    student: nn.Module,
    losses: nn.ModuleDict,
    args: DistillationConfig,
    images: InputSpec | None,
) -> None:
    """Bring teacher and losses into the precision of the run, and tap the teacher's layers that the losses read.

    Args:
        images: size and normalisation of the batches.

    Raises:
        HfkdError: for layers or a placement that the teacher does not have.
    """
    if not isinstance(teacher, CachedTeacher):  # which has no network
        check_placement(teacher, args.world_size, args.torch_compile)
        settle_layers(losses.values(), student, teacher.members[0].model)
    autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    for loss in losses.values():
        loss.autocast_dtype = autocast_dtype
    layers = [layer for loss in losses.values() for layer in loss.teacher_layers]
    teacher.prepare(args.device, autocast_dtype, args.channels_last, images, layers, args.shard_teacher)
    check_ensemble(teacher, losses, args)


def batch_spec(train_dataset, eval_dataset, student: nn.Module) -> InputSpec | None:
    """Return size and normalisation of the batches: those of an hfkd data set, else those that the student expects."""
    for source in (image_source(train_dataset), image_source(eval_dataset)):
        if source is not None:
            return InputSpec(source.image_size, source.mean, source.std)
    return known_input_spec(student)
