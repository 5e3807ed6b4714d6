"""Gradient checkpointing: the backward pass runs parts of the student again, without updating running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

from ..errors import HfkdError

# Original buffers of the modules that run again. Meanwhile copies stand in their place and take the second update.
_ORIGINAL_BUFFERS: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def recomputing() -> bool:
    """Return True within a backward pass, where gradient checkpointing repeats an earlier forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def use_gradient_checkpointing(student: nn.Module, settings: Mapping[str, Any]) -> None:
    """Prepare a student for gradient checkpointing, so that running statistics are updated once a step.

    A layer that runs again in the backward pass would update its BatchNorm statistics twice. With this, the student
    trains as it does without checkpointing.

    Raises:
        HfkdError: if the student does not support checkpointing, or not with these settings.
    """
    wrapped = isinstance(student, TimmWrapperPreTrainedModel)
    name = type(student.timm_model if wrapped else student).__name__
    if not isinstance(student, PreTrainedModel) or not student.supports_gradient_checkpointing:
        raise HfkdError(
            f"gradient_checkpointing: {name} does not support it. Leave it out, or take a student of timm or "
            "transformers that does, such as cifar_*, timm's ResNets or any ViT."
        )
    if settings.get("use_reentrant"):
        raise HfkdError(
            "gradient_checkpointing_kwargs: use_reentrant must be false, or features would have no gradients."
        )
    if wrapped:
        ignored = sorted(settings.keys() - {"use_reentrant"})
        if ignored:
            raise HfkdError(f"gradient_checkpointing_kwargs: {ignored[0]} has no effect on {name}, a model of timm.")
        # Checkpointing is switched on now, before the dry run, which must call the layers as training does: taps sit
        # on the modules that are called.
        student.timm_model.set_grad_checkpointing(True)
    for module in student.modules():
        if any(buffer.startswith("running_") for buffer, _ in module.named_buffers(recurse=False)):
            module.register_forward_pre_hook(_swap_in_copies)
            # Always called: torch stops a repeated forward with an exception once it has the tensors that it needs.
            module.register_forward_hook(_restore_buffers, always_call=True)


def _swap_in_copies(module: nn.Module, arguments: tuple) -> None:
    if recomputing() and module not in _ORIGINAL_BUFFERS:
        _ORIGINAL_BUFFERS[module] = dict(module.named_buffers(recurse=False))
        for name, buffer in _ORIGINAL_BUFFERS[module].items():
            setattr(module, name, buffer.clone())


def _restore_buffers(module: nn.Module, arguments: tuple, output: Tensor | None) -> None:
    if recomputing():
        for name, buffer in _ORIGINAL_BUFFERS.pop(module, {}).items():
            setattr(module, name, buffer)
