"""ITRD: embeddings agree in the correlation of each dimension and in the similarities of images.

Paper: Miles, Lopez-Rodriguez and Mikolajczyk, Information Theoretic Representation Distillation, BMVC 2022.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .checks import not_negative, positive
from .embeddings import paired_embeddings, unit_vectors


def itrd_correlation_loss(projected: Tensor, teacher_embedding: Tensor, alpha: float) -> Tensor:
    """Return log2 of the sum over the dimensions of |1 - c|^(2 * alpha).

    c is the mean over the batch of the product of both networks' embeddings, each dimension standardized over the batch
    with its unbiased standard deviation. So the largest c is (B - 1) / B, as released.

    Args:
        projected: (B, D), the student's embedding behind a projector; B at least 2.
        teacher_embedding: (B, D).
        alpha: 0.5 or above.

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the embeddings are not (B, D) each, or of fewer than two images.
    """
    student, teacher = paired_embeddings(projected, teacher_embedding, same_width=True)
    if len(student) < 2:
        raise HfkdError(f"embeddings of two images or more expected, got {tuple(student.shape)}")
    correlations = (_standardized(student) * _standardized(teacher)).mean(dim=0)
    return (1 - correlations).abs().pow(2 * alpha).sum().log2()


def _standardized(embedding: Tensor) -> Tensor:
    """Return each dimension standardized over the batch; a constant dimension is 0."""
    std, mean = torch.std_mean(embedding, dim=0)
    return (embedding - mean) / torch.where(std == 0, 1.0, std)


def itrd_mutual_loss(projected: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Return |S / tr(S)|^2 - |J / tr(J)|^2, squared Frobenius norms of similarities (B, B) of the batch.

    S are the cosine similarities of the student's embeddings, T those of the teacher's, J = S * T entry by entry. The
    paper takes the logarithm of each norm, the released code does not.

    Args:
        projected: (B, D), the student's embedding behind a projector.
        teacher_embedding: (B, D').

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the embeddings are not (B, D) and (B, D') of one batch.
    """
    student, teacher = paired_embeddings(projected, teacher_embedding)
    student, teacher = unit_vectors(student), unit_vectors(teacher)
    similarities = student @ student.mT
    return _purity(similarities) - _purity(similarities * (teacher @ teacher.mT))


def _purity(similarities: Tensor) -> Tensor:
    """Return the squared norm of a matrix (B, B) divided by its trace; 0 where the trace is 0."""
    trace = similarities.trace()
    return (similarities / torch.where(trace == 0, 1.0, trace)).square().sum()


class ITRDLoss(DistillationLoss):
    """`itrd_correlation_loss` and `itrd_mutual_loss` as a method of a recipe, with a learnt linear projector.

    Both are taken over the images of one process.

    Args:
        correlation: weight of the first.
        mutual: weight of the second.
        alpha: half the exponent of the correlations, 0.5 or above.
        weight: of both; see `DistillationLoss`.

    Raises:
        ValueError: one of them out of range.
    """

    citation = """
        @inproceedings{miles2022information,
            title = {Information Theoretic Representation Distillation},
            author = {Miles, Roy and Lopez-Rodriguez, Adrian and Mikolajczyk, Krystian},
            booktitle = {British Machine Vision Conference (BMVC)},
            year = {2022},
        }
    """

    reads_logits = False
    student_layers = teacher_layers = ["embedding"]
    least_images = 2

    def __init__(self, correlation: float = 2.0, mutual: float = 1.0, alpha: float = 1.5, weight: float = 1.0):
        super().__init__(weight)
        self.correlation = not_negative("correlation", correlation)
        self.mutual = not_negative("mutual", mutual)
        self.alpha = positive("alpha", alpha)
        if alpha < 0.5:  # the gradient of a smaller power is infinite at 0
            raise HfkdError(f"alpha is {alpha!r}: give a finite number, 0.5 or above")

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        self.projector = nn.Linear(student.embedding.shape[1], teacher.embedding.shape[1])

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self.autocast(student.embedding.device):
            projected = self.projector(student.embedding)
        correlation = itrd_correlation_loss(projected, teacher.embedding, self.alpha)
        mutual = itrd_mutual_loss(projected, teacher.embedding)
        return {"correlation": self.correlation * correlation, "mutual": self.mutual * mutual}
