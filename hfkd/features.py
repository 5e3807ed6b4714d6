"""What a network takes and what it says of a batch, whatever library it comes from."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.models.timm_wrapper import TimmWrapperForImageClassification

Layer = int | str  # a stage index of timm's `feature_info`, or a module path


@dataclass(frozen=True)
class InputSpec:
    """What a network expects of its input: side in pixels, and the mean and std (RGB, images in [0, 1])."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass
class Outputs:
    """The outputs of one network for one view of a batch.

    Attributes:
        logits: (B, C), what is compared with the other network: of a student with two heads in training, those of the
            distillation head.
        class_logits: (B, C), what the cross-entropy takes: those of the class head; `logits` where there is one head.
        features: what the tapped layers gave, under the names they were asked for by.
        strong: the outputs for the strongly augmented view of the same images, where a loss asked for two views.
    """

    logits: Tensor
    class_logits: Tensor
    features: dict[Layer, Tensor] = field(default_factory=dict)
    strong: Outputs | None = None

    def views(self) -> list[Outputs]:
        return [self] if self.strong is None else [self, self.strong]


class Taps:
    """Records what named layers of a network give during each forward.

    Args:
        model: the network; it gets a forward hook on each layer.
        layers: stage indices into the `feature_info` of a timm model, or module paths.

    Raises:
        ValueError: for a layer that does not exist, naming near ones.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]):
        self._recorded: dict[Layer, Tensor] = {}
        for layer in dict.fromkeys(layers):
            find_layer(model, layer).register_forward_hook(functools.partial(self._record, layer))

    def _record(self, layer: Layer, module: nn.Module, arguments, output) -> None:
        output = output[0] if isinstance(output, tuple) else output  # transformers' blocks, PiT's stages
        if not isinstance(output, Tensor):
            raise ValueError(f"The layer {layer!r} gives {type(output).__name__}, not a tensor: name another one.")
        self._recorded[layer] = output

    def take(self) -> dict[Layer, Tensor]:
        """What the layers gave since the last call."""
        recorded, self._recorded = self._recorded, {}
        return recorded


def find_layer(model: nn.Module, layer: Layer) -> nn.Module:
    """The module that a stage index or a path stands for; in a wrapped timm model, inside the wrapper.

    Raises:
        ValueError: if there is none, naming near ones.
    """
    inner = model.timm_model if isinstance(model, TimmWrapperForImageClassification) else model
    name = type(inner).__name__
    modules = dict(inner.named_modules())
    if isinstance(layer, str):
        if layer in modules:
            return modules[layer]
        near = difflib.get_close_matches(layer, modules, n=3, cutoff=0.3)
        raise ValueError(f"{name} has no layer '{layer}'. Near are {', '.join(near) or ', '.join(list(modules)[1:9])}.")
    stages = getattr(inner, "feature_info", None)  # timm's; other libraries have no such table
    if stages is None:
        raise ValueError(
            f"{name} has no stage indices, which are timm's: name the layer {layer} by its module path, e.g. "
            f"'{list(modules)[-1]}'."
        )
    paths = [stage["module"] for stage in stages]
    if not 0 <= layer < len(paths):
        listed = ", ".join(f"{index} ({path})" for index, path in enumerate(paths))
        raise ValueError(f"{name} has no stage {layer}. Stages: {listed}.")
    return modules[paths[layer]]


def logits_of(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Logits (B, C) of a transformers classifier, a timm model or a module that returns a tensor.

    Raises:
        TypeError: if the model returns something else.
    """
    return _forward(model, pixel_values).logits


def forward_views(model: nn.Module, batch: dict[str, Tensor], taps: Taps | None = None) -> Outputs:
    """One forward per view in the batch: the weak one, then the strong one if the batch holds it.

    Two forwards, not one over the concatenation: each view has its own BatchNorm statistics, as in the published
    training code. Features are those of the weak view.
    """
    outputs = _forward(model, batch["pixel_values"])
    if taps is not None:
        outputs.features = taps.take()
    if "pixel_values_strong" in batch:
        outputs.strong = _forward(model, batch["pixel_values_strong"])
        if taps is not None:
            taps.take()
    return outputs


def _forward(model: nn.Module, pixel_values: Tensor) -> Outputs:
    output = model(pixel_values)
    logits = output if isinstance(output, (Tensor, tuple)) else getattr(output, "logits", None)
    if model.training and getattr(output, "distillation_logits", None) is not None:
        logits = (output.cls_logits, output.distillation_logits)  # transformers' DeiT averages them in training too
    class_logits, logits = logits if isinstance(logits, tuple) and len(logits) == 2 else (logits, logits)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise TypeError(
            f"{type(model).__name__} must return logits of shape (batch, classes), or an output with such `.logits`; "
            f"got {type(output).__name__}"
            + (f" with logits {tuple(logits.shape)}." if isinstance(logits, Tensor) else ".")
        )
    return Outputs(logits, class_logits)


def use_two_heads(model: nn.Module) -> None:
    """Makes a distilled DeiT or PiT of timm give both heads' logits in training; other models stay as they are.

    In evaluation, and once exported, they give the average.
    """
    inner = model.timm_model if isinstance(model, TimmWrapperForImageClassification) else model
    enable = getattr(inner, "set_distilled_training", None)  # timm's way of saying that a model has two heads
    if enable is not None:
        enable(True)
