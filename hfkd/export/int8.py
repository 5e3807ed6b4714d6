"""Files of a student that was trained in simulated int8: its rounding as operators, its weights as int8 numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed  # noqa: F401  # registers the operators that torch.onnx writes as ONNX's
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.features import timm_model_of
from ..networks.int8 import ActivationQuantizer, Int8Conv2d, Int8Linear, round_weight, weight_scales


@dataclass(frozen=True)
class Operators:
    """Operators that a file rounds with.

    Attributes:
        activation: rounds an activation with a scale and a zero point.
        weight: returns float weights of int8 ones (C, ...) with the scales (C,) of their output channels.
    """

    activation: Callable[[Tensor, float, int], Tensor]
    weight: Callable[[Tensor, Tensor], Tensor]


def _rounded(x: Tensor, scale: float, zero_point: int) -> Tensor:
    # torch.export has no shapes for torch.fake_quantize_per_tensor_affine; these operators give the same to the bit.
    inverse = float(torch.tensor(scale).reciprocal())
    return (((x * inverse).round() + zero_point).clamp(0, 255) - zero_point) * scale


def _scaled(weight: Tensor, scales: Tensor) -> Tensor:
    return weight.float() * scales.view(-1, *[1] * (weight.ndim - 1))


def _quantize_and_back(x: Tensor, scale: float, zero_point: int) -> Tensor:
    settings = scale, zero_point, 0, 255, torch.uint8
    integers = torch.ops.quantized_decomposed.quantize_per_tensor(x, *settings)
    return torch.ops.quantized_decomposed.dequantize_per_tensor(integers, *settings)


def _dequantized(weight: Tensor, scales: Tensor) -> Tensor:
    zero_points = torch.zeros_like(scales, dtype=torch.int8)
    settings = scales, zero_points, 0, -127, 127, torch.int8
    return torch.ops.quantized_decomposed.dequantize_per_channel(weight, *settings)


OPERATORS = {"onnx": Operators(_quantize_and_back, _dequantized), "torch": Operators(_rounded, _scaled)}


class _FileLayer(nn.Module):
    """Layer as it stands in a file: int8 weights, constant scales and zero points."""

    def __init__(self, layer: Int8Conv2d | Int8Linear, operators: Operators):
        super().__init__()
        weight, bias = layer.folded()
        scales = weight_scales(weight)
        self.register_buffer("weight", (round_weight(weight) / scales.view(-1, *[1] * (weight.ndim - 1))).round().char())
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.operators = operators
        self.input = _constants(layer.quantize_input)
        self.layer: Callable[..., Tensor] = F.linear
        self.output = None
        if isinstance(layer, Int8Conv2d):
            self.layer, self.output = layer._conv_forward, _constants(layer.quantize_output)

    def forward(self, x: Tensor) -> Tensor:
        x = self.operators.activation(x, *self.input)
        x = self.layer(x, self.operators.weight(self.weight, self.scales), self.bias)
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
