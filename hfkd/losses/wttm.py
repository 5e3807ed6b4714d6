"""WTTM: TTM in which an image counts more, the less sure the teacher is of it.

Paper: Zheng and Yang, Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .base import paired, reduced
from .checks import positive
from .regions import PerImageLoss
from .ttm import TTMLoss, spread_caveat


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, exponent: float, reduction: str = "mean") -> Tensor:
    """Return U * KL(p^l / U || q), averaged over the batch, with U = sum(p^l) of each image.

    p and q are the probabilities of teacher and student, l is the exponent. For l below 1, U lies between 1, where the
    teacher is sure of one class, and C^(1 - l), where it takes all for equally likely.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        exponent: l, above 0.
        reduction: "mean", or "none" for the value of each image.

    Returns:
        0-d, or (B,) without reduction; float32 or float64.

    Raises:
        ValueError: the logits' shapes differ or are not (B, C).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    student_log_probs = F.log_softmax(student_logits, dim=1)
    powers = exponent * F.log_softmax(teacher_logits, dim=1)
    log_total = powers.logsumexp(dim=1, keepdim=True)
    divergence = F.kl_div(student_log_probs, powers - log_total, reduction="none", log_target=True).sum(dim=1)
    return reduced(log_total.squeeze(1).exp() * divergence, reduction)


class WTTMLoss(PerImageLoss):
    """`wttm_loss` as a method of a recipe.

    Args:
        exponent: of the teacher's probabilities, above 0; below 1 it softens them.
        weight: see `DistillationLoss`.
        regions: see `PerImageLoss`.

    Raises:
        ValueError: exponent or weight out of range.
    """

    citation = TTMLoss.citation

    def __init__(self, exponent: float = 0.2, weight: float = 4.0, regions: list | None = None):
        super().__init__(weight, regions)
        self.exponent = positive("exponent", exponent)

    @property
    def zscore_caveat(self) -> str:
        return spread_caveat(self.exponent)

    def per_image(self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return wttm_loss(student_logits, teacher_logits, self.exponent, reduction="none")
