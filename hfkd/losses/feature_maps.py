"""Feature maps in one layout for all architectures, and the bases of the losses that compare maps."""

import math
from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor

from ..errors import HfkdError
from .base import DistillationLoss, Outputs
from .checks import layers_of


def as_map(feature: Tensor) -> Tensor:
    """Return a layer's output as a map (B, C, H, W).

    Maps are returned as they are. Tokens (B, N, C) must form a square image grid, after up to three prefix tokens, such
    as a class and a distillation token. The prefix tokens are left out.

    Raises:
        HfkdError: for another shape, or for tokens that form no square.
    """
    if feature.ndim == 4:
        return feature
    if feature.ndim == 3:
        side = math.isqrt(feature.shape[1])
        prefix = feature.shape[1] - side * side
        if side > 0 and prefix <= 3:
            return feature[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    raise HfkdError(
        f"the layer gives {tuple(feature.shape)}; expected a map (B, C, H, W), or the tokens (B, N, C) of a square "
        "image after at most three prefix tokens. Name another layer"
    )


def pooled_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average two maps (B, C, H, W) down to the smaller height and width of the two."""
    height, width = (min(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
    size = height, width
    student, teacher = (m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size) for m in (student, teacher))
    return student, teacher


def summed(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of the terms of the pairs of maps."""
    return sum(terms)  # type: ignore[return-value]  # there is a pair, so it is no plain 0


def read_map(outputs: Outputs, role: str, layer: int | str) -> Tensor:
    """Return the map (B, C, H, W) of a layer.

    Raises:
        HfkdError: the layer gives no map; the message names the role, "student" or "teacher", and the layer.
    """
    try:
        return as_map(outputs.features[layer])
    except ValueError as error:
        raise HfkdError(f"{role}_layers: {layer!r}: {error}") from error


def check_averaged(role: str, outputs: Outputs) -> None:
    """Check that a network averages its last map, and that one linear layer makes the average its logits.

    Args:
        role: "student" or "teacher", for the message.
        outputs: of the network, with the layers "averaged_map" and "embedding".

    Raises:
        HfkdError: if it does not.
    """
    if outputs.classifier is None:
        raise HfkdError(
            f"this {role}'s logits do not come from one linear layer over its embedding, as those of two averaged "
            f"heads: give another {role}"
        )
    averaged, embedding = outputs.averaged_map.mean(dim=(2, 3)), outputs.embedding
    # In bf16 both differ by about 0.01.
    if averaged.shape != embedding.shape or (averaged - embedding).abs().max() > 0.05 * embedding.abs().max():
        raise HfkdError(
            f"the {role}'s classifier reads an embedding {tuple(embedding.shape)} that is not the average of its last "
            f"map {tuple(outputs.averaged_map.shape)}: give another {role}"
        )


class MapsLoss(DistillationLoss):
    """Base of the losses that compare maps of the student with maps of the teacher.

    Args:
        student_layers: stage indices (negative: from the end) or module paths, shallow to deep. None: every stage
            except the first. The layers give maps (B, C, H, W), or tokens (B, N, C) of a square image.
        teacher_layers: layers of the teacher, in the same form.
        weight: see `DistillationLoss`.

    Raises:
        HfkdError: an argument is not a list of layers.
    """

    reads_logits = False
    student_layers: Sequence[int | str]
    teacher_layers: Sequence[int | str]

    def __init__(self, student_layers: list | None = None, teacher_layers: list | None = None, weight: float = 1.0):
        super().__init__(weight)
        self.student_layers = None if student_layers is None else layers_of("student_layers", student_layers)  # type: ignore[assignment]
        self.teacher_layers = None if teacher_layers is None else layers_of("teacher_layers", teacher_layers)  # type: ignore[assignment]

    def maps(self, student: Outputs, teacher: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """Return the student's maps and the teacher's maps, (B, C, H, W) each.

        Raises:
            HfkdError: if the output of a layer is not a map.
        """
        student_maps = [read_map(student, "student", layer) for layer in self.student_layers]
        return student_maps, [read_map(teacher, "teacher", layer) for layer in self.teacher_layers]


class MapPairsLoss(MapsLoss):
    """Base of the losses that compare map i of the student with map i of the teacher.

    Raises:
        HfkdError: the numbers of layers differ.
    """

    def __init__(self, student_layers: list | None = None, teacher_layers: list | None = None, weight: float = 1.0):
        super().__init__(student_layers, teacher_layers, weight)
        if student_layers is not None and teacher_layers is not None:
            self._check_pairs()

    def _check_pairs(self) -> None:
        if len(self.student_layers) != len(self.teacher_layers):
            raise HfkdError(
                f"student_layers is {self.student_layers} and teacher_layers {self.teacher_layers}: give lists "
                "of equal length"
            )

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        self._check_pairs()
        self.maps(student, teacher)
