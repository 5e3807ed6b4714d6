"""TTM: the student, at temperature 1, matches a power of the teacher's probabilities.

Paper: Zheng and Yang, Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .base import paired, reduced
from .checks import positive
from .regions import PerImageLoss


def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, exponent: float, reduction: str = "mean") -> Tensor:
    """Return KL(p^l / sum(p^l) || q), averaged over the batch.

    p and q are the probabilities of teacher and student, l is the exponent. p^l / sum(p^l) is the teacher's softmax at
    temperature 1 / l. So TTM is KD with a temperature for the teacher alone, and without the factor T^2.

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
    transformed_log_probs = F.log_softmax(exponent * teacher_logits, dim=1)
    divergence = F.kl_div(student_log_probs, transformed_log_probs, reduction="none", log_target=True)
    return reduced(divergence.sum(dim=1), reduction)


def spread_caveat(exponent: float) -> str:
    """Return why Z-scores do not suit a target with this exponent; nothing if they do."""
    if exponent >= 1:
        return ""
    return (
        f"It asks the student for probabilities as flat as the teacher's at temperature {1 / exponent:.3g}, and the "
        "Z-scores of the student's logits always have a standard deviation of 1, so it learns to be wrong. Set "
        "logit_standardization to false."
    )


class TTMLoss(PerImageLoss):
    """`ttm_loss` as a method of a recipe.

    Args:
        exponent: of the teacher's probabilities, above 0; below 1 it softens them.
        weight: see `DistillationLoss`.
        regions: see `PerImageLoss`.

    Raises:
        ValueError: exponent or weight out of range.
    """

    citation = """
        @inproceedings{zheng2024knowledge,
            title = {Knowledge Distillation Based on Transformed Teacher Matching},
            author = {Zheng, Kaixiang and Yang, En-Hui},
            booktitle = {International Conference on Learning Representations (ICLR)},
            year = {2024},
        }
    """

    def __init__(self, exponent: float = 0.1, weight: float = 45.0, regions: list | None = None):
        super().__init__(weight, regions)
        self.exponent = positive("exponent", exponent)

    @property
    def teacher_temperature(self) -> float:
        return 1 / self.exponent

    @property
    def zscore_caveat(self) -> str:
        return spread_caveat(self.exponent)

    def per_image(self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return ttm_loss(student_logits, teacher_logits, self.exponent, reduction="none")
