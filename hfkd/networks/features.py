"""What a network takes and what it says of a batch, whatever library it comes from."""

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

EMBEDDING = "embedding"  # what the classifier reads


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
        classifier: of a teacher whose logits are those of one linear layer over its embedding, that layer, frozen, with
            the student's classes; else None.
        standardized: of a teacher: the logits are Z-scores already.
        strong: the outputs for the strongly augmented view of the same images, where a loss asked for two views.
    """

    logits: Tensor
    class_logits: Tensor
    features: dict[Layer, Tensor] = field(default_factory=dict)
    classifier: nn.Linear | None = None
    standardized: bool = False
    strong: Outputs | None = None

    @property
    def embedding(self) -> Tensor:
        """(B, D), what the classifier reads; of two heads the distillation head's. For losses that name EMBEDDING."""
        return self.features[EMBEDDING]

    def views(self) -> list[Outputs]:
        return [self] if self.strong is None else [self, self.strong]


_HOOKS: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


class Taps:
    """Records what named layers of a network give during each forward.

    Args:
        model: the network; it gets a forward hook on each layer, in the place of those of earlier taps.
        layers: stage indices into the `feature_info` of a timm model, module paths, or EMBEDDING.

    Raises:
        ValueError: for a layer that does not exist, naming near ones.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]):
        self.layers = list(dict.fromkeys(layers))
        self._channels_last = getattr(timm_model_of(model), "output_fmt", None) == "NHWC"  # timm's Swin, for one
        self._recorded: dict[Layer, Tensor] = {}
        remove_taps(model)
        _HOOKS[timm_model_of(model)] = [self._tap(model, layer) for layer in self.layers]

    def _tap(self, model: nn.Module, layer: Layer) -> RemovableHandle:
        if layer == EMBEDDING:
            return find_classifier(model).register_forward_pre_hook(self._record_embedding)
        module = find_layer(model, layer)
        # timm's gradient checkpointing calls the blocks of a stage by themselves.
        while type(module) is nn.Sequential and len(module):
            module = module[-1]
        return module.register_forward_hook(functools.partial(self._record, layer))

    def _record(self, layer: Layer, module: nn.Module, arguments, output) -> None:
        if recomputing():  # nobody would take it
            return
        output = output[0] if isinstance(output, tuple) else output  # transformers' blocks, PiT's stages
        if not isinstance(output, Tensor):
            raise HfkdError(f"The layer {layer!r} gives {type(output).__name__}, not a tensor: name another one.")
        self._recorded[layer] = output.permute(0, 3, 1, 2) if self._channels_last and output.ndim == 4 else output

    def _record_embedding(self, classifier: nn.Module, arguments: tuple) -> None:
        embedding = arguments[0]
        if embedding.ndim == 4 and embedding.shape[2:] == (1, 1):  # a 1 x 1 convolution classifies
            embedding = embedding.flatten(1)
        if embedding.ndim != 2:
            raise HfkdError(
                f"The classifier ({type(classifier).__name__}) reads {tuple(embedding.shape)}: expected an embedding "
                "(B, D)."
            )
        self._recorded[EMBEDDING] = embedding

    def take(self) -> dict[Layer, Tensor]:
        """What the layers gave since the last call: maps (B, C, H, W), tokens (B, N, C) or embeddings (B, C).

        Raises:
            ValueError: if one was not called in between.
        """
        recorded, self._recorded = self._recorded, {}
        missing = [layer for layer in self.layers if layer not in recorded]
        if missing:
            raise HfkdError(f"The forward does not call the layer {missing[0]!r}: name another one.")
        return recorded


def remove_taps(model: nn.Module) -> None:
    """Takes the hooks of earlier `Taps` off: they hold the last batch's features, with which it cannot be copied."""
    for hook in _HOOKS.pop(timm_model_of(model), []):
        hook.remove()


