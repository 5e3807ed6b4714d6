"""Hard distillation: the student takes the teacher's first choice for a label.

Paper: Touvron, Cord, Douze, Massa, Sablayrolles and Jegou, Training Data-Efficient Image Transformers and Distillation
through Attention, ICML 2021.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .base import paired, reduced
from .regions import PerImageLoss


def hard_loss(student_logits: Tensor, teacher_logits: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of the student with the class to which the teacher gives the largest logit.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        reduction: "mean", or "none" for the value of each image.

    Returns:
        0-d, or (B,) without reduction; float32 or float64.

    Raises:
        ValueError: the logits' shapes differ or are not (B, C).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    return reduced(F.cross_entropy(student_logits, teacher_logits.argmax(dim=1), reduction="none"), reduction)


class HardLoss(PerImageLoss):
    """`hard_loss` as a method of a recipe. In the published DeiT it and the cross-entropy each weigh 0.5.

    Args:
        weight: see `DistillationLoss`.
        regions: see `PerImageLoss`.

    Raises:
        ValueError: weight out of range.
    """

    citation = """
        @inproceedings{touvron2021training,
            title = {Training Data-Efficient Image Transformers and Distillation through Attention},
            author = {Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and Massa, Francisco and Sablayrolles,
                Alexandre and J{\\'e}gou, Herv{\\'e}},
            booktitle = {International Conference on Machine Learning (ICML)},
            year = {2021},
        }
    """

    def per_image(self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return hard_loss(student_logits, teacher_logits, reduction="none")
