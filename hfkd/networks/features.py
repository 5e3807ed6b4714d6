"""Inputs and outputs of a network, from any library: input size, logits, named layers, two heads."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DeiTForImageClassificationWithTeacher
from transformers.models.timm_wrapper import TimmWrapperForImageClassification

from ..errors import HfkdError, WrongTypeError, nearest
from .gradient_checkpointing import recomputing

# A stage index into timm's `feature_info` (negative: from the end), a module path, or EMBEDDING.
Layer = int | str

EMBEDDING = "embedding"  # the pooled input of the classifier


@dataclass(frozen=True)
class InputSpec:
    """Expected input of a network: side in pixels, and mean and std (RGB, images in [0, 1])."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass
class Outputs:
    """Outputs of one network for one view of a batch.

    Attributes:
        logits: (B, C), compared with the other network's. For a student with two heads in training, the distillation
            head's.
        class_logits: (B, C), read by the cross-entropy. For two heads, the class head's; for one head, `logits`.
        features: outputs of the tapped layers, by the names under which they were requested.
        classifier: for a teacher whose logits are one linear layer over its embedding: this layer, frozen, reduced to
            the student's classes. None for other networks.
        standardized: True if the teacher's logits are Z-scores already.
        strong: outputs for the strongly augmented view of the same images, if a loss requested two views.
    """

    logits: Tensor
    class_logits: Tensor
    features: dict[Layer, Tensor] = field(default_factory=dict)
    classifier: nn.Linear | None = None
    standardized: bool = False
    strong: Outputs | None = None

    @property
    def embedding(self) -> Tensor:
        """(B, D), input of the classifier; with two heads, input of the distillation head.

        Only recorded for losses that name EMBEDDING.
        """
        return self.features[EMBEDDING]

    def views(self) -> list[Outputs]:
        """Return the outputs of each view: the weak one and, if there is one, the strong one."""
        return [self] if self.strong is None else [self, self.strong]


# Hooks of the latest taps of each model. They are kept outside the model, since a model may outlive its taps: a second
# trainer removes the hooks of the first. The keys are weak, so that the table keeps no model alive.
_HOOKS: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


class Taps:
    """Recorder of the outputs of named layers during a forward pass.

    Args:
        model: the network. Each layer gets a forward hook; the hooks of earlier taps are removed.
        layers: stage indices into the `feature_info` of a timm model, module paths, or EMBEDDING.

    Raises:
        HfkdError: for a layer that does not exist; the message names near ones.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]):
        self.layers = list(dict.fromkeys(layers))
        self._channels_last = getattr(timm_model_of(model), "output_fmt", None) == "NHWC"  # such as timm's Swin
        self._recorded: dict[Layer, Tensor] = {}
        self.attach(model)

    def attach(self, model: nn.Module) -> None:
        """Register the hooks, on the model that the taps were made for."""
        remove_taps(model)
        _HOOKS[timm_model_of(model)] = [self._tap(model, layer) for layer in self.layers]

    def _tap(self, model: nn.Module, layer: Layer) -> RemovableHandle:
        # A hook before the classifier sees the embedding of every architecture, however the model pools its features.
        if layer == EMBEDDING:
            return find_classifier(model).register_forward_pre_hook(self._record_embedding)
        module = find_layer(model, layer)
        # With gradient checkpointing timm calls the blocks of a stage and not the stage, so a hook on the stage would
        # not run. The last block has the same output.
        while type(module) is nn.Sequential and len(module):
            module = module[-1]
        return module.register_forward_hook(functools.partial(self._record, layer))

    def _record(self, layer: Layer, module: nn.Module, arguments, output) -> None:
        # The backward pass runs checkpointed blocks again. Its outputs would be taken for those of the next forward.
        if recomputing():
            return
        output = output[0] if isinstance(output, tuple) else output  # transformers' blocks, PiT's stages
        if not isinstance(output, Tensor):
            raise HfkdError(f"The layer {layer!r} returns {type(output).__name__}, not a tensor: name another layer.")
        self._recorded[layer] = output.permute(0, 3, 1, 2) if self._channels_last and output.ndim == 4 else output

    def _record_embedding(self, classifier: nn.Module, arguments: tuple) -> None:
        embedding = arguments[0]
        if embedding.ndim == 4 and embedding.shape[2:] == (1, 1):  # the classifier is a 1 x 1 convolution
            embedding = embedding.flatten(1)
        if embedding.ndim != 2:
            raise HfkdError(
                f"The input of the classifier ({type(classifier).__name__}) has shape {tuple(embedding.shape)}: "
                "expected an embedding (B, D)."
            )
        self._recorded[EMBEDDING] = embedding

    def take(self) -> dict[Layer, Tensor]:
        """Return the outputs since the last call: maps (B, C, H, W), tokens (B, N, C) or embeddings (B, C).

        Raises:
            HfkdError: if the forward pass did not call one of the layers.
        """
        recorded, self._recorded = self._recorded, {}
        missing = [layer for layer in self.layers if layer not in recorded]
        if missing:
            raise HfkdError(f"The forward pass does not call the layer {missing[0]!r}: name another layer.")
        return recorded


def remove_taps(model: nn.Module) -> None:
    """Remove the hooks of earlier `Taps` from a model.

    The hooks hold the last batch's features, which are not leaf tensors, so the model could not be copied with them.
    """
    for hook in _HOOKS.pop(timm_model_of(model), []):
        hook.remove()


def find_layer(model: nn.Module, layer: Layer) -> nn.Module:
    """Return the module at a stage index or a path; for a wrapped timm model, inside the wrapper.

    Raises:
        HfkdError: if there is none; the message names near ones.
    """
    inner = timm_model_of(model)
    name = type(inner).__name__
    modules = dict(inner.named_modules())
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


def settle_layers(losses: Iterable[nn.Module], student: nn.Module, teacher: nn.Module) -> None:
    """Set the layers of losses that leave them open (None) to every stage except the stem, the published choice.

    Raises:
        HfkdError: for a network without stages.
    """
    for loss in losses:
        if loss.student_layers is None:
            loss.student_layers = list(range(1, len(stages_of(student))))
        if loss.teacher_layers is None:
            loss.teacher_layers = list(range(1, len(stages_of(teacher))))


def logits_of(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return the logits (B, C) of a transformers classifier, a timm model or a module that returns a tensor.

    If training gives the logits of two heads, the distillation head's are returned.

    Raises:
        WrongTypeError: if the model returns something else.
    """
    return _forward(model, pixel_values, two_heads=False).logits


