"""Feature queue: an image resembles the images of past batches as it does for the teacher.

Paper: Fang, Wang, Wang, Zhang, Yang and Liu, SEED: Self-supervised Distillation for Visual Representation, ICLR 2021.
LightlyTrain distills vision foundation models with this loss.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .checks import count, positive
from .crd import all_processes
from .embeddings import paired_embeddings, unit_vectors


def feature_queue_loss(projected: Tensor, teacher_embedding: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return KL(p || q), averaged over the batch.

    p is the softmax of the teacher's cosine similarities with the queue, divided by the temperature, q the softmax of
    the student's.

    Args:
        projected: (B, D), the student's embedding behind a projector.
        teacher_embedding: (B, D).
        queue: (N, D), embeddings of the teacher, of length 1 or zeros.
        temperature: above 0.

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the embeddings are not (B, D) each, or the queue is not as wide.
    """
    student, teacher = paired_embeddings(projected, teacher_embedding, same_width=True)
    if queue.ndim != 2 or queue.shape[1] != student.shape[1]:
        raise HfkdError(f"a queue (N, {student.shape[1]}) expected, got {tuple(queue.shape)}")
    student_log_probs, teacher_log_probs = (
        F.log_softmax(unit_vectors(embedding) @ queue.mT / temperature, dim=1) for embedding in (student, teacher)
    )
    return F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)


class FeatureQueueLoss(DistillationLoss):
    """`feature_queue_loss` as a method of a recipe, with a learnt linear projector and a queue of the last images.

    The teacher's embeddings of a batch join the queue before the loss is taken, and the oldest leave it. Places that no
    image has taken yet hold zeros, which resemble all images alike. In several processes all hold the same queue, of
    the images of all.

    Args:
        temperature: above 0.
        size: images in the queue.
        weight: see `DistillationLoss`.

    Raises:
        ValueError: one of them out of range.
    """

    citation = """
        @inproceedings{fang2021seed,
            title = {{SEED}: Self-supervised Distillation for Visual Representation},
            author = {Fang, Zhiyuan and Wang, Jianfeng and Wang, Lijuan and Zhang, Lei and Yang, Yezhou and Liu,
                Zicheng},
            booktitle = {International Conference on Learning Representations (ICLR)},
            year = {2021},
        }
    """

    reads_logits = False
    student_layers = teacher_layers = ["embedding"]
    replicated_buffers = ("queue",)
    queue: Tensor

    def __init__(self, temperature: float = 0.07, size: int = 8192, weight: float = 1.0):
        super().__init__(weight)
        self.temperature = positive("temperature", temperature)
        self.size = count("size", size)

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        width = teacher.embedding.shape[1]
        self.projector = nn.Linear(student.embedding.shape[1], width)
        self.register_buffer("queue", torch.zeros(self.size, width))
        self.run_eagerly()  # the queue is gathered from all processes

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        with self.autocast(student.embedding.device):
            projected = self.projector(student.embedding)
        if self.training:  # an evaluation changes nothing
            self.remember(teacher.embedding)
        return feature_queue_loss(projected, teacher.embedding, self.queue, self.temperature)

    @torch.no_grad()
    def remember(self, teacher_embedding: Tensor) -> None:
        """Put the embeddings (B, D) of all processes in front of the queue."""
        newest = all_processes(unit_vectors(teacher_embedding))
        self.queue = torch.cat([newest, self.queue])[: self.size]
