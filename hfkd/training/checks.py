"""Checks before training that teacher, student, losses and settings fit together."""

from __future__ import annotations

import inspect
from collections.abc import Sized
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset

from ..data import MixedImageDataset, StreamingImageDataset
from ..data.subsets import image_source
from ..errors import HfkdError, did_you_mean
from ..losses import DistillationLoss
from ..networks.frozen import trainable_weights_in_common
from ..networks.headless import is_headless
from ..networks.teacher import Teacher, TeacherEnsemble
from ..recipe.config import DistillationConfig
from ..teacher_cache.teacher import CachedTeacher
from .distiller import Distiller
from .loaders import data_sets
from .metrics import TIMES

PLATEAU = ("reduce_lr_on_plateau", "greedy")  # schedules that read metric_for_best_model


def check_ensemble(teacher: Teacher | TeacherEnsemble, losses: nn.ModuleDict, args: DistillationConfig) -> None:
    """Check that no loss needs raw logits of an ensemble that gives standardized ones.

    Raises:
        HfkdError: if a loss does.
    """
    if not (isinstance(teacher, TeacherEnsemble) and args.logit_standardization):
        return
    for name, loss in losses.items():
        if loss.reads_raw_logits and loss.needs_teacher:
            raise HfkdError(
                f"The loss '{name}' also reads logits that are not standardized, and an ensemble under "
                "logit_standardization averages standardized ones: give one teacher, or leave logit_standardization "
                "off."
            )


def check_roles(model: nn.Module, teacher, losses: nn.ModuleDict, args: DistillationConfig) -> None:
    """Check that teacher, student, losses and mixing fit together.

    Args:
        teacher: the trainer's, None for a student without one.

    Raises:
        HfkdError: if they do not.
    """
    taught = sorted(name for name, loss in losses.items() if loss.needs_teacher)
    if taught and teacher is None:
        raise HfkdError(f"The losses {taught} need a teacher: set teacher_name_or_path, or remove them.")
    if teacher is not None and not teacher.has_classifier:
        check_reads_features(losses, teacher.name)
    if is_headless(model):
        check_trains_backbone(losses, args)
    if not losses and args.ce_weight == 0:
        raise HfkdError("There is nothing to train on: ce_weight is 0 and there are no losses. Set one of them.")
    networks = [member.model for member in teacher.members if isinstance(member, Teacher)] if teacher else []
    if any(trainable_weights_in_common(model, network) for network in networks):
        raise HfkdError(
            "Student and teacher are the same object or have weights in common, which training would change in both: "
            "pass copy.deepcopy(teacher) as the student."
        )
    if not args.mixes:
        return
    for name, loss in losses.items():
        if not (loss.takes_mixed_labels or loss.dominant_label):
            way_out = f"set losses.{name}.dominant_label to true to take the class with the larger share, or "
            offered = "dominant_label" in inspect.signature(type(loss)).parameters
            raise HfkdError(
                f"The loss '{name}' needs one class for each image, and mixup and cutmix mix classes: "
                f"{way_out if offered else ''}leave mixup and cutmix at 0."
            )
        if loss.views == 2:
            raise HfkdError(f"The loss '{name}' takes two views of an image: leave mixup and cutmix at 0.")


def check_reads_features(losses: nn.ModuleDict, teacher: str) -> None:
    """Check that no loss reads logits or a classifier of a teacher that has neither.

    Args:
        teacher: its name.

    Raises:
        HfkdError: if a loss does.
    """
    reading = sorted(name for name, loss in losses.items() if loss.needs_teacher and reads_classes(loss))
    if reading:
        raise HfkdError(
            f"The losses {reading} read logits or a classifier, and the teacher {teacher} has none. Take losses that "
            "read features in their place, such as token_mse, feature_queue or pkt, or a teacher with a classifier; "
            "CLIP and SigLIP classify with teacher_prompts."
        )


def reads_classes(loss: DistillationLoss) -> bool:
    """Return True if a loss reads logits or the classifier, which depend on the classes."""
    return loss.reads_logits or loss.reads_classifier


def check_trains_backbone(losses: nn.ModuleDict, args: DistillationConfig) -> None:
    """Check that nothing trains or measures the classifier that a student does not have.

    Raises:
        HfkdError: if something does.
    """
    reading = [name for name, loss in losses.items() if reads_classes(loss)]
    if args.ce_weight > 0 or reading:
        what = f"the losses {reading} read logits" if reading else f"ce_weight is {args.ce_weight:g}"
        raise HfkdError(
            f"The student has no classifier, and {what}: give it the classes of the data set, or set ce_weight to 0 "
            "and take only losses that read features."
        )


