"""Checks of labels against logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import HfkdError


def check_classes(labels: Tensor, logits: Tensor) -> None:
    """Check that there is one class index for each row of logits.

    Args:
        labels: (B,), int64.
        logits: (B, C).

    Raises:
        ValueError: the labels are not (B,).
    """
    if labels.shape != logits.shape[:1]:
        raise HfkdError(
            f"labels of shape ({logits.shape[0]},) expected: one class index for each row of logits, "
            f"got {tuple(labels.shape)}"
        )


def dominant_classes(labels: Tensor) -> Tensor:
    """Return class indices (B,): labels (B,) as they are; of shares (B, C), the class with the largest share."""
    return labels.argmax(dim=1) if labels.ndim == 2 else labels


def log_probs_of_others(logits: Tensor, columns: Tensor) -> Tensor:
    """Return log-probabilities (B, C) among all classes but those of the columns (B, K), whose entries are 0."""
    return F.log_softmax(logits.scatter(1, columns, -torch.inf), dim=1).scatter(1, columns, 0.0)
