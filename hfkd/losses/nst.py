"""NST: where the student's channels respond in an image is distributed as with the teacher's.

Paper: Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import HfkdError
from .base import Outputs
from .embeddings import unit_vectors
from .feature_maps import MapPairsLoss, pooled_to_smaller, summed
from .standardize import at_least_float32


def nst_loss(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Return the sum over the pairs of maps of the squared maximum mean discrepancy of their channels.

    The maps of a pair are first averaged down to the smaller sides of the two. A sample is a channel of an image, its
    responses at all positions divided by their L2 norm. The kernel of two samples is the square of their dot product.
    With k averaged over the images and over all pairs of channels, the discrepancy is k(teacher, teacher) +
    k(student, student) - 2 k(student, teacher).

    Args:
        student_maps: (B, C, H, W) each.
        teacher_maps: (B, C', H', W') each.

    Returns:
        0-d, float32 or float64.

    Raises:
        ValueError: the numbers of maps differ, or a pair's batches, or one is no map.
    """
    losses = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
            raise HfkdError(
                f"two maps (B, C, H, W) of one batch expected, got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        student, teacher = pooled_to_smaller(at_least_float32(student), at_least_float32(teacher))
        student, teacher = unit_vectors(student.flatten(2)), unit_vectors(teacher.flatten(2))
        own, other = _mean_kernel(student, student), _mean_kernel(teacher, teacher)
        losses += [own, other, -2 * _mean_kernel(student, teacher)]
    return summed(losses)


def _mean_kernel(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean of the squared dot products of channels (B, C, P) and (B, C', P) of the same image."""
    return (one @ other.mT).square().mean()


class NSTLoss(MapPairsLoss):
    """`nst_loss` as a method of a recipe.

    Args:
        student_layers, teacher_layers: see `MapPairsLoss`.
        weight: see `DistillationLoss`; the default is the published one.

    Raises:
        ValueError: see `MapPairsLoss`.
    """

    citation = """
        @article{huang2017like,
            title = {Like What You Like: Knowledge Distill via Neuron Selectivity Transfer},
            author = {Huang, Zehao and Wang, Naiyan},
            journal = {arXiv preprint arXiv:1707.01219},
            year = {2017},
        }
    """

    def __init__(self, student_layers: list | None = None, teacher_layers: list | None = None, weight: float = 50.0):
        super().__init__(student_layers, teacher_layers, weight)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor:
        return nst_loss(*self.maps(student, teacher))
