"""Evaluation metrics: top-1, top-5 and agreement with the teacher, in percent, without the network."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from ..data import ImageSource
from ..errors import HfkdError


class ImageClassificationMetrics(evaluate.Metric):
    """Accuracy of ranked predictions.

    `compute(predictions=ranked, references=labels, teacher=classes)`: `ranked` (N, K) holds each image's classes from
    the most probable on, `labels` (N,) the true classes, and `teacher` (N,) the teacher's most probable classes or
    None. K is 5, or the number of classes if there are fewer.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy and agreement with a teacher, in percent.",
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, teacher=None):
        return ranked_accuracy(np.asarray(predictions), np.asarray(references), teacher)


def ranked_accuracy(ranked: np.ndarray, labels: np.ndarray, teacher: np.ndarray | None) -> dict[str, float]:
    """Return `top1`, `top5` and, with a teacher's classes (N,), `agreement` and `teacher_top1`, in percent.

    Raises:
        HfkdError: if there is no image.
    """
    if len(labels) == 0:
        raise HfkdError("There is no image to evaluate: the evaluation set is empty.")
    hits = ranked == labels[:, None]
    metrics = {"top1": 100 * hits[:, 0].mean().item(), "top5": 100 * hits.any(axis=1).mean().item()}
    if teacher is not None:
        metrics["agreement"] = 100 * (ranked[:, 0] == teacher).mean().item()
        metrics["teacher_top1"] = 100 * (teacher == labels).mean().item()
    return metrics


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute the metrics from the outputs of `prediction_step`.

    The outputs are logits (N, C), or ranked classes (N, K) and losses (N,), with the teacher's classes (N,) if there is
    a teacher.
    """
    given, labels = prediction.predictions, prediction.label_ids
    counts = labels != ImageSource.IGNORED
    if not isinstance(given, tuple):
        given, labels = given[counts], labels[counts]
        metrics = ImageClassificationMetrics().compute(predictions=np.argsort(-given, axis=1)[:, :5], references=labels)
        loss = F.cross_entropy(torch.from_numpy(given), torch.from_numpy(labels))
        return metrics | {"loss": loss.item()}
    ranked, losses, *teacher = (values[counts] for values in given)
    metrics = ImageClassificationMetrics().compute(
        predictions=ranked, references=labels[counts], teacher=teacher[0] if teacher else None
    )
    return metrics | {"loss": losses.mean().item()}
