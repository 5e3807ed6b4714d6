"""Cross-entropy with the labels: class weights and label smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import ImageSource, IndexedImageSource
from ..data.subsets import image_source, training_labels
from ..errors import HfkdError
from ..recipe.checks import BALANCED, check_label_smoothing
from ..recipe.config import DistillationConfig


def cross_entropy(args: DistillationConfig, train_dataset: Any) -> nn.CrossEntropyLoss:
    """Return the cross-entropy that the settings describe.

    Raises:
        HfkdError: if the class weights do not fit the training images.
    """
    weights = None if args.class_weights is None else class_weights(args.class_weights, train_dataset)
    return nn.CrossEntropyLoss(weight=weights, label_smoothing=args.label_smoothing_factor)


def check_label_loss(own: Any, losses: Any, args: DistillationConfig) -> None:
    """Check that the settings of the cross-entropy are not in vain.

    Args:
        own: Trainer's `compute_loss_func`, which takes the place of the cross-entropy; None without one.
        losses: the losses beside it.

    Raises:
        HfkdError: for class weights, label smoothing or a `ce_weight` of 0 beside a `compute_loss_func`, or label
            smoothing beside losses.
    """
    if own is not None and args.ce_weight == 0:
        raise HfkdError("ce_weight, the weight of compute_loss_func, is 0: leave one of them out.")
    for key in ("class_weights", "label_smoothing_factor"):
        if own is not None and getattr(args, key):
            raise HfkdError(
                f"{key} is for the cross-entropy, and compute_loss_func takes its place: leave one of them out."
            )
    check_label_smoothing(args.label_smoothing_factor, losses)


def check_weight_count(given: Sequence[str] | None, classes: int) -> None:
    """Raise HfkdError if class weights are listed and their number is not the number of classes."""
    if given is not None and list(given) != [BALANCED] and len(given) != classes:
        raise HfkdError(
            f"class_weights has {len(given)} weights, and the data set {classes} classes: give one for each, in the "
            f"order of the labels, or {BALANCED}."
        )


def class_weights(given: Sequence[str], train_dataset: Any) -> Tensor:
    """Return the weights (C,) of the classes.

    Args:
        given: a weight for each class, or "balanced": N / (C * images of the class), as scikit-learn's.

    Raises:
        HfkdError: if their number is not that of the classes, or the labels are not known.
    """
    source = image_source(train_dataset)
    if list(given) != [BALANCED]:
        if source is not None:
            check_weight_count(given, source.num_classes)
        return torch.tensor([float(weight) for weight in given])
    if not isinstance(source, IndexedImageSource):
        raise HfkdError(
            f"class_weights: {BALANCED} counts the labels of the training images, which a "
            f"{type(source or train_dataset).__name__} does not know beforehand: give a weight for each class."
        )
    labels = training_labels(train_dataset)
    counts = labels[labels != ImageSource.IGNORED].bincount(minlength=source.num_classes)
    return counts.sum() / (source.num_classes * counts.clamp(min=1))  # a class without images has no weight to speak of
