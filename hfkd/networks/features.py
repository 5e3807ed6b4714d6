"""Inputs and outputs of a network, from any library: input size, logits, named layers, two heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DeiTForImageClassificationWithTeacher
from transformers.models.timm_wrapper import TimmWrapperModel

from ..errors import HfkdError, WrongTypeError
from .gradient_checkpointing import recomputing
from .headless import HeadlessNetwork, embed, is_headless
from .layers import AFFINE as AFFINE
from .layers import AVERAGED_MAP as AVERAGED_MAP
from .layers import EMBEDDING as EMBEDDING
from .layers import INPUT as INPUT
from .layers import Layer as Layer
from .layers import find_classifier as find_classifier
from .layers import find_layer as find_layer
from .layers import find_pooling as find_pooling
from .layers import settle_layers as settle_layers
from .layers import stages_of as stages_of
from .layers import timm_model_of as timm_model_of


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
        classifier: for a network whose logits are one linear layer over its embedding, if EMBEDDING is recorded: this
            layer. A teacher's is frozen and reduced to the student's classes. None for other networks.
        standardized: True if the teacher's logits are Z-scores already.
        members: for several teachers: the outputs of each one for this view. Empty for one network.
        strong: outputs for the strongly augmented view of the same images, if a loss requested two views.
    """

    logits: Tensor
    class_logits: Tensor
    features: dict[Layer, Tensor] = field(default_factory=dict)
    classifier: nn.Linear | None = None
    standardized: bool = False
    members: Sequence[Outputs] = ()
    strong: Outputs | None = None

    @property
    def embedding(self) -> Tensor:
        """(B, D), input of the classifier; with two heads, input of the distillation head.

        Only recorded for losses that name EMBEDDING.
        """
        return self.features[EMBEDDING]

    @property
    def averaged_map(self) -> Tensor:
        """(B, D, H, W), input of the global pooling. Only recorded for losses that name AVERAGED_MAP."""
        return self.features[AVERAGED_MAP]

    def first(self, number: int) -> Outputs:
        """Return the outputs of the first images of the batch."""
        return replace(
            self,
            logits=self.logits[:number],
            class_logits=self.class_logits[:number],
            features={layer: value if _is_norm(layer) else value[:number] for layer, value in self.features.items()},
            members=[member.first(number) for member in self.members],
            strong=self.strong and self.strong.first(number),
        )

    def views(self) -> list[Outputs]:
        """Return the outputs of each view: the weak one and, if there is one, the strong one."""
        return [self] if self.strong is None else [self, self.strong]


def _is_norm(layer: Layer) -> bool:
    return isinstance(layer, str) and layer.endswith(AFFINE)


# Hooks of the latest taps of each model. They are kept outside the model, since a model may outlive its taps: a second
# trainer removes the hooks of the first. The keys are weak, so that the table keeps no model alive.
_HOOKS: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


