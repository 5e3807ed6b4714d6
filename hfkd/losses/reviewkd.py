"""ReviewKD: each level of the student, fused with the deeper ones, imitates the teacher's map of that level.

Paper: Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, CVPR 2021.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import Outputs
from .checks import count, not_negative
from .feature_maps import MapPairsLoss, read_map, summed
from .projectors import images_for_batch_norm
from .standardize import at_least_float32

POOLED_SIDES = (4, 2, 1)  # each with half the weight of the one before


def reviewkd_loss(fused_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum the hierarchical context loss of all pairs of maps.

    It is the weighted mean of the mean squared differences of the maps (weight 1), and of the maps averaged to 4 x 4,
    2 x 2 and 1 x 1 (1/2, 1/4, 1/8), as far as these are smaller than the map.

    Args:
        fused_maps: (B, C, H, W) each, what the fusion makes of the student's maps.
        teacher_maps: (B, C, H, W) each.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the shapes of a pair differ.
        ValueError: the numbers of maps differ.
    """
    return summed(_context_loss(*pair) for pair in zip(fused_maps, teacher_maps, strict=True))


def _context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape:
        raise HfkdError(f"maps of one shape expected, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for side in POOLED_SIDES:
        if side >= student.shape[2]:
            continue
        weight /= 2
        own, other = (F.adaptive_avg_pool2d(feature_map, side) for feature_map in (student, teacher))
        loss, total = loss + weight * F.mse_loss(own, other), total + weight
    return loss / total


def _convolution(in_channels: int, channels: int, side: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, side, padding=side // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels)))


class Fusion(nn.Module):
    """One level of the review: the student's map, fused with what the deeper levels came to.

    Args:
        in_channels: channels of the student's map.
        channels: of the fused maps of all levels.
        out_channels: channels of the teacher's map.
        deepest: no level is deeper, so nothing is fused.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, deepest: bool):
        super().__init__()
        self.reduce = _convolution(in_channels, channels, 1)
        self.attention = None if deepest else nn.Conv2d(2 * channels, 2, 1)
        self.expand = _convolution(channels, out_channels, 3)

    def forward(self, student_map: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the map that is compared with the teacher's, and the fused map for the next level.

        Args:
            student_map: (B, C, H, W).
            deeper: (B, channels, H', W'), the fused map of the level before; None at the deepest.
            size: sides of the teacher's map.
        """
        fused = self.reduce(student_map)
        if self.attention is not None:
            deeper = F.interpolate(deeper, fused.shape[2:])  # type: ignore[arg-type]  # None at the deepest only
            shares = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid()
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        if fused.shape[2:] != size:
            fused = F.interpolate(fused, size)
        return self.expand(fused), fused


class ReviewKDLoss(MapPairsLoss):
    """`reviewkd_loss` as a method of a recipe, with a learnt `Fusion` for each level and a warm-up.

    The loss is multiplied by min(epoch / warmup_epochs, 1), epochs counted from 1. The release takes the teacher's maps
    before the last activation of each stage, on ImageNet the student's as well: name these as "layer1.8.act2:input".
    BatchNorm takes its statistics over the images of one process.

    Args:
        student_layers: stage indices, module paths or "embedding", shallow to deep. None: every stage except the first,
            and the embedding.
        teacher_layers: an equal number of layers of the teacher, in the same form.
        max_channels: the fused maps have the channels of the student's deepest map, but no more than these.
        warmup_epochs: 0 for no warm-up.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: an argument is out of range or no list of layers, or the numbers of layers differ.
    """

    citation = """
        @inproceedings{chen2021distilling,
            title = {Distilling Knowledge via Knowledge Review},
            author = {Chen, Pengguang and Liu, Shu and Zhao, Hengshuang and Jia, Jiaya},
            booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            year = {2021},
        }
    """

    beside_stages = ("embedding",)

    def __init__(
        self,
        student_layers: list | None = None,
        teacher_layers: list | None = None,
        max_channels: int = 512,
        warmup_epochs: float = 20.0,
        weight: float = 1.0,
    ):
        super().__init__(student_layers, teacher_layers, weight)
        self.max_channels = count("max_channels", max_channels)
        self.warmup_epochs = not_negative("warmup_epochs", warmup_epochs)

    def maps(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """Return the maps of all levels, (B, C, H, W) each, an embedding as (B, C, 1, 1)."""
        student_maps = [_level(student, "student", layer) for layer in self.student_layers]
        return student_maps, [_level(teacher, "teacher", layer) for layer in self.teacher_layers]

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        super().setup(student, teacher)
        student_maps, teacher_maps = self.maps(student, teacher)
        self.least_images = images_for_batch_norm([*student_maps, *teacher_maps])
        channels = min(self.max_channels, student_maps[-1].shape[1])
        self.fusions = nn.ModuleList(
            Fusion(own.shape[1], channels, other.shape[1], deepest=own is student_maps[-1])
            for own, other in zip(student_maps, teacher_maps, strict=True)
        )

    def fuse(self, student_maps: Sequence[Tensor], sizes: Sequence[torch.Size]) -> list[Tensor]:
        """Return what is compared with the teacher's maps, whose sides are given, shallow to deep."""
        fused, results = None, []
        for fuse, student_map, size in reversed(list(zip(self.fusions, student_maps, sizes, strict=True))):
            result, fused = fuse(student_map, fused, size)
            results.append(result)
        return results[::-1]

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_maps, teacher_maps = self.maps(student, teacher)
        with self.autocast(student_maps[0].device):
            fused = self.fuse(student_maps, [teacher_map.shape[2:] for teacher_map in teacher_maps])
        return self.warmup(batch) * reviewkd_loss(fused, teacher_maps)


def _level(outputs: Outputs, role: str, layer: int | str) -> Tensor:
    return outputs.embedding[..., None, None] if layer == "embedding" else read_map(outputs, role, layer)
