"""Optimisation: weight decay, fused SGD, learning rates by layer, and schedules of steps."""

from __future__ import annotations

import contextlib
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import accelerate.optimizer
import torch
from accelerate.utils import DistributedType
from timm.optim import param_groups_layer_decay
from torch import nn

from ..errors import HfkdError
from ..networks.features import timm_model_of

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


def layer_scales(student: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """Return the factor of the learning rate of each parameter that is trained, by timm's `param_groups_layer_decay`.

    The classifier has 1, and each layer before it `layer_decay` of the next one's.

    Raises:
        HfkdError: for a network that does not tell its layers, as most of timm's do by `group_matcher`.
    """
    network = timm_model_of(student)
    if not hasattr(network, "group_matcher"):
        raise HfkdError(
            f"layer_decay needs a network of timm that tells its layers (group_matcher), and {type(network).__name__} "
            "does not: leave it out."
        )
    groups = param_groups_layer_decay(network, layer_decay=layer_decay)
    return {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}


def scale_learning_rates(optimizer: torch.optim.Optimizer, scales: Mapping[nn.Parameter, float]) -> None:
    """Split the groups of an optimizer by factors of the learning rate; a parameter without one, as of a loss, has 1.

    The first group has the highest rate, which is what Trainer logs.
    """
    groups = []
    for group in optimizer.param_groups:
        by_scale = defaultdict(list)
        for parameter in group["params"]:
            by_scale[scales.get(parameter, 1.0)].append(parameter)
        groups += [group | {"params": held, "lr": group["lr"] * scale} for scale, held in by_scale.items()]
    optimizer.param_groups[:] = sorted(groups, key=lambda group: -group["lr"])


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
