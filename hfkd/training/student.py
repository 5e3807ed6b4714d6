"""The student of a run: wrapped, rebuilt where a loss asks for it, and the teacher made ready beside it."""

from __future__ import annotations

from typing import Any

import datasets
import timm
import torch
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

from ..data import ImageSource, collate_batch
from ..data.subsets import image_source
from ..errors import HfkdError
from ..networks.channels import check_channels
from ..networks.features import AFFINE, InputSpec, remove_taps, settle_layers
from ..networks.input_spec import known_input_spec, load_processor
from ..networks.int8 import is_int8, quantize
from ..networks.simkd_rebuild import with_teacher_classifier
from ..networks.student_loading import load_student
from ..networks.teacher import Teacher, TeacherEnsemble, check_placement
from ..networks.wrapping import wrap_timm
from ..recipe.config import DistillationConfig
from ..teacher_cache.teacher import CachedTeacher
from .checks import check_ensemble
from .freezing import frozen_names
from .loaders import first_images
from .optimization import layer_scales


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
    check_channels(model)
    source = image_source(train_dataset)
    if hasattr(model, "pretrained_cfg"):  # a bare timm model
        model = _wrap(model, source)
    if isinstance(teacher, CachedTeacher):
        teacher.fit(source, losses, args)
    set_seed(args.seed)  # SimKD's projector must not depend on whether a teacher has just been loaded
    dataset = eval_dataset if train_dataset is None else train_dataset
    model = with_teacher_classifier(model, teacher, losses, image_source(dataset))
    _simulate_int8(model, train_dataset, args)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def _simulate_int8(model: nn.Module, train_dataset: Any, args: DistillationConfig) -> None:
    """Put simulated int8 into a student that is to be trained in it, unless it was trained in it before.

    Raises:
        HfkdError: if there are no training images, if the student has seen no image yet, or if it is for int8 and the
            run is not.
    """
    if args.quantize == "none":
        if is_int8(model) and train_dataset is not None:  # it may be evaluated
            raise HfkdError("The student was trained for int8, and its ranges go with that: set quantize to int8.")
        return
    if is_int8(model):
        return
    if train_dataset is None:
        raise HfkdError("quantize reads the first ranges of activations from training images: give a train_dataset.")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms and not any(norm.running_mean.any() for norm in norms):  # the norms are held from the first step
        raise HfkdError(
            "quantize goes on from a trained student, and the batch norms of this one have seen no image: their means "
            "are 0. Train it without quantize first."
        )
    batch = first_images(train_dataset, collate_batch)
    quantize(model, batch["pixel_values"].to(next(model.parameters()).device))


def load_named_student(name_or_path: str, dataset: Any, has_classifier: bool = True) -> PreTrainedModel:
    """Return the student of a name, for the classes, the size and the normalisation of a data set.

    Args:
        has_classifier: False for a backbone without a classifier, whatever classes the data set has.

    Raises:
        HfkdError: if the data set does not tell its classes, or as `load_student`.
    """
    source = image_source(dataset)
    names: list[str] | None = []
    if has_classifier:
        names = _class_names(dataset) if source is None else source.class_names
    if names is None:
        raise HfkdError(
            f"The student '{name_or_path}' is to be loaded for the classes of the data set, and a "
            f"{type(dataset).__name__} does not tell them: pass load_student('{name_or_path}', class_names)."
        )
    if source is None:
        return load_student(name_or_path, names)
    student = load_student(name_or_path, names, image_size=source.image_size if timm.is_model(name_or_path) else None)
    if isinstance(student, TimmWrapperPreTrainedModel):  # what others prepare their images by
        student.config.pretrained_cfg |= {"mean": source.mean, "std": source.std}
    return student


def check_layer_names(student: nn.Module, args: DistillationConfig) -> None:
    """Check the settings that go by the names of a student's layers, before images are decoded.

    Raises:
        HfkdError: for a pattern that names no part of it, or layers that it does not tell.
    """
    frozen_names(student, args.freeze or [])
    if args.layer_decay is not None:
        layer_scales(student, args.layer_decay)


def _class_names(dataset: Any) -> list[str] | None:
    """Return the class names of a data set of `datasets` or torchvision, None where it has none."""
    features = dataset.features if isinstance(dataset, datasets.Dataset) else {}
    labels = features.get("labels", features.get("label"))
    names = labels.names if isinstance(labels, datasets.ClassLabel) else getattr(dataset, "classes", None)
    return None if names is None else list(names)


def own_processor(model: PreTrainedModel) -> Any:
    """Return the image processor of a model loaded by name; None for timm's, whose config.json says the same."""
    return None if isinstance(model, TimmWrapperPreTrainedModel) else load_processor(model.name_or_path)


def _wrap(model: nn.Module, source: ImageSource | None) -> PreTrainedModel:
    """Wrap a bare timm model for transformers, its classes named by the data set as far as that has names."""
    names = [] if source is None else source.class_names
    return wrap_timm(model, [*names, *map(str, range(len(names), model.num_classes))][: model.num_classes])


def tell_losses(
    losses: nn.ModuleDict,
    student: nn.Module,
    teacher: Teacher | TeacherEnsemble | CachedTeacher | None,
    args: DistillationConfig,
) -> torch.dtype | None:
    """Tell the losses seed, layers and precision of the run, and return the latter, None for float32.

    Raises:
        HfkdError: for a network without stages, where a loss reads them all.
    """
    has_network = teacher is not None and not isinstance(teacher, CachedTeacher)
    settle_layers(losses.values(), student, teacher.members[0].model if has_network else None)
    autocast_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    for loss in losses.values():
        loss.autocast_dtype = autocast_dtype
        loss.seed = args.seed
    return autocast_dtype


def prepare_teacher(
    teacher: Teacher | TeacherEnsemble | CachedTeacher,
    losses: nn.ModuleDict,
    args: DistillationConfig,
    images: InputSpec | None,
    autocast_dtype: torch.dtype | None,
) -> None:
    """Bring the teacher into the precision of the run, and tap those of its layers that the losses read.

    Args:
        images: size and normalisation of the batches.
        autocast_dtype: precision of the run, None for float32.

    Raises:
        HfkdError: for layers or a placement that the teacher does not have.
    """
    if not isinstance(teacher, CachedTeacher):  # which has no network
        check_placement(teacher, args.world_size, args.torch_compile)
    layers, member_layers = [], []
    for loss in losses.values():
        read = [*loss.teacher_layers, *(norm + AFFINE for norm in loss.teacher_norms)]
        (member_layers if loss.reads_members else layers).extend(read)
    precision = args.device, autocast_dtype, args.channels_last
    teacher.prepare(*precision, images, layers, args.shard_teacher, member_layers)
    check_ensemble(teacher, losses, args)


def batch_spec(train_dataset, eval_dataset, student: nn.Module) -> InputSpec | None:
    """Return size and normalisation of the batches: those of an hfkd data set, else those that the student expects."""
    for source in (image_source(train_dataset), image_source(eval_dataset)):
        if source is not None:
            return InputSpec(source.image_size, source.mean, source.std)
    return known_input_spec(student)
