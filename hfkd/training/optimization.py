"""Optimisation of the published protocols: weight decay, fused SGD, and a learning rate of steps."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import accelerate.optimizer
import torch
from accelerate.utils import DistributedType
from torch import nn

# Names that a model need not list in `no_weight_decay`: the tokens and position embeddings of timm and transformers.
UNDECAYED = re.compile(
    r"(^|\.)(cls_token|dist\w*_token|pos_embed\w*|position_embeddings?|relative_position_bias\w*)($|\.)"
)


def decayed_parameter_names(model: nn.Module, all_parameters: bool) -> list[str]:
    """Return the names of the parameters that weight decay applies to.

    Args:
        all_parameters: every parameter, as in the CIFAR protocols. Otherwise the matrices and kernels that the model
            does not exempt (`no_weight_decay`), without tokens and position embeddings.
    """
    if all_parameters:
        return [name for name, _ in model.named_parameters()]
    exempt = set()
    for prefix, module in model.named_modules():
        if isinstance(getattr(type(module), "no_weight_decay", None), Callable):
            exempt |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
    return [
        name
        for name, value in model.named_parameters()
        if value.ndim > 1 and name not in exempt and not UNDECAYED.search(name)
    ]


def optimizer_settings(optimizer_class: type, settings: dict[str, Any], kind: DistributedType) -> dict[str, Any]:
    """Return an optimizer's keyword arguments with torch's fused SGD, one kernel in place of three a parameter.

    torch has no fused SGD for sharded parameters.
    """
    if optimizer_class is torch.optim.SGD:
        return {**settings, "fused": kind != DistributedType.FSDP}
    return settings


def multi_step_schedule(
    optimizer: torch.optim.Optimizer, milestones: Sequence[float], gamma: float, steps_per_epoch: int
) -> torch.optim.lr_scheduler.MultiStepLR:
    """Return the schedule that multiplies the learning rate by `gamma` after each of the epochs in `milestones`."""
    steps = [round(epoch * steps_per_epoch) for epoch in milestones]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma)


@contextlib.contextmanager
def lomo_looked_up_once() -> Iterator[None]:
    """Cache accelerate's search for the package of the LOMO optimizer while training.

    accelerate looks through all of sys.path twice in every update, more than a third of what Trainer adds to a step.
    """
    former = accelerate.optimizer.is_lomo_available
    accelerate.optimizer.is_lomo_available = functools.cache(former)
    try:
        yield
    finally:
        accelerate.optimizer.is_lomo_available = former
