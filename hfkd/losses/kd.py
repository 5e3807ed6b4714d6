"""KD: the student matches the teacher's softened probabilities.

Paper: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .base import paired, reduced
from .checks import positive
from .regions import PerImageLoss


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor, reduction: str = "mean"
) -> Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: above 0; a number, a 0-d tensor, or one value for each sample, (B,). Gradients reach a tensor.
        reduction: "mean", or "none" for the value of each image.

    Returns:
        0-d, or (B,) without reduction; float32 or float64.

    Raises:
        HfkdError: the logits' shapes differ or are not (B, C).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1, 1)
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
    return reduced((divergence.sum(1, keepdim=True) * temperature**2).squeeze(1), reduction)


class KDLoss(PerImageLoss):
    """`kd_loss` as a method of a recipe.

    Args:
        temperature: above 0.
        weight: see `DistillationLoss`.
        regions: see `PerImageLoss`.

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

    def __init__(self, temperature: float = 4.0, weight: float = 1.0, regions: list | None = None):
        super().__init__(weight, regions)
        self.temperature = positive("temperature", temperature)

    @property
    def teacher_temperature(self) -> float:
        return self.temperature

    def per_image(self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return kd_loss(student_logits, teacher_logits, self.temperature, reduction="none")
