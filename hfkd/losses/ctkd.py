"""CTKD: KD at a temperature that is trained against the student, with a curriculum over the epochs.

Paper: Li, Li, Yang, Zhao, Song, Luo, Li and Yang, Curriculum Temperature for Knowledge Distillation, AAAI 2023.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from .base import DistillationLoss, Outputs, epoch_number, paired
from .checks import not_negative, positive
from .kd import kd_loss

RAW_TEMPERATURE = 1.0  # before the sigmoid, at the start of training
HIDDEN_FEATURES = 128


def ctkd_instance_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor) -> Tensor:
    """Return T^2 * sum of p * log(p / q) at each sample's own temperature T, averaged over the batch.

    p are the teacher's probabilities plus 1e-7, as in the released code. q are the student's probabilities.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: (B,), above 0. Gradients reach it.

    Returns:
        0-d, float32 or float64.

    Raises:
        HfkdError: the logits' shapes differ or are not (B, C), or temperature is not (B,).
    """
    student_logits, teacher_logits = paired(student_logits, teacher_logits)
    if temperature.shape != student_logits.shape[:1]:
        raise HfkdError(f"temperature of shape ({student_logits.shape[0]},) expected, got {tuple(temperature.shape)}")
    column = temperature[:, None]
    student_log_probs = F.log_softmax(student_logits / column, dim=1)
    teacher_probs = F.softmax(teacher_logits / column, dim=1) + 1e-7
    divergence = (teacher_probs * (teacher_probs.log() - student_log_probs)).sum(1)
    return (divergence * temperature**2).mean()


def curriculum_factor(progress: Tensor, curriculum_epochs: float) -> Tensor:
    """Return the factor of the temperature's gradient, 0-d: a cosine from 0 to -1, then -1.

    The factor is (cos(pi * min(epoch / curriculum_epochs, 1)) - 1) / 2, with epochs counted from 1. With 0 curriculum
    epochs it is -1 throughout.
    """
    # The epoch is at least 1, so with 0 curriculum epochs the quotient is infinite and the clamp gives 1.
    done = (epoch_number(progress) / curriculum_epochs).clamp(max=1)
    return (torch.cos(math.pi * done) - 1) / 2


def scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """Return the value unchanged, with its gradient multiplied by `factor`; a negative factor reverses it."""
    constant = value.detach()
    return constant + factor * (value - constant)


class GlobalTemperature(nn.Module):
    """One raw temperature for all samples."""

    def __init__(self):
        super().__init__()
        # Shape (1,) and not 0-d: FSDP does not shard 0-d parameters.
        self.raw = nn.Parameter(torch.full((1,), RAW_TEMPERATURE))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the raw temperature, 0-d."""
        return self.raw[0]


class InstanceTemperature(nn.Module):
    """Small network that predicts a raw temperature for each sample from both logits.

    It normalises with LayerNorm, not BatchNorm: LayerNorm takes batches of one and has no statistics to synchronise.
    The logits are detached. Otherwise the student would receive the reversed gradient through this network and learn to
    raise its own loss.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * classes, HIDDEN_FEATURES),
            nn.LayerNorm(HIDDEN_FEATURES),
            nn.ReLU(),
            nn.Linear(HIDDEN_FEATURES, HIDDEN_FEATURES),
            nn.LayerNorm(HIDDEN_FEATURES),
            nn.ReLU(),
            last := nn.Linear(HIDDEN_FEATURES, 1),
        )
        # Then it starts close to the global temperature.
        nn.init.constant_(last.bias, RAW_TEMPERATURE)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return raw temperatures (B,) for logits (B, C)."""
        logits = torch.cat([teacher_logits, student_logits], dim=1).detach()
        with torch.autocast(device_type=logits.device.type, enabled=False):
            return self.layers(logits.to(self.layers[0].get_parameter("weight").dtype)).squeeze(1)


class CTKDLoss(DistillationLoss):
    """KD at temperature start + end * sigmoid(raw), where raw is trained to raise the loss.

    The gradient of raw is multiplied by `curriculum_factor`. The temperature of the last step is logged.

    Args:
        instance_wise: True: one temperature for each sample, from the `InstanceTemperature` that `setup` builds. False:
            one temperature for all samples.
        start: lowest temperature, above 0.
        end: highest value that can be added to it, above 0.
        curriculum_epochs: epochs until the reversed gradient has its full size; 0 for full size at once.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: a parameter is out of range.
    """

    citation = """
        @inproceedings{li2023curriculum,
            title = {Curriculum Temperature for Knowledge Distillation},
            author = {Li, Zheng and Li, Xiang and Yang, Lingfeng and Zhao, Borui and Song, Renjie and Luo, Lei and Li,
                Jun and Yang, Jian},
            booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
            year = {2023},
        }
    """

    raw_temperature: nn.Module
    last_temperature: Tensor

    def __init__(
        self,
        instance_wise: bool = False,
        start: float = 1.0,
        end: float = 20.0,
        curriculum_epochs: float = 10.0,
        weight: float = 1.0,
    ):
        super().__init__(weight)
        self.instance_wise = instance_wise
        self.start = positive("start", start)
        self.end = positive("end", end)
        self.curriculum_epochs = not_negative("curriculum_epochs", curriculum_epochs)
        if not instance_wise:
            self.raw_temperature = GlobalTemperature()
        # A buffer, written in place: logging it neither waits for the device nor breaks a compiled graph.
        initial = self._temperature(torch.tensor(RAW_TEMPERATURE))
        self.register_buffer("last_temperature", initial, persistent=False)

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        if self.instance_wise:
            logits, _ = paired(student.logits, teacher.logits)
            self.raw_temperature = InstanceTemperature(logits.shape[1]).to(logits.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        student_logits, teacher_logits = paired(*self.logits(student, teacher))
        raw = self.raw_temperature(student_logits, teacher_logits)
        raw = scale_gradient(raw, curriculum_factor(batch["progress"], self.curriculum_epochs))
        temperature = self._temperature(raw)
        self.last_temperature.copy_(temperature.detach().mean())
        loss = ctkd_instance_loss if self.instance_wise else kd_loss
        return loss(student_logits, teacher_logits, temperature)

    def metrics(self) -> dict[str, Tensor]:
        """Return the `temperature` of the last forward, averaged over the batch if it is instance-wise."""
        return {"temperature": self.last_temperature.clone()}

    def _temperature(self, raw: Tensor) -> Tensor:
        return self.start + self.end * torch.sigmoid(raw)
