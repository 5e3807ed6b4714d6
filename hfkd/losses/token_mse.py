"""Token MSE: each token of the student, through a learnt linear layer, equals the teacher's at the same place.

The idea is the hint of Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, without normalization and
activation, as LightlyTrain distills vision foundation models.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import Outputs
from .feature_maps import MapPairsLoss, summed
from .fitnet import FitNetLoss
from .projectors import comparable


def token_mse_loss(projected_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Return the sum over the pairs of the mean squared difference, averaged down to the smaller sides of the two.

    Args:
        projected_maps: (B, C, H, W) each, the student's tokens or maps behind their projectors.
        teacher_maps: (B, C, H', W') each.

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the numbers of maps differ, or a pair's batches or channels.
    """
    pairs = zip(projected_maps, teacher_maps, strict=True)
    return summed(F.mse_loss(*comparable(projected, teacher)) for projected, teacher in pairs)


def _check_places(layer: int | str, student: Tensor, teacher: Tensor) -> None:
    """Check that a map of the student has places to compare with the teacher's tokens.

    Raises:
        HfkdError: if it has only one, so that all of the teacher's tokens would be averaged.
    """
    if student.shape[2:].numel() == 1 < teacher.shape[2:].numel():
        sides = " x ".join(map(str, teacher.shape[2:]))
        raise HfkdError(
            f"student_layers: {layer!r} gives one place for the whole image, and the teacher {sides}: give larger "
            "images, an earlier layer, such as student_layers: [-2], or a loss of embeddings, such as feature_queue"
        )


class TokenMSELoss(MapPairsLoss):
    """`token_mse_loss` as a method of a recipe, with one linear layer over the channels for each pair.

    Tokens of a vision transformer are taken as a square map, without its class and distillation tokens.

    Args:
        student_layers, teacher_layers: see `MapPairsLoss`, but None: the deepest stage.
        weight: see `DistillationLoss`.

    Raises:
        ValueError: see `MapPairsLoss`.
    """

    citation = FitNetLoss.citation

    def __init__(self, student_layers: list | None = None, teacher_layers: list | None = None, weight: float = 1.0):
        deepest = [-1]
        super().__init__(
            deepest if student_layers is None else student_layers,
            deepest if teacher_layers is None else teacher_layers,
            weight,
        )

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        for layer, own, other in zip(self.student_layers, *self.maps(student, teacher), strict=True):
            _check_places(layer, own, other)
        pairs = zip(*self.maps(student, teacher), strict=True)
        self.projectors = nn.ModuleList(nn.Conv2d(own.shape[1], other.shape[1], 1) for own, other in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_maps, teacher_maps = self.maps(student, teacher)
        with self.autocast(student_maps[0].device):
            projected = [project(own) for project, own in zip(self.projectors, student_maps, strict=True)]
        return token_mse_loss(projected, teacher_maps)
