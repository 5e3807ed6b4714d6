"""The accuracy of hfkd as a metric of the library evaluate, which is imported at the first evaluation."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from .accuracy import ranked_accuracy


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
