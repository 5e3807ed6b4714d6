"""One pass over a data set: an evaluation with labels or without, a probe of features, a prediction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..networks.embeddings import recording_embeddings
from ..networks.headless import is_headless
from ..recipe.config import DistillationConfig
from .distiller import Distiller
from .metrics import EvaluationMetrics
from .probes import ProbedMetrics, is_due
from .unlabelled import TermMetrics, has_labels, measures_terms, uncounted_label


class Measuring:
    """Parts of one pass, which every step of it reads.

    Args:
        dataset: what is passed over.
        student: the network that is measured.
        args: of the run.
        state: Trainer's.
        is_prediction: the pass is a prediction, whose logits a caller gets, and no evaluation.
        with_labels: makes the metrics of an evaluation with labels, given whether the logits are kept.
        users_metrics: whether a user's function computes metrics, which reads the logits.

    Attributes:
        asks_teacher: whether the teacher's choices are compared.
        reads_labels: whether the images have labels that the outputs of the student are compared with.
        keeps_logits: whether the outputs of a step hold the logits.
        terms: figures of an evaluation without labels, or of a student without a classifier; None with labels.
        probe: figures that include `knn`; None where it is not due.
        metrics: what computes the figures of the pass; `probe`, `terms`, or an `EvaluationMetrics`.
    """

    def __init__(
        self,
        dataset: Any,
        student: nn.Module,
        args: DistillationConfig,
        state: Any,
        is_prediction: bool,
        with_labels: Callable[[bool], EvaluationMetrics],
        users_metrics: bool,
    ):
        uncounted = uncounted_label(dataset)
        self.asks_teacher = not is_prediction
        self.reads_labels = has_labels(dataset) and not (is_prediction and is_headless(student))
        by_terms = not is_prediction and measures_terms(dataset, student)
        self.terms = TermMetrics(uncounted) if by_terms else None
        self.keeps_logits = (is_prediction or users_metrics) and not by_terms
        self.metrics: Any = self.terms or with_labels(self.keeps_logits)
        self.probe: ProbedMetrics | None = None
        if not is_prediction and self.reads_labels and is_due(args, state):
            self.metrics = self.probe = ProbedMetrics(self.metrics, uncounted)

    @contextlib.contextmanager
    def prepared(self, distiller: Distiller, student: nn.Module) -> Iterator[None]:
        """Prepare losses and student for the pass."""
        with contextlib.ExitStack() as stack:
            if self.terms is not None:
                stack.enter_context(distiller.evaluating(student))
            if self.probe is not None:
                self.probe.embeddings = stack.enter_context(recording_embeddings(student))
            yield
