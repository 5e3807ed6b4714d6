"""Helpers of losses that compare a projected map of the student with a map of the teacher."""

from collections.abc import Sequence

from torch import Tensor

from ..errors import HfkdError
from .feature_maps import pooled_to_smaller
from .standardize import at_least_float32


def comparable(projected: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps with one shape, in float32 or wider; the larger is averaged down to the smaller sides.

    Args:
        projected: (B, C, H, W), the output of a projector on the student's map.
        teacher: (B, C, H', W').

    Raises:
        HfkdError: the batch sizes or the channels differ.
    """
    if projected.shape[:2] != teacher.shape[:2]:
        raise HfkdError(
            "a projected map of the student and a map of the teacher must have the same (B, C), got "
            f"{tuple(projected.shape)} and {tuple(teacher.shape)}: give the projector the teacher's channels"
        )
    return pooled_to_smaller(at_least_float32(projected), at_least_float32(teacher))


def images_for_batch_norm(maps: Sequence[Tensor]) -> int:
    """Return the smallest batch size at which a projector's BatchNorm sees two values a channel.

    Args:
        maps: (B, C, H, W) each, the maps that the projectors read and imitate.
    """
    return 2 if any(feature_map.shape[2:].numel() == 1 for feature_map in maps) else 1
