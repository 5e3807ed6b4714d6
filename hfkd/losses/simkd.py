"""SimKD: the student's projected map imitates the teacher's map, and the teacher's classifier reads it.

Paper: Chen, Mei, Zhang, Wang, Feng and Chen, Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ..errors import HfkdError
from .base import DistillationLoss, Outputs, ReusedClassifier
from .checks import count
from .feature_maps import as_map
from .projectors import comparable, images_for_batch_norm


def simkd_loss(projected: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the mean squared difference of two maps, averaged down to the smaller sides if they differ.

    Args:
        projected: (B, C, H, W), the output of the projector on the student's map.
        teacher_map: (B, C, H', W').

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the batch sizes or the channels differ.
    """
    return F.mse_loss(*comparable(projected, teacher_map))


class SimKDLoss(DistillationLoss):
    """`simkd_loss` as a method of a recipe. It changes the student: see `hfkd.networks.simkd_student`.

    The projector's BatchNorm takes its statistics over the images of one process.

    The method was published alone, with `ce_weight` 0 and no loss that reads logits: the classifier is the teacher's
    and does not learn.

    Args:
        factor: the projector's inner channels are the teacher's channels divided by it; 2, 4 and 8 were published.
        student_layer: stage index (negative: from the end). The student ends at this stage.
        teacher_layer: stage index or module path of the map that the teacher averages for its classifier. "embedding"
            for a teacher that averages no map (a class token): the student's map is then averaged before it is
            projected.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: factor or weight is out of range, or a layer is of the wrong type.
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
    reads_classifier = True
    student_layers = ["projector"]
    reuses_classifier: ReusedClassifier

    def __init__(self, factor: int = 2, student_layer: int = -1, teacher_layer: int | str = -1, weight: float = 1.0):
        super().__init__(weight)
        if type(student_layer) is not int:
            raise HfkdError(f"student_layer is {student_layer!r}: give a stage index, such as -1")
        if type(teacher_layer) not in (int, str):
            raise HfkdError(f"teacher_layer is {teacher_layer!r}: give a stage index, a module path or embedding")
        self.reuses_classifier = ReusedClassifier(student_layer, teacher_layer, count("factor", factor))
        self.teacher_layers = [teacher_layer, "embedding"]

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        if teacher.classifier is None:
            raise HfkdError(
                "SimKD needs a teacher whose classifier is one linear layer over its embedding. This teacher's logits "
                "come from something else, such as two averaged heads. Give another teacher"
            )
        layer = self.reuses_classifier.teacher_layer
        averaged, embedding = self._teacher_map(teacher).mean(dim=(2, 3)), teacher.embedding
        # In bf16 both differ by about 0.01.
        if averaged.shape != embedding.shape or (averaged - embedding).abs().max() > 0.05 * embedding.abs().max():
            raise HfkdError(
                f"teacher_layer is {layer!r}, but the average of its map {tuple(self._teacher_map(teacher).shape)} is "
                f"not the embedding {tuple(embedding.shape)} that the teacher's classifier reads. Name the layer that "
                "the teacher averages, such as a norm or activation behind the deepest stage. Name embedding if the "
                "teacher averages no map"
            )

        self.least_images = images_for_batch_norm([student.features["projector"]])

    def _teacher_map(self, teacher: Outputs) -> Tensor:
        """Return the teacher's map (B, C, H, W); an embedding (B, C) becomes (B, C, 1, 1)."""
        layer = self.reuses_classifier.teacher_layer
        return teacher.embedding[..., None, None] if layer == "embedding" else as_map(teacher.features[layer])

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        return simkd_loss(student.features["projector"], self._teacher_map(teacher))
