"""SimKD: the student's map, projected, is the teacher's, and the teacher's own classifier reads it.

Paper: Chen, Mei, Zhang, Wang, Feng and Chen, Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss, Outputs, ReusedClassifier
from .checks import count
from .feature_maps import as_map
from .projectors import comparable, images_for_batch_norm


def simkd_loss(projected: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared difference of two maps, averaged down to the smaller sides where they differ.

    Args:
        projected: (B, C, H, W), what the projector makes of the student's map.
        teacher_map: (B, C, H', W').

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the batches or the channels differ.
    """
    return F.mse_loss(*comparable(projected, teacher_map))


class SimKDLoss(DistillationLoss):
    """`simkd_loss` as a method of a recipe. It changes the student: see `hfkd.networks.simkd_student`.

    The projector's BatchNorm takes its statistics over the images of one process.

    Published alone, with `ce_weight` 0 and no loss that reads logits: the classifier is the teacher's and does not
    learn.

    Args:
        factor: the projector's inner channels are the teacher's divided by it; published are 2, 4 and 8.
        student_layer: stage index (negative: from the end). The student goes no further than this stage.
        teacher_layer: stage index or module path of the map that the teacher averages for its classifier; "embedding"
            for one that averages none (a class token): the student's map is then averaged before it is projected.
        weight: see `DistillationLoss`.

    Raises:
        ValueError: factor or weight out of range, or no such layers.
    """

    citation = """
        @inproceedings{chen2022knowledge,
            title = {Knowledge Distillation with the Reused Teacher Classifier},
            author = {Chen, Defang and Mei, Jian-Ping and Zhang, Hailin and Wang, Can and Feng, Yan and Chen, Chun},
            booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            year = {2022},
        }
    """

    reads_logits = False
    student_layers = ["projector"]

    def __init__(self, factor: int = 2, student_layer: int = -1, teacher_layer: int | str = -1, weight: float = 1.0):
        super().__init__(weight)
        if type(student_layer) is not int:
            raise ValueError(f"student_layer is {student_layer!r}: give a stage index, such as -1")
        if type(teacher_layer) not in (int, str):
            raise ValueError(f"teacher_layer is {teacher_layer!r}: give a stage index, a module path or embedding")
        self.reuses_classifier = ReusedClassifier(student_layer, teacher_layer, count("factor", factor))
        self.teacher_layers = [teacher_layer, "embedding"]

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        if teacher.classifier is None:
            raise ValueError(
                "SimKD needs a teacher whose classifier is one linear layer over its embedding, and this one's logits "
                "are not those of such a layer (two averaged heads, say): give another teacher"
            )
        layer = self.reuses_classifier.teacher_layer
        averaged, embedding = self._teacher_map(teacher).mean(dim=(2, 3)), teacher.embedding
        # In bf16 they are about 0.01 apart.
        if averaged.shape != embedding.shape or (averaged - embedding).abs().max() > 0.05 * embedding.abs().max():
            raise ValueError(
                f"teacher_layer is {layer!r}, and the average of its map {tuple(self._teacher_map(teacher).shape)} is "
                f"not the embedding {tuple(embedding.shape)} that the teacher's classifier reads: name the layer that "
                "the teacher averages last (a norm or activation behind the deepest stage, say), or embedding where "
                "it averages none"
            )

        self.least_images = images_for_batch_norm([student.features["projector"]])

    def _teacher_map(self, teacher: Outputs) -> Tensor:
        """(B, C, H, W)."""
        layer = self.reuses_classifier.teacher_layer
        return teacher.embedding[..., None, None] if layer == "embedding" else as_map(teacher.features[layer])

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        return simkd_loss(student.features["projector"], self._teacher_map(teacher))
