"""The interface of a distillation loss, and what every logit loss shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import HfkdError
from .checks import not_negative
from .standardize import at_least_float32, standardize


class Outputs(Protocol):
    """What a loss reads of a model's outputs."""

    logits: Tensor  # (B, C)
    features: Mapping[int | str, Tensor]  # what the layers that losses name gave
    embedding: Tensor  # (B, D), what the classifier reads, where a loss names the layer "embedding"
    classifier: nn.Linear | None  # of a teacher, frozen; None unless its logits are those of one linear layer
    standardized: bool  # of a teacher: its logits are Z-scores already
    strong: "Outputs | None"  # the same images under the strong augmentation, where a loss has views = 2


@dataclass(frozen=True)
class ReusedClassifier:
    """How a student is to end in the teacher's classifier: the trainer builds it before anything taps the student.

    Attributes:
        student_layer: the stage whose map a projector reads; what lies behind it is dropped.
        teacher_layer: the layer whose map the projector imitates, a stage index, a module path or "embedding".
        factor: the projector's inner channels are the teacher's divided by it.
    """

    student_layer: int
    teacher_layer: int | str
    factor: int


class DistillationLoss(nn.Module):
    """One method: reads the student's and the teacher's outputs, returns its terms.

    A subclass states what it needs in the class attributes, takes its hyper-parameters by name in its
    constructor, each annotated, and passes `weight` on. It may own parameters and buffers: they are trained,
    synchronised and checkpointed with the student, and not shipped with it.

    In several processes each computes its terms over its own images, and gradients are averaged. For a term that is a
    mean over the batch that comes to the mean over all images. A term that compares images with one another compares
    those of one process, as in the released code, which computes the losses on each GPU.

    Args:
        weight: what the training loop multiplies every term by; `forward` returns them without it.

    Raises:
        ValueError: weight is negative or not finite.
    """

    views = 1  # 2: `student.strong` and `teacher.strong` are filled
    reads_logits = True  # False: a student's distillation head, where it has one, gets nothing from this loss
    reads_raw_logits = False  # True: other logits than `self.logits()` gives, so also those that are not standardized
    # The one temperature at which `forward` reads the teacher's logits; None: it reads them at several, or otherwise.
    teacher_temperature: float | None = None
    takes_mixed_labels = True  # False: `labels` must be classes, which mixup and CutMix do not leave
    # What `features` must hold: stage indices, module paths or "embedding". None: every stage but the first, which the
    # trainer then fills in.
    student_layers: Sequence[int | str] | None = ()
    teacher_layers: Sequence[int | str] | None = ()
    needs_index = False  # True: `batch` must hold `index`, the images' rows in the data set; `setup_rows` is called
    replicated_buffers: Sequence[str] = ()  # that `forward` keeps equal in all processes, so that DDP need not
    least_images = 1  # in a batch: 2 where BatchNorm sees one value an image and channel
    reuses_classifier: ReusedClassifier | None = None  # not None: the student gets a projector at its path "projector"

    citation = ""  # of the method's paper, one BibTeX entry, indented as one likes: the model card of a run quotes it

    # The run's one switch. `build_losses` sets it, so that no constructor has to repeat it.
    logit_standardization = False
    arguments: Mapping[str, Any] = {}  # of its constructor, defaults included; `build_losses` sets them, too
    autocast_dtype: torch.dtype | None = None  # the run's precision, None: float32; the trainer sets it

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = not_negative("weight", weight)

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        """Build what depends on shapes, from the outputs of one batch. Called once, before the optimizer.

        Raises:
            ValueError: if the loss cannot work with such outputs.
        """

    def setup_rows(self, labels: Tensor) -> None:
        """Build what depends on the training set, for a loss that `needs_index`. Called once, before `setup`.

        Args:
            labels: (N,) int64, one a row; -100 where a row is not trained on.
        """

    def autocast(self, device: torch.device) -> torch.autocast:
        """The run's precision, for learnt projectors: `forward` itself runs in float32."""
        return torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """The terms, not yet weighted: one 0-d tensor, or {term: 0-d tensor}.

        `batch` holds `labels` (B,), int64, or after mixup (B, C), shares of each class, and `progress`, 0-d: epochs
        done, 2.5 half way through the third.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def metrics(self) -> dict[str, Tensor]:
        """{name: detached 0-d tensor}: what is logged beside the terms, as of the last forward."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Its parameters as results name them: `arguments`, with the layers that it really reads."""
        layers = {"student_layers": self.student_layers, "teacher_layers": self.teacher_layers}
        read = {key: list(value) for key, value in layers.items() if key in self.arguments}
        return {**self.arguments, **read, "weight": self.weight}

    def logits(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """Student and teacher logits, each (B, C), standardized when the run asks for it."""
        if self.logit_standardization:
            return standardize(student.logits), teacher.logits if teacher.standardized else standardize(teacher.logits)
        return student.logits, teacher.logits


def paired(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The two, in float32 or wider, after a check that they can be compared class by class.

    Raises:
        ValueError: the shapes differ, or are not (B, C) with two classes or more.
    """
    if student_logits.shape != teacher_logits.shape:
        raise HfkdError(
            "student and teacher logits must have one shape (B, C), "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if student_logits.ndim != 2 or student_logits.shape[1] < 2:
        raise HfkdError(f"logits of shape (B, C) with C >= 2 expected, got {tuple(student_logits.shape)}")
    return at_least_float32(student_logits), at_least_float32(teacher_logits)


def epoch_number(progress: Tensor) -> Tensor:
    """The epoch under way, counted from 1, as warm-ups and curricula count it. 0-d."""
    return progress.floor() + 1
