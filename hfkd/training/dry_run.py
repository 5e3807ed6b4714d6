"""Dry run: two images through both networks before training, to match classes and set the losses up."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..data.subsets import image_source, training_labels
from ..errors import HfkdError
from ..networks.class_matching import class_names_of
from ..networks.teacher import Teacher, TeacherEnsemble
from ..teacher_cache.teacher import CachedTeacher
from .checks import reads_classes
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
        The student's number of classes, 0 without a classifier.

    Raises:
        HfkdError: if the classes of data, student and teacher do not agree, or a loss cannot work with the outputs.
    """
    source = image_source(train_dataset if train_dataset is not None else eval_dataset)
    modes = {module: module.training for module in distiller.student.modules()}
    distiller.student.eval()
    with torch.no_grad(), autocast:
        student = distiller.predict(batch)
        distiller.check_classifier(student)
    for module, was_training in modes.items():
        module.training = was_training
    if student.logits.isnan().any():
        raise HfkdError("The student's logits for the first images are NaN: give other weights, or check the images.")
    classes = student.logits.shape[1]
    needed = int(batch["labels"].max()) + 1 if source is None else source.num_classes
    if 0 < classes < needed:  # without a classifier, it learns no labels
        raise HfkdError(
            f"The student has {classes} classes and the data set {needed}: build the student with num_classes={needed}."
        )
    outputs = None
    if teacher is not None:
        # The labels are in the data set's order, so its names decide.
        names = class_names_of(distiller.student) if source is None else source.class_names
        names = names if len(names) == classes else list(map(str, range(classes)))
        compared = any(loss.needs_teacher and reads_classes(loss) for loss in distiller.losses.values())
        teacher.align_classes(names, batch, required=compared)
        outputs = teacher(batch)
    for name, loss in distiller.losses.items():
        if loss.views == 2 and student.strong is None:
            raise HfkdError(
                f"The loss '{name}' needs two views of every image: the batches must hold 'pixel_values_strong' "
                f"beside 'pixel_values', but hold {sorted(batch)}."
            )
        if loss.draws_noise and "index" not in batch:
            raise HfkdError(
                f"The loss '{name}' draws noise for each image, so the batches must hold 'index', the images' rows in "
                f"the data set, as those of hfkd.data do. They hold {sorted(batch)}."
            )
        try:
            if loss.needs_index and train_dataset is not None:
                loss.setup_rows(training_labels(train_dataset))
            loss.setup(student, outputs)
        except ValueError as error:
            raise HfkdError(f"losses.{name}: {error}") from error
    return classes


def check_single_image(
    distiller: Distiller,
    teacher: Teacher | TeacherEnsemble | CachedTeacher | None,
    batch: dict[str, Tensor],
    autocast: contextlib.AbstractContextManager,
) -> None:
    """Check that student and losses can be trained on a batch of one image, which BatchNorm may refuse.

    A copy is run, in train mode: weights, statistics, memories of losses and random numbers stay as they are.

    Args:
        batch: images of the dry run, on the device.

    Raises:
        HfkdError: if they cannot.
    """
    image = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    device = image["labels"].device
    image |= {"progress": torch.zeros((), device=device), "step": torch.zeros((), dtype=torch.long, device=device)}
    outputs = teacher(image) if teacher is not None and distiller.needs_teacher else None
    with _same_random_state(device), torch.no_grad(), autocast, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gradient checkpointing warns that there is no gradient
        try:
            copy.deepcopy(distiller).train()(image, outputs)
        except (ValueError, RuntimeError, IndexError) as error:
            raise HfkdError(
                "A batch of one image comes up in training, and the student or a loss cannot train on one "
                f"({error}). Set dataloader_drop_last: true, which leaves out the last batch, or another "
                "per_device_train_batch_size."
            ) from error


@contextlib.contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Leave the state of all random generators as it is."""
    states = random.getstate(), np.random.get_state()
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with torch.random.fork_rng(devices, device_type=kind):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