def find_layer(model: nn.Module, layer: Layer) -> nn.Module:
    """The module that a stage index or a path stands for; in a wrapped timm model, inside the wrapper.

    Raises:
        ValueError: if there is none, naming near ones.
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
    """The module paths of a timm model's stages, from the stem to the deepest.

    Raises:
        ValueError: for a model of another library, which has no such table.
    """
    inner = timm_model_of(model)
    stages = getattr(inner, "feature_info", None)
    if stages is None:
        raise HfkdError(
            f"{type(inner).__name__} has no stage indices, which are timm's: name its layers by their module paths, "
            f"e.g. '{[path for path, _ in inner.named_modules()][-1]}'."
        )
    return [stage["module"] for stage in stages]


def find_classifier(model: nn.Module) -> nn.Module:
    """What gives the logits: of a timm model what it says, the distillation head's of two; else the last linear layer.

    Raises:
        ValueError: if there is none.
    """
    inner = timm_model_of(model)
    if hasattr(inner, "get_classifier"):  # timm's
        classifiers = inner.get_classifier()
        return classifiers[-1] if isinstance(classifiers, tuple) else classifiers
    linear = [module for module in inner.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise HfkdError(f"{type(inner).__name__} has no linear layer to take for its classifier.")
    return linear[-1]


def settle_layers(losses: Iterable[nn.Module], student: nn.Module, teacher: nn.Module) -> None:
    """Gives losses that leave their layers open (None) every stage but the first, the stem: the published choice.

    Raises:
        ValueError: for a network without stages.
    """
    for loss in losses:
        if loss.student_layers is None:
            loss.student_layers = list(range(1, len(stages_of(student))))
        if loss.teacher_layers is None:
            loss.teacher_layers = list(range(1, len(stages_of(teacher))))


def logits_of(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Logits (B, C) of a transformers classifier, a timm model or a module that returns a tensor; of two heads, where
    training gives both, the distillation head's.

    Raises:
        TypeError: if the model returns something else.
    """
    return _forward(model, pixel_values, two_heads=False).logits


def forward_views(
    model: nn.Module, batch: dict[str, Tensor], taps: Taps | None = None, two_heads: bool = False
) -> Outputs:
    """One forward per view in the batch: the weak one, then the strong one if the batch holds it.

    Two forwards, not one over the concatenation: each view has its own BatchNorm statistics, as in the published
    training code. Features are those of the weak view.

    Args:
        two_heads: keep the heads of a model that has two apart where it gives both, which it does in training.
    """
    outputs = _forward(model, batch["pixel_values"], two_heads)
    if taps is not None:
        outputs.features = taps.take()
    if "pixel_values_strong" in batch:
        outputs.strong = _forward(model, batch["pixel_values_strong"], two_heads)
        if taps is not None:
            taps.take()
    return outputs


def _forward(model: nn.Module, pixel_values: Tensor, two_heads: bool) -> Outputs:
    output = model(pixel_values)
    logits = output if isinstance(output, (Tensor, tuple)) else getattr(output, "logits", None)
    if two_heads and model.training:
        if isinstance(logits, tuple):  # timm's
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
    """What transformers' wrapper of timm models wraps; any other model itself."""
    return model.timm_model if isinstance(model, TimmWrapperForImageClassification) else model


def has_two_heads(model: nn.Module) -> bool:
    """Is it a distilled DeiT or PiT, of timm or transformers, whose heads are averaged in evaluation?"""
    if isinstance(model, DeiTForImageClassificationWithTeacher):
        return True
    return getattr(timm_model_of(model), "head_dist", None) is not None  # timm's name for the second


def train_heads_apart(model: nn.Module, apart: bool) -> None:
    """Says whether a model that `has_two_heads` gives both heads' logits in training, or their average.

    In evaluation, and once exported, it is the average.
    """
    if not isinstance(model, DeiTForImageClassificationWithTeacher):  # which always gives all three
        timm_model_of(model).set_distilled_training(apart)
