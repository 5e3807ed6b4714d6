"""What a model costs to run: parameters, multiply-adds, time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .features import logits_of


def multiply_adds(model: nn.Module, image_size: int) -> int:
    """Of the forward of one image: those of convolutions, matrix products and attention, as papers count them."""
    with FlopCounterMode(display=False) as counter:
        _forward(model, torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


def latencies(
    models: Mapping[str, nn.Module], image_sizes: Mapping[str, int], batch_size: int = 1, rounds: int = 30
) -> dict[str, float]:
    """Milliseconds of a forward of `batch_size` images on the CPU, in float32: the median over the rounds.

    The models take turns, so that what slows the machine for a while slows all.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    images = {name: torch.randn(batch_size, 3, size, size) for name, size in image_sizes.items()}
    for turn, (name, model) in itertools.product(range(rounds + 3), models.items()):
        started = time.perf_counter()
        _forward(model, images[name])
        if turn >= 3:  # the first ones allocate
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def _forward(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    was_training = model.training
    try:
        return logits_of(model.eval(), images)
    finally:
        model.train(was_training)
