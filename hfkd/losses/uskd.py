"""USKD: the student makes its own soft labels, of its output for the label and of the ranks of the other classes.

Paper: Yang, Zeng, Li, Zhang, Yuan and Li, From Knowledge Distillation to Self-Knowledge Distillation: A Unified
Approach with Normalized Loss and Customized Soft Labels, ICCV 2023.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .checks import not_negative
from .feature_maps import read_map
from .labels import log_probs_of_others
from .nkd import NKDLoss
from .standardize import at_least_float32

EPS = 1e-6  # added to the denominators of the ranks, as released
SMOOTHED = 0.9  # share of the label in the target of the weak logits; the rest is uniform


def uskd_loss(student_logits: Tensor, weak_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the terms of the released code, each a mean over the batch.

    q and w are the probabilities of the student and of its weak logits, y the label.

        target: -s * log(q_y), where s = q_y^2 + 1 - (the batch's mean of q_y^2), without gradient
        others: cross-entropy of Zipf's law (1 / rank) with the student's softmax over the classes c != y
        weak: cross-entropy of the weak logits with the label, which is smoothed: 0.9 of it, the rest uniform

    All classes, also y, rank by w_c / (1 - w_y + 1e-6) + log(q_c) / (1 - log(q_y) + 1e-6): as released, the student's
    part is made of log-probabilities. Of a mixed image (mixup, CutMix) the two classes with the largest shares are
    labels, and a share takes the place of 1 in s.

    The mean of q_y^2 is taken over the images of one process.

    Args:
        student_logits: (B, C), C at least 3.
        weak_logits: (B, C), of an earlier stage.
        labels: (B,), int64, each in [0, C), or (B, C), shares of each class.

    Returns:
        0-d each: `target`, `others`, `weak`.

    Raises:
        HfkdError: the logits' shapes differ or have fewer than three classes, or labels are neither (B,) nor (B, C).
    """
    student_logits, weak_logits = at_least_float32(student_logits), at_least_float32(weak_logits)
    shape = student_logits.shape
    if shape != weak_logits.shape or len(shape) != 2 or shape[1] < 3 or labels.shape not in (shape, shape[:1]):
        raise HfkdError(
            "two logits (B, C) of three classes or more and labels (B,) or (B, C) expected, got "
            f"{tuple(shape)}, {tuple(weak_logits.shape)} and {tuple(labels.shape)}"
        )
    shares, columns = _labels_of(labels, student_logits)
    log_probs = F.log_softmax(student_logits, dim=1)
    own = log_probs.gather(1, columns)
    square = own.detach().exp().square()
    soft = torch.where(shares == 0, 0.0, square + shares - square.mean(dim=0))
    zipf = _zipf(log_probs.detach(), weak_logits.detach(), columns)
    smoothed = SMOOTHED * torch.zeros_like(log_probs).scatter(1, columns, shares) + (1 - SMOOTHED) / shape[1]
    return {
        "target": -(soft * own).sum(dim=1).mean(),
        "others": -(zipf * log_probs_of_others(student_logits, columns)).sum(dim=1).mean(),
        "weak": -(smoothed * F.log_softmax(weak_logits, dim=1)).sum(dim=1).mean(),
    }


def _labels_of(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return shares and classes of the labels: (B, 1) each, or of mixed images (B, 2) each."""
    if labels.ndim == 1:
        return torch.ones_like(logits[:, :1]), labels[:, None]
    shares, columns = labels.topk(2, dim=1)
    return shares.to(logits.dtype), columns


def _zipf(log_probs: Tensor, weak_logits: Tensor, columns: Tensor) -> Tensor:
    """Return 1 / rank of each class but the labels, whose entries are 0, as a distribution (B, C)."""
    weak = F.softmax(weak_logits, dim=1)
    scores = weak / (1 - weak.gather(1, columns).sum(dim=1, keepdim=True) + EPS)
    scores = scores + log_probs / (1 - log_probs.gather(1, columns).sum(dim=1, keepdim=True) + EPS)
    ranks = scores.argsort(dim=1, descending=True).argsort(dim=1) + 1
    law = (1 / ranks.to(log_probs.dtype)).scatter(1, columns, 0.0)
    return law / law.sum(dim=1, keepdim=True)


class USKDLoss(DistillationLoss):
    """`uskd_loss` as a method of a recipe, with a learnt linear layer over an earlier map. It needs no teacher.

    It reads raw logits also in a run with `logit_standardization`.

    Args:
        alpha: factor of the term `target`.
        beta: factor of the term `others`.
        mu: factor of the term `weak`.
        student_layer: stage index (negative: from the end) or module path of the map from whose average the linear
            layer makes the weak logits.
        weight: of all three terms; see `DistillationLoss`.

    Raises:
        HfkdError: a parameter is out of range, or the layer is of the wrong type.
    """

    citation = NKDLoss.citation
    needs_teacher = False
    reads_labels = True
    reads_raw_logits = True
    student_layers: Sequence[int | str]

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        student_layer: int | str = -2,
        weight: float = 1.0,
    ):
        super().__init__(weight)
        self.factors = {
            "target": not_negative("alpha", alpha),
            "others": not_negative("beta", beta),
            "weak": not_negative("mu", mu),
        }
        if type(student_layer) not in (int, str):
            raise HfkdError(f"student_layer is {student_layer!r}: give a stage index or a module path, such as -2")
        self.student_layers = [student_layer]

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        self.weak_classifier = nn.Linear(self._pooled(student).shape[1], student.logits.shape[1])

    def _pooled(self, student: Outputs) -> Tensor:
        return read_map(student, "student", self.student_layers[0]).mean(dim=(2, 3))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self.autocast(student.logits.device):
            weak_logits = self.weak_classifier(self._pooled(student))
        terms = uskd_loss(student.logits, weak_logits, batch["labels"])
        return {name: self.factors[name] * term for name, term in terms.items()}
