"""CA-MKD: several teachers, of which each image learns most from those that are surest of its label.

Paper: Zhang, Chen and Wang, Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .checks import not_negative, positive
from .feature_maps import check_averaged
from .kd import kd_loss
from .projectors import comparable
from .standardize import at_least_float32


def ca_mkd_weights(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the weight of each teacher for each image, (K, B): (1 - softmax of the cross-entropies over K) / (K - 1).

    Args:
        logits: K tensors (B, C), one for each teacher, K at least 2.
        labels: (B,), int64, or (B, C), shares of each class.
    """
    labels = labels.to(logits[0].dtype) if labels.ndim == 2 else labels
    losses = torch.stack([F.cross_entropy(one, labels, reduction="none") for one in logits])
    return (1 - losses.softmax(dim=0)) / (len(logits) - 1)


def ca_mkd_features_loss(projected_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the mean over images and teachers of weight * (mean squared difference of the maps).

    Args:
        projected_maps: K maps (B, C, H, W), the student's with each teacher's channels.
        teacher_maps: K maps (B, C, H', W'), averaged down to the smaller sides, as the student's.
        weights: (K, B).

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batch sizes or the channels of a pair differ.
        ValueError: the numbers of maps differ.
    """
    pairs = [comparable(*pair) for pair in zip(projected_maps, teacher_maps, strict=True)]
    distances = torch.stack([(own - other).square().flatten(1).mean(dim=1) for own, other in pairs])
    return (weights * distances).mean()


def ca_mkd_logits_loss(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], weights: Tensor, temperature: float
) -> Tensor:
    """Return the mean over images and teachers of weight * T^2 * KL(softmax(teacher / T) || softmax(student / T)).

    Args:
        student_logits: K tensors (B, C), the student's for each teacher; they differ where a teacher's Z-score does.
        teacher_logits: K tensors (B, C).
        weights: (K, B).
        temperature: T, above 0.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the shapes of a pair differ or are not (B, C).
        ValueError: the numbers of logits differ.
    """
    divergences = []
    for student, teacher in zip(student_logits, teacher_logits, strict=True):
        divergences.append(kd_loss(student, teacher, temperature, reduction="none"))
    return (weights * torch.stack(divergences)).mean()


class CAMKDLoss(DistillationLoss):
    """CA-MKD as a method of a recipe with several teachers: `ca_mkd_logits_loss` and `ca_mkd_features_loss`.

    The logits' term weighs the teachers by their own cross-entropy with the label. The features' term compares the maps
    that the networks average for their classifiers, behind a learnt projector (1x1 convolution, BatchNorm, ReLU) for
    each teacher, and weighs a teacher by the cross-entropy of its classifier on the projected map; as released,
    gradients pass through these weights. The release leaves the features' term out in the first epoch.

    Args:
        temperature: of the term `logits`, above 0.
        logits: factor of the term `logits`; alpha in the release.
        features: factor of the term `features`; beta in the release.
        weight: of both terms; see `DistillationLoss`.

    Raises:
        HfkdError: a parameter is out of range; in setup, there is one teacher only, or a network does not average a map
            for one linear layer.
    """

    citation = """
        @inproceedings{zhang2022confidence,
            title = {Confidence-Aware Multi-Teacher Knowledge Distillation},
            author = {Zhang, Hailin and Chen, Defang and Wang, Can},
            booktitle = {IEEE International Conference on Acoustics, Speech and Signal Processing (ICASSP)},
            year = {2022},
        }
    """

    reads_labels = True
    reads_members = True
    student_layers = teacher_layers = ["averaged_map", "embedding"]

    def __init__(self, temperature: float = 4.0, logits: float = 1.0, features: float = 50.0, weight: float = 1.0):
        super().__init__(weight)
        self.temperature = positive("temperature", temperature)
        self.factors = {"logits": not_negative("logits", logits), "features": not_negative("features", features)}

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        if len(teacher.members) < 2:
            raise HfkdError(
                "CA-MKD weighs several teachers, and this run has one: name several in teacher_name_or_path"
            )
        for member in teacher.members:
            check_averaged("teacher", member)
        channels = student.averaged_map.shape[1]
        self.projectors = nn.ModuleList(_projector(channels, one.averaged_map.shape[1]) for one in teacher.members)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        members, labels = teacher.members, batch["labels"]
        pairs = [self.logits(student, member) for member in members]
        weights = ca_mkd_weights([member.logits for member in members], labels)
        own, others = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        terms = {
            "logits": ca_mkd_logits_loss(own, others, weights, self.temperature),
            "features": self._features_loss(student.averaged_map, members, labels),
        }
        return {name: self.factors[name] * term for name, term in terms.items()}

    def _features_loss(self, student_map: Tensor, members: Sequence[Outputs], labels: Tensor) -> Tensor:
        teacher_maps = [member.averaged_map for member in members]
        with self.autocast(student_map.device):
            projected = [
                project(_resized(student_map, other))
                for project, other in zip(self.projectors, teacher_maps, strict=True)
            ]
        projected = [at_least_float32(one) for one in projected]
        classifiers = [member.classifier for member in members]
        logits = [
            classify(one.mean(dim=(2, 3)))  # type: ignore[misc]  # see `setup`
            for classify, one in zip(classifiers, projected, strict=True)
        ]
        return ca_mkd_features_loss(projected, teacher_maps, ca_mkd_weights(logits, labels))


def _resized(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the student's map at the sides of the teacher's: averaged if it is larger, else resized bilinearly."""
    size = teacher_map.shape[2], teacher_map.shape[3]
    if student_map.shape[2] >= size[0]:
        return F.adaptive_avg_pool2d(student_map, size)
    return F.interpolate(student_map, size, mode="bilinear")


def _projector(in_channels: int, channels: int) -> nn.Sequential:
    conv, norm = nn.Conv2d(in_channels, channels, 1), nn.BatchNorm2d(channels)
    return nn.Sequential(OrderedDict(conv=conv, bn=norm, relu=nn.ReLU()))
