"""Layers of a network, from any library, found by stage index, path or role."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

from ..errors import HfkdError, nearest
from .headless import HeadlessNetwork

# A stage index into timm's `feature_info` (negative: from the end), a module path, with or without INPUT or AFFINE,
# EMBEDDING or AVERAGED_MAP.
Layer = int | str

EMBEDDING = "embedding"  # the pooled input of the classifier
AVERAGED_MAP = "averaged_map"  # the input of the global pooling
AFFINE = ":affine"  # "layer3.8.bn2:affine": scale and shift of a norm, (2, C)
INPUT = ":input"  # "layer3.8.act2:input": what the module reads, for an activation the map before it


def find_layer(model: nn.Module, layer: Layer) -> nn.Module:
    """Return the module at a stage index or a path; for a wrapped timm model, inside the wrapper.

    Raises:
        HfkdError: if there is none; the message names near ones.
    """
    inner = timm_model_of(model)
    headless = isinstance(inner, HeadlessNetwork)
    name = type(inner.backbone if headless else inner).__name__
    modules = inner.named_layers() if headless else dict(inner.named_modules())
    if isinstance(layer, str):
        if layer in modules:
            return modules[layer]
        near = nearest(layer, modules, n=3, cutoff=0.3)
        raise HfkdError(f"{name} has no layer '{layer}'. Near are {', '.join(near) or ', '.join(list(modules)[1:9])}.")
    paths = stages_of(model)
    if not -len(paths) <= layer < len(paths):
        listed = ", ".join(f"{index} ({path})" for index, path in enumerate(paths))
        raise HfkdError(f"{name} has no stage {layer}. Stages: {listed}.")
    return modules[paths[layer]]


def stages_of(model: nn.Module) -> list[str]:
    """Return the module paths of a timm model's stages, from the stem to the deepest.

    Raises:
        HfkdError: for a model of another library, which has no such table.
    """
    inner = timm_model_of(model)
    stages = getattr(inner, "feature_info", None)
    if stages is None:
        raise HfkdError(
            f"{type(inner).__name__} has no stage indices, which only timm models have: name its layers by their "
            f"module paths, e.g. '{[path for path, _ in inner.named_modules()][-1]}'."
        )
    return [stage["module"] for stage in stages]


def find_classifier(model: nn.Module) -> nn.Module:
    """Return the module that computes the logits.

    For a timm model it is the one from `get_classifier`, with two heads the distillation head. For other models it is
    the last linear layer.

    Raises:
        HfkdError: if there is none.
    """
    inner = timm_model_of(model)
    if hasattr(inner, "get_classifier"):  # timm's
        classifiers = inner.get_classifier()
        return classifiers[-1] if isinstance(classifiers, tuple) else classifiers
    linear = [module for module in inner.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise HfkdError(f"{type(inner).__name__} has no linear layer that could be its classifier.")
    return linear[-1]


def classifier_names(model: nn.Module) -> set[str]:
    """Return the names of the classifier's parameters in a timm or transformers model; with two heads, of both."""
    inner: Any = timm_model_of(model)
    if not hasattr(inner, "get_classifier"):  # of transformers
        return {name for name in inner.state_dict() if not name.startswith(f"{inner.base_model_prefix}.")}
    classifiers = inner.get_classifier()
    classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    own = {id(parameter) for classifier in classifiers for parameter in classifier.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def find_pooling(model: nn.Module) -> nn.Module:
    """Return the module that averages the last map: timm's `global_pool`, else the last that averages to a fixed size.

    Raises:
        HfkdError: if there is none.
    """
    modules = list(timm_model_of(model).named_modules())
    pools = [module for path, module in modules if path.rpartition(".")[2] == "global_pool"]
    pools = pools or [module for _, module in modules if isinstance(module, nn.AdaptiveAvgPool2d)]
    if not pools:
        raise HfkdError(
            f"{type(timm_model_of(model)).__name__} has no module that averages its last map, and a loss reads what it "
            "averages: take a CNN in its place, or leave the loss (or its `regions`) out."
        )
    return pools[-1]


def settle_layers(losses: Iterable[nn.Module], student: nn.Module, teacher: nn.Module | None) -> None:
    """Set the layers of losses that leave them open (None) to every stage except the stem, and `beside_stages`.

    Args:
        teacher: None without a network, as from a cache; its layers then stay as they are.

    Raises:
        HfkdError: for a network without stages.
    """
    for loss in losses:
        if loss.student_layers is None:
            loss.student_layers = [*range(1, len(stages_of(student))), *loss.beside_stages]
        if loss.teacher_layers is None and teacher is not None:
            loss.teacher_layers = [*range(1, len(stages_of(teacher))), *loss.beside_stages]


def timm_model_of(model: nn.Module) -> nn.Module:
    """Return the timm model inside transformers' wrapper; any other model is returned as it is."""
    return model.timm_model if isinstance(model, TimmWrapperPreTrainedModel) else model
