"""FitNet: a middle layer of the student imitates a layer of the teacher (the hint) through a learnt regressor.

Paper: Romero, Ballas, Kahou, Chassang, Gatta and Bengio, FitNets: Hints for Thin Deep Nets, ICLR 2015.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Outputs
from .feature_maps import MapPairsLoss, summed
from .projectors import comparable, images_for_batch_norm


def fitnet_loss(regressed_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum over all pairs the mean squared difference of their maps.

    Maps of unequal size are first averaged down to the smaller height and width of the two.

    Args:
        regressed_maps: (B, C, H, W) each, the outputs of the regressors.
        teacher_maps: (B, C, H', W') each.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batch sizes or the channels of a pair differ.
        ValueError: the numbers of maps differ.
    """
    pairs = zip(regressed_maps, teacher_maps, strict=True)
    return summed(F.mse_loss(*comparable(regressed, teacher)) for regressed, teacher in pairs)


def regressor(student_map: Tensor, teacher_map: Tensor) -> nn.Sequential:
    """Build a convolution, BatchNorm and ReLU from the student's channels to the teacher's.

    The convolution is the published one for equal sides (1 x 1), for sides that are halved (3 x 3, stride 2) or doubled
    (transposed, 4 x 4, stride 2), and for a student map that is smaller otherwise (3 x 3). A student map that is larger
    otherwise is averaged down to the teacher's sides first: the published kernel of 1 + H - H' would have 43 x 43
    weights from 56 to 14.

    Args:
        student_map: (B, C, H, W).
        teacher_map: (B, C', H', W').
    """
    student_size, teacher_size = student_map.shape[2:], teacher_map.shape[2:]
    channels = student_map.shape[1], teacher_map.shape[1]
    convolution: nn.Module
    if student_size == teacher_size:
        convolution = nn.Conv2d(*channels, 1)
    elif all(side == 2 * target for side, target in zip(student_size, teacher_size, strict=True)):
        convolution = nn.Conv2d(*channels, 3, stride=2, padding=1)
    elif all(2 * side == target for side, target in zip(student_size, teacher_size, strict=True)):
        convolution = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
    else:
        height, width = (min(sides) for sides in zip(student_size, teacher_size, strict=True))
        convolution = nn.Sequential(nn.AdaptiveAvgPool2d((height, width)), nn.Conv2d(*channels, 3, padding=1))
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(channels[1]), relu=nn.ReLU()))


class FitNetLoss(MapPairsLoss):
    """`fitnet_loss` as a method of a recipe, with one `regressor` for each pair.

    The regressors' BatchNorm takes its statistics over the images of one process.

    Args:
        student_layers: stage indices or module paths, shallow to deep. None: [1], the published choice.
        teacher_layers: an equal number of layers of the teacher, in the same form. None: [1].
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: an argument is not a list of layers, or the numbers of layers differ.
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
        self.regressors = nn.ModuleList(regressor(student_map, teacher_map) for student_map, teacher_map in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_maps, teacher_maps = self.maps(student, teacher)
        with self.autocast(student_maps[0].device):
            regressed = [
                regress(student_map) for regress, student_map in zip(self.regressors, student_maps, strict=True)
            ]
        return fitnet_loss(regressed, teacher_maps)
