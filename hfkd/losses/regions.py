"""SDD: a logit method over regions of the image, of which the networks' classifiers tell what they think.

Paper: Wei, Luo and Luo, Scale Decoupled Distillation, CVPR 2024.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .feature_maps import check_averaged
from .standardize import at_least_float32, standardize

# BibTeX entry, as `DistillationLoss.citation`; a run with `regions` quotes it in its model card.
CITATION = """
    @inproceedings{wei2024scale,
        title = {Scale Decoupled Distillation},
        author = {Wei, Shicai and Luo, Chunbo and Luo, Yang},
        booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
        year = {2024},
    }
"""

FINEST = 4  # sides of the grid from which all regions are averaged, as released


def region_logits(feature_map: Tensor, classifier: nn.Linear, regions: Sequence[int]) -> Tensor:
    """Return the classifier's logits for the averages of the regions, (B, N, C).

    The map is first averaged to 4 x 4, and this to each number of sides, as released.

    Args:
        feature_map: (B, D, H, W), what the network averages for its classifier.
        classifier: from D to C.
        regions: sides of the grids into which the image is divided: N is the sum of their squares.
    """
    grid = F.adaptive_avg_pool2d(at_least_float32(feature_map), FINEST)
    averages = torch.cat([F.adaptive_avg_pool2d(grid, side).flatten(2) for side in regions], dim=2)
    # Not through the module, whose input is tapped as the embedding.
    return F.linear(averages.mT, classifier.weight, classifier.bias)


def region_weights(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Return 2 for a region where the teacher is right and on the first one wrong, or the reverse; else 1, (B, N).

    Args:
        teacher_logits: (B, N, C), the whole image as the first region.
        labels: (B,), int64.
    """
    right = teacher_logits.argmax(dim=2) == labels[:, None]
    return torch.where(right == right[:, :1], 1.0, 2.0).to(teacher_logits.dtype)


class PerImageLoss(DistillationLoss):
    """Base of the logit methods that give one value for each image, whose mean is the loss.

    With `regions` the loss is the mean over regions of the images, each weighted by `region_weights`. Then student and
    teacher must average a map for one linear layer.

    Args:
        weight: see `DistillationLoss`.
        regions: sides of the grids into which an image is divided, beginning with 1: [1, 2] or [1, 2, 4]. None: the
            whole image alone.

    Raises:
        HfkdError: weight is out of range, or regions is no such list.
    """

    def __init__(self, weight: float = 1.0, regions: list | None = None):
        super().__init__(weight)
        if regions is not None and regions not in ([1, 2], [1, 4], [1, 2, 4]):
            raise HfkdError(f"regions is {regions!r}: give [1, 2], [1, 4] or [1, 2, 4], or leave it out")
        self.regions = regions
        if regions is not None:
            self.reads_labels = True  # of the weights
            self.student_layers = self.teacher_layers = ["averaged_map", "embedding"]

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        if self.regions is not None:
            check_averaged("student", student)
            check_averaged("teacher", teacher)

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if self.regions is None:  # as if there were no such parameter
            settings.pop("regions", None)
        return settings

    def per_image(self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the value of each image (or region), (B,).

        Args:
            student_logits: (B, C), standardized if the run asks for it.
            teacher_logits: (B, C), the same.
            batch: as of `forward`, with a label for each row.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define per_image")

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        if self.regions is not None:
            return self.warmup(batch) * self._over_regions(student, teacher, batch)
        return self.warmup(batch) * self.per_image(*self.logits(student, teacher), batch).mean()

    def _over_regions(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_logits, teacher_logits = (
            region_logits(outputs.averaged_map, outputs.classifier, self.regions)  # type: ignore[arg-type]  # see `setup`
            for outputs in (student, teacher)
        )
        weights = region_weights(teacher_logits, self.classes(batch)).flatten()
        labels = batch["labels"].repeat_interleave(student_logits.shape[1], dim=0)
        rows = student_logits.flatten(0, 1), teacher_logits.flatten(0, 1)
        if self.logit_standardization:
            rows = standardize(rows[0]), standardize(rows[1])
        return (weights * self.per_image(*rows, {**batch, "labels": labels})).mean()