class Taps:
    """Recorder of the outputs (or inputs) of named layers during a forward pass.

    Args:
        model: the network. Each layer gets a forward hook; the hooks of earlier taps are removed.
        layers: stage indices into the `feature_info` of a timm model, module paths, module paths that end in INPUT
            or AFFINE, EMBEDDING, or AVERAGED_MAP.

    Raises:
        HfkdError: for a layer that does not exist; the message names near ones.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]):
        self.layers = list(dict.fromkeys(layers))
        self._channels_last = getattr(timm_model_of(model), "output_fmt", None) == "NHWC"  # such as timm's Swin
        self._headless = [model] if isinstance(model, HeadlessNetwork) else []
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
        if layer == AVERAGED_MAP:
            return find_pooling(model).register_forward_pre_hook(functools.partial(self._record_input, layer))
        if isinstance(layer, str) and layer.endswith(INPUT):
            module = find_layer(model, layer.removesuffix(INPUT))
            return module.register_forward_pre_hook(functools.partial(self._record_input, layer))
        if isinstance(layer, str) and layer.endswith(AFFINE):
            return self._tap_affine(model, layer)
        module = find_layer(model, layer)
        # With gradient checkpointing timm calls the blocks of a stage and not the stage, so a hook on the stage would
        # not run. The last block has the same output.
        while type(module) is nn.Sequential and len(module):
            module = module[-1]
        return module.register_forward_hook(functools.partial(self._record, layer))

    def _tap_affine(self, model: nn.Module, layer: str) -> RemovableHandle:
        norm = find_layer(model, layer.removesuffix(AFFINE))
        if not all(isinstance(getattr(norm, name, None), nn.Parameter) for name in ("weight", "bias")):
            raise HfkdError(f"{layer.removesuffix(AFFINE)!r} is no norm with a learnt scale and shift: name another.")
        # In the forward pass, during which also a sharded network's parameters are whole.
        return norm.register_forward_hook(lambda module, *_: self._record_affine(layer, module))

    def _record_affine(self, layer: str, norm: nn.Module) -> None:
        self._recorded[layer] = torch.stack([norm.weight, norm.bias])

    def _record(self, layer: Layer, module: nn.Module, arguments, output) -> None:
        # The backward pass runs checkpointed blocks again. Its outputs would be taken for those of the next forward.
        if recomputing():
            return
        output = output[0] if isinstance(output, tuple) else output  # transformers' blocks, PiT's stages
        if not isinstance(output, Tensor):
            raise HfkdError(f"The layer {layer!r} returns {type(output).__name__}, not a tensor: name another layer.")
        for network in self._headless:
            output = network.as_map(output)
        self._recorded[layer] = output.permute(0, 3, 1, 2) if self._channels_last and output.ndim == 4 else output

    def _record_input(self, layer: Layer, module: nn.Module, arguments: tuple) -> None:
        # timm's activations overwrite their input, so it is copied before they run.
        overwritten = getattr(module, "inplace", False)
        self._record(layer, module, (), arguments[0].clone() if overwritten else arguments[0])

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


def is_classifier_of(outputs: Outputs, classifier: nn.Linear) -> bool:
    """Return True if the logits are the classifier's output for the embedding.

    They are not if two heads are averaged, for example. The structure of a network does not tell, a batch does.
    """
    embedding = outputs.embedding.to(classifier.weight.dtype)
    logits = F.linear(embedding, classifier.weight, classifier.bias)  # not through the module, which may be tapped
    return bool((logits - outputs.logits).abs().max() <= 0.05 * outputs.logits.abs().max())  # bf16 is 0.01 off


def logits_of(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return the logits (B, C) of a transformers classifier, a timm model or a module that returns a tensor.

    If training gives the logits of two heads, the distillation head's are returned.

    Raises:
        WrongTypeError: if the model returns something else.
    """
    return _forward(model, pixel_values, two_heads=False).logits


def prediction_of(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return the logits (B, C) of a classifier, or the embedding (B, D) of a network without one."""
    return embed(model, pixel_values) if is_headless(model) else logits_of(model, pixel_values)


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
    if isinstance(model, TimmWrapperModel):
        output = output.pooler_output[:, :0]
    logits = output if isinstance(output, (Tensor, tuple)) else getattr(output, "logits", None)
    if two_heads and model.training:
        if isinstance(logits, tuple):  # timm's class and distillation head
            return Outputs(logits=logits[1], class_logits=logits[0])
        return Outputs(logits=output.distillation_logits, class_logits=output.cls_logits)  # transformers' DeiT
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise WrongTypeError(
            f"{type(model).__name__} must return logits of shape (batch, classes), or an output with such `.logits`; "
            f"got {type(output).__name__}"
            + (f" with logits {tuple(logits.shape)}" if isinstance(logits, Tensor) else "")
            + ". A teacher that returns features is given as Teacher(model, has_classifier=False)."
        )
    return Outputs(logits, logits)


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
