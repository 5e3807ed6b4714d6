"""CRLD: KD on two views of an image and from each view to the other, where the teacher is confident.

Paper: Zhang, Liu, Cai and Ma, Cross-View Consistency Regularisation for Knowledge Distillation, ACM MM 2024.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from ..errors import HfkdError
from .base import DistillationLoss, Outputs, paired
from .checks import fraction, not_negative, positive
from .standardize import standardize


def crld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_logits_strong: Tensor,
    teacher_logits_strong: Tensor,
    temperature: float,
    weak_threshold: float,
    strong_threshold: float,
    logit_standardization: bool = False,
) -> dict[str, Tensor]:
    """Return the divergences of the same view and across the views, each a mean over all images of the batch.

    K(s, t) is T^2 * KL(t || s) at T, w the weak view, s the strong one:

        within_view: m_w * (K(s_w, t_w) + K(s_s, t_s))
        cross_view:  m_s * (K(s_s, t_w) + K(s_w, t_s))

    m_w is 1 for an image whose teacher probability at temperature 1 reaches the weak threshold in the weak view, else
    0. m_s is the same for the strong view and its threshold.

    Args:
        student_logits: (B, C), weak view.
        teacher_logits: (B, C), weak view.
        student_logits_strong: (B, C), strong view.
        teacher_logits_strong: (B, C), strong view.
        temperature: T, above 0.
        weak_threshold: from 0 to 1.
        strong_threshold: from 0 to 1.
        logit_standardization: Z-score the logits that the divergences read; the masks read raw logits.

    Returns:
        0-d each: `within_view`, `cross_view`.

    Raises:
        ValueError: a view's student and teacher shapes differ or are not (B, C).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    student_logits_strong, teacher_logits_strong = paired(student_logits_strong, teacher_logits_strong)
    confident_weak = _confident(teacher_logits, weak_threshold)
    confident_strong = _confident(teacher_logits_strong, strong_threshold)
    views: tuple[Tensor, ...] = student_logits, teacher_logits, student_logits_strong, teacher_logits_strong
    if logit_standardization:
        views = tuple(standardize(logits) for logits in views)
    student, teacher, student_strong, teacher_strong = (F.log_softmax(logits / temperature, dim=1) for logits in views)
    within = _divergences(student, teacher) + _divergences(student_strong, teacher_strong)
    cross = _divergences(student_strong, teacher) + _divergences(student, teacher_strong)
    return {
        "within_view": temperature**2 * (confident_weak * within).mean(),
        "cross_view": temperature**2 * (confident_strong * cross).mean(),
    }


def _confident(teacher_logits: Tensor, threshold: float) -> Tensor:
    """Return 1 for each image whose largest probability reaches the threshold, else 0, (B,)."""
    return (F.softmax(teacher_logits, dim=1).amax(dim=1) >= threshold).to(teacher_logits.dtype)


def _divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of each image, (B,), of log-probabilities (B, C)."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


class CRLDLoss(DistillationLoss):
    """`crld_loss` as a method of a recipe. The run's cross-entropy is taken on both views.

    Args:
        within_view: weight of the divergences of the same view.
        cross_view: weight of the divergences across the views.
        temperature: above 0.
        weak_threshold: confidence from which an image counts within the views, from 0 to 1.
        strong_threshold: confidence from which an image counts across the views, from 0 to 1.
        weight: of both terms; see `DistillationLoss`.

    Raises:
        ValueError: one of them out of range; in forward, outputs without a strong view.
    """

    citation = """
        @inproceedings{zhang2024cross,
            title = {Cross-View Consistency Regularisation for Knowledge Distillation},
            author = {Zhang, Weijia and Liu, Dongnan and Cai, Weidong and Ma, Chao},
            booktitle = {Proceedings of the ACM International Conference on Multimedia},
            year = {2024},
        }
    """

    views = 2
    reads_raw_logits = True  # for the masks

    def __init__(
        self,
        within_view: float = 2.0,
        cross_view: float = 0.5,
        temperature: float = 4.0,
        weak_threshold: float = 0.9,
        strong_threshold: float = 0.2,
        weight: float = 1.0,
    ):
        super().__init__(weight)
        self.within_view = not_negative("within_view", within_view)
        self.cross_view = not_negative("cross_view", cross_view)
        self.temperature = positive("temperature", temperature)
        self.weak_threshold = fraction("weak_threshold", weak_threshold)
        self.strong_threshold = fraction("strong_threshold", strong_threshold)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if student.strong is None or teacher.strong is None:
            raise HfkdError("crld reads two views of each image: the outputs hold no strong view")
        terms = crld_loss(
            student.logits,
            teacher.logits,
            student.strong.logits,
            teacher.strong.logits,
            self.temperature,
            self.weak_threshold,
            self.strong_threshold,
            self.logit_standardization,
        )
        weights = {"within_view": self.within_view, "cross_view": self.cross_view}
        return {term: weights[term] * value for term, value in terms.items()}
