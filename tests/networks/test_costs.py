"""Multiply-adds against known figures and hand formulas; times of networks that take turns."""

import time

import pytest
import timm
import torch
from torch import nn

import hfkd  # noqa: F401  (registers cifar_*)
from hfkd.networks.costs import latencies, multiply_adds, parameter_count


@pytest.mark.parametrize(
    "architecture, classes, image_size, millions",
    [
        ("cifar_resnet20", 100, 32, 40.82),  # as the model zoos of CIFAR-100 list them
        ("cifar_resnet56", 100, 32, 125.75),
        ("resnet18", 1000, 224, 1814.07),
    ],
)
def test_multiply_adds_of_known_networks(architecture, classes, image_size, millions):
    model = timm.create_model(architecture, num_classes=classes)
    assert multiply_adds(model, image_size) / 1e6 == pytest.approx(millions, abs=0.005)
    assert model.training, "as it was given"


def test_parameters():
    shared = nn.Linear(3, 2)
    shared.bias.requires_grad_(False)
    assert parameter_count(nn.Sequential(shared, nn.BatchNorm1d(2), shared)) == 8 + 4


@pytest.mark.parametrize("fused", [True, False])
def test_multiply_adds_of_attention(fused):
    """Whichever kernel computes the attention."""
    tokens, width, depth, side, classes = 1 + (64 // 16) ** 2, 192, 2, 16, 10
    model = timm.create_model("deit_tiny_patch16_224", depth=depth, img_size=64, num_classes=classes)
    for block in model.blocks:
        block.attn.fused_attn = fused
    linear = tokens * (3 * width * width + width * width + 2 * 4 * width * width)
    attention = 2 * tokens * tokens * width
    patches = (tokens - 1) * 3 * side * side * width
    assert multiply_adds(model, 64) == depth * (linear + attention) + patches + width * classes


def test_multiply_adds_where_a_parameter_enters_a_module():
    """PiT hands its class token from stage to stage."""
    model = timm.create_model("pit_ti_224")
    assert multiply_adds(model, 224) / 1e6 == pytest.approx(699, abs=1)
    assert all(parameter.grad is None for parameter in model.parameters())


class Sleeping(nn.Module):
    """Takes as long as it is told, and remembers which sizes it saw and who else ran."""

    def __init__(self, name, seconds, seen):
        super().__init__()
        self.name, self.seconds, self.seen = name, seconds, seen

    def forward(self, pixel_values):
        time.sleep(self.seconds)
        self.seen.append((self.name, tuple(pixel_values.shape), self.training, torch.is_grad_enabled()))
        return pixel_values.mean((2, 3))


def test_networks_take_turns():
    seen = []
    models = {"slow": Sleeping("slow", 0.02, seen), "fast": Sleeping("fast", 0.005, seen)}
    times = latencies(models, {"slow": 8, "fast": 4}, batch_size=2, rounds=3)
    assert times["slow"] >= 20 and 5 <= times["fast"] < times["slow"]
    assert seen == 6 * [("slow", (2, 3, 8, 8), False, False), ("fast", (2, 3, 4, 4), False, False)]
