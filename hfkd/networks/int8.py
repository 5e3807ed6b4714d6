"""Simulated int8: convolutions and linear layers that compute, in float32, with the values of an int8 file.

Weights are rounded to -127..127 with a scale for each output channel, the inputs of every layer and the outputs of
convolutions to 0..255 with one scale and a zero point. A batch norm behind a convolution is folded into its weights
before they are rounded, as in the file. Its statistics are those of the float network that was given and do not move:
so training computes what the file will compute at every step. Its weight and bias are trained. Gradients pass through
the rounding unchanged (straight-through), and not through values that are cut off.

Everything else stays float: LayerNorm, softmax, GELU, additions, products of two activations, and layers of other
classes than `nn.Conv2d` and `nn.Linear`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging

from ..errors import HfkdError
from ..names import architecture_of
from .features import prediction_of, timm_model_of
from .folding import conv_norm_pairs

LAYERS_KEY = "int8_layers"  # in config.json: each layer in int8, and the name of the norm folded into it or None
RANGE = "range"  # last part of a range's name in the weights file
SMALLEST_SCALE = 1e-12


class _Rounding(torch.autograd.Function):
    """`torch.fake_quantize_per_tensor_affine` for 0..255 on a CPU, to the bit in value and gradient.

    torch's own kernel computes one element at a time there and took a third of a step of ResNet-20; these operators are
    vectorised. What is cut off is found again in the backward pass: the input is mostly kept anyway, and a mask of
    booleans is slow to write and read.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        return _Rounding.integers(x, scale, zero_point).clamp_(0, 255).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        integers = _Rounding.integers(*ctx.saved_tensors)
        cut_off = integers.clamp(0, 255).sub_(integers).abs_().clamp_(max=1)  # 0 or 1
        return cut_off.neg_().add_(1).mul_(gradients[0]), None, None

    @staticmethod
    def integers(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return (x * scale.reciprocal()).round_().add_(zero_point)


class ActivationQuantizer(nn.Module):
    """Rounding of an activation to 0..255 with one scale and a zero point.

    Attributes:
        range: buffer (2,), the smallest and the largest value that is not cut off.
        momentum: share of a batch in the range in training: 0 for a range that does not move.
        rounds: False while the first ranges are read.
    """

    range: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(RANGE, torch.zeros(2))
        self.momentum, self.rounds = 0.0, True

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the scale, 0-d, and the zero point, 0-d int32; zero is always a value of its own."""
        low, high = self.range[0].clamp(max=0), self.range[1].clamp(min=0)
        scale = ((high - low) / 255).clamp(min=SMALLEST_SCALE)
        return scale, (-low / scale).round().clamp(0, 255).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.momentum:
            self._follow(x)
        if not self.rounds:
            return x
        if x.device.type == "cpu":
            rounded = _Rounding.apply(x, *self.scale_and_zero_point())
        else:
            rounded = torch.fake_quantize_per_tensor_affine(x, *self.scale_and_zero_point(), 0, 255)  # one kernel
        if self.training:
            rounded.rounded_to = self.range, rounded._version
        return rounded

    def _follow(self, x: Tensor) -> None:
        """Move the range towards that of a batch; of one that was rounded just before, take the range of that rounding.

        ONNX Runtime makes one rounding of two in a row, which changes nothing only if both have the same range.
        """
        earlier, version = getattr(x, "rounded_to", (None, None))
        if earlier is not None and version == x._version:  # no activation has changed it in place since
            self.range.copy_(earlier)
        else:
            # aminmax() would copy a batch that is stored channels last.
            self.range.lerp_(torch.stack([x.detach().amin(), x.detach().amax()]), self.momentum)


def weight_scales(weight: Tensor) -> Tensor:
    """Return the scale of each output channel (C,) of weights (C, ...)."""
    return (weight.detach().abs().flatten(1).amax(1) / 127).clamp(min=SMALLEST_SCALE)


def round_weight(weight: Tensor) -> Tensor:
    """Round weights (C, ...) to -127..127 times the scale of their output channel."""
    scales = weight_scales(weight)
    zero_points = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scales, zero_points, 0, -127, 127)


def round_bias(bias: Tensor, scales: Tensor) -> Tensor:
    """Round a bias (C,) to multiples of the scales (C,) of the sums to which it is added, as int8 kernels do."""
    rounded = (bias.detach() / scales).round().clamp(-(2**31), 2**31 - 128) * scales
    return bias + (rounded - bias).detach()


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that the convolution before it applies; of timm's norms dropout and activation are left to do."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__(norm.num_features, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(self, name, buffer)
        has_activation = isinstance(norm, BatchNormAct2d)
        self.drop = norm.drop if has_activation else nn.Identity()
        self.act = norm.act if has_activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


class Int8Conv2d(nn.Conv2d):
    """Convolution and the batch norm behind it, if there is one, in simulated int8."""

    def __init__(self, conv: nn.Conv2d, norm: FoldedBatchNorm2d | None):
        super().__init__(*_shape(conv), conv.bias is not None, conv.padding_mode, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.norms = [] if norm is None else [norm]  # in a list: the network holds the norm in a place of its own
        self.quantize_input, self.quantize_output = ActivationQuantizer(), ActivationQuantizer()
        self.to(conv.weight.device)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return weights and bias of the convolution with the norm in them."""
        for norm in self.norms:
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            bias = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
            return self.weight * scale.view(-1, 1, 1, 1), norm.bias + bias * scale
        return self.weight, self.bias

    def sum_scales(self, weight: Tensor) -> Tensor:
        """Return the scales (C,) of the sums of products with weights that have the norm in them."""
        return weight_scales(weight) * self.quantize_input.scale_and_zero_point()[0]

    def forward(self, x: Tensor) -> Tensor:
        # Also in a run in bf16, whose products are as coarse as int8's steps.
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.folded()
            if self.quantize_input.rounds:
                weight, bias = round_weight(weight), None if bias is None else round_bias(bias, self.sum_scales(weight))
            return self.quantize_output(self._conv_forward(self.quantize_input(x.float()), weight, bias))


def _shape(conv: nn.Conv2d) -> tuple[Any, ...]:
    """Return the first arguments of a convolution like this one."""
    return conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups


class Int8Linear(nn.Linear):
    """Linear layer in simulated int8. Its output stays float: ONNX Runtime's kernels for it give float anyway."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.quantize_input = ActivationQuantizer()
        self.to(linear.weight.device)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return weights and bias."""
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = round_weight(self.weight) if self.quantize_input.rounds else self.weight
            return F.linear(self.quantize_input(x.float()), weight, self.bias)


def is_int8(model: nn.Module) -> bool:
    """Return True if layers of a model compute in simulated int8."""
    return any(isinstance(module, (Int8Conv2d, Int8Linear)) for module in model.modules())


def activation_quantizers(model: nn.Module) -> Iterator[ActivationQuantizer]:
    """Give the quantizers of a model's activations."""
    return (module for module in model.modules() if isinstance(module, ActivationQuantizer))


def quantize(model: nn.Module, images: Tensor) -> None:
    """Put simulated int8 into the place of a model's convolutions and linear layers.

    Names and values of the weights stay. The configuration of a transformers model names the layers.

    Args:
        images: (B, 3, H, W), with which the model is run to see which norm follows which convolution, and which set
            the first ranges.

    Raises:
        HfkdError: if the model has no layer to quantise, or folding a norm changes its output.
    """
    was_training = model.training
    model.eval()
    layers = _layers_to_round(model, images)
    if not layers:
        raise HfkdError(
            f"quantize needs convolutions (nn.Conv2d) or linear layers (nn.Linear), and {architecture_of(model)} runs "
            "none. Leave quantize out."
        )
    with torch.no_grad():
        expected = prediction_of(model, images)
        insert_int8(model, layers)
        for quantizer in activation_quantizers(model):
            quantizer.train()
            quantizer.momentum, quantizer.rounds = 1.0, False
        given = prediction_of(model, images)
        for quantizer in activation_quantizers(model):
            quantizer.momentum, quantizer.rounds = 0.0, True
    model.train(was_training)
    if not torch.allclose(given, expected, rtol=1e-2, atol=1e-2 * float(expected.std())):
        raise HfkdError(
            f"quantize folds batch norms into the convolutions before them, and {architecture_of(model)} also reads "
            "a convolution's output elsewhere. Leave quantize out, or give another student."
        )
    if isinstance(model, PreTrainedModel):
        setattr(model.config, LAYERS_KEY, layers)


@torch.no_grad()
def _layers_to_round(model: nn.Module, images: Tensor) -> dict[str, str | None]:
    """Return the names of a model's layers that int8 knows and its forward calls, each with that of the norm behind."""
    network, called = timm_model_of(model), set()
    layers = {name: module for name, module in network.named_modules() if type(module) in (nn.Conv2d, nn.Linear)}
    norms = {layer: norm for layer, norm in conv_norm_pairs(network, images) if network.get_submodule(norm).affine}
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in layers.values()]
    try:
        prediction_of(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: norms.get(name) for name, module in layers.items() if module in called}


