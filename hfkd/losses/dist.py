"""DIST: the student's probabilities correlate with the teacher's, within each image and within each class.

Paper: Huang, You, Wang, Qian and Xu, Knowledge Distillation from a Stronger Teacher, NeurIPS 2022.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss, Outputs, paired
from .checks import not_negative, positive

EPS = 1e-8  # added to the product of the norms, as released


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """Return T^2 * (beta * (1 - r_image) + gamma * (1 - r_class)).

    r_image is the Pearson correlation of the two networks' probabilities over the classes of an image, averaged over
    the images. r_class is the correlation over the images of a class, averaged over the classes. Probabilities are
    softmax(logits / T). A constant row or column has correlation 0, so a batch of one image has r_class = 0.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        beta: weight of the term of the images.
        gamma: weight of the term of the classes.
        temperature: T, above 0.

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the logits' shapes differ or are not (B, C).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    student_probs = F.softmax(student_logits / temperature, dim=1)
    teacher_probs = F.softmax(teacher_logits / temperature, dim=1)
    images = 1 - _correlations(student_probs, teacher_probs, dim=1).mean()
    classes = 1 - _correlations(student_probs, teacher_probs, dim=0).mean()
    return temperature**2 * (beta * images + gamma * classes)


def _correlations(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Return the Pearson correlations over `dim` of two tensors (B, C)."""
    student, teacher = student - student.mean(dim, keepdim=True), teacher - teacher.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(student, dim=dim) * torch.linalg.vector_norm(teacher, dim=dim)
    return (student * teacher).sum(dim) / (norms + EPS)


class DISTLoss(DistillationLoss):
    """`dist_loss` as a method of a recipe. The images of one process are correlated with one another.

    Args:
        beta: weight of the term of the images.
        gamma: weight of the term of the classes.
        temperature: above 0.
        weight: see `DistillationLoss`.

    Raises:
        ValueError: one of them out of range.
    """

    citation = """
        @inproceedings{huang2022knowledge,
            title = {Knowledge Distillation from a Stronger Teacher},
            author = {Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang},
            booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
            year = {2022},
        }
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, weight: float = 1.0):
        super().__init__(weight)
        self.beta = not_negative("beta", beta)
        self.gamma = not_negative("gamma", gamma)
        self.temperature = positive("temperature", temperature)

    @property
    def teacher_temperature(self) -> float:
        return self.temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_logits, teacher_logits = self.logits(student, teacher)
        return dist_loss(student_logits, teacher_logits, self.beta, self.gamma, self.temperature)
