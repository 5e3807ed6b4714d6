"""Costs of a model: parameters, multiply-adds and latency."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .features import prediction_of


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters, trained or frozen; shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, image_size: int) -> int:
    """Count the multiply-adds of one image's forward pass, as papers do.

    Convolutions, matrix products and attention count.
    """
    # Gradients are on because the counter hooks into the graph of a module's inputs, and a ViT's class token is a
    # parameter. The attention kernel is the one made of matrix products: torch 2.14 does not count the CPU's fused one.
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), _evaluating(model), sdpa_kernel(SDPBackend.MATH), counter:
        prediction_of(model, torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def latencies(
    models: Mapping[str, nn.Module],
    image_sizes: Mapping[str, int],
    batch_size: int = 1,
    rounds: int = 30,
    statistic: Callable[[list[float]], float] = min,
) -> dict[str, float]:
    """Measure the milliseconds of a forward pass of `batch_size` images on the CPU, in float32.

    The models take turns, so that a slow moment of the machine slows all of them. The fastest round counts. Other work
    on the machine only adds time, and adds more to a long forward pass than to a short one, so medians of
    different networks would not be comparable; `statistic` can be statistics.median for files of one network.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    images = {name: torch.randn(batch_size, 3, size, size) for name, size in image_sizes.items()}
    for turn, (name, model) in itertools.product(range(rounds + 3), models.items()):
        with _evaluating(model):
            started = time.perf_counter()
            prediction_of(model, images[name])
            ended = time.perf_counter()
        if turn >= 3:  # the first rounds allocate memory
            times[name].append(1000 * (ended - started))
    return {name: statistic(values) for name, values in times.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
