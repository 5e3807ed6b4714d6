"""Feature maps of one layout, whatever network they come from."""

import math

from torch import Tensor


def as_map(feature: Tensor) -> Tensor:
    """A layer's output as a map (B, C, H, W).

    Maps stay as they are. Tokens (B, N, C) are those of a square image grid, after up to three others (a class and a
    distillation token, say), which are left out.

    Raises:
        ValueError: for another shape, or tokens that are no square.
    """
    if feature.ndim == 4:
        return feature
    if feature.ndim == 3:
        side = math.isqrt(feature.shape[1])
        prefix = feature.shape[1] - side * side
        if side > 0 and prefix <= 3:
            return feature[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    raise ValueError(
        f"a layer gives {tuple(feature.shape)}; expected a map (B, C, H, W) or the tokens (B, N, C) of a square image"
    )
