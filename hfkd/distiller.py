"""Everything that learns, as one module: what DDP wraps, the optimizer updates and torch.compile sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import Outputs, forward_views
from .losses.standardize import at_least_float32


class Distiller(nn.Module):
    """Student and losses in one forward.

    Args:
        student: the network to train.
        losses: distillation losses by name, each a `DistillationLoss`.
        ce_weight: weight of the cross-entropy with the labels, summed over the views of the batch.
    """

    def __init__(self, student: nn.Module, losses: nn.ModuleDict, ce_weight: float):
        super().__init__()
        self.student = student
        self.losses = losses
        self.ce_weight = ce_weight

    def forward(self, batch: dict[str, Tensor], teacher: Outputs | None) -> dict[str, Tensor]:
        """Weighted loss terms by name (`loss_ce`, `loss_kd`, `loss_mlkd_class_correlation`, ...), 0-d each.

        Their sum is the training loss. The losses run outside autocast, in float32 at least: in bf16 a KL term is off
        by several percent.
        """
        student = forward_views(self.student, batch)
        with torch.autocast(student.logits.device.type, enabled=False):
            student.logits = at_least_float32(student.logits)
            if student.strong is not None:
                student.strong.logits = at_least_float32(student.strong.logits)
            terms = {}
            if self.ce_weight > 0:
                terms["loss_ce"] = self.ce_weight * self._cross_entropy(student, batch["labels"])
            for name, loss in self.losses.items():
                value = loss(student, teacher, batch)
                if isinstance(value, Tensor):
                    value = {"": value}
                for term, term_value in value.items():
                    key = f"loss_{name}_{term}" if term else f"loss_{name}"
                    terms[key] = loss.weight * term_value
        return terms

    def _cross_entropy(self, student: Outputs, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(student.logits, labels)
        if student.strong is not None:
            loss = loss + F.cross_entropy(student.strong.logits, labels)
        return loss

    def metrics(self) -> dict[str, Tensor]:
        """What the losses want in the log beside their terms, such as CTKD's temperature; 0-d tensors."""
        return {
            f"{name}_{metric}": value
            for name, loss in self.losses.items()
            for metric, value in loss.metrics().items()
        }
