"""Accuracy of ranked predictions, and the agreement with a teacher."""

from __future__ import annotations

import numpy as np

from ..errors import HfkdError


def ranked_accuracy(ranked: np.ndarray, labels: np.ndarray, teacher: np.ndarray | None) -> dict[str, float]:
    """Return `top1`, `top5` and, with a teacher's classes (N,), `agreement` and `teacher_top1`, in percent.

    Args:
        ranked: (N, K), each image's classes from the most probable on; K is 5, or the number of classes if smaller.
        labels: (N,), the true classes.

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
