"""VkD: the student's features, projected with orthonormal columns, are the teacher's behind a LayerNorm.

Paper: Miles, Elezi and Deng, VkD: Improving Knowledge Distillation using Orthogonal Projections, CVPR 2024.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from .base import Outputs
from .embeddings import paired_embeddings
from .feature_maps import MapPairsLoss, summed


def vkd_loss(projected: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Return the sum over the pairs of the mean smooth L1 difference of P s and LayerNorm(t).

    LayerNorm has no learnt scale and no bias.

    Args:
        projected: (B, D) each, P s, what projections make of the student's averaged features.
        teacher_features: (B, D) each, the teacher's averaged features.

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the numbers of features differ, or a pair's are not (B, D) each.
    """
    losses = []
    for student, teacher in zip(projected, teacher_features, strict=True):
        student, teacher = paired_embeddings(student, teacher, same_width=True)
        losses.append(F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[1:])))
    return summed(losses)


def _projection(student_width: int, teacher_width: int) -> nn.Linear:
    """Return a linear layer without bias, whose weight torch keeps orthonormal."""
    projection = nn.Linear(student_width, teacher_width, bias=False)
    parametrization = orthogonal(projection).get_submodule("parametrizations.weight.0")
    parametrization.base = parametrization.get_buffer("base").contiguous()  # safetensors saves nothing else
    return projection


class VkDLoss(MapPairsLoss):
    """`vkd_loss` as a method of a recipe, with a learnt projection for each pair. The paper adds KD at temperature 1.

    The features are the average of a map, or of the tokens of a vision transformer without its class and distillation
    tokens. The columns of a projection stay orthonormal throughout training; where the student's features are wider
    than the teacher's, its rows do.

    Args:
        student_layers, teacher_layers: see `MapPairsLoss`, but None: the deepest stage.
        weight: see `DistillationLoss`.

    Raises:
        ValueError: see `MapPairsLoss`.
    """

    citation = """
        @inproceedings{miles2024vkd,
            title = {{VkD}: Improving Knowledge Distillation using Orthogonal Projections},
            author = {Miles, Roy and Elezi, Ismail and Deng, Jiankang},
            booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            year = {2024},
        }
    """

    def __init__(self, student_layers: list | None = None, teacher_layers: list | None = None, weight: float = 1.0):
        deepest = [-1]
        super().__init__(
            deepest if student_layers is None else student_layers,
            deepest if teacher_layers is None else teacher_layers,
            weight,
        )

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        pairs = zip(*self.maps(student, teacher), strict=True)
        self.projections = nn.ModuleList(_projection(own.shape[1], other.shape[1]) for own, other in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_maps, teacher_maps = self.maps(student, teacher)
        student_features, teacher_features = (
            [one.mean(dim=(2, 3)) for one in maps] for maps in (student_maps, teacher_maps)
        )
        # In float32 also in a run in bf16, in which the columns are not orthonormal.
        projected = [project(own) for project, own in zip(self.projections, student_features, strict=True)]
        return vkd_loss(projected, teacher_features)
