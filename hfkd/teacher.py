"""The frozen network that teaches."""

from __future__ import annotations

import functools

import torch
from torch import nn

from .features import Outputs, forward_views
from .losses.standardize import at_least_float32


def _refuse_train_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `module.train`."""
    if mode:
        raise RuntimeError("A teacher stays in eval mode: its BatchNorm statistics and its dropout must not train.")
    return module


class Teacher:
    """A classifier that is frozen in place and kept outside every module tree.

    It is no `nn.Module`, so it ends up in no checkpoint, no optimizer and no DDP bucket. The model given becomes part
    of it: its parameters stop requiring gradients and `model.train()` raises from then on.

    Args:
        model: a transformers image classifier, a timm model or a module that returns logits (B, C).
        name: what to call it in results; by default the class of the model.
    """

    def __init__(self, model: nn.Module, name: str | None = None):
        self.name = name or type(model).__name__
        self.model = model.requires_grad_(False).eval()
        for module in self.model.modules():
            module.train = functools.partial(_refuse_train_mode, module)
        self._autocast_dtype: torch.dtype | None = None

    def prepare(
        self, device: torch.device, autocast_dtype: torch.dtype | None, channels_last: bool
    ) -> None:
        """Moves the teacher to a device and into the precision and layout of the run.

        Convolution and linear weights are converted to the autocast type once, since autocast would otherwise convert
        them again in every step (its weight cache lives for one forward). Norms keep float32 weights, as under
        autocast, so the logits are the same.

        Raises:
            ValueError: if the weights were converted to another type before.
        """
        weights = [module for module in self.model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        half = {module.weight.dtype for module in weights} & {torch.float16, torch.bfloat16}
        if half - {autocast_dtype}:
            raise ValueError(
                f"This teacher's weights were converted to {half.pop()} for an earlier trainer and cannot serve in "
                f"{autocast_dtype or torch.float32}: load the teacher again."
            )
        self.model.to(device)
        self._autocast_dtype = autocast_dtype
        if autocast_dtype is not None:
            for module in weights:
                module.to(autocast_dtype)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> Outputs:
        """Outputs for every view in `batch` (`pixel_values` and maybe `pixel_values_strong`), logits in float32."""
        device_type = batch["pixel_values"].device.type
        with torch.autocast(device_type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            outputs = forward_views(self.model, batch)
        outputs.logits = at_least_float32(outputs.logits)
        if outputs.strong is not None:
            outputs.strong.logits = at_least_float32(outputs.strong.logits)
        return outputs

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())
