"""Images without labels: what may be trained on them, and what an evaluation measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from ..data import ImageSource
from ..data.subsets import image_source
from ..errors import HfkdError
from ..networks.headless import is_headless
from ..recipe.config import DistillationConfig
from ..teacher_cache.teacher import CachedTeacher

AGREEMENT = "agreement"
AFTER_WARMUPS = 1e6  # epochs; an evaluation counts every term in full, so that the epochs can be compared


def has_labels(dataset: Any) -> bool:
    """Return False for a data set of hfkd in which no image has a label."""
    source = image_source(dataset)
    return source is None or source.has_labels


def measures_terms(dataset: Any, student: nn.Module) -> bool:
    """Return True if an evaluation measures loss terms, since there are no labels or the student has no classes."""
    return not has_labels(dataset) or is_headless(student)


def check_can_measure_terms(teacher: Any, student: nn.Module) -> None:
    """Check that the teacher can be asked about evaluation images, if a student with classes depends on it.

    Raises:
        HfkdError: for a teacher cache, which holds the teacher's outputs for the training images only.
    """
    if isinstance(teacher, CachedTeacher) and not is_headless(student):
        raise HfkdError(
            "The evaluation images have no labels, so that the losses are measured on them, and a teacher cache holds "
            "the logits of training images only: give evaluation images with labels, or the teacher itself."
        )


def settle_best_metric(args: DistillationConfig) -> None:
    """Let the lowest loss decide which checkpoint is the best, unless the recipe names a metric."""
    given = args.written is not None and "metric_for_best_model" in args.written
    if args.metric_for_best_model == "top1" and not given:
        args.metric_for_best_model, args.greater_is_better = "loss", False


class TermMetrics:
    """Figures of an evaluation without labels: the weighted loss terms, their sum and the agreement with the teacher.

    It stands where `EvaluationMetrics` stands in an evaluation with labels. What Trainer's loop gathers of a batch is
    (B, T), the T figures for each image: of a term, that of its batch. In several processes it includes the images that
    fill up the last batch.

    Attributes:
        names: of the T figures, known after the first batch.
    """

    def __init__(self, uncounted: int):
        self.uncounted = uncounted  # label of rows that do not count
        self.names: list[str] = []
        self._batches: list[np.ndarray] = []

    def preprocess(self, outputs: Any, labels: Any) -> Any:
        """Return the outputs as they are."""
        return outputs

    def rows(self, terms: dict[str, Tensor], agreeing: Tensor | None, labels: Tensor) -> Tensor:
        """Return the figures of the images (B, T) of a batch.

        Args:
            agreeing: for the images that count, or for all, True where student and teacher choose the same class; None
                if they have no common classes.
            labels: (B,), which tell the images that do not count.
        """
        self.names = [*terms, *([] if agreeing is None else [AGREEMENT])]
        columns = [term.float().expand(len(labels)) for term in terms.values()]
        if agreeing is not None:
            counts = labels != self.uncounted if len(agreeing) < len(labels) else torch.ones_like(labels, dtype=bool)
            columns.append(torch.zeros(len(labels), device=labels.device).masked_scatter(counts, 100.0 * agreeing))
        return torch.stack(columns, dim=1) if columns else torch.zeros(len(labels), 0, device=labels.device)

    def loss(self, figures: Tensor) -> Tensor:
        """Return the sum of the terms, 0-d, of the figures (B, T) of a batch: all but the agreement."""
        terms = [column for column, name in enumerate(self.names) if name != AGREEMENT]
        return figures[:, terms].sum(dim=1).mean()

    def __call__(self, prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, float]:
        """Return the mean figures over all images; see `EvaluationMetrics.__call__`."""
        figures, labels = prediction.predictions, prediction.label_ids
        for batch, of_batch in zip(figures, labels, strict=True) if isinstance(labels, list) else [(figures, labels)]:
            self._batches.append(_array(batch)[_array(of_batch) != self.uncounted])
        if compute_result is False:
            return {}
        means = np.concatenate(self._batches).mean(axis=0, dtype=np.float64)
        self._batches = []
        return total_of(dict(zip(self.names, means.tolist(), strict=True)))


def total_of(figures: dict[str, float]) -> dict[str, float]:
    """Return the figures, with `loss`, the sum of the terms, in front."""
    terms = [value for name, value in figures.items() if name != AGREEMENT]
    return ({"loss": sum(terms)} if terms else {}) | figures


def evaluated_batch(inputs: dict[str, Tensor], losses: Sequence[Any], uncounted: int) -> dict[str, Tensor]:
    """Return the images of an evaluation batch that count, as the losses read them.

    The second view of an image is the first one again.
    """
    counts = inputs["labels"] != uncounted
    batch = {name: value[counts] for name, value in inputs.items()} if counts.any() else dict(inputs)
    if any(loss.views == 2 for loss in losses):
        batch["pixel_values_strong"] = batch["pixel_values"]
    device = batch["labels"].device
    return batch | {
        "progress": torch.full((), AFTER_WARMUPS, device=device),
        "step": torch.zeros((), dtype=torch.long, device=device),
    }


def uncounted_label(dataset: Any) -> int:
    """Return the label of rows that do not count in an evaluation."""
    source = image_source(dataset)
    return ImageSource.UNCOUNTED if source is None else source.uncounted


def _array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.cpu().numpy()
