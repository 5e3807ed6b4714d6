"""What a model costs to run: parameters, multiply-adds, time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .features import logits_of


def multiply_adds(model: nn.Module, image_size: int) -> int:
    """Of the forward of one image: those of convolutions, matrix products and attention, as papers count them."""
    # With gradients: the counter hooks into the graph of a module's inputs, and a ViT's class token is a parameter.
    # With the kernel that is made of matrix products: torch 2.14 does not count a CPU's fused one.
    counter = FlopCounterMode(display=False)
    with torch.enable_grad(), _evaluating(model), sdpa_kernel(SDPBackend.MATH), counter:
        logits_of(model, torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def latencies(
    models: Mapping[str, nn.Module], image_sizes: Mapping[str, int], batch_size: int = 1, rounds: int = 30
) -> dict[str, float]:
    """Milliseconds of a forward of `batch_size` images on the CPU, in float32: the fastest of the rounds.

    The models take turns, so that what slows the machine for a while slows all. Other work only ever adds time, and
    to a long forward, which it interrupts, more than to a short one: a median would not compare the two.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    images = {name: torch.randn(batch_size, 3, size, size) for name, size in image_sizes.items()}
    for turn, (name, model) in itertools.product(range(rounds + 3), models.items()):
        with _evaluating(model):
            started = time.perf_counter()
            logits_of(model, images[name])
            ended = time.perf_counter()
        if turn >= 3:  # the first ones allocate
            times[name].append(1000 * (ended - started))
    return {name: min(values) for name, values in times.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
