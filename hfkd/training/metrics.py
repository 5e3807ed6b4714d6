"""Evaluation metrics: top-1, top-5 and agreement with the teacher, in percent, and what a user's functions compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_numpify
from transformers.utils import logging

from ..data import ImageSource
from ..errors import HfkdError

logger = logging.get_logger(__name__)

# Names of hfkd's own figures, those with a teacher, and those that Trainer adds to every evaluation.
OWN = ("loss", "top1", "top5")
WITH_TEACHER = ("agreement", "teacher_top1")
TIMES = ("runtime", "samples_per_second", "steps_per_second")


class EvaluationMetrics:
    """Figures of one evaluation: hfkd's own, and those of a user's `compute_metrics`.

    In place of the user's two functions, Trainer's loop gets this object and its `preprocess`. What it gathers of a
    batch is a tuple: ranked classes (B, K) and cross-entropy (B,), the teacher's classes (B,) where there are some, and
    at the end the logits (B, C), but only where somebody reads them: of ImageNet they would be gigabytes.

    Args:
        compute: the user's `compute_metrics`, or None.
        preprocess: the user's `preprocess_logits_for_metrics`, or None.
        keeps_logits: the tuples end in logits.
        with_losses: the user's function gets the cross-entropies (`include_for_metrics`).
    """

    def __init__(
        self, compute: Callable | None, preprocess: Callable | None, keeps_logits: bool, with_losses: bool = False
    ):
        self.compute, self._preprocess = compute, preprocess
        self.keeps_logits, self.with_losses = keeps_logits, with_losses
        self._batches: list[tuple[np.ndarray, ...]] = []  # hfkd's own outputs, and the labels

    def preprocess(self, outputs: Any, labels: Any) -> Any:
        """Apply the user's `preprocess_logits_for_metrics` to the logits of a batch."""
        if self._preprocess is None or not self.keeps_logits:
            return outputs
        if labels is None:  # the logits alone
            return self._preprocess(outputs, labels)
        return (*outputs[:-1], self._preprocess(outputs[-1], labels))

    def logits(self, predictions: Any) -> Any:
        """Return the logits, or what `preprocess` made of them, out of gathered outputs or a list of batches."""
        return [batch[-1] for batch in predictions] if isinstance(predictions, list) else predictions[-1]

    def __call__(self, prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, float]:
        """Compute all figures.

        Args:
            prediction: outputs and labels of all images, or lists of batches of them (`eval_do_concat_batches`).
            compute_result: with `batch_eval_metrics`, where `prediction` is one batch: whether it is the last one.

        Raises:
            HfkdError: if the user's function returns no mapping.
        """
        outputs, labels = prediction.predictions, prediction.label_ids
        for batch, of_batch in zip(outputs, labels, strict=True) if isinstance(labels, list) else [(outputs, labels)]:
            own = batch[:-1] if self.keeps_logits else batch
            self._batches.append(tuple(_array(value) for value in (*own, of_batch)))
        users = {} if self.compute is None else self._users(prediction, compute_result)
        if compute_result is False:
            return {}
        own, self._batches = _own_metrics(self._batches), []
        replaced = sorted(own.keys() & users.keys())
        if replaced:
            logger.warning_once(f"compute_metrics returns {', '.join(replaced)}, in place of hfkd's own, in percent.")
        return own | users

    def _users(self, prediction: EvalPrediction, compute_result: bool | None) -> dict[str, Any]:
        labels = prediction.label_ids
        batches = self._batches if compute_result is None else self._batches[-1:]
        losses = np.concatenate([batch[1] for batch in batches]) if self.with_losses else None
        arrays = (self.logits(prediction.predictions), labels, prediction.inputs, losses)
        if not isinstance(labels, list):  # rows that only fill up a stream, or whose image cannot be decoded
            arrays = tuple(_rows(value, labels != ImageSource.IGNORED) for value in arrays)
        arguments = {} if compute_result is None else {"compute_result": compute_result}
        found = self.compute(EvalPrediction(*arrays), **arguments)  # type: ignore[misc]
        if compute_result is False:
            return {}
        if not isinstance(found, Mapping):
            raise HfkdError(
                f"compute_metrics must return a dictionary, such as {{'accuracy': 0.9}}; it returned {found!r}."
            )
        return dict(found)


def _array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.cpu().numpy()  # of batch_eval_metrics


def _rows(value: Any, counts: Any) -> Any:
    """Return the rows that count of arrays or tensors, however they are nested."""
    if value is None or bool(counts.all()):
        return value
    if isinstance(value, Mapping):
        return {key: _rows(each, counts) for key, each in value.items()}
    return type(value)(_rows(each, counts) for each in value) if isinstance(value, (tuple, list)) else value[counts]


def _own_metrics(batches: list[tuple[np.ndarray, ...]]) -> dict[str, float]:
    """Return hfkd's own figures from its outputs and the labels, batch by batch."""
    from .evaluate_metric import ImageClassificationMetrics  # imports a library that the first step does not need

    arrays = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    counts = arrays[-1] != ImageSource.IGNORED
    ranked, losses, *teacher, labels = (array[counts] for array in arrays)
    metrics = ImageClassificationMetrics().compute(
        predictions=ranked, references=labels, teacher=teacher[0] if teacher else None
    )
    return metrics | {"loss": losses.mean().item()}


def own_names(with_teacher: bool) -> list[str]:
    """Return the names of hfkd's own figures."""
    return [*OWN, *(WITH_TEACHER if with_teacher else ())]


def names_of_users(metrics: EvaluationMetrics, labels: Tensor, by_batch: bool) -> list[str] | None:
    """Return the names that a user's `compute_metrics` gives, from logits of 0 for a few images.

    Args:
        labels: (B,), of the images.
        by_batch: `batch_eval_metrics` is set.

    Returns:
        None if the function fails, which so few images may make it do.
    """
    try:
        logits = torch.zeros(len(labels), int(labels.max()) + 1, device=labels.device)
        outputs = metrics.preprocess((labels[:, None], logits[:, 0], logits), labels)
        if by_batch:
            return list(metrics(EvalPrediction(outputs, labels), compute_result=True))  # type: ignore[arg-type]
        return list(metrics(EvalPrediction(nested_numpify(outputs), nested_numpify(labels))))
    except Exception:  # whatever it raises, an evaluation will tell
        return None


def measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that an evaluation has measured, by their names `eval_...`, without Trainer's times."""
    return {
        key: value
        for key, value in metrics.items()
        if key.startswith("eval_")
        and not key.endswith((*TIMES, "model_preparation_time", "skipped_images"))
        and not key.startswith("eval_mem_")
        and isinstance(value, (int, float))
    }
