"""AT: the student imitates the teacher's spatial attention.

Paper: Zagoruyko and Komodakis, Paying More Attention to Attention: Improving the Performance of Convolutional Neural
Networks via Attention Transfer, ICLR 2017.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from ..errors import HfkdError
from .base import Outputs
from .feature_maps import MapPairsLoss, pooled_to_smaller, summed
from .standardize import at_least_float32


def at_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum over all pairs the mean squared difference of their attention.

    The maps of a pair are first averaged down to the smaller height and width of the two. Attention is the mean over
    the channels of the squared map, divided by its L2 norm over the positions.

    Args:
        student_maps: (B, C, H, W) each.
        teacher_maps: (B, C', H', W') each.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batch sizes of a pair differ, or an input is not a map.
        ValueError: the numbers of maps differ.
    """
    losses = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
            raise HfkdError(
                f"two maps (B, C, H, W) of one batch expected, got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        student, teacher = pooled_to_smaller(at_least_float32(student), at_least_float32(teacher))
        losses.append(F.mse_loss(_attention(student), _attention(teacher)))
    return summed(losses)


def _attention(feature_map: Tensor) -> Tensor:
    """Return the attention (B, H * W) of maps (B, C, H, W), rows of norm 1.

    The row of a map of zeros is zero, and its gradient is zero too.
    """
    return F.normalize(feature_map.pow(2).mean(dim=1).flatten(1))


class ATLoss(MapPairsLoss):
    """`at_loss` as a method of a recipe.

    Args:
        student_layers, teacher_layers: see `MapPairsLoss`.
        weight: see `DistillationLoss`; the default is the published one.

    Raises:
        HfkdError: see `MapPairsLoss`.
    """

    citation = """
        @inproceedings{zagoruyko2017paying,
            title = {Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via
                Attention Transfer},
            author = {Zagoruyko, Sergey and Komodakis, Nikos},
            booktitle = {International Conference on Learning Representations (ICLR)},
            year = {2017},
        }
    """

    def __init__(self, student_layers: list | None = None, teacher_layers: list | None = None, weight: float = 1000.0):
        super().__init__(student_layers, teacher_layers, weight)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        return at_loss(*self.maps(student, teacher))
