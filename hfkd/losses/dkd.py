"""DKD: the KL divergence split into target class against the rest, and the rest among themselves.

Paper: Zhao, Cui, Song, Qiu and Liang, Decoupled Knowledge Distillation, CVPR 2022.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HfkdError
from .base import paired, reduced
from .checks import not_negative, positive
from .regions import PerImageLoss


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """Return T^2 * (alpha * TCKD + beta * NCKD), averaged over the batch.

    TCKD is the KL divergence between the distributions over (label, any other class). NCKD is the KL divergence between
    the distributions over the other classes.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        labels: (B,), int64, each in [0, C).
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: above 0.
        reduction: "mean", or "none" for the value of each image.

    Returns:
        0-d, or (B,) without reduction; float32 or float64.

    Raises:
        HfkdError: the logits' shapes differ or are not (B, C), or labels are not (B,).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    if labels.shape != student_logits.shape[:1]:
        raise HfkdError(
            f"labels of shape ({student_logits.shape[0]},) expected: one class index for each row of logits, "
            f"got {tuple(labels.shape)}"
        )
    student_target, student_others = _decoupled_log_probs(student_logits / temperature, labels)
    teacher_target, teacher_others = _decoupled_log_probs(teacher_logits / temperature, labels)
    tckd = F.kl_div(student_target, teacher_target, reduction="none", log_target=True).sum(dim=1)
    nckd = F.kl_div(student_others, teacher_others, reduction="none", log_target=True).sum(dim=1)
    return reduced((alpha * tckd + beta * nckd) * temperature**2, reduction)


def _decoupled_log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of (label, any other class), (B, 2), and among the other classes, (B, C).

    The label's column of the second result is 0 for student and teacher, so it adds nothing to their divergence. Both
    results are differences of logits and log-sum-exps. A large negative mask would fail for logits of 1e3, and the log
    of a probability would underflow.
    """
    label_column = labels[:, None]
    others = logits.scatter(1, label_column, -torch.inf)
    others_total = others.logsumexp(1, keepdim=True)
    margin = logits.gather(1, label_column) - others_total
    target_log_probs = F.logsigmoid(torch.cat([margin, -margin], dim=1))
    return target_log_probs, (others - others_total).scatter(1, label_column, 0.0)


class DKDLoss(PerImageLoss):
    """`dkd_loss` as a method of a recipe, with its warm-up.

    The loss is multiplied by min(epoch / warmup_epochs, 1), with epochs counted from 1.

    Args:
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: above 0.
        warmup_epochs: 0 for no warm-up.
        dominant_label: True: the label of a mixed image (mixup, CutMix) is the class with the largest share. False:
            mixing is refused, since the target class of a mixture is not defined.
        weight: see `DistillationLoss`.
        regions: see `PerImageLoss`.

    Raises:
        HfkdError: a parameter is out of range.
    """

    citation = """
        @inproceedings{zhao2022decoupled,
            title = {Decoupled Knowledge Distillation},
            author = {Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun},
            booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            year = {2022},
        }
    """

    reads_labels = True
    takes_mixed_labels = False

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup_epochs: float = 20.0,
        dominant_label: bool = False,
        weight: float = 1.0,
        regions: list | None = None,
    ):
        super().__init__(weight, regions)
        self.alpha = not_negative("alpha", alpha)
        self.beta = not_negative("beta", beta)
        self.temperature = positive("temperature", temperature)
        self.warmup_epochs = not_negative("warmup_epochs", warmup_epochs)
        self.dominant_label = dominant_label

    @property
    def teacher_temperature(self) -> float:
        return self.temperature

    def per_image(self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        settings = self.alpha, self.beta, self.temperature
        return dkd_loss(student_logits, teacher_logits, self.classes(batch), *settings, reduction="none")
