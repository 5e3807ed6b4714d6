"""Checks of labels against logits."""

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
