"""FitNet: a middle layer of the student, through a learnt regressor, gives what the teacher's gives (the hint).

Paper: Romero, Ballas, Kahou, Chassang, Gatta and Bengio, FitNets: Hints for Thin Deep Nets, ICLR 2015.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Outputs
from .feature_maps import MapPairsLoss
from .projectors import comparable, images_for_batch_norm


def fitnet_loss(regressed_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum over the pairs of the mean squared difference, averaged down to the smaller sides where they differ.

    Args:
        regressed_maps: (B, C, H, W) each, the student's behind their regressors.
        teacher_maps: (B, C, H', W') each.

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the numbers of maps differ, or a pair's batches or channels.
    """
    pairs = zip(regressed_maps, teacher_maps, strict=True)
    return sum(F.mse_loss(*comparable(regressed, teacher)) for regressed, teacher in pairs)


def regressor(student_map: Tensor, teacher_map: Tensor) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU from the student's channels to the teacher's.

    As published for equal sides (1 x 1), sides halved (3 x 3, stride 2) or doubled (transposed, 4 x 4, stride 2), and
    a student that is otherwise the smaller (3 x 3). One that is otherwise the larger is averaged down to the teacher's
    sides first; the published kernel of 1 + H - H' would have 43 x 43 weights from 56 to 14.

    Args:
        student_map: (B, C, H, W).
        teacher_map: (B, C', H', W').
    """
    own, other = student_map.shape[2:], teacher_map.shape[2:]
    channels = student_map.shape[1], teacher_map.shape[1]
    if own == other:
        convolution = nn.Conv2d(*channels, 1)
    elif all(side == 2 * target for side, target in zip(own, other, strict=True)):
        convolution = nn.Conv2d(*channels, 3, stride=2, padding=1)
    elif all(2 * side == target for side, target in zip(own, other, strict=True)):
        convolution = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
    else:
        smaller = [min(sides) for sides in zip(own, other, strict=True)]
        convolution = nn.Sequential(nn.AdaptiveAvgPool2d(smaller), nn.Conv2d(*channels, 3, padding=1))
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(channels[1]), relu=nn.ReLU()))


class FitNetLoss(MapPairsLoss):
    """`fitnet_loss` as a method of a recipe, with one `regressor` a pair, whose BatchNorm takes its statistics over the
    images of one process.

    Args:
        student_layers: stage indices or module paths, shallow to deep; None: [1], the published choice.
        teacher_layers: as many, likewise.
        weight: see `DistillationLoss`.

    Raises:
        ValueError: not lists of layers, or not as many of the one as of the other.
    """

    citation = """
        @inproceedings{romero2015fitnets,
            title = {{FitNets}: Hints for Thin Deep Nets},
            author = {Romero, Adriana and Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta,
                Carlo and Bengio, Yoshua},
            booktitle = {International Conference on Learning Representations (ICLR)},
            year = {2015},
        }
    """

    def __init__(self, student_layers: list | None = None, teacher_layers: list | None = None, weight: float = 100.0):
        super().__init__(
            [1] if student_layers is None else student_layers, [1] if teacher_layers is None else teacher_layers, weight
        )

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        student_maps, teacher_maps = self.maps(student, teacher)
        self.least_images = images_for_batch_norm([*student_maps, *teacher_maps])
        pairs = zip(student_maps, teacher_maps, strict=True)
        self.regressors = nn.ModuleList(regressor(own, other) for own, other in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_maps, teacher_maps = self.maps(student, teacher)
        with self.autocast(student_maps[0].device):
            regressed = [regress(own) for regress, own in zip(self.regressors, student_maps, strict=True)]
        return fitnet_loss(regressed, teacher_maps)
