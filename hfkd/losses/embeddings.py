"""Checks and scales that losses over embeddings share."""

import torch
from torch import Tensor

from ..errors import HfkdError
from .standardize import at_least_float32


def paired_embeddings(student: Tensor, teacher: Tensor, same_width: bool = False) -> tuple[Tensor, Tensor]:
    """Return both embeddings in float32 or wider, after a check of their shapes.

    Args:
        student: (B, D).
        teacher: (B, D').
        same_width: D and D' must be equal.

    Raises:
        ValueError: the embeddings are not (B, D) and (B, D') of one batch, or not equally wide where they must be.
    """
    shapes = tuple(student.shape), tuple(teacher.shape)
    wanted = "(B, D) and (B, D)" if same_width else "(B, D) and (B, D')"
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or same_width and shapes[0] != shapes[1]:
        raise HfkdError(f"embeddings {wanted} of one batch expected, got {shapes[0]} and {shapes[1]}")
    return at_least_float32(student), at_least_float32(teacher)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Return vectors (..., D) of length 1; a vector of zeros stays zero, and so does its gradient."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # F.normalize divides zeros by 1e-12, which makes their gradient 1e12 times larger.
    return vectors / torch.where(lengths == 0, 1.0, lengths)
