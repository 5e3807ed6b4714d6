"""ABKD: the alpha-beta divergence, which balances large errors against large probabilities.

Paper: Wang, Yang, Wang, Wang, Xu and Huang, ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge
Distillation via alpha-beta-Divergence, ICML 2025.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import paired, reduced
from .checks import finite, positive
from .regions import PerImageLoss


def abkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """Return the sum over the classes of the alpha-beta divergence of the probabilities at T, averaged over the batch.

    With p of the teacher and q of the student, the divergence is

        -(p^alpha q^beta - alpha / s * p^s - beta / s * q^s) / (alpha beta),    s = alpha + beta,

    and where this is not defined:

        alpha = beta = 0:   log(p / q)^2 / 2
        alpha = 0:          (p^beta - q^beta - beta q^beta log(p / q)) / beta
        beta = 0:           (q^alpha - p^alpha + alpha p^alpha log(p / q)) / alpha
        alpha + beta = 0:   ((p / q)^alpha - 1 - alpha log(p / q)) / alpha

    alpha = 1, beta = 0 is the divergence of KD. There is no factor T^2. The last three lines are those of the released
    code: the first formula tends to them divided once more by beta, alpha and alpha.

    All is computed from log-probabilities. A power with a negative exponent that exceeds the square root of the largest
    number of the precision (1e19 in float32) is held there, without a gradient.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        alpha: exponent of the teacher's probabilities.
        beta: exponent of the student's probabilities.
        temperature: T, above 0.
        reduction: "mean", or "none" for the value of each image.

    Returns:
        0-d, or (B,) without reduction; float32 or float64.

    Raises:
        ValueError: the logits' shapes differ or are not (B, C).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=1)
    return reduced(_divergences(teacher_log_probs, student_log_probs, alpha, beta).sum(dim=1), reduction)


def _divergences(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """Return the divergence of each class, (B, C).

    (p^s - q^s) / s - (p^alpha q^beta - q^s) / alpha, divided by beta, is the formula in an order in which small
    exponents cancel nothing: each bracket is a step of the exponential function, and proportional to its divisor.
    """
    ratio = log_p - log_q
    total = alpha + beta
    if alpha == 0 and beta == 0:
        return ratio.square() / 2
    if alpha == 0:
        return _step(beta * log_q, beta * ratio) / beta - _exp(beta * log_q) * ratio
    if beta == 0:
        return _exp(alpha * log_p) * ratio - _step(alpha * log_q, alpha * ratio) / alpha
    if total == 0:
        return _step(torch.zeros_like(ratio), alpha * ratio) / alpha - ratio
    powers = _step(total * log_q, total * ratio) / total
    return (powers - _step(total * log_q, alpha * ratio) / alpha) / beta


def _step(start: Tensor, length: Tensor) -> Tensor:
    """Return exp(start + length) - exp(start), accurate for short steps and without overflow for long ones."""
    rises = length > 0
    # Not clamp: its gradient at 0, where the networks agree, depends on the version of torch.
    up = -_exp(start + length) * torch.expm1(-torch.where(rises, length, 0.0))
    down = _exp(start) * torch.expm1(torch.where(rises, 0.0, length))
    return torch.where(rises, up, down)


def _exp(exponent: Tensor) -> Tensor:
    """Return exp(exponent), at most the square root of the largest number."""
    return exponent.clamp(max=math.log(torch.finfo(exponent.dtype).max) / 2).exp()


class ABKDLoss(PerImageLoss):
    """`abkd_loss` as a method of a recipe.

    In a run with `logit_standardization` the released code multiplies the loss by T^2; here `weight` does.

    Args:
        alpha: exponent of the teacher's probabilities, any finite number.
        beta: exponent of the student's probabilities, any finite number.
        temperature: above 0.
        weight: see `DistillationLoss`.
        regions: see `PerImageLoss`.

    Raises:
        ValueError: one of them out of range.
    """

    citation = """
        @inproceedings{wang2025abkd,
            title = {{ABKD}: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
                $\\alpha$-$\\beta$-Divergence},
            author = {Wang, Guanghui and Yang, Zhiyong and Wang, Zitai and Wang, Shi and Xu, Qianqian and Huang,
                Qingming},
            booktitle = {International Conference on Machine Learning (ICML)},
            year = {2025},
        }
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.5,
        temperature: float = 4.0,
        weight: float = 1.0,
        regions: list | None = None,
    ):
        super().__init__(weight, regions)
        self.alpha = finite("alpha", alpha)
        self.beta = finite("beta", beta)
        self.temperature = positive("temperature", temperature)

    @property
    def teacher_temperature(self) -> float:
        return self.temperature

    def per_image(self, student_logits: Tensor, teacher_logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        settings = self.alpha, self.beta, self.temperature
        return abkd_loss(student_logits, teacher_logits, *settings, reduction="none")