def smallest_batch(train_dataset: Any, losses: nn.ModuleDict, args: DistillationConfig) -> int | None:
    """Return the least number of images that a process gets in a training batch; None for an unknown number of images.

    Raises:
        HfkdError: if all images would be dropped, or the smallest batch is too small for a loss.
    """
    added = unlabelled_images(train_dataset)
    images = args.per_device_train_batch_size - added
    streamed = isinstance(train_dataset, StreamingImageDataset)
    if not isinstance(train_dataset, Sized) or (isinstance(train_dataset, IterableDataset) and not streamed):
        return None
    rows = -(-train_dataset.num_rows // args.world_size) if streamed else len(train_dataset)
    if not streamed and args.dataloader_drop_last and rows < images * args.world_size:
        raise HfkdError(
            f"{rows:,} training images do not fill a batch of {images} for each of {args.world_size} process(es): set "
            "a smaller per_device_train_batch_size, fewer processes, or dataloader_drop_last: false."
        )
    settings: Any = args.accelerator_config  # an object once args is built
    filled_up = not streamed and args.world_size > 1 and settings.even_batches
    if filled_up or args.dataloader_drop_last or rows % images == 0:
        return images + added
    for name, loss in losses.items():
        if rows % images + (0 if loss.reads_labels else added) < loss.least_images:
            raise HfkdError(
                f"The loss '{name}' needs {loss.least_images} images in every batch, and the last of {rows:,} in "
                f"batches of {images} has {rows % images}: set dataloader_drop_last: true, or another "
                "per_device_train_batch_size."
            )
    return rows % images + added


def unlabelled_images(train_dataset: Any) -> int:
    """Return the number of images without labels that are added to each batch of images with labels."""
    source = image_source(train_dataset)
    return source.unlabelled_images if isinstance(source, MixedImageDataset) else 0


def check_mixed(train_dataset: Any, teacher: Any, args: DistillationConfig) -> None:
    """Check that the settings suit batches of images with and without labels.

    Raises:
        HfkdError: for mixup, CutMix, a teacher cache, or another batch size than the data set was made for.
    """
    source = image_source(train_dataset)
    if not isinstance(source, MixedImageDataset):
        return
    size = source.labelled_images + source.unlabelled_images
    if args.per_device_train_batch_size != size:
        raise HfkdError(
            f"per_device_train_batch_size is {args.per_device_train_batch_size}, and the MixedImageDataset was made "
            f"for batches of {size}: give both the same number."
        )
    if args.mixes:
        raise HfkdError(
            "mixup and cutmix would mix images with labels and images without: leave them at 0, or train on images "
            "without labels alone, with label_column none and ce_weight 0."
        )
    if isinstance(teacher, CachedTeacher):
        raise HfkdError(
            "A teacher cache holds the rows of one data set, and each batch holds images of unlabelled_dataset_name as "
            "well: train with the teacher itself, or on one data set."
        )


def check_types(model: Any, args: Any) -> None:
    """Check the types of the trainer's first arguments.

    Raises:
        HfkdError: if the student is neither a model nor a name, or the settings are no `DistillationConfig`.
    """
    if not isinstance(args, DistillationConfig):
        raise HfkdError(
            f"args must be a DistillationConfig, got {type(args).__name__}. It takes every field of TrainingArguments: "
            "DistillationTrainer(student, teacher, DistillationConfig(output_dir, learning_rate=0.1, ...))."
        )
    if not (model is None or isinstance(model, (nn.Module, str))):
        raise HfkdError(f"The student must be a model or its name, got {type(model).__name__}.")


def check_metric_settings(model: nn.Module, eval_dataset: Any, args: DistillationConfig) -> None:
    """Check that the settings of a user's metrics can be met.

    Raises:
        HfkdError: if they cannot.
    """
    if "inputs" in args.include_for_metrics and getattr(model, "main_input_name", None) != "pixel_values":
        raise HfkdError(
            f"include_for_metrics: inputs needs a model of transformers or timm, and {type(model).__name__} does not "
            "name its input: leave it out."
        )
    if args.batch_eval_metrics and any(isinstance(each, StreamingImageDataset) for each in data_sets(eval_dataset)):
        raise HfkdError(
            "batch_eval_metrics is not supported with a streamed evaluation set, which does not tell its last batch: "
            "set streaming or batch_eval_metrics to false."
        )


def check_given_optimizer(optimizer: Any, distiller: Distiller, args: DistillationConfig) -> None:
    """Check that an optimizer of the user's holds what is to be trained.

    Raises:
        HfkdError: if it lacks the parameters of a loss, or has none of the student's, or beside `layer_decay`.
    """
    if optimizer is None:
        return
    if args.layer_decay is not None:
        raise HfkdError(
            "layer_decay sets the learning rates of an optimizer that hfkd makes: give optimizer_cls_and_kwargs="
            "(torch.optim.SGD, {'lr': 0.1}) in place of optimizers, or leave layer_decay out."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in distiller.student.parameters()):
        raise HfkdError(
            "The optimizer given holds no parameter of the student, which may have been rebuilt for a loss: give "
            "optimizer_cls_and_kwargs=(torch.optim.SGD, {'lr': 0.1}) in place of optimizers."
        )
    for name, loss in distiller.losses.items():
        if any(parameter.requires_grad and id(parameter) not in held for parameter in loss.parameters()):
            raise HfkdError(
                f"The loss '{name}' has parameters of its own, which the optimizer given would not train: give "
                "optimizer_cls_and_kwargs=(torch.optim.SGD, {'lr': 0.1}) in place of optimizers."
            )


def asks_for_best(args: DistillationConfig) -> bool:
    """Return whether the run needs `metric_for_best_model`."""
    chooses = args.load_best_model_at_end or args.save_strategy == "best" or args.lr_scheduler_type in PLATEAU
    return chooses or args.early_stopping_patience is not None


def check_best_metric(wanted: str | None, eval_dataset: Any, names: list[str] | None) -> None:
    """Check that an evaluation will give the metric that decides which checkpoint is the best.

    Args:
        names: names that the evaluation of one data set gives; None if they are not known.

    Raises:
        HfkdError: if it will not; the message lists the names.
    """
    if names is None or wanted is None:  # Trainer refuses None
        return
    if not names:
        raise HfkdError(
            "No evaluation measures anything here: the student has no classifier, and a teacher cache knows no "
            "evaluation images. Set load_best_model_at_end: false, or probe_every and metric_for_best_model: knn."
        )
    prefixes = [f"{each}_" for each in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    given = [prefix + name for prefix in prefixes for name in (*names, *TIMES)]
    if wanted.removeprefix("eval_") not in given:
        shown = [prefix + name for prefix in prefixes for name in names]
        raise HfkdError(f"metric_for_best_model: no evaluation gives '{wanted}'.{did_you_mean(wanted, shown)}.")
