"""RLD: the teacher's confidence goes to the label, and its ranking below the label goes to the other classes.

Paper: Sun, Chen, Lyu, Chen, Chen and Wang, Knowledge Distillation with Refined Logits, ICCV 2025.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import paired, reduced
from .checks import not_negative, positive
from .labels import check_classes
from .regions import PerImageLoss


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    target_temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """Return alpha * Ty^2 * KL_confidence + beta * T^2 * KL_ranking, averaged over the batch.

    KL_confidence compares (p_max, 1 - p_max) of the teacher with (q_y, 1 - q_y) of the student at Ty, y the label.
    KL_ranking compares the two networks at T over the classes whose teacher logit lies below the label's, each
    renormalised over these. It is 0 where there are none.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        labels: (B,), int64, each in [0, C).
        alpha: weight of KL_confidence.
        beta: weight of KL_ranking.
        temperature: T, above 0.
        target_temperature: Ty, above 0.
        reduction: "mean", or "none" for the value of each image.

    Returns:
        0-d, or (B,) without reduction; float32 or float64.

    Raises:
        ValueError: the logits' shapes differ or are not (B, C), or labels are not (B,).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    check_classes(labels, student_logits)
    student_target = _target_log_probs(student_logits / target_temperature, labels)
    teacher_target = _target_log_probs(teacher_logits / target_temperature, teacher_logits.argmax(dim=1))
    confidence = F.kl_div(student_target, teacher_target, reduction="none", log_target=True).sum(dim=1)
    below = teacher_logits < teacher_logits.gather(1, labels[:, None])
    student_below = _log_probs_among(student_logits / temperature, below)
    teacher_below = _log_probs_among(teacher_logits / temperature, below)
    ranking = F.kl_div(student_below, teacher_below, reduction="none", log_target=True).sum(dim=1)
    return reduced(alpha * target_temperature**2 * confidence + beta * temperature**2 * ranking, reduction)


def _target_log_probs(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the log-probabilities of (the given class, any other), (B, 2), of logits (B, C) and classes (B,)."""
    column = classes[:, None]
    margin = logits.gather(1, column) - logits.scatter(1, column, -torch.inf).logsumexp(dim=1, keepdim=True)
    return F.logsigmoid(torch.cat([margin, -margin], dim=1))


def _log_probs_among(logits: Tensor, kept: Tensor) -> Tensor:
    """Return the log-probabilities among the kept classes, (B, C), and 0 for the others."""
    left_out = ~kept & kept.any(dim=1, keepdim=True)  # all -inf in a row would be NaN
    return F.log_softmax(logits.masked_fill(left_out, -torch.inf), dim=1).masked_fill(~kept, 0.0)


class RLDLoss(PerImageLoss):
    """`rld_loss` as a method of a recipe, with its warm-up.

    The loss is multiplied by min(epoch / warmup_epochs, 1), epochs counted from 1.

    Args:
        alpha: weight of the confidence.
        beta: weight of the ranking.
        temperature: of the ranking, above 0.
        target_temperature: of the confidence, above 0.
        warmup_epochs: 0 for none.
        dominant_label: True: the label of a mixed image (mixup, CutMix) is the class with the largest share. False:
            mixing is refused, since the ranking below the label of a mixture is not defined.
        weight: see `DistillationLoss`.
        regions: see `PerImageLoss`.

    Raises:
        ValueError: one of them out of range.
    """

    citation = """
        @inproceedings{sun2025knowledge,
            title = {Knowledge Distillation with Refined Logits},
            author = {Sun, Wujie and Chen, Defang and Lyu, Siwei and Chen, Genlang and Chen, Chun and Wang, Can},
            booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
            year = {2025},
        }
    """

    reads_labels = True
    takes_mixed_labels = False

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        target_temperature: float = 1.0,
        warmup_epochs: float = 20.0,
        dominant_label: bool = False,
        weight: float = 1.0,
        regions: list | None = None,
    ):
        super().__init__(weight, regions)
        self.alpha = not_negative("alpha", alpha)
        self.beta = not_negative("beta", beta)
        self.temperature = positive("temperature", temperature)
        self.target_temperature = positive("target_temperature", target_temperature)
        self.warmup_epochs = not_negative("warmup_epochs", warmup_epochs)
        self.dominant_label = dominant_label

    def per_image(self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        settings = self.alpha, self.beta, self.temperature, self.target_temperature
        return rld_loss(student_logits, teacher_logits, self.classes(batch), *settings, reduction="none")
