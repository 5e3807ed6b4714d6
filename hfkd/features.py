"""What a network says of a batch, whatever library it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Outputs:
    """The outputs of one network for one view of a batch.

    Attributes:
        logits: (B, C).
        strong: the outputs for the strongly augmented view of the same images, where a loss asked for two views.
    """

    logits: Tensor
    strong: Outputs | None = None


def logits_of(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Logits (B, C) of a transformers classifier, a timm model or a module that returns a tensor.

    Raises:
        TypeError: if the model returns something else.
    """
    output = model(pixel_values)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise TypeError(
            f"{type(model).__name__} must return logits of shape (batch, classes), or an output with such `.logits`; "
            f"got {type(output).__name__}" + (f" with logits {tuple(logits.shape)}." if logits is not None else ".")
        )
    return logits


def forward_views(model: nn.Module, batch: dict[str, Tensor]) -> Outputs:
    """One forward per view in the batch: the weak one, then the strong one if the batch holds it.

    Two forwards, not one over the concatenation: each view has its own BatchNorm statistics, as in the published
    training code.
    """
    strong = batch.get("pixel_values_strong")
    weak_logits = logits_of(model, batch["pixel_values"])
    return Outputs(weak_logits, None if strong is None else Outputs(logits_of(model, strong)))
