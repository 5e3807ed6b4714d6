"""CC: student and teacher err together on neighbouring images of a batch as little as possible.

Paper: Peng, Jin, Liu, Li, Wu, Liu, Zhou and Zhang, Correlation Congruence for Knowledge Distillation, ICCV 2019.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .checks import count
from .embeddings import paired_embeddings


def cc_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Return the mean over b of sum_d |s - t|_(b, d) * |s - t|_(b + 1, d), b from 1 to B - 1.

    This is the loss of the RepDistiller benchmark. It depends on the order of the images in the batch, which is random.
    The paper compares correlation matrices of the whole batch.

    Args:
        student_embedding: (B, D), B at least 2.
        teacher_embedding: (B, D).

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the embeddings are not (B, D) each, or of fewer than two images.
    """
    student, teacher = paired_embeddings(student_embedding, teacher_embedding, same_width=True)
    if len(student) < 2:
        raise HfkdError(f"embeddings of two images or more expected, got {tuple(student.shape)}")
    errors = (student - teacher).abs()
    return (errors[:-1] * errors[1:]).sum(dim=1).mean()


class CCLoss(DistillationLoss):
    """`cc_loss` as a method of a recipe, with a learnt linear layer over each network's embedding.

    The images of one process are compared with one another.

    Args:
        dimension: outputs of the linear layers.
        weight: see `DistillationLoss`; the default is the one of the RepDistiller benchmark.

    Raises:
        ValueError: dimension or weight out of range.
    """

    citation = """
        @inproceedings{peng2019correlation,
            title = {Correlation Congruence for Knowledge Distillation},
            author = {Peng, Baoyun and Jin, Xiao and Liu, Jiaheng and Li, Dongsheng and Wu, Yichao and Liu, Yu and Zhou,
                Shunfeng and Zhang, Zhaoning},
            booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
            year = {2019},
        }
    """

    reads_logits = False
    student_layers = teacher_layers = ["embedding"]
    least_images = 2

    def __init__(self, dimension: int = 128, weight: float = 0.02):
        super().__init__(weight)
        self.dimension = count("dimension", dimension)

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        self.student_head = nn.Linear(student.embedding.shape[1], self.dimension)
        self.teacher_head = nn.Linear(teacher.embedding.shape[1], self.dimension)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        with self.autocast(student.embedding.device):
            embedded = self.student_head(student.embedding), self.teacher_head(teacher.embedding)
        return cc_loss(*embedded)
