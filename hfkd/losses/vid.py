"""VID: the student's maps predict the teacher's maps, with one variance for each channel of the teacher.

Paper: Ahn, Hu, Damianou, Lawrence and Dai, Variational Information Distillation for Knowledge Transfer, CVPR 2019.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import Outputs
from .feature_maps import MapPairsLoss, pooled_to_smaller, summed
from .projectors import comparable
from .standardize import at_least_float32

INITIAL_VARIANCE = 5.0
LEAST_VARIANCE = 1e-5


def vid_loss(predicted_maps: Sequence[Tensor], log_scales: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum over all pairs the mean of ((prediction - teacher)^2 / variance + log(variance)) / 2.

    Up to a constant, this is the negative log-likelihood of the teacher's map under a normal distribution with variance
    softplus(log_scale) + 1e-5.

    Args:
        predicted_maps: (B, C, H, W) each, the outputs of regressors on the student's maps.
        log_scales: (C,) each. Gradients reach them.
        teacher_maps: (B, C, H', W') each, averaged down to the sides of the prediction.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batch sizes or the channels of a pair differ, or a scale is not (C,).
        ValueError: the numbers of maps and scales differ.
    """
    losses = []
    for predicted, log_scale, teacher in zip(predicted_maps, log_scales, teacher_maps, strict=True):
        predicted, teacher = comparable(predicted, teacher)
        if log_scale.shape != teacher.shape[1:2]:
            raise HfkdError(f"log_scales of shape ({teacher.shape[1]},) expected, got {tuple(log_scale.shape)}")
        variance = F.softplus(at_least_float32(log_scale)).view(1, -1, 1, 1) + LEAST_VARIANCE
        losses.append(((predicted - teacher) ** 2 / variance + variance.log()).mean() / 2)
    return summed(losses)


def _regressor(student_map: Tensor, teacher_map: Tensor) -> nn.Sequential:
    channels = teacher_map.shape[1]
    return nn.Sequential(
        nn.Conv2d(student_map.shape[1], channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
    )


class VIDLoss(MapPairsLoss):
    """`vid_loss` as a method of a recipe; each pair has a learnt regressor of 1 x 1 convolutions and learnt scales.

    Args:
        student_layers: stage indices or module paths, shallow to deep. None: every stage except the first.
        teacher_layers: an equal number of layers of the teacher, in the same form.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: an argument is not a list of layers, or the numbers of layers differ.
    """

    citation = """
        @inproceedings{ahn2019variational,
            title = {Variational Information Distillation for Knowledge Transfer},
            author = {Ahn, Sungsoo and Hu, Shell Xu and Damianou, Andreas and Lawrence, Neil D. and Dai, Zhenwen},
            booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            year = {2019},
        }
    """

    def __init__(self, student_layers: list | None = None, teacher_layers: list | None = None, weight: float = 1.0):
        super().__init__(student_layers, teacher_layers, weight)

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        super().setup(student, teacher)
        initial = math.log(math.expm1(INITIAL_VARIANCE - LEAST_VARIANCE))  # the inverse of softplus
        student_maps, teacher_maps = self.maps(student, teacher)
        pairs = zip(student_maps, teacher_maps, strict=True)
        self.regressors = nn.ModuleList(_regressor(student_map, teacher_map) for student_map, teacher_map in pairs)
        self.log_scales = nn.ParameterList(torch.full((teacher_map.shape[1],), initial) for teacher_map in teacher_maps)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_maps, teacher_maps = self.maps(student, teacher)
        pairs = zip(student_maps, teacher_maps, strict=True)
        pooled = [pooled_to_smaller(student_map, teacher_map)[0] for student_map, teacher_map in pairs]
        with self.autocast(student_maps[0].device):
            predicted = [regress(student_map) for regress, student_map in zip(self.regressors, pooled, strict=True)]
        return vid_loss(predicted, list(self.log_scales), teacher_maps)
