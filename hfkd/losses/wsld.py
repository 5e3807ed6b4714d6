"""WSLD: KD in which an image counts more, the worse the student is at its label compared with the teacher.

Paper: Zhou, Song, Chen, Zhou, Wang, Yuan and Zhang, Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
Tradeoff Perspective, ICLR 2021.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HfkdError
from .base import paired, reduced
from .checks import not_negative, positive
from .regions import PerImageLoss

EPS = 1e-7  # added to the teacher's cross-entropy, as released


def wsld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    reduction: str = "mean",
) -> Tensor:
    """Return alpha * T^2 * w * CE(p, q), averaged over the batch.

    p and q are the probabilities of teacher and student at T, and CE(p, q) = -sum(p log q). The weight of an image is
    w = 1 - exp(-CE_student / CE_teacher), of the cross-entropies with its label at temperature 1. No gradient passes
    through it.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        labels: (B,), int64, each in [0, C), or (B, C), shares of each class.
        temperature: T, above 0.
        alpha: factor of the loss.
        reduction: "mean", or "none" for the value of each image.

    Returns:
        0-d, or (B,) without reduction; float32 or float64.

    Raises:
        ValueError: the logits' shapes differ or are not (B, C), or labels are neither (B,) nor (B, C).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    if labels.shape not in (student_logits.shape, student_logits.shape[:1]):
        batch_size, classes = student_logits.shape
        raise HfkdError(
            f"labels of shape ({batch_size},), class indices, or ({batch_size}, {classes}), shares of each class, "
            f"expected, got {tuple(labels.shape)}"
        )
    weights = _image_weights(student_logits.detach(), teacher_logits.detach(), labels)
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    teacher_probs = F.softmax(teacher_logits / temperature, dim=1)
    cross_entropies = -(teacher_probs * student_log_probs).sum(dim=1)
    return reduced(alpha * temperature**2 * weights * cross_entropies, reduction)


def _image_weights(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the weight of each image, (B,)."""
    if labels.ndim == 2:
        labels = labels.to(student_logits.dtype)
    student = F.cross_entropy(student_logits, labels, reduction="none")
    teacher = F.cross_entropy(teacher_logits, labels, reduction="none")
    return -torch.expm1(-student / (teacher + EPS))


class WSLDLoss(PerImageLoss):
    """`wsld_loss` as a method of a recipe.

    Args:
        temperature: above 0.
        alpha: factor of the loss, as published; `weight` is another.
        weight: see `DistillationLoss`.
        regions: see `PerImageLoss`.

    Raises:
        ValueError: one of them out of range.
    """

    citation = """
        @inproceedings{zhou2021rethinking,
            title = {Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective},
            author = {Zhou, Helong and Song, Liangchen and Chen, Jiajie and Zhou, Ye and Wang, Guoli and Yuan, Junsong
                and Zhang, Qian},
            booktitle = {International Conference on Learning Representations (ICLR)},
            year = {2021},
        }
    """

    reads_labels = True

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 2.25,
        weight: float = 1.0,
        regions: list | None = None,
    ):
        super().__init__(weight, regions)
        self.temperature = positive("temperature", temperature)
        self.alpha = not_negative("alpha", alpha)

    @property
    def teacher_temperature(self) -> float | None:
        return 1.0 if self.temperature == 1 else None

    def per_image(self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        settings = self.temperature, self.alpha
        return wsld_loss(student_logits, teacher_logits, batch["labels"], *settings, reduction="none")
