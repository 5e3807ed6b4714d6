"""MGD: from the student's map without some of its channels, a small network generates the teacher's map.

Paper: Yang, Li, Shao, Shi, Yuan and Yuan, Masked Generative Distillation, ECCV 2022.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .base import Outputs
from .checks import fraction
from .feature_maps import MapPairsLoss, summed
from .noise import uniform_noise
from .projectors import comparable


def mgd_loss(generated_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum over all pairs the squared difference of their maps, summed over channels and positions, a mean over images.

    Maps of unequal size are first averaged down to the smaller height and width of the two.

    Args:
        generated_maps: (B, C, H, W) each.
        teacher_maps: (B, C, H', W') each.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batch sizes or the channels of a pair differ.
        ValueError: the numbers of maps differ.
    """
    losses = []
    for pair in zip(generated_maps, teacher_maps, strict=True):
        generated, teacher = comparable(*pair)
        losses.append((generated - teacher).square().sum() / len(teacher))
    return summed(losses)


class Generator(nn.Module):
    """Network that makes the teacher's map of the student's: an alignment, and two convolutions behind the mask.

    As released there is no alignment where both maps have the same number of channels.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.align = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        conv1, conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.generation = nn.Sequential(OrderedDict(conv1=conv1, relu=nn.ReLU(), conv2=conv2))

    def forward(self, student_map: Tensor, kept: Tensor) -> Tensor:
        """Return a map (B, C, H, W); `kept` (B, C) is False for a channel that is dropped."""
        return self.generation(self.align(student_map) * kept[..., None, None])


class MGDLoss(MapPairsLoss):
    """`mgd_loss` as a method of a recipe, with a learnt `Generator` for each pair.

    Which channels of an image are dropped depends only on the run's seed, the step and the image's row in the data set.

    Args:
        student_layers, teacher_layers: see `MapPairsLoss`, but None: the deepest stage.
        dropped: probability that a channel of the aligned map is set to 0, from 0 to 1; lambda in the paper.
        weight: see `DistillationLoss`; alpha in the paper, 7e-5 on ImageNet, 1.2e-3 on CIFAR-100.

    Raises:
        HfkdError: see `MapPairsLoss`, or dropped is out of range.
    """

    citation = """
        @inproceedings{yang2022masked,
            title = {Masked Generative Distillation},
            author = {Yang, Zhendong and Li, Zhe and Shao, Mingqi and Shi, Dachuan and Yuan, Zehuan and Yuan, Chun},
            booktitle = {Proceedings of the European Conference on Computer Vision (ECCV)},
            year = {2022},
        }
    """

    draws_noise = True

    def __init__(
        self,
        student_layers: list | None = None,
        teacher_layers: list | None = None,
        dropped: float = 0.15,
        weight: float = 7e-5,
    ):
        deepest = [-1]
        super().__init__(
            deepest if student_layers is None else student_layers,
            deepest if teacher_layers is None else teacher_layers,
            weight,
        )
        self.dropped = fraction("dropped", dropped)

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        pairs = zip(*self.maps(student, teacher), strict=True)
        self.generators = nn.ModuleList(Generator(own.shape[1], other.shape[1]) for own, other in pairs)

    def kept(self, channels: Sequence[int], batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Draw for each pair of maps which channels of its images are kept, (B, C) each."""
        noise = uniform_noise(self.seed, batch["step"], batch["index"], sum(channels))
        return (noise >= self.dropped).split(list(channels), dim=1)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_maps, teacher_maps = self.maps(student, teacher)
        kept = self.kept([other.shape[1] for other in teacher_maps], batch)
        with self.autocast(student_maps[0].device):
            generated = [
                generate(own, mask) for generate, own, mask in zip(self.generators, student_maps, kept, strict=True)
            ]
        return mgd_loss(generated, teacher_maps)
