"""Files of a student that was trained in simulated int8: its rounding as operators, its weights as int8 numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # noqa: F401  # registers the operators that torch.onnx writes as ONNX's
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import HfkdError
from ..names import architecture_of
from ..networks.features import logits_of, timm_model_of
from ..networks.int8 import ActivationQuantizer, Int8Conv2d, Int8Linear, round_bias, round_weight, weight_scales
from .formats import FORMATS, captured
from .quantization import OPERATORS as INT8_OPERATORS
from .quantization import has_int8_instructions, logits_of_file

TOLERANCE = 0.05  # root mean square of the difference of two logits, in their standard deviations


@dataclass(frozen=True)
class Operators:
    """Operators that a file rounds with.

    Attributes:
        activation: rounds an activation with a scale and a zero point.
        constant: returns the float values of integers (C, ...) with the scales (C,) of their output channels.
    """

    activation: Callable[[Tensor, float, int], Tensor]
    constant: Callable[[Tensor, Tensor], Tensor]


def _rounded(x: Tensor, scale: float, zero_point: int) -> Tensor:
    # torch.export has no shapes for torch.fake_quantize_per_tensor_affine; these operators give the same to the bit.
    inverse = float(torch.tensor(scale).reciprocal())
    return (((x * inverse).round() + zero_point).clamp(0, 255) - zero_point) * scale


def _scaled(integers: Tensor, scales: Tensor) -> Tensor:
    return integers.float() * _of_channels(scales, integers)


def _quantize_and_back(x: Tensor, scale: float, zero_point: int) -> Tensor:
    settings = scale, zero_point, 0, 255, torch.uint8
    integers = torch.ops.quantized_decomposed.quantize_per_tensor(x, *settings)
    return torch.ops.quantized_decomposed.dequantize_per_tensor(integers, *settings)


def _dequantized(integers: Tensor, scales: Tensor) -> Tensor:
    limits = torch.iinfo(integers.dtype)
    settings = scales, torch.zeros_like(scales, dtype=integers.dtype), 0, limits.min, limits.max, integers.dtype
    return torch.ops.quantized_decomposed.dequantize_per_channel(integers, *settings)


def _of_channels(scales: Tensor, values: Tensor) -> Tensor:
    """Return scales (C,) in the shape that multiplies values (C, ...)."""
    return scales.view(-1, *[1] * (values.ndim - 1))


OPERATORS = {"onnx": Operators(_quantize_and_back, _dequantized), "torch": Operators(_rounded, _scaled)}


class _FileLayer(nn.Module):
    """Layer as it stands in a file: integers for weights, constant scales and zero points."""

    def __init__(self, layer: Int8Conv2d | Int8Linear, operators: Operators):
        super().__init__()
        weight, bias = layer.folded()
        scales = weight_scales(weight)
        self.operators = operators
        self.register_buffer("weight", (round_weight(weight) / _of_channels(scales, weight)).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.input, self.output = _constants(layer.quantize_input), None
        self.layer: Callable[..., Tensor] = F.linear
        if isinstance(layer, Int8Conv2d):
            self.layer, self.output = layer._conv_forward, _constants(layer.quantize_output)
            if bias is not None:
                self.register_buffer("bias_scales", layer.sum_scales(weight))
                self.bias = (round_bias(bias, self.bias_scales) / self.bias_scales).round().to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.operators.constant(self.weight, self.scales), self.bias
        if bias is not None and not bias.is_floating_point():
            bias = self.operators.constant(bias, self.bias_scales)
        x = self.layer(self.operators.activation(x, *self.input), weight, bias)
        return x if self.output is None else self.operators.activation(x, *self.output)


def _constants(quantizer: ActivationQuantizer) -> tuple[float, int]:
    scale, zero_point = quantizer.scale_and_zero_point()
    return float(scale), int(zero_point)


@torch.no_grad()
def for_file(model: nn.Module, file_format: str) -> nn.Module:
    """Return a copy of a model in simulated int8 whose layers are those of a file of a format, `onnx` or `torch`."""
    model = copy.deepcopy(model)
    network = timm_model_of(model)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, (Int8Conv2d, Int8Linear)):
            network.set_submodule(name, _FileLayer(layer, OPERATORS[file_format]))
    return model


@torch.no_grad()
def write_int8(model: nn.Module, path: Path, preprocessing: str, images: Tensor) -> dict[str, Any]:
    """Write the ONNX file of a model in simulated int8, and return how it was made.

    Sums that round to the next value where torch's round to this one make the logits of both differ a little.

    Args:
        preprocessing: text that goes into the file.
        images: (B, 3, H, W), on which the file is compared with the model.

    Raises:
        HfkdError: if their logits differ by more than `TOLERANCE`. On a CPU without instructions for int8, where sums
            may saturate, the difference is told alone.
    """
    FORMATS["onnx"].write(captured(for_file(model, "onnx"), images.shape[-1]), path, preprocessing)
    expected, given = logits_of(model, images), logits_of_file(path, images)
    difference = float((given - expected).square().mean().sqrt() / expected.std())
    if not difference <= TOLERANCE and has_int8_instructions():
        raise HfkdError(
            f"The int8 file of {architecture_of(model)} gives other logits than the training simulated, by "
            f"{100 * difference:.2g} % of their standard deviation: expected at most {100 * TOLERANCE:g} %. It was "
            "removed. Give --format torch."
        )
    same = float((given.argmax(1) == expected.argmax(1)).float().mean())
    layers, operators = _float_parts(path)
    return {
        "trained": True,
        "int8_layers": sum(isinstance(module, (Int8Conv2d, Int8Linear)) for module in model.modules()),
        "float_layers": layers,
        "float_operators": operators,
        "simulated_difference": difference,
        "simulated_agreement": 100 * same,
    }


def _float_parts(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the layers with float weights in a file, and the types of the other operators in float."""
    import onnx

    graph = onnx.load(path).graph
    constants = {initializer.name for initializer in graph.initializer}
    weighted = [node for node in graph.node if node.op_type in INT8_OPERATORS and len(node.input) > 1]
    layers = tuple(node.name for node in weighted if node.input[1] in constants)
    rest = {node.op_type for node in graph.node} - {*INT8_OPERATORS, "QuantizeLinear", "DequantizeLinear"}
    return layers, tuple(sorted(rest))
