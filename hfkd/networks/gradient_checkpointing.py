"""Gradient checkpointing: the backward pass runs parts of the student a second time, which must leave no trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.timm_wrapper import TimmWrapperForImageClassification

from ..errors import HfkdError

# The buffers in whose place copies stand while their module runs again.
_KEPT: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def recomputing() -> bool:
    """Is what runs now part of a backward pass? A forward then is one that ran before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def use_gradient_checkpointing(student: nn.Module, settings: Mapping[str, Any]) -> None:
    """Sees to it that what `gradient_checkpointing` runs twice counts once in running statistics, of BatchNorm above
    all: the student is then trained as it is without.

    Raises:
        ValueError: if the student cannot be checkpointed, or not in the way asked for.
    """
    wrapped = isinstance(student, TimmWrapperForImageClassification)
    name = type(student.timm_model if wrapped else student).__name__
    if not isinstance(student, PreTrainedModel) or not student.supports_gradient_checkpointing:
        raise HfkdError(
            f"gradient_checkpointing: a {name} does not know how to run its layers again. Leave it out, or take a "
            "student of timm or transformers that has it, such as cifar_*, timm's ResNets or any ViT."
        )
    if settings.get("use_reentrant"):
        raise HfkdError(
            "gradient_checkpointing_kwargs: use_reentrant must be false: else the losses' features have no gradients."
        )
    if wrapped:
        ignored = sorted(settings.keys() - {"use_reentrant"})
        if ignored:
            raise HfkdError(f"gradient_checkpointing_kwargs: {ignored[0]} has no effect on {name}, a model of timm.")
        # Now, and not when training starts: the dry run then calls the layers in the way that training does.
        student.timm_model.set_grad_checkpointing(True)
    for module in student.modules():
        if any(buffer.startswith("running_") for buffer, _ in module.named_buffers(recurse=False)):
            module.register_forward_pre_hook(_put_copies_in_place)
            module.register_forward_hook(_put_back, always_call=True)  # it may stop inside: torch needs no more


def _put_copies_in_place(module: nn.Module, arguments: tuple) -> None:
    if recomputing() and module not in _KEPT:
        _KEPT[module] = dict(module.named_buffers(recurse=False))
        for name, buffer in _KEPT[module].items():
            setattr(module, name, buffer.clone())


def _put_back(module: nn.Module, arguments: tuple, output: Tensor | None) -> None:
    if recomputing():
        for name, buffer in _KEPT.pop(module, {}).items():
            setattr(module, name, buffer)
