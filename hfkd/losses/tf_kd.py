"""Tf-KD: in place of a teacher's output, a distribution made by hand with most of the probability on the label.

Paper: Yuan, Tay, Li, Wang and Feng, Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss, Outputs
from .checks import not_negative, positive
from .labels import check_classes
from .standardize import at_least_float32

CORRECT = 0.99  # probability of the label; the other classes share the rest


def tf_kd_loss(student_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return KL(u || q), averaged over the batch and over the classes.

    q is the softmax of the student's logits at temperature 1. u is the softmax of d / T, where d is 0.99 on the label
    and uniform on the other classes: as released, T divides these probabilities, so that u is nearly uniform.

    Args:
        student_logits: (B, C).
        labels: (B,), int64, each in [0, C).
        temperature: T, above 0.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: labels are not (B,).
    """
    student_logits = at_least_float32(student_logits)
    check_classes(labels, student_logits)
    rest = (1 - CORRECT) / (student_logits.shape[1] - 1)
    made = torch.full_like(student_logits, rest).scatter(1, labels[:, None], CORRECT)
    target = F.log_softmax(made / temperature, dim=1)
    return F.kl_div(F.log_softmax(student_logits, dim=1), target, reduction="none", log_target=True).mean()


class TfKDLoss(DistillationLoss):
    """`tf_kd_loss` as a method of a recipe. It needs no teacher.

    The release takes (1 - alpha) of the cross-entropy beside it: set `ce_weight`. The loss reads raw logits also in a
    run with `logit_standardization`.

    Args:
        alpha: factor of the loss, as published; `weight` is another.
        temperature: T, above 0.
        multiplier: a further factor, as released, where alpha is the share of the loss.
        dominant_label: True: the label of a mixed image (mixup, CutMix) is the class with the largest share. False:
            mixing is refused.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: a parameter is out of range.
    """

    citation = """
        @inproceedings{yuan2020revisiting,
            title = {Revisiting Knowledge Distillation via Label Smoothing Regularization},
            author = {Yuan, Li and Tay, Francis EH and Li, Guilin and Wang, Tao and Feng, Jiashi},
            booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            year = {2020},
        }
    """

    reads_labels = True
    needs_teacher = False
    reads_raw_logits = True
    takes_mixed_labels = False

    def __init__(
        self,
        alpha: float = 0.9,
        temperature: float = 20.0,
        multiplier: float = 1.0,
        dominant_label: bool = False,
        weight: float = 1.0,
    ):
        super().__init__(weight)
        self.alpha = not_negative("alpha", alpha)
        self.temperature = positive("temperature", temperature)
        self.multiplier = not_negative("multiplier", multiplier)
        self.dominant_label = dominant_label

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Mapping[str, Tensor]) -> Tensor:
        loss = tf_kd_loss(student.logits, self.classes(batch), self.temperature)
        return self.alpha * self.multiplier * loss
