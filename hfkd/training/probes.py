"""Evaluations of a training that measure `knn`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction

from ..networks.probes import knn_classes, top1
from ..recipe.config import DistillationConfig
from .checks import PLATEAU

KNN = "knn"


def is_due(args: DistillationConfig, state: Any) -> bool:
    """Return whether an evaluation measures `knn`: every `probe_every` epochs, before the first step, after the last.

    Args:
        state: Trainer's, whose log tells when it was last measured, also before a run was resumed.
    """
    if args.probe_every is None:
        return False
    if state.global_step == 0 or state.global_step >= state.max_steps or args.lr_scheduler_type in PLATEAU:
        return True
    probed = [entry["epoch"] for entry in state.log_history if any(key.endswith("_knn") for key in entry)]
    return state.epoch - max((epoch for epoch in probed if epoch < state.epoch), default=0.0) >= args.probe_every


def between_probes(wanted: str | None, metrics: Mapping[str, Any]) -> bool:
    """Return whether the best checkpoint is to be chosen by `knn` and an evaluation has not measured it."""
    name = f"eval_{(wanted or '').removeprefix('eval_')}"
    return name.endswith("_knn") and name not in metrics


class ProbedMetrics:
    """Figures of an evaluation and `knn`, the top-1 of a vote of each image's nearest others.

    It stands in the place of the metrics around which it is made. What Trainer's loop gathers of a batch is a pair: the
    embedding (B, D), and what these metrics read.

    Args:
        metrics: `EvaluationMetrics` or `TermMetrics`.
        uncounted: label of rows that do not count.
    """

    def __init__(self, metrics: Any, uncounted: int):
        self.metrics, self.uncounted = metrics, uncounted
        self.embeddings: list[Tensor] = []  # of the batch in hand, from `recording_embeddings`
        self._batches: list[tuple[Tensor, Tensor]] = []

    def paired(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Any]:
        """Return the embedding (B, D) of a batch, and its outputs.

        Rows that do not count may have been left out of the forward pass: theirs is 0.
        """
        embedding, counts = self.embeddings[0], labels != self.uncounted  # of the first of two views
        self.embeddings.clear()
        if len(embedding) < len(counts):
            embedding = embedding.new_zeros(len(counts), embedding.shape[1]).index_put((counts,), embedding)
        return embedding, outputs

    def preprocess(self, outputs: Any, labels: Any) -> Any:
        """Apply the `preprocess` of the metrics to what they read."""
        embedding, others = outputs
        return embedding, self.metrics.preprocess(others, labels)

    def logits(self, predictions: Any) -> Any:
        """Return the `logits` of the metrics."""
        return self.metrics.logits(_without_embeddings(predictions))

    def __call__(self, prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, float]:
        """Return all figures; see `EvaluationMetrics.__call__`."""
        outputs, labels = prediction.predictions, prediction.label_ids
        for batch, of_batch in zip(outputs, labels, strict=True) if isinstance(labels, list) else [(outputs, labels)]:
            self._batches.append((torch.as_tensor(batch[0]).cpu(), torch.as_tensor(of_batch).cpu()))
        others = _without_embeddings(outputs)
        figures = self.metrics(EvalPrediction(others, labels, prediction.inputs), compute_result)
        if compute_result is False:
            return {}
        features, classes = map(torch.cat, zip(*self._batches, strict=True))
        self._batches = []
        counts = classes != self.uncounted
        features, classes = features[counts], classes[counts]
        return {KNN: top1(knn_classes(features, features, classes, same_images=True), classes), **figures}


def _without_embeddings(predictions: Any) -> Any:
    return [others for _, others in predictions] if isinstance(predictions, list) else predictions[1]
