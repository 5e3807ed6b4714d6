"""SRD: the student's embedding, projected and standardized over the batch, is the teacher's, by a soft maximum.

Paper: Miles and Mikolajczyk, Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .checks import positive
from .embeddings import paired_embeddings

EPS = 1e-4  # added to the variances, as released


def srd_loss(projected: Tensor, teacher_embedding: Tensor, exponent: float) -> Tensor:
    """Return log of the sum over all entries of |s - t|^exponent.

    s and t are the embeddings, each dimension standardized over the batch: (z - mean) / sqrt(variance + 1e-4). The
    logarithm is not defined where s and t are equal; it is held at that of the smallest normal number.

    Args:
        projected: (B, D), the student's embedding behind a projector; B at least 2.
        teacher_embedding: (B, D).
        exponent: 1 or above; the larger, the more the largest differences count.

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the embeddings are not (B, D) each, or of fewer than two images.
    """
    student, teacher = paired_embeddings(projected, teacher_embedding, same_width=True)
    if len(student) < 2:
        raise HfkdError(f"embeddings of two images or more expected, got {tuple(student.shape)}")
    difference = _standardized(student) - _standardized(teacher)
    return difference.abs().pow(exponent).sum().clamp(min=torch.finfo(difference.dtype).tiny).log()


def _standardized(embedding: Tensor) -> Tensor:
    return F.batch_norm(embedding, None, None, training=True, eps=EPS)


class SRDLoss(DistillationLoss):
    """`srd_loss` as a method of a recipe, with a learnt linear projector. The paper adds KD at temperature 1.

    Embeddings are standardized over the images of one process.

    Args:
        exponent: 1 or above.
        weight: see `DistillationLoss`; the default is the published one.

    Raises:
        ValueError: exponent or weight out of range.
    """

    citation = """
        @inproceedings{miles2024understanding,
            title = {Understanding the Role of the Projector in Knowledge Distillation},
            author = {Miles, Roy and Mikolajczyk, Krystian},
            booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
            year = {2024},
        }
    """

    reads_logits = False
    student_layers = teacher_layers = ["embedding"]
    least_images = 2

    def __init__(self, exponent: float = 4.0, weight: float = 2.0):
        super().__init__(weight)
        self.exponent = positive("exponent", exponent)
        if exponent < 1:  # the gradient of a smaller power is infinite at 0
            raise HfkdError(f"exponent is {exponent!r}: give a finite number, 1 or above")

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        self.projector = nn.Linear(student.embedding.shape[1], teacher.embedding.shape[1])

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        with self.autocast(student.embedding.device):
            projected = self.projector(student.embedding)
        return srd_loss(projected, teacher.embedding, self.exponent)
