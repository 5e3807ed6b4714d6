"""RKD: distances between images, and angles between three of them, are those of the teacher.

Paper: Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss, Outputs
from .checks import not_negative
from .embeddings import paired_embeddings, unit_vectors

EPS = 1e-12  # the least squared distance of two images, as released


def rkd_loss(
    student_embedding: Tensor, teacher_embedding: Tensor, distance: float, angle: float, squared: bool = False
) -> Tensor:
    """Return distance * L_distance + angle * L_angle, each a mean smooth L1 difference of the two networks.

    L_distance compares the distances of all B * B pairs of images, each divided by the mean over pairs of two different
    images. L_angle compares, for all B^3 triples (i, j, k), the cosine of the angle at i between j and k.

    Args:
        student_embedding: (B, D).
        teacher_embedding: (B, D').
        distance: weight of the distances.
        angle: weight of the angles.
        squared: take squared distances.

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the embeddings are not (B, D) and (B, D') of one batch.
    """
    student, teacher = paired_embeddings(student_embedding, teacher_embedding)
    student, teacher = _differences(student), _differences(teacher)
    distances = F.smooth_l1_loss(_distances(student, squared), _distances(teacher, squared))
    angles = F.smooth_l1_loss(_cosines(student), _cosines(teacher))
    return distance * distances + angle * angles


def _differences(embedding: Tensor) -> Tensor:
    """Return e_j - e_i at (i, j), (B, B, D)."""
    return embedding[None] - embedding[:, None]


def _distances(differences: Tensor, squared: bool) -> Tensor:
    """Return the distances (B, B) in units of their mean over the pairs of different images."""
    images = len(differences)
    distances = differences.square().sum(dim=2).clamp(min=EPS)
    distances = distances if squared else distances.sqrt()
    same = torch.eye(images, dtype=torch.bool, device=distances.device)
    distances = distances.masked_fill(same, 0.0)
    if images == 1:
        return distances
    return distances / (distances.sum() / (images * (images - 1)))


def _cosines(differences: Tensor) -> Tensor:
    """Return the cosine of the angle at i between j and k, (B, B, B); 0 where two of them coincide with i."""
    directions = unit_vectors(differences)
    return directions @ directions.mT


class RKDLoss(DistillationLoss):
    """`rkd_loss` as a method of a recipe. The images of one process are compared with one another.

    Time and memory grow with the third power of their number: at 64 images the cosines take 1 MiB, at 512 they take
    512 MiB.

    Args:
        distance: weight of the distances.
        angle: weight of the angles.
        squared: take squared distances.
        weight: see `DistillationLoss`.

    Raises:
        ValueError: one of them out of range.
    """

    citation = """
        @inproceedings{park2019relational,
            title = {Relational Knowledge Distillation},
            author = {Park, Wonpyo and Kim, Dongju and Lu, Yan and Cho, Minsu},
            booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            year = {2019},
        }
    """

    reads_logits = False
    student_layers = teacher_layers = ["embedding"]

    def __init__(self, distance: float = 25.0, angle: float = 50.0, squared: bool = False, weight: float = 1.0):
        super().__init__(weight)
        self.distance = not_negative("distance", distance)
        self.angle = not_negative("angle", angle)
        self.squared = squared

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        return rkd_loss(student.embedding, teacher.embedding, self.distance, self.angle, self.squared)
