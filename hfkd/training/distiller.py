"""Everything that learns, as one module: what DDP wraps, the optimizer updates and torch.compile sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from ..losses.standardize import at_least_float32
from ..networks.features import Outputs, Taps, forward_views, has_two_heads, logits_of, train_heads_apart


class Distiller(nn.Module):
    """Student and losses in one forward.

    Args:
        student: the network to train.
        losses: distillation losses by name, each a `DistillationLoss`.
        ce_weight: weight of the cross-entropy with the labels, summed over the views of the batch.

    Raises:
        ValueError: if a loss names a layer that the student does not have, or if a class head would not train.
    """

    def __init__(self, student: nn.Module, losses: nn.ModuleDict, ce_weight: float):
        super().__init__()
        self.student = student
        self.losses = losses
        self.ce_weight = ce_weight
        layers = [layer for loss in losses.values() for layer in loss.student_layers]
        self.taps = Taps(student, layers) if layers else None
        # DDP's name for what it need not broadcast before every forward: CRD's memory would be most of a step.
        self._ddp_params_and_buffers_to_ignore = [
            f"losses.{name}.{buffer}" for name, loss in losses.items() for buffer in loss.replicated_buffers
        ]
        # Without a loss that reads logits, both heads learn the labels by their average: each alone would stay as it
        # was made, and evaluation averages it in.
        self.two_heads = has_two_heads(student) and any(loss.reads_logits for loss in losses.values())
        if has_two_heads(student):
            train_heads_apart(student, self.two_heads)
        if self.two_heads and ce_weight == 0:
            raise HfkdError(
                "ce_weight is 0, and the student has a class head that only the cross-entropy trains, while evaluation "
                "averages both heads: set ce_weight above 0, or take a student without a distillation token."
            )

    def predict(self, batch: dict[str, Tensor]) -> Outputs:
        """The student's outputs for every view in `batch`, in float32 at least."""
        outputs = forward_views(self.student, batch, self.taps, self.two_heads)
        outputs.features = {layer: at_least_float32(feature) for layer, feature in outputs.features.items()}
        for view in outputs.views():
            view.logits, view.class_logits = at_least_float32(view.logits), at_least_float32(view.class_logits)
        return outputs

    def logits(self, pixel_values: Tensor) -> Tensor:
        """The student's, (B, C), for evaluation."""
        return logits_of(self.student, pixel_values)

    def forward(self, batch: dict[str, Tensor], teacher: Outputs | None) -> dict[str, Tensor]:
        """Weighted loss terms by name (`loss_ce`, `loss_kd`, `loss_mlkd_class_correlation`, ...), 0-d each.

        Their sum is the training loss. The losses run outside autocast, in float32 at least: in bf16 a KL term is off
        by several percent.
        """
        student = self.predict(batch)
        with torch.autocast(student.logits.device.type, enabled=False):
            terms = {}
            if self.ce_weight > 0:
                views = [F.cross_entropy(view.class_logits, batch["labels"]) for view in student.views()]
                terms["loss_ce"] = self.ce_weight * sum(views)
            for name, loss in self.losses.items():
                value = loss(student, teacher, batch)
                if isinstance(value, Tensor):
                    value = {"": value}
                for term, term_value in value.items():
                    key = f"loss_{name}_{term}" if term else f"loss_{name}"
                    terms[key] = loss.weight * term_value
        return terms

    def metrics(self) -> dict[str, Tensor]:
        """What the losses want in the log beside their terms, such as CTKD's temperature; 0-d tensors."""
        return {
            f"{name}_{metric}": value for name, loss in self.losses.items() for metric, value in loss.metrics().items()
        }
