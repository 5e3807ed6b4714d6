"""SRRL: the student's projected embedding imitates the teacher's and gives its logits in the teacher's classifier.

Paper: Yang, Martinez, Bulat and Tzimiropoulos, Knowledge Distillation via Softmax Regression Representation Learning,
ICLR 2021.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .standardize import at_least_float32


def srrl_loss(
    projected: Tensor, teacher_embedding: Tensor, teacher_logits: Tensor, teacher_classifier: nn.Linear
) -> Tensor:
    """Add the mean squared differences of the embeddings and of their logits.

    The logits of both come from the teacher's classifier.

    Args:
        projected: (B, D), the output of the projector on the student's embedding.
        teacher_embedding: (B, D).
        teacher_logits: (B, C).
        teacher_classifier: from D to C, frozen.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the embeddings' shapes differ, or the classifier does not fit them.
    """
    classes, width = teacher_classifier.weight.shape
    if projected.shape != teacher_embedding.shape or projected.shape[1:] != (width,):
        raise HfkdError(
            f"expected embeddings (B, {width}), as the teacher's classifier reads, got {tuple(projected.shape)} and "
            f"{tuple(teacher_embedding.shape)}"
        )
    if teacher_logits.shape != (len(projected), classes):
        raise HfkdError(
            f"expected teacher logits {(len(projected), classes)}, as the teacher's classifier gives, got "
            f"{tuple(teacher_logits.shape)}"
        )
    projected = at_least_float32(projected)
    logits = teacher_classifier(projected)
    return F.mse_loss(projected, at_least_float32(teacher_embedding)) + F.mse_loss(logits, teacher_logits)


class SRRLLoss(DistillationLoss):
    """`srrl_loss` as a method of a recipe, with a learnt projector: 1x1 convolution, BatchNorm and ReLU.

    The BatchNorm takes its statistics over the images of one process. The loss compares raw logits as published, also
    in a run with `logit_standardization`: the logits of both sides come from the teacher's classifier.

    Args:
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: weight is out of range.
    """

    citation = """
        @inproceedings{yang2021knowledge,
            title = {Knowledge Distillation via Softmax Regression Representation Learning},
            author = {Yang, Jing and Martinez, Brais and Bulat, Adrian and Tzimiropoulos, Georgios},
            booktitle = {International Conference on Learning Representations (ICLR)},
            year = {2021},
        }
    """

    reads_logits = False
    reads_classifier = True
    reads_raw_logits = True
    student_layers = teacher_layers = ["embedding"]
    least_images = 2

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        if teacher.classifier is None:
            raise HfkdError(
                "SRRL reads the student's embedding with the teacher's classifier, which must be one linear layer. "
                "This teacher's logits come from something else, such as two averaged heads. Give another teacher"
            )
        channels = student.embedding.shape[1], teacher.embedding.shape[1]
        self.projector = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(*channels, 1, bias=False), bn=nn.BatchNorm2d(channels[1]), relu=nn.ReLU())
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        with self.autocast(student.embedding.device):
            projected = self.projector(student.embedding[..., None, None]).flatten(1)
        classifier = teacher.classifier
        return srrl_loss(projected, teacher.embedding, teacher.logits, classifier)  # type: ignore[arg-type]  # see `setup`
