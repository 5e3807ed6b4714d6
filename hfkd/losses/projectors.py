"""What losses with learnt projectors share: a projected map of the student beside the teacher's map."""

from collections.abc import Sequence

from torch import Tensor

from ..errors import HfkdError
from .feature_maps import pooled_to_smaller
from .standardize import at_least_float32


def comparable(projected: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The two as maps of one shape, in float32 or wider, the teacher's averaged down where it is the larger.

    Args:
        projected: (B, C, H, W), what a projector makes of the student's map.
        teacher: (B, C, H', W').

    Raises:
        ValueError: the batches or the channels differ.
    """
    if projected.shape[:2] != teacher.shape[:2]:
        raise HfkdError(
            "a projected map of the student and a map of the teacher must have one (B, C), got "
            f"{tuple(projected.shape)} and {tuple(teacher.shape)}: give the projector the teacher's channels"
        )
    return pooled_to_smaller(at_least_float32(projected), at_least_float32(teacher))


def images_for_batch_norm(maps: Sequence[Tensor]) -> int:
    """How many images a batch needs at least, so that a projector's BatchNorm sees two values a channel.

    Args:
        maps: (B, C, H, W) each, what the projectors read and imitate.
    """
    return 2 if any(one.shape[2:].numel() == 1 for one in maps) else 1
