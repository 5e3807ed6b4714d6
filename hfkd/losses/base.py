"""Interface of a distillation loss, and the parts that all logit losses share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import HfkdError
from .checks import not_negative
from .labels import dominant_classes
from .standardize import at_least_float32, standardize


class Outputs(Protocol):
    """Outputs of a model, as far as losses read them."""

    logits: Tensor  # (B, C)
    features: Mapping[int | str, Tensor]  # outputs of the layers that losses name
    embedding: Tensor  # (B, D), input of the classifier, if a loss names the layer "embedding"
    averaged_map: Tensor  # (B, D, H, W), input of the global pooling, if a loss names the layer "averaged_map"
    # With "embedding", if one linear layer makes it the logits: this layer, of a teacher frozen; else None.
    classifier: nn.Linear | None
    standardized: bool  # of a teacher: True if its logits are already Z-scores
    members: "Sequence[Outputs]"  # of several teachers: the outputs of each, with its layers if a loss `reads_members`
    strong: "Outputs | None"  # the same images, strongly augmented, if a loss has views = 2


@dataclass(frozen=True)
class ReusedClassifier:
    """Description of a student that ends in the teacher's classifier.

    The trainer builds this student before it taps any layer.

    Attributes:
        student_layer: the stage whose map a projector reads. The layers behind it are dropped.
        teacher_layer: the layer whose map the projector imitates: a stage index, a module path or "embedding".
        factor: the projector's inner channels are the teacher's channels divided by this number.
    """

    student_layer: int
    teacher_layer: int | str
    factor: int


class DistillationLoss(nn.Module):
    """Base of all methods: reads the outputs of student and teacher, returns the method's terms.

    A subclass states in class attributes what it needs. It takes its hyper-parameters by name in its constructor, each
    annotated, and passes `weight` on. It may own parameters and buffers: they are trained, synchronised and
    checkpointed with the student, and they are not exported with it.

    In a run of several processes each computes its terms over its own images, and gradients are averaged. For a term
    that is a mean over the batch, the result is the mean over all images. A term that compares images with one another
    compares the images of one process, as in the released code, which computes the losses on each GPU.

    Args:
        weight: factor by which the training loop multiplies every term. `forward` returns the terms without it.

    Raises:
        HfkdError: weight is negative or not finite.
    """

    views = 1  # 2: `student.strong` and `teacher.strong` are filled
    needs_teacher = True  # False: it works without a teacher, and `forward` may get None for it
    # False: it reads the logits of neither network. It then trains no classifier, distillation head included, and a
    # teacher without a classifier, or with other classes, can teach it.
    reads_logits = True
    reads_classifier = False  # True: it reads the weights of the teacher's classifier
    reads_raw_logits = False  # True: it reads logits besides `self.logits()`, so also unstandardized ones
    # The one temperature at which `forward` reads the teacher's logits. None: it reads them in another way.
    if TYPE_CHECKING:  # so that a subclass may have an attribute or a property

        @property
        def teacher_temperature(self) -> float | None: ...
        @property
        def zscore_caveat(self) -> str: ...

    else:
        teacher_temperature = None
        zscore_caveat = ""  # why Z-scores do not suit it, in sentences that a run tells before it trains on them
    # True: it reads `labels`. Of a batch in which some images have no label it then gets the others, and a training
    # without labels is refused.
    reads_labels = False
    takes_mixed_labels = True  # False: `labels` must be classes, so mixup and CutMix are refused without:
    dominant_label = False  # True: `classes` gives the class with the largest share; set by a constructor that has it
    # The layers that `features` must hold: stage indices, module paths (with ":input" behind it the module's input),
    # "embedding" or "averaged_map". None: every stage except the first, and `beside_stages`; the trainer replaces None.
    student_layers: Sequence[int | str] | None = ()
    teacher_layers: Sequence[int | str] | None = ()
    beside_stages: Sequence[str] = ()
    # BatchNorms of the teacher whose scale and shift, (2, C), `features` must hold under f"{path}:affine".
    teacher_norms: Sequence[str] = ()
    reads_members = False  # True: it reads `members`, and its `teacher_layers` are those of each teacher
    needs_index = False  # True: `batch` holds `index`, the images' rows in the data set, and `setup_rows` is called
    draws_noise = False  # True: `batch` holds `index` and `step`, for `uniform_noise` with `seed`
    replicated_buffers: Sequence[str] = ()  # kept equal in all processes by `forward`, so DDP does not copy them
    least_images = 1  # smallest batch: 2 if BatchNorm sees one value for each image and channel
    warmup_epochs = 0.0  # of the factor `warmup`, for a loss that multiplies its terms by it
    reuses_classifier: ReusedClassifier | None = None  # not None: the student gets a module "projector"

    citation = ""  # BibTeX entry of the method's paper, with any indentation; a run's model card quotes it

    # The run's switch for all losses. `build_losses` sets it, so that no constructor has to take it.
    logit_standardization = False
    arguments: Mapping[str, Any] = {}  # of the constructor, with defaults; set by `build_losses`
    autocast_dtype: torch.dtype | None = None  # the run's precision, None for float32; set by the trainer
    seed = 0  # of the run; set by the trainer

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = not_negative("weight", weight)

    def setup(self, student: Outputs, teacher: Outputs) -> None:
        """Build the parts that depend on shapes, from the outputs of one batch.

        The trainer calls it once, before it creates the optimizer.

        Raises:
            HfkdError: if the loss cannot work with these outputs.
        """

    def setup_rows(self, labels: Tensor) -> None:
        """Build the parts that depend on the training set, for a loss with `needs_index`.

        The trainer calls it once, before `setup`.

        Args:
            labels: (N,) int64, one for each row of the data set; -100 for a row that is not trained on.
        """

    def run_eagerly(self) -> None:
        """Keep torch.compile out of `forward`, for a loss whose state changes within a step.

        Call it in the constructor or in `setup`. It is no decorator, because `torch.compiler.disable` imports the
        compiler, which takes longer than importing torch.
        """
        eager = MethodType(torch.compiler.disable(type(self).forward), self)
        self.forward = eager  # type: ignore[method-assign]  # of this instance alone

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return a context with the run's precision, for learnt projectors; `forward` itself runs in float32."""
        return torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def forward(self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Return the unweighted terms: one 0-d tensor, or {term: 0-d tensor}.

        Args:
            teacher: None in a run without a teacher, for a loss that needs none.
            batch: holds `labels`, (B,) int64, or after mixup (B, C), the share of each class; `progress`, 0-d, the
                epochs done: 2.5 half way through the third epoch; and `step`, 0-d int64, the steps done. Without
                `reads_labels` the labels may be -100: an image without one.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def metrics(self) -> dict[str, Tensor]:
        """Return values of the last forward to log beside the terms, {name: detached 0-d tensor}."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the parameters as results name them: `arguments`, with the layers that the loss reads."""
        layers: dict[str, Any] = {"student_layers": self.student_layers, "teacher_layers": self.teacher_layers}
        actual = {key: list(value) for key, value in layers.items() if key in self.arguments}
        return {**self.arguments, **actual, "weight": self.weight}

    def warmup(self, batch: Mapping[str, Tensor]) -> Tensor | float:
        """Return min(epoch / warmup_epochs, 1), 0-d, epochs counted from 1."""
        if self.warmup_epochs == 0:
            return 1.0
        return (epoch_number(batch["progress"]) / self.warmup_epochs).clamp(max=1)

    def classes(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the class of each image, (B,); of a mixed one, the class with the largest share."""
        return dominant_classes(batch["labels"])

    def logits(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """Return student and teacher logits, each (B, C), standardized if the run asks for it."""
        if self.logit_standardization:
            return standardize(student.logits), teacher.logits if teacher.standardized else standardize(teacher.logits)
        return student.logits, teacher.logits


def trains_classifier(losses: Iterable[Any], ce_weight: float) -> bool:
    """Return True if the cross-entropy or one of the losses reads the student's logits, or its classifier."""
    return ce_weight > 0 or any(loss.reads_logits or loss.reads_classifier for loss in losses)


def paired(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Check that logits can be compared class by class, and return both in float32 or wider.

    Raises:
        HfkdError: the shapes differ, or are not (B, C) with two classes or more.
    """
    if student_logits.shape != teacher_logits.shape:
        raise HfkdError(
            "student and teacher logits must have the same shape (B, C), "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if student_logits.ndim != 2 or student_logits.shape[1] < 2:
        raise HfkdError(f"logits of shape (B, C) with C >= 2 expected, got {tuple(student_logits.shape)}")
    return at_least_float32(student_logits), at_least_float32(teacher_logits)


def reduced(values: Tensor, reduction: str) -> Tensor:
    """Return the mean of the values (B,) of the images, or, for the reduction "none", the values.

    Raises:
        HfkdError: for another reduction.
    """
    if reduction not in ("mean", "none"):
        raise HfkdError(f'reduction is {reduction!r}: give "mean" or "none"')
    return values if reduction == "none" else values.mean()


def epoch_number(progress: Tensor) -> Tensor:
    """Return the current epoch, 0-d, counted from 1 as warm-ups and curricula count it."""
    return progress.floor() + 1
