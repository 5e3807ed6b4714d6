"""OFD: the student's maps before the last activation imitate the teacher's, as far as these matter behind it.

Paper: Heo, Kim, Yun, Park, Kwak and Choi, A Comprehensive Overhaul of Feature Distillation, ICCV 2019.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import Outputs
from .checks import layers_of
from .feature_maps import MapPairsLoss, summed
from .projectors import images_for_batch_norm
from .standardize import at_least_float32

RARELY_NEGATIVE = 0.001  # probability of a negative response from which on the margin is 3 standard deviations


def ofd_loss(connected_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], margins: Sequence[Tensor]) -> Tensor:
    """Return the sum over the pairs of maps of their partial L2 distance, divided by 2 for each deeper pair.

    The teacher's map is averaged to the sides of the student's, and t is what is compared of it: t itself where it is
    positive, else max(t, margin). Where t is not positive the student s may lie below it: only s > max(t, margin) costs
    anything. The distance is the sum over channels and positions of the squared differences, averaged over the batch.

    Args:
        connected_maps: (B, C, H, W) each, shallow to deep, the student's maps behind connectors.
        teacher_maps: (B, C, H', W') each, before the activation.
        margins: (C,) each, see `ofd_margin`.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batches or the channels of a pair differ.
        ValueError: the numbers of maps and margins differ.
    """
    pairs = list(zip(connected_maps, teacher_maps, margins, strict=True))
    return summed(_partial_distance(*pair) / 2**deeper for deeper, pair in enumerate(reversed(pairs)))


def _partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    if student.shape[:2] != teacher.shape[:2]:
        raise HfkdError(
            f"maps of one batch and one number of channels expected, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if teacher.shape[2:] != student.shape[2:]:
        teacher = F.adaptive_avg_pool2d(teacher, (student.shape[2], student.shape[3]))
    # By products with 0 and 1: torch.where is not vectorised on a CPU, and took half of this loss.
    positive = (teacher > 0).to(student.dtype)
    difference = student - teacher.maximum(margin.to(student.dtype)[:, None, None] * (1 - positive))
    counted = positive.maximum((difference.detach() > 0).to(student.dtype))
    return (difference * counted).square().sum() / len(student)


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """Return for each channel the mean of the negative responses of a BatchNorm, (C,), float32.

    The response of a channel is taken for normally distributed, with the mean `bias` and the standard deviation
    |weight|. Where it is hardly ever negative, the margin is -3 standard deviations.

    Args:
        weight: (C,), of the BatchNorm.
        bias: (C,), of the BatchNorm.
    """
    mean, std = bias.double(), weight.double().abs()
    score = mean / std.clamp(min=1e-300)  # a channel without spread is its mean
    negative = torch.special.ndtr(-score)
    density = torch.exp(-score.square() / 2) / math.sqrt(2 * math.pi)
    rare = negative <= RARELY_NEGATIVE
    return torch.where(rare, -3 * std, mean - std * density / torch.where(rare, 1.0, negative)).float()


class OFDLoss(MapPairsLoss):
    """`ofd_loss` as a method of a recipe, with a learnt 1x1 convolution and BatchNorm for each pair.

    BatchNorm takes its statistics over the images of one process.

    Args:
        student_layers: layers that give the student's maps before the last activation of a stage, shallow to deep, such
            as "layer3.2.act2:input".
        teacher_layers: an equal number of such layers of the teacher.
        teacher_norms: module paths of the teacher's BatchNorms before these activations, from which the margins come.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: an argument is no list of layers, the lengths differ, or in setup, a norm does not fit its map.
    """

    citation = """
        @inproceedings{heo2019comprehensive,
            title = {A Comprehensive Overhaul of Feature Distillation},
            author = {Heo, Byeongho and Kim, Jeesoo and Yun, Sangdoo and Park, Hyojin and Kwak, Nojun and Choi,
                Jin Young},
            booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
            year = {2019},
        }
    """

    # No default layers: which activations end a stage, and which norms stand before them, differs between networks.
    def __init__(self, student_layers: list, teacher_layers: list, teacher_norms: list, weight: float = 1e-3):
        super().__init__(
            layers_of("student_layers", student_layers), layers_of("teacher_layers", teacher_layers), weight
        )
        if not isinstance(teacher_norms, list) or not all(isinstance(norm, str) for norm in teacher_norms):
            raise HfkdError(f"teacher_norms is {teacher_norms!r}: give a list of module paths, such as [layer3.8.bn2]")
        self.teacher_norms = teacher_norms
        if len(teacher_norms) != len(teacher_layers):
            raise HfkdError(
                f"teacher_norms is {teacher_norms} and teacher_layers {teacher_layers}: give lists of equal length"
            )

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        student_maps, teacher_maps = self.maps(student, teacher)
        self.least_images = images_for_batch_norm(student_maps)
        self.connectors = nn.ModuleList()
        for number, (own, other) in enumerate(zip(student_maps, teacher_maps, strict=True)):
            self.connectors.append(_connector(own.shape[1], other.shape[1]))
            self.register_buffer(f"margin_{number}", self._margin(number, other.shape[1], teacher))

    def _margin(self, number: int, channels: int, teacher: Outputs) -> Tensor:
        path, layer = self.teacher_norms[number], self.teacher_layers[number]
        weight, bias = teacher.features[f"{path}:affine"]
        margin = ofd_margin(weight, bias)
        if len(margin) != channels:
            raise HfkdError(f"teacher_norms: {path!r} has {len(margin)} channels and the map of {layer!r} {channels}")
        return margin

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_maps, teacher_maps = self.maps(student, teacher)
        with self.autocast(student_maps[0].device):
            connected = [connect(own) for connect, own in zip(self.connectors, student_maps, strict=True)]
        margins = [self.get_buffer(f"margin_{number}") for number in range(len(connected))]
        return ofd_loss(connected, teacher_maps, margins)


def _connector(in_channels: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels)))
