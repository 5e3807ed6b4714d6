"""Checks before training that teacher, student, losses and settings fit together."""

from __future__ import annotations

import inspect

from torch import nn

from ..errors import HfkdError
from ..networks.teacher import Teacher, TeacherEnsemble
from ..recipe.arguments import DistillationConfig


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

    Raises:
        HfkdError: if they do not.
    """
    taught = sorted(name for name, loss in losses.items() if loss.needs_teacher)
    if taught and teacher is None:
        raise HfkdError(f"The losses {taught} need a teacher: set teacher_name_or_path, or remove them.")
    if not losses and args.ce_weight == 0:
        raise HfkdError("There is nothing to train on: ce_weight is 0 and there are no losses. Set one of them.")
    if teacher is not None and model is (teacher.model if isinstance(teacher, Teacher) else teacher):
        raise HfkdError("Student and teacher are the same object: the teacher is frozen, so pass a copy.")
    if not args.mixes:
        return
    for name, loss in losses.items():
        if not loss.takes_mixed_labels:
            way_out = f"set losses.{name}.dominant_label to true to take the class with the larger share, or "
            offered = "dominant_label" in inspect.signature(type(loss)).parameters
            raise HfkdError(
                f"The loss '{name}' needs one class for each image, and mixup and cutmix mix classes: "
                f"{way_out if offered else ''}leave mixup and cutmix at 0."
            )
        if loss.views == 2:
            raise HfkdError(f"The loss '{name}' takes two views of an image: leave mixup and cutmix at 0.")


def check_last_batch(losses: nn.ModuleDict, rows: int, args: DistillationConfig) -> None:
    """Check that an epoch has a batch, and that every loss can take its last one.

    With several processes the last batch is filled up.

    Raises:
        HfkdError: if all images would be dropped, or the last batch is too small for a loss.
    """
    images = args.per_device_train_batch_size
    if args.dataloader_drop_last and rows < images * args.world_size:
        raise HfkdError(
            f"{rows:,} training images do not fill a batch of {images} for each of {args.world_size} process(es): set "
            "a smaller per_device_train_batch_size, fewer processes, or dataloader_drop_last: false."
        )
    if args.world_size > 1 or args.dataloader_drop_last or rows % images == 0:
        return
    for name, loss in losses.items():
        if rows % images < loss.least_images:
            raise HfkdError(
                f"The loss '{name}' needs {loss.least_images} images in every batch, and the last of {rows:,} in "
                f"batches of {images} has {rows % images}: set dataloader_drop_last: true, or another "
                "per_device_train_batch_size."
            )
