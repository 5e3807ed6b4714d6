"""SKD: KD, and the directions of a batch's logits to one another, compared in a whitened space.

Paper: Jeong and others, Streamlined Knowledge Distillation, CVPR 2026.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss, Outputs, paired
from .checks import not_negative, positive
from .embeddings import unit_vectors


def skd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float, damping: float) -> dict[str, Tensor]:
    """Return the terms of torchdistill's version.

        instance: KL(softmax(teacher / T) || softmax(student / T)), averaged over the batch, without T^2
        direction: sqrt(d' (Cov + damping * I)^-1 d), averaged over the images

    d is an image's row of the difference of both networks' cosine similarities among the images, B x B, and Cov the
    covariance of these rows. Images are compared with those of one process.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: T, above 0.
        damping: lambda, above 0.

    Returns:
        0-d each, float32 or float64: `instance`, `direction`.

    Raises:
        HfkdError: the logits' shapes differ or are not (B, C).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    student_log_probs, teacher_log_probs = (
        F.log_softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits)
    )
    with torch.autocast(device_type=student_logits.device.type, enabled=False):  # it would compute products in bf16
        differences = _similarities(student_logits) - _similarities(teacher_logits)
        distances = _whitened_distances(differences, damping)
    return {
        "instance": F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True),
        "direction": distances.mean(),
    }


def _similarities(logits: Tensor) -> Tensor:
    """Return the cosine of each image's logits with each other image's, (B, B)."""
    # Scaled first, since the squares of large logits overflow, and those of small ones vanish.
    largest = logits.detach().abs().amax(dim=1, keepdim=True)
    directions = unit_vectors(logits / torch.where(largest == 0, 1.0, largest))
    return directions @ directions.mT


def _whitened_distances(differences: Tensor, damping: float) -> Tensor:
    """Return the Mahalanobis length of each row, (B,), of differences (B, B)."""
    centered = differences - differences.mean(dim=0)
    covariance = centered.mT @ centered / max(len(differences) - 1, 1)  # of one image 0, as its difference is
    covariance = covariance + damping * torch.eye(len(differences), dtype=differences.dtype, device=differences.device)
    # `_ex` does not look whether it has succeeded, for which the host would wait. Damped, it does.
    factor, _ = torch.linalg.cholesky_ex(covariance)
    whitened = torch.linalg.solve_triangular(factor, differences.mT, upper=False)
    squares = whitened.square().sum(dim=0)
    # The root has no gradient at 0, where nothing is to be learnt.
    return torch.where(squares == 0, 0.0, torch.where(squares == 0, 1.0, squares).sqrt())


class SKDLoss(DistillationLoss):
    """`skd_loss` as a method of a recipe.

    It is torchdistill's version. The authors' code multiplies `instance` by T^2, divides the similarities by the number
    of classes, and scales both terms by shares of unsure images and classes, as MLKD does.

    Args:
        temperature: of the term `instance`, above 0.
        damping: added to the diagonal of the covariance, above 0; lambda in the paper.
        instance: factor of the term `instance`.
        direction: factor of the term `direction`.
        weight: of both terms; see `DistillationLoss`.

    Raises:
        HfkdError: a parameter is out of range.
    """

    # The paper's page names Jeong first; the other authors could not be verified.
    citation = """
        @inproceedings{jeong2026streamlined,
            title = {Streamlined Knowledge Distillation},
            author = {Jeong, {} and others},
            booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            year = {2026},
        }
    """

    def __init__(
        self,
        temperature: float = 4.0,
        damping: float = 0.1,
        instance: float = 1.0,
        direction: float = 1.0,
        weight: float = 1.0,
    ):
        super().__init__(weight)
        self.temperature = positive("temperature", temperature)
        self.damping = positive("damping", damping)
        self.factors = {
            "instance": not_negative("instance", instance),
            "direction": not_negative("direction", direction),
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        student_logits, teacher_logits = self.logits(student, teacher)
        terms = skd_loss(student_logits, teacher_logits, self.temperature, self.damping)
        return {name: self.factors[name] * term for name, term in terms.items()}
