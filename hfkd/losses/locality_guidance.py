"""Locality guidance: a transformer's maps imitate the maps of a convolutional network on the same image.

Paper: Li, Yu, Wang, Yuan, Song and Chen, Locality Guidance for Improving Vision Transformers on Tiny Datasets, ECCV
2022.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import Outputs
from .checks import layers_of
from .feature_maps import MapPairsLoss, summed
from .standardize import at_least_float32


def locality_guidance_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum over all pairs the mean squared difference of their maps, resized bilinearly to the larger sides.

    Args:
        student_maps: (B, C, H, W) each, already with the teacher's channels.
        teacher_maps: (B, C, H', W') each.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batch sizes or the channels of a pair differ.
        ValueError: the numbers of maps differ.
    """
    losses = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        student = at_least_float32(student)
        if student.shape[:2] != teacher.shape[:2]:
            raise HfkdError(
                f"maps of one batch and one number of channels expected, got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}"
            )
        size = [max(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        losses.append(F.mse_loss(_resize(student, size), _resize(teacher, size)))
    return summed(losses)


def _resize(feature_map: Tensor, size: list[int]) -> Tensor:
    if list(feature_map.shape[2:]) == size:
        return feature_map
    return F.interpolate(feature_map, size, mode="bilinear", align_corners=False)


class LocalityGuidanceLoss(MapPairsLoss):
    """`locality_guidance_loss` as a method of a recipe, with a learnt 1x1 convolution for each pair.

    The convolution gives the student's map the teacher's channels.

    Args:
        student_layers: stage indices or module paths, shallow to deep.
        teacher_layers: an equal number of layers of the teacher, in the same form.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: there are no layers, or the numbers of layers differ.
    """

    citation = """
        @inproceedings{li2022locality,
            title = {Locality Guidance for Improving Vision Transformers on Tiny Datasets},
            author = {Li, Kehan and Yu, Runyi and Wang, Zhennan and Yuan, Li and Song, Guoli and Chen, Jie},
            booktitle = {Proceedings of the European Conference on Computer Vision (ECCV)},
            year = {2022},
        }
    """

    def __init__(self, student_layers: list, teacher_layers: list, weight: float = 2.5):
        # No default layers: the published blocks differ between students.
        super().__init__(
            layers_of("student_layers", student_layers), layers_of("teacher_layers", teacher_layers), weight
        )

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        pairs = zip(*self.maps(student, teacher), strict=True)
        self.projectors = nn.ModuleList(
            nn.Conv2d(student_map.shape[1], teacher_map.shape[1], 1) for student_map, teacher_map in pairs
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_maps, teacher_maps = self.maps(student, teacher)
        with self.autocast(student_maps[0].device):
            projected = [
                project(student_map) for project, student_map in zip(self.projectors, student_maps, strict=True)
            ]
        return locality_guidance_loss(projected, teacher_maps)
