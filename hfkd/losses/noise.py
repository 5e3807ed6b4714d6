"""Random numbers without a state: a pure function of the run's seed, the step and the image's row in the data set.

So an image gets the same numbers in any batch and in any process, and in a resumed run those of an uninterrupted one.
"""

import torch
from torch import Tensor


def _signed(bits: int) -> int:
    """Return 64 bits as the int64 that a tensor takes."""
    return bits - 2**64 if bits >= 2**63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_FLOAT_BITS = 24  # of the significand of float32


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Return int64 shifted to the right, with zeros for the places that become free."""
    return (bits >> places) & (2 ** (64 - places) - 1)


def _mix(bits: Tensor) -> Tensor:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood, 2014): every input bit changes half of the others."""
    bits = (bits ^ _shifted(bits, 30)) * _FACTORS[0]
    bits = (bits ^ _shifted(bits, 27)) * _FACTORS[1]
    return bits ^ _shifted(bits, 31)


def uniform_noise(seed: int, step: Tensor, index: Tensor, draws: int) -> Tensor:
    """Return numbers uniform in [0, 1), (B, draws), float32.

    Args:
        seed: of the run.
        step: 0-d int64.
        index: (B,) int64, the images' rows in the data set.
        draws: numbers for each image.
    """
    run = _mix(torch.full_like(step, _signed(seed % 2**64)) + _GOLDEN)
    images = _mix(_mix(run + _GOLDEN + step) + _GOLDEN * (index + 1))
    bits = _mix(images[:, None] + _GOLDEN * torch.arange(1, draws + 1, device=index.device))
    return _shifted(bits, 64 - _FLOAT_BITS).float() * 2.0**-_FLOAT_BITS
