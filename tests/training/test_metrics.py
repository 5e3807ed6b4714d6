import numpy as np
import pytest

from hfkd.training.accuracy import ranked_accuracy
from hfkd.training.evaluate_metric import ImageClassificationMetrics


def test_ranked_accuracy_in_percent():
    ranked = np.array([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [5, 6, 7, 8, 9], [2, 1, 0, 3, 4]])
    labels = np.array([0, 0, 0, 4])
    metrics = ImageClassificationMetrics().compute(
        predictions=ranked, references=labels, teacher=np.array([0, 0, 5, 4])
    )
    assert metrics == {"top1": 25.0, "top5": 75.0, "agreement": 50.0, "teacher_top1": 75.0}
    assert "agreement" not in ImageClassificationMetrics().compute(predictions=ranked, references=labels, teacher=None)


def test_fewer_than_five_classes():
    assert ranked_accuracy(np.array([[1, 0]]), np.array([0]), None) == {"top1": 0.0, "top5": 100.0}


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="empty"):
        ranked_accuracy(np.empty((0, 5)), np.empty(0), None)
