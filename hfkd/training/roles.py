"""Roles of a run: student, teacher and losses, made of what a caller gives and checked against one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import set_seed
from transformers.utils import logging

from ..losses import build_losses
from ..losses.base import trains_classifier
from ..networks.headless import is_headless
from ..networks.origins import student_weights, teacher_weights
from ..networks.teacher import Teacher, TeacherEnsemble
from ..networks.teacher_loading import as_teacher
from ..recipe.checks import check_probe, check_quantized_losses, check_without_labels
from ..recipe.config import DistillationConfig
from ..teacher_cache.teacher import CachedTeacher
from .checks import check_mixed, check_roles
from .loaders import first_set
from .student import fit_student, load_named_student, own_processor
from .unlabelled import check_can_measure_terms, has_labels, measures_terms, settle_best_metric

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Roles:
    """Parts of a run that fit one another.

    Attributes:
        student: the network that Trainer gets, with the data's classes; SimKD's is rebuilt.
        teacher: None for a training from the labels alone.
        losses: by name, each a `DistillationLoss`.
        weights: for "student" and "teacher", where the weights of one that was given by name come from.
        processor: image processor of a student that was given by name.
        by_terms: whether evaluations measure loss terms, for lack of labels or of a classifier.
    """

    student: nn.Module
    teacher: Teacher | TeacherEnsemble | CachedTeacher | None
    losses: nn.ModuleDict
    weights: dict[str, str]
    processor: Any
    by_terms: bool


def cast_roles(
    model: nn.Module | str, teacher: Any, losses: Any, args: DistillationConfig, train_dataset: Any, eval_dataset: Any
) -> Roles:
    """Return the roles of what `DistillationTrainer` is given.

    Raises:
        HfkdError: if student, teacher, losses and data do not fit one another.
    """
    weights = {"student": student_weights(model)} if isinstance(model, str) else {}
    weights |= {"teacher": teacher_weights(teacher)} if isinstance(teacher, str) else {}
    built = build_losses(losses, args.logit_standardization)
    for name, loss in built.items():
        if args.logit_standardization and loss.zscore_caveat:
            logger.warning_once(f"The loss '{name}' does not suit Z-scores. {loss.zscore_caveat}")
    if not has_labels(train_dataset):
        check_without_labels(built, args, "the training images")
    if not isinstance(teacher, CachedTeacher):
        teacher = as_teacher(teacher, args.logit_standardization)
    evaluated, processor = first_set(eval_dataset), None
    if isinstance(model, str):
        set_seed(args.seed)  # as for a recipe
        dataset = evaluated if train_dataset is None else train_dataset
        model = load_named_student(model, dataset, trains_classifier(built.values(), args.ce_weight))
        processor = own_processor(model)
    check_settings(model, teacher, built, args, train_dataset)
    if evaluated is not None:
        check_probe(args, has_labels(evaluated))
    by_terms = evaluated is not None and measures_terms(evaluated, model)
    if by_terms:
        check_can_measure_terms(teacher, model)
        settle_best_metric(args)
    student = fit_student(model, teacher, built, args, train_dataset, evaluated)
    return Roles(student, teacher, built, weights, processor, by_terms)


def check_settings(
    model: nn.Module, teacher: Any, losses: nn.ModuleDict, args: DistillationConfig, train_dataset: Any
) -> None:
    """Check that settings, which each trial of a search has anew, suit student, teacher, losses and training images.

    Raises:
        HfkdError: if they do not.
    """
    if not has_labels(train_dataset):
        check_without_labels(losses, args, "the training images")
    check_quantized_losses(losses, args, not is_headless(model))
    check_roles(model, teacher, losses, args)
    check_mixed(train_dataset, teacher, args)
