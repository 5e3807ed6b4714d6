"""Frozen networks: copies that share the weights of a model and leave the model as it was."""

from __future__ import annotations

import copy
import functools

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..errors import RunError


def _refuse_train_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stand-in for `module.train` of a teacher's modules: it accepts only eval mode.

    Raises:
        RunError: if asked for train mode.
    """
    if mode:
        raise RunError("A teacher stays in eval mode: its BatchNorm statistics and its dropout must not train.")
    return module


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in eval mode that can be neither trained nor put into train mode.

    Its parameters and buffers are others, over the same memory: the copy takes none until it is converted to another
    type, layout or device. The model keeps its mode, its weights and its attributes. A model that accelerate has placed
    on several devices or FSDP has sharded is not copied: it is frozen itself.
    """
    if not (hasattr(model, "_hf_hook") or isinstance(model, FSDPModule)):
        tensors = [*model.parameters(), *model.buffers()]
        model = copy.deepcopy(model, {id(tensor): _alias(tensor) for tensor in tensors})
    model.requires_grad_(False).eval()
    for module in model.modules():
        module.train = functools.partial(_refuse_train_mode, module)  # type: ignore[method-assign]  # so frozen
    return model


def _alias(tensor: Tensor) -> Tensor:
    """Return another tensor over the same memory, a parameter for a parameter."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach()


def trainable_weights_in_common(model: nn.Module, other: nn.Module) -> bool:
    """Return True if a parameter that `model` trains lies in the memory of a weight of `other`."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in other.state_dict().values() if tensor.numel()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    return any(parameter.untyped_storage().data_ptr() in memory for parameter in trained)