def insert_int8(model: nn.Module, layers: dict[str, str | None]) -> None:
    """Put simulated int8 into the place of layers, by their names and those of the norms behind them."""
    network = timm_model_of(model)
    for name, norm_name in layers.items():
        layer = network.get_submodule(name)
        if isinstance(layer, nn.Linear):
            network.set_submodule(name, Int8Linear(layer))
            continue
        norm = None if norm_name is None else FoldedBatchNorm2d(network.get_submodule(norm_name))
        if norm is not None:
            network.set_submodule(norm_name, norm)
        network.set_submodule(name, Int8Conv2d(layer, norm))
    network.train(network.training)


@contextlib.contextmanager
def unreported_ranges(config: Any) -> Iterator[None]:
    """Keep transformers from reporting the ranges of a model for int8, which are restored after its weights."""
    verbosity = logging.get_verbosity()
    if getattr(config, LAYERS_KEY, None) is not None:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def restore_int8(model: Any, name_or_path: str) -> None:
    """Put simulated int8 into a model that was loaded from a folder or the Hub, if its configuration asks for it.

    Raises:
        HfkdError: if the weights file lacks ranges, or the configuration names layers that the model does not have.
    """
    layers = getattr(model.config, LAYERS_KEY, None)
    if layers is None:
        return
    try:
        insert_int8(model, layers)
        network = timm_model_of(model)
        with safe_open(cached_file(name_or_path, "model.safetensors"), "pt") as weights:
            wanted = [name for name in network.state_dict() if name.endswith(f".{RANGE}")]
            network.load_state_dict({name: weights.get_tensor(name) for name in wanted}, strict=False)
    except (AttributeError, OSError, RuntimeError, SafetensorError) as error:
        raise HfkdError(
            f"{name_or_path} was trained for int8 ({LAYERS_KEY} in its config.json), and layers or their ranges are "
            f"missing ({error}). Get the whole folder."
        ) from error


@torch.no_grad()
def without_rounding(model: nn.Module) -> nn.Module:
    """Return a model that computes in float with the same weights: itself if none of its layers rounds, else a copy.

    In the copy the norms are folded into the weights, so it has other parameters.
    """
    if not is_int8(model):
        return model
    model = copy.deepcopy(model)
    network = timm_model_of(model)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, (Int8Conv2d, Int8Linear)):
            network.set_submodule(name, _in_float(layer))
    return model


def _in_float(layer: Int8Conv2d | Int8Linear) -> nn.Conv2d | nn.Linear:
    """Return the plain layer that computes what a layer in simulated int8 computes but for the rounding."""
    weight, bias = layer.folded()
    plain: nn.Conv2d | nn.Linear
    if isinstance(layer, Int8Conv2d):
        plain = nn.Conv2d(*_shape(layer), bias is not None, layer.padding_mode, device="meta")
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    return plain


def move_ranges(model: nn.Module, momentum: float) -> None:
    """Let the ranges of activations follow the batches of a training by this share; 0 holds them."""
    for quantizer in activation_quantizers(model):
        quantizer.momentum = momentum
