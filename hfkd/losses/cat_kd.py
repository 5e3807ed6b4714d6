"""CAT-KD: the student's class activation maps imitate the teacher's.

Paper: Guo, Yan, Li and Lin, Class Attention Transfer Based Knowledge Distillation, CVPR 2023.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .checks import count
from .embeddings import unit_vectors
from .feature_maps import check_averaged
from .standardize import at_least_float32


def cat_kd_loss(
    student_map: Tensor,
    student_weight: Tensor,
    teacher_map: Tensor,
    teacher_weight: Tensor,
    resolution: int,
    normalize: bool,
) -> Tensor:
    """Return the mean squared difference of the class activation maps.

    A class activation map is the classifier, without its bias, at every position of the map that the network averages,
    itself averaged to resolution x resolution.

    Args:
        student_map: (B, D, H, W).
        student_weight: (C, D), of the student's classifier. Gradients reach it.
        teacher_map: (B, D', H', W').
        teacher_weight: (C, D'), of the teacher's classifier.
        resolution: side of the class activation maps that are compared.
        normalize: divide each class activation map by its norm over the positions.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batches or the numbers of classes differ.
    """
    student = _activation_maps(student_map, student_weight, resolution)
    teacher = _activation_maps(teacher_map, teacher_weight, resolution)
    if student.shape != teacher.shape:
        raise HfkdError(
            "maps of one batch and classifiers of the same classes expected, got maps of "
            f"{len(student)} and {len(teacher)} images and classifiers of {student.shape[1]} and {teacher.shape[1]} "
            "classes"
        )
    if normalize:
        student, teacher = unit_vectors(student), unit_vectors(teacher)
    return F.mse_loss(student, teacher)


def _activation_maps(feature_map: Tensor, weight: Tensor, resolution: int) -> Tensor:
    """Return the class activation maps (B, C, resolution^2); averaging first gives the same and takes less."""
    return weight @ F.adaptive_avg_pool2d(at_least_float32(feature_map), resolution).flatten(2)


class CATKDLoss(DistillationLoss):
    """`cat_kd_loss` as a method of a recipe.

    The release drops the bias of both classifiers, which changes the teacher's logits. Here both keep theirs, and the
    loss leaves it out.

    Args:
        resolution: side of the class activation maps that are compared.
        normalize: divide each class activation map by its norm over the positions.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: a parameter is out of range; in setup, a network does not average a map for one linear layer.
    """

    citation = """
        @inproceedings{guo2023class,
            title = {Class Attention Transfer Based Knowledge Distillation},
            author = {Guo, Ziyao and Yan, Haonan and Li, Hui and Lin, Xiaodong},
            booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            year = {2023},
        }
    """

    reads_logits = False
    reads_classifier = True
    student_layers = teacher_layers = ["averaged_map", "embedding"]

    def __init__(self, resolution: int = 2, normalize: bool = False, weight: float = 1.0):
        super().__init__(weight)
        self.resolution = count("resolution", resolution)
        self.normalize = normalize

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        check_averaged("student", student)
        check_averaged("teacher", teacher)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_weight, teacher_weight = student.classifier.weight, teacher.classifier.weight  # type: ignore[union-attr]  # see `setup`
        maps = student.averaged_map, teacher.averaged_map
        return cat_kd_loss(maps[0], student_weight, maps[1], teacher_weight, self.resolution, self.normalize)
