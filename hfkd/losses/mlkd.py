"""MLKD: the divergence of KD at five temperatures and on two views, and correlations of samples and classes.

Paper: Jin, Wang and Lin, Multi-level Logit Distillation, CVPR 2023.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HfkdError
from .base import DistillationLoss, Outputs, paired
from .checks import positive
from .standardize import standardize

# Temperatures besides the method's own. The released code reads the weak view at the last two even in the sum over
# the strong view.
BOTH_VIEWS_TEMPERATURES = (3.0, 5.0)
WEAK_VIEW_TEMPERATURES = (2.0, 6.0)


def mlkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_logits_strong: Tensor,
    teacher_logits_strong: Tensor,
    temperature: float,
    logit_standardization: bool = False,
) -> dict[str, Tensor]:
    """Return the terms of the released code, summed over the temperatures (T, 3, 5, 2, 6).

    The method also takes cross-entropy on both views, which is not among these terms. The published numbers come from
    code that departs from the paper. This function follows the code:

    1. The mask of samples whose teacher confidence is at most the batch's median multiplies losses that are already
       averaged, so it only scales them. The weak view's divergences and the batch correlation are scaled by the share
       of these samples. The class correlation is scaled by the share of classes whose probability, summed over the
       batch, is at most the median.
    2. Of the strong view's five divergences, the two at T = 2 and T = 6 are taken on the weak view.
    3. Both correlations are taken on the weak view only.
    4. Logit standardization reaches the divergences only.

    The correlations are sums over pairs, so they grow with the batch. Correlations, medians and shares are taken over
    the images of one process.

    Args:
        student_logits: (B, C), weak view.
        teacher_logits: (B, C), weak view.
        student_logits_strong: (B, C), strong view.
        teacher_logits_strong: (B, C), strong view.
        temperature: T, above 0.
        logit_standardization: Z-score the logits that the divergences read.

    Returns:
        0-d each: `kd`, `class_correlation`, `batch_correlation`.

    Raises:
        HfkdError: a view's student and teacher shapes differ or are not (B, C).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    student_logits_strong, teacher_logits_strong = paired(student_logits_strong, teacher_logits_strong)
    both_views = (temperature, *BOTH_VIEWS_TEMPERATURES)

    student_weak = _log_probs(student_logits, both_views + WEAK_VIEW_TEMPERATURES)
    teacher_weak = _log_probs(teacher_logits, both_views + WEAK_VIEW_TEMPERATURES)
    class_correlation, batch_correlation = _correlations(student_weak.exp(), teacher_weak.exp())

    if logit_standardization:
        student_weak = _log_probs(standardize(student_logits), both_views + WEAK_VIEW_TEMPERATURES)
        teacher_weak = _log_probs(standardize(teacher_logits), both_views + WEAK_VIEW_TEMPERATURES)
        student_logits_strong = standardize(student_logits_strong)
        teacher_logits_strong = standardize(teacher_logits_strong)
    student_strong = _log_probs(student_logits_strong, both_views)
    teacher_strong = _log_probs(teacher_logits_strong, both_views)

    weak = _divergences(student_weak, teacher_weak, both_views + WEAK_VIEW_TEMPERATURES)
    strong = _divergences(student_strong, teacher_strong, both_views)
    low_samples, low_classes = _low_confidence_shares(teacher_logits)
    return {
        "kd": low_samples * sum(weak) + sum(strong) + sum(weak[len(both_views) :]),
        "class_correlation": low_classes * class_correlation,
        "batch_correlation": low_samples * batch_correlation,
    }


def _log_probs(logits: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """Return log-probabilities at each temperature, (temperatures, B, C), of logits (B, C)."""
    return F.log_softmax(torch.stack([logits / temperature for temperature in temperatures]), dim=2)


def _divergences(student: Tensor, teacher: Tensor, temperatures: tuple[float, ...]) -> list[Tensor]:
    """Return T^2 * KL(teacher || student), averaged over the batch, of log-probabilities (temperatures, B, C)."""
    divergences = F.kl_div(student, teacher, reduction="none", log_target=True).sum(2).mean(1)
    return [value * temperature**2 for value, temperature in zip(divergences.unbind(), temperatures, strict=True)]


def _correlations(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances between products of probabilities S and T, (temperatures, B, C), by class and by sample.

    Class correlation: |T'T - S'S|^2 / C. Batch correlation: |TT' - SS'|^2 / B. Both are summed over temperatures.

    With total = T + S, gap = T - S and cross = gap total', the differences of products are TT' - SS' = (cross + cross')
    / 2 and T'T - S'S = (total' gap + gap' total) / 2, and the squared norm of the latter is (<total total', gap gap'> +
    <cross, cross'>) / 2. So no tensor is larger than (B, B), while T'T is (C, C): with 64 samples of 1000 classes this
    takes an eighth of the time.
    """
    _, batch_size, classes = student.shape
    # Autocast would compute these products in bfloat16.
    with torch.autocast(device_type=student.device.type, enabled=False):
        total, gap = teacher + student, teacher - student
        cross = gap @ total.mT
        class_distance = ((total @ total.mT) * (gap @ gap.mT) + cross * cross.mT).sum() / 2
        batch_distance = (cross + cross.mT).square().sum() / 4
    return class_distance / classes, batch_distance / batch_size


def _low_confidence_shares(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of samples, and of classes, with a teacher confidence of at most the median, 0-d each.

    The share is one half, unless the count is odd or confidences tie, as a sharp teacher's confidences tie at 1.
    """
    probs = F.softmax(teacher_logits.detach(), dim=1)
    sample_confidence, class_confidence = probs.amax(1), probs.sum(0)
    low_samples = (sample_confidence <= sample_confidence.median()).to(probs.dtype)
    low_classes = (class_confidence <= class_confidence.median()).to(probs.dtype)
    return low_samples.mean(), low_classes.mean()


class MLKDLoss(DistillationLoss):
    """`mlkd_loss` as a method of a recipe.

    Args:
        temperature: the first of the five, above 0.
        weight: of all three terms; see `DistillationLoss`.

    Raises:
        HfkdError: temperature or weight is out of range; in forward, the outputs have no strong view.
    """

    citation = """
        @inproceedings{jin2023multilevel,
            title = {Multi-level Logit Distillation},
            author = {Jin, Ying and Wang, Jiaqi and Lin, Dahua},
            booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
            year = {2023},
        }
    """

    views = 2
    reads_raw_logits = True  # for the correlations, see point 4

    def __init__(self, temperature: float = 4.0, weight: float = 1.0):
        super().__init__(weight)
        self.temperature = positive("temperature", temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if student.strong is None or teacher.strong is None:
            raise HfkdError(
                "mlkd reads two views of each image, but the outputs hold no strong view: give data with views=2"
            )
        return mlkd_loss(
            student.logits,
            teacher.logits,
            student.strong.logits,
            teacher.strong.logits,
            self.temperature,
            self.logit_standardization,
        )