def forward_views(
    model: nn.Module, batch: dict[str, Tensor], taps: Taps | None = None, two_heads: bool = False
) -> Outputs:
    """Run one forward pass for each view in the batch: the weak one, then the strong one if there is one.

    The views are not concatenated into one pass: each has its own BatchNorm statistics, as in the published training
    code. Features are recorded for the weak view.

    Args:
        two_heads: keep the logits of both heads apart, for a model that gives both in training.
    """
    outputs = _forward(model, batch["pixel_values"], two_heads)
    if taps is not None:
        outputs.features = taps.take()
    if "pixel_values_strong" in batch:
        outputs.strong = _forward(model, batch["pixel_values_strong"], two_heads)
        if taps is not None:
            taps.take()  # discards the strong view's features: no loss reads them
    return outputs


def _forward(model: nn.Module, pixel_values: Tensor, two_heads: bool) -> Outputs:
    output = model(pixel_values)
    logits = output if isinstance(output, (Tensor, tuple)) else getattr(output, "logits", None)
    if two_heads and model.training:
        if isinstance(logits, tuple):  # timm's class and distillation head
            return Outputs(logits=logits[1], class_logits=logits[0])
        return Outputs(logits=output.distillation_logits, class_logits=output.cls_logits)  # transformers' DeiT
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise WrongTypeError(
            f"{type(model).__name__} must return logits of shape (batch, classes), or an output with such `.logits`; "
            f"got {type(output).__name__}"
            + (f" with logits {tuple(logits.shape)}." if isinstance(logits, Tensor) else ".")
        )
    return Outputs(logits, logits)


def timm_model_of(model: nn.Module) -> nn.Module:
    """Return the timm model inside transformers' wrapper; any other model is returned as it is."""
    return model.timm_model if isinstance(model, TimmWrapperForImageClassification) else model


def has_two_heads(model: nn.Module) -> bool:
    """Return True for a distilled DeiT or PiT, of timm or transformers, whose heads are averaged in evaluation."""
    if isinstance(model, DeiTForImageClassificationWithTeacher):
        return True
    return getattr(timm_model_of(model), "head_dist", None) is not None  # timm's name for the distillation head


def train_heads_apart(model: nn.Module, apart: bool) -> None:
    """Choose the training output of a model that `has_two_heads`: the logits of both heads, or their average.

    In evaluation, and in the exported model, it is the average.
    """
    if not isinstance(model, DeiTForImageClassificationWithTeacher):  # it always returns both and their average
        timm_model_of(model).set_distilled_training(apart)
