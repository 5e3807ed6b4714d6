"""OFA-KD: classifiers over the student's stages learn the teacher's logits, whatever the two architectures.

Paper: Hao, Guo, Han, Tang, Hu, Wang and Xu, One-for-All: Bridge the Gap Between Heterogeneous Architectures in
Knowledge Distillation, NeurIPS 2023.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Outputs, paired
from .branch_heads import TokenHead, map_head
from .checks import count, not_negative, positive
from .feature_maps import MapsLoss, read_map, summed
from .labels import check_classes
from .projectors import images_for_batch_norm
from .standardize import at_least_float32, standardize


def ofa_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, eps: float, temperature: float) -> Tensor:
    """Return -sum_c [(p_c + 1[c = y])^eps - 1[c = y]] log(q_c), averaged over the batch.

    p and q are the probabilities of teacher and student at T, y the label. There is no factor T^2. eps = 1 is the
    cross-entropy with p; a larger eps gives the label more, and the unlikely classes less.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        labels: (B,), int64, each in [0, C).
        eps: above 0.
        temperature: T, above 0.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the logits' shapes differ or are not (B, C), or labels are not (B,).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    check_classes(labels, student_logits)
    probs = F.softmax(teacher_logits / temperature, dim=1)
    is_label = torch.zeros_like(probs, dtype=torch.bool).scatter(1, labels[:, None], True)
    # (1 + p)^eps - 1 by way of logarithms, for a small p would be lost beside the 1.
    modulated = torch.where(is_label, torch.expm1(eps * torch.log1p(probs)), probs**eps)
    return -(modulated * F.log_softmax(student_logits / temperature, dim=1)).sum(dim=1).mean()


class OFALoss(MapsLoss):
    """`ofa_loss` as a method of a recipe: on the student's logits, and on those of a learnt head for each stage.

    A stage that gives a map has a head of separable convolutions, which halve it to the sides of the deepest stage.
    Tokens have a head of transformer blocks: the first of N layers N - 1, the next one less, the last two one each.
    Published are the last blocks of the four quarters of a vision transformer. BatchNorm takes its statistics over the
    images of one process. The label of a mixed image (mixup, CutMix) is the class with the largest share, as released.

    Args:
        student_layers: stage indices or module paths, shallow to deep. None: every stage except the first.
        eps: above 0; published are 1.0 to 1.5.
        temperature: above 0.
        logits: factor of the term of the student's logits.
        branches: factor of the term of the heads.
        min_channels: the heads over maps have as many channels as the deepest stage, but no fewer than these: in the
            release, than the teacher's embedding has.
        weight: of both terms; see `DistillationLoss`.

    Raises:
        HfkdError: a parameter is out of range, or student_layers is no list of layers.
    """

    citation = """
        @inproceedings{hao2023one,
            title = {One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation},
            author = {Hao, Zhiwei and Guo, Jianyuan and Han, Kai and Tang, Yehui and Hu, Han and Wang, Yunhe and Xu,
                Chang},
            booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
            year = {2023},
        }
    """

    reads_labels = True
    reads_logits = True

    def __init__(
        self,
        student_layers: list | None = None,
        eps: float = 1.0,
        temperature: float = 1.0,
        logits: float = 1.0,
        branches: float = 1.0,
        min_channels: int = 0,
        weight: float = 1.0,
    ):
        super().__init__(student_layers, weight=weight)
        self.teacher_layers = ()
        self.eps = positive("eps", eps)
        self.temperature = positive("temperature", temperature)
        self.factors = {"logits": not_negative("logits", logits), "branches": not_negative("branches", branches)}
        self.min_channels = count("min_channels", min_channels, least=0)

    @property
    def teacher_temperature(self) -> float:
        return self.temperature

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        maps = [read_map(student, "student", layer) for layer in self.student_layers]
        self.least_images = images_for_batch_norm(maps)
        classes, side = student.logits.shape[1], maps[-1].shape[2]
        channels = max(maps[-1].shape[1], self.min_channels)
        self.heads = nn.ModuleList()
        for number, (layer, one) in enumerate(zip(self.student_layers, maps, strict=True), 1):
            if student.features[layer].ndim == 3:
                blocks = max(len(maps) - number, 1)
                self.heads.append(TokenHead(one.shape[1], one.shape[2:].numel(), blocks, classes))
            else:
                halvings = max(round(math.log2(one.shape[2] / side)), 0)
                self.heads.append(map_head(one.shape[1], halvings, channels, classes))

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        student_logits, teacher_logits = self.logits(student, teacher)
        with self.autocast(student.logits.device):
            pairs = zip(self.heads, self.student_layers, strict=True)
            branches = [head(student.features[layer]) for head, layer in pairs]
        branches = [standardize(one) if self.logit_standardization else at_least_float32(one) for one in branches]
        settings = teacher_logits, self.classes(batch), self.eps, self.temperature
        terms = {
            "logits": ofa_loss(student_logits, *settings),
            "branches": summed(ofa_loss(branch, *settings) for branch in branches),
        }
        return {name: self.factors[name] * term for name, term in terms.items()}
