"""KD: the student matches the teacher's softened probabilities.

Paper: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss, Outputs, paired
from .checks import positive


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: above 0; a number, a 0-d tensor, or one value for each sample, (B,). Gradients reach a tensor.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the logits' shapes differ or are not (B, C).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1, 1)
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
    return (divergence.sum(1, keepdim=True) * temperature**2).mean()


class KDLoss(DistillationLoss):
    """`kd_loss` as a method of a recipe.

    Args:
        temperature: above 0.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: temperature or weight is out of range.
    """

    citation = """
        @article{hinton2015distilling,
            title = {Distilling the Knowledge in a Neural Network},
            author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
            journal = {arXiv preprint arXiv:1503.02531},
            year = {2015},
        }
    """

    def __init__(self, temperature: float = 4.0, weight: float = 1.0):
        super().__init__(weight)
        self.temperature = positive("temperature", temperature)

    @property
    def teacher_temperature(self) -> float:
        return self.temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_logits, teacher_logits = self.logits(student, teacher)
        return kd_loss(student_logits, teacher_logits, self.temperature)
