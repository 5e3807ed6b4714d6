"""PKT: the student imitates the teacher's probabilities that two images of a batch are neighbours.

Paper: Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .standardize import at_least_float32

EPS = 1e-7  # added to norms and probabilities, as published


def pkt_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Return the mean over all B * B pairs of images of p_teacher * log(p_teacher / p_student).

    p is the probability that an image of the batch is the neighbour of another: (1 + cosine similarity) / 2, divided by
    the row's sum.

    Args:
        student_embedding: (B, D).
        teacher_embedding: (B, D').

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the embeddings are not (B, D) and (B, D') of one batch.
    """
    shapes = tuple(student_embedding.shape), tuple(teacher_embedding.shape)
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][0]:
        raise HfkdError(f"embeddings (B, D) and (B, D') of one batch expected, got {shapes[0]} and {shapes[1]}")
    student, teacher = _neighbour_probs(student_embedding), _neighbour_probs(teacher_embedding)
    return (teacher * torch.log((teacher + EPS) / (student + EPS))).mean()


def _neighbour_probs(embedding: Tensor) -> Tensor:
    """Return neighbour probabilities (B, B), rows that sum to 1, of embeddings (B, D).

    An embedding of zeros, which a ReLU may give, has all images as equally probable neighbours.
    """
    embedding = at_least_float32(embedding)
    norms = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
    # Dividing zeros by EPS would make their gradient 1e7 times larger.
    directions = embedding / torch.where(norms == 0, 1.0, norms + EPS)
    similarities = (directions @ directions.T + 1).clamp(min=0) / 2  # opposite directions may round to below -1
    return similarities / similarities.sum(dim=1, keepdim=True)


class PKTLoss(DistillationLoss):
    """`pkt_loss` as a method of a recipe, over the images of one process.

    Args:
        weight: see `DistillationLoss`; the default is the one of the RepDistiller benchmark.

    Raises:
        HfkdError: weight is out of range.
    """

    citation = """
        @inproceedings{passalis2018learning,
            title = {Learning Deep Representations with Probabilistic Knowledge Transfer},
            author = {Passalis, Nikolaos and Tefas, Anastasios},
            booktitle = {Proceedings of the European Conference on Computer Vision (ECCV)},
            year = {2018},
        }
    """

    reads_logits = False
    student_layers = teacher_layers = ["embedding"]

    def __init__(self, weight: float = 30000.0):
        super().__init__(weight)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        return pkt_loss(student.embedding, teacher.embedding)
