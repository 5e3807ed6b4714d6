"""Dry run: two images through both networks before training, to match classes and set the losses up."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..data.subsets import image_source, training_labels
from ..errors import HfkdError
from ..networks.class_matching import class_names_of
from ..networks.teacher import Teacher, TeacherEnsemble
from ..teacher_cache.teacher import CachedTeacher
from .distiller import Distiller


def dry_run(
    distiller: Distiller,
    teacher: Teacher | TeacherEnsemble | CachedTeacher | None,
    batch: dict[str, Tensor],
    train_dataset,
    eval_dataset,
    autocast: contextlib.AbstractContextManager,
) -> int:
    """Run two images through student and teacher, match their classes, and set the losses up on the shapes found.

    Args:
        batch: the images, on the device.
        autocast: context of the student's forward.

    Returns:
        The student's number of classes.

    Raises:
        HfkdError: if the classes of data, student and teacher do not agree, or a loss cannot work with the outputs.
    """
    source = image_source(train_dataset if train_dataset is not None else eval_dataset)
    was_training = distiller.student.training
    distiller.student.eval()
    with torch.no_grad(), autocast:
        student = distiller.predict(batch)
    distiller.student.train(was_training)
    if student.logits.isnan().any():
        raise HfkdError("The student's logits for the first images are NaN: give other weights, or check the images.")
    classes = student.logits.shape[1]
    needed = int(batch["labels"].max()) + 1 if source is None else source.num_classes
    if classes < needed:
        raise HfkdError(
            f"The student has {classes} classes and the data set {needed}: build the student with num_classes={needed}."
        )
    if teacher is None:
        return classes
    # The labels are in the data set's order, so its names decide.
    names = class_names_of(distiller.student) if source is None else source.class_names
    teacher.align_classes(names if len(names) == classes else list(map(str, range(classes))), batch)
    outputs = teacher(batch)
    for name, loss in distiller.losses.items():
        if loss.views == 2 and student.strong is None:
            raise HfkdError(
                f"The loss '{name}' needs two views of every image: the batches must hold 'pixel_values_strong' "
                f"beside 'pixel_values', but hold {sorted(batch)}."
            )
        try:
            if loss.needs_index and train_dataset is not None:
                loss.setup_rows(training_labels(train_dataset))
            loss.setup(student, outputs)
        except ValueError as error:
            raise HfkdError(f"losses.{name}: {error}") from error
    return classes
