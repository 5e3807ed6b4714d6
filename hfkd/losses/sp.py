"""SP: two images that are similar for the teacher are similar for the student.

Paper: Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import HfkdError
from .base import Outputs
from .feature_maps import MapPairsLoss, summed
from .standardize import at_least_float32


def sp_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum over all pairs the mean squared difference of their similarities within the batch.

    The similarities (B, B) are the dot products of the flattened maps, each row divided by its L2 norm. So the channels
    and the sides of a pair may differ.

    Args:
        student_maps: (B, C, H, W) each.
        teacher_maps: (B, C', H', W') each.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batch sizes of a pair differ.
        ValueError: the numbers of maps differ.
    """
    losses = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        if len(student) != len(teacher):
            raise HfkdError(
                f"two maps (B, C, H, W) of one batch expected, got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        losses.append((_similarities(student) - _similarities(teacher)).pow(2).mean())
    return summed(losses)


def _similarities(feature_map: Tensor) -> Tensor:
    """Return similarities (B, B), rows of norm 1, of maps (B, C, H, W).

    The row of a map of zeros, which a ReLU may give, is zero.
    """
    features = at_least_float32(feature_map).flatten(1)
    similarities = features @ features.T
    norms = torch.linalg.vector_norm(similarities, dim=1, keepdim=True)
    # As F.normalize, except for rows of zeros: its division by 1e-12 would make their gradient 1e12 times larger.
    return similarities / torch.where(norms == 0, 1.0, norms.clamp(min=1e-12))


class SPLoss(MapPairsLoss):
    """`sp_loss` as a method of a recipe, with similarities over the images of one process.

    Args:
        student_layers, teacher_layers: see `MapPairsLoss`. None: the deepest stage.
        weight: see `DistillationLoss`; the default is the published one.

    Raises:
        HfkdError: see `MapPairsLoss`.
    """

    citation = """
        @inproceedings{tung2019similarity,
            title = {Similarity-Preserving Knowledge Distillation},
            author = {Tung, Frederick and Mori, Greg},
            booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
            year = {2019},
        }
    """

    def __init__(self, student_layers: list | None = None, teacher_layers: list | None = None, weight: float = 3000.0):
        deepest = [-1]
        super().__init__(
            deepest if student_layers is None else student_layers,
            deepest if teacher_layers is None else teacher_layers,
            weight,
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        return sp_loss(*self.maps(student, teacher))
