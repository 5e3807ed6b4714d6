"""NKD: cross-entropy with the teacher on the label, and on the other classes after a softmax of their own.

Paper: Yang, Zeng, Li, Zhang, Yuan and Li, From Knowledge Distillation to Self-Knowledge Distillation: A Unified
Approach with Normalized Loss and Customized Soft Labels, ICCV 2023.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .base import paired, reduced
from .checks import not_negative, positive
from .labels import check_classes, log_probs_of_others
from .regions import PerImageLoss


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    gamma: float,
    temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """Return -p_y * log(q_y) - gamma * T^2 * sum of p'_c * log(q'_c) over c != y, averaged over the batch.

    p and q are the probabilities of teacher and student at temperature 1, y the label. p' and q' are the softmax at T
    over all classes but the label. The loss is a cross-entropy: it is above 0 where the student equals the teacher.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        labels: (B,), int64, each in [0, C).
        gamma: weight of the other classes.
        temperature: T, above 0.
        reduction: "mean", or "none" for the value of each image.

    Returns:
        0-d, or (B,) without reduction; float32 or float64.

    Raises:
        ValueError: the logits' shapes differ or are not (B, C), or labels are not (B,).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    check_classes(labels, student_logits)
    label_column = labels[:, None]
    student_label = F.log_softmax(student_logits, dim=1).gather(1, label_column)
    teacher_label = F.softmax(teacher_logits, dim=1).gather(1, label_column)
    target = -(teacher_label * student_label).squeeze(1)
    student_others = log_probs_of_others(student_logits / temperature, label_column)
    teacher_others = log_probs_of_others(teacher_logits / temperature, label_column).exp()
    others = -(teacher_others * student_others).sum(dim=1)
    return reduced(target + gamma * temperature**2 * others, reduction)


class NKDLoss(PerImageLoss):
    """`nkd_loss` as a method of a recipe. The label of a mixed image (mixup, CutMix) is the class with the largest
    share, as released.

    Args:
        gamma: weight of the classes other than the label.
        temperature: of these classes, above 0.
        weight: see `DistillationLoss`.
        regions: see `PerImageLoss`.

    Raises:
        ValueError: one of them out of range.
    """

    citation = """
        @inproceedings{yang2023knowledge,
            title = {From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
                and Customized Soft Labels},
            author = {Yang, Zhendong and Zeng, Ailing and Li, Zhe and Zhang, Tianke and Yuan, Chun and Li, Yu},
            booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
            year = {2023},
        }
    """

    reads_labels = True

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, weight: float = 1.0, regions: list | None = None):
        super().__init__(weight, regions)
        self.gamma = not_negative("gamma", gamma)
        self.temperature = positive("temperature", temperature)

    @property
    def teacher_temperature(self) -> float | None:
        return 1.0 if self.temperature == 1 else None

    def per_image(self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        labels = self.classes(batch)
        return nkd_loss(student_logits, teacher_logits, labels, self.gamma, self.temperature, reduction="none")
