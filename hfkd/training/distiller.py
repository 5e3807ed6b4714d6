"""Distiller: student and losses as one module, which DDP wraps, the optimizer updates and torch.compile compiles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..errors import HfkdError
from ..losses.standardize import at_least_float32
from ..networks.features import (
    EMBEDDING,
    Outputs,
    Taps,
    find_classifier,
    forward_views,
    has_two_heads,
    is_classifier_of,
    prediction_of,
    remove_taps,
    train_heads_apart,
)

LOGGED = ("learning_rate", "grad_norm", "images_per_second", "skipped_images")  # names in the log beside the losses'


class Distiller(nn.Module):
    """Module that computes all loss terms in one forward pass.

    The losses may own parameters, such as projectors. With student and losses in one module, one optimizer trains them
    and one wrapper synchronises them.

    Args:
        student: the network to train.
        losses: distillation losses by name, each a `DistillationLoss`.
        ce_weight: weight of the cross-entropy with the labels, summed over the views of the batch.
        label_loss: Trainer's `compute_loss_func`, in place of the cross-entropy.
        cross_entropy: the cross-entropy with the labels, with class weights or label smoothing.
        frozen_norms: norms of the student that stay in evaluation mode: their statistics do not move.
        unlabelled_images: number of images without labels at the end of every batch whose other images have labels.

    Raises:
        HfkdError: if a loss names a layer that the student does not have, or if a class head would not be trained.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: nn.ModuleDict,
        ce_weight: float,
        label_loss: Callable[..., Tensor] | None = None,
        cross_entropy: nn.CrossEntropyLoss | None = None,
        frozen_norms: Sequence[nn.Module] = (),
        unlabelled_images: int = 0,
    ):
        super().__init__()
        self.student = student
        self.losses = losses
        self.ce_weight = ce_weight
        self.cross_entropy = cross_entropy or nn.CrossEntropyLoss()
        self.frozen_norms = list(frozen_norms)
        self.unlabelled_images = unlabelled_images
        self._label_loss = [label_loss] if label_loss else []  # in a list, else a module would become part of this one
        layers = [layer for loss in losses.values() for layer in loss.student_layers]
        self.taps = Taps(student, layers) if layers else None
        self._tapped = self.taps is not None
        # In a list, for it is a part of the student and no second module. See `check_classifier`.
        self.classifiers = [find_classifier(student)] if EMBEDDING in layers else []
        # DDP reads this attribute and does not broadcast these buffers before every forward. They are equal in all
        # processes without it, and broadcasting CRD's memory would take most of a step.
        self._ddp_params_and_buffers_to_ignore = [
            f"losses.{name}.{buffer}" for name, loss in losses.items() for buffer in loss.replicated_buffers
        ]
        self.needs_teacher = any(loss.needs_teacher for loss in losses.values())
        # Without a loss that compares logits with a teacher's, nothing would train the distillation head alone, but
        # evaluation averages it in. Then both heads learn the labels through their average.
        taught = any(loss.reads_logits and loss.needs_teacher for loss in losses.values())
        self.two_heads = has_two_heads(student) and taught
        if has_two_heads(student):
            train_heads_apart(student, self.two_heads)
        if self.two_heads and ce_weight == 0:
            raise HfkdError(
                "ce_weight is 0, and the student has a class head that only the cross-entropy trains, while evaluation "
                "averages both heads: set ce_weight above 0, or take a student without a distillation token."
            )

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode of student and losses; frozen norms stay in evaluation mode."""
        super().train(mode)
        for norm in self.frozen_norms:
            norm.eval()
        return self

    def attach_taps(self) -> None:
        """Record the layers that the losses read again, after `remove_taps`."""
        if self.taps is not None and not self._tapped:
            self.taps.attach(self.student)
            self._tapped = True

    def remove_taps(self) -> None:
        """Remove the hooks from the student, which cannot be copied with them."""
        if self._tapped:
            remove_taps(self.student)
            self._tapped = False

    def predict(self, batch: dict[str, Tensor]) -> Outputs:
        """Return the student's outputs for every view in `batch`, in float32 or wider."""
        outputs = forward_views(self.student, batch, self.taps, self.two_heads)
        outputs.features = {layer: at_least_float32(feature) for layer, feature in outputs.features.items()}
        outputs.classifier = next(iter(self.classifiers), None)
        for view in outputs.views():
            view.logits, view.class_logits = at_least_float32(view.logits), at_least_float32(view.class_logits)
        return outputs

    def check_classifier(self, outputs: Outputs) -> None:
        """Forget the student's classifier if it is no linear layer that makes the embedding its logits.

        Losses that read the classifier then find None.
        """
        if self.classifiers and not (
            isinstance(self.classifiers[0], nn.Linear) and is_classifier_of(outputs, self.classifiers[0])
        ):
            self.classifiers, outputs.classifier = [], None

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Return the student's logits (B, C), or the embedding (B, D) of one without a classifier, for evaluation."""
        return prediction_of(self.student, pixel_values)

    def forward(self, batch: dict[str, Tensor], teacher: Outputs | None) -> dict[str, Tensor]:
        """Return weighted loss terms by name (`loss_ce`, `loss_kd`, `loss_mlkd_class_correlation`, ...), each 0-d.

        Their sum is the training loss. The losses run outside autocast, in float32 or wider: in bf16 a KL term is off
        by several percent.
        """
        student = self.predict(batch)
        with torch.autocast(student.logits.device.type, enabled=False):
            terms = {}
            labelled = self._labelled(student, teacher, batch)
            if self.ce_weight > 0:
                name = "loss_labels" if self._label_loss else "loss_ce"
                terms[name] = self.ce_weight * sum(
                    self._learn_labels(view, labelled[2]["labels"]) for view in labelled[0].views()
                )
            for name, loss in self.losses.items():
                value = loss(*labelled) if loss.reads_labels else loss(student, teacher, batch)
                self._add_terms(terms, name, value)
        return terms

    def _labelled(self, student: Outputs, teacher: Outputs | None, batch: dict[str, Tensor]) -> tuple:
        """Return the outputs and the batch of the images that have labels, which come first."""
        if not self.unlabelled_images:
            return student, teacher, batch
        number = len(batch["labels"]) - self.unlabelled_images
        rows = {name: value[:number] if value.ndim else value for name, value in batch.items()}
        return student.first(number), teacher and teacher.first(number), rows

    def _add_terms(self, terms: dict[str, Tensor], name: str, value: Tensor | dict[str, Tensor]) -> None:
        """Add the weighted terms of a loss by their names in the log."""
        for term, term_value in ({"": value} if isinstance(value, Tensor) else value).items():
            key = f"loss_{name}_{term}" if term else f"loss_{name}"
            if key in terms:
                raise HfkdError(f"Two terms of the losses have the name '{key}': give '{name}' another name.")
            terms[key] = self.losses[name].weight * term_value

    def evaluate(self, batch: dict[str, Tensor], teacher: Outputs | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return the weighted terms of the losses for images without labels, as `forward` does, and the logits (B, C).

        Losses that read labels, remember training images or lack their teacher are left out. Call it in `evaluating`.
        """
        student = self.predict(batch)
        terms: dict[str, Tensor] = {}
        with torch.autocast(student.logits.device.type, enabled=False):
            for name, loss in self.losses.items():
                taught = teacher is not None or not loss.needs_teacher
                if taught and not (loss.reads_labels or loss.needs_index):
                    self._add_terms(terms, name, loss(student, teacher, batch))
        return terms, student.logits

    @contextlib.contextmanager
    def evaluating(self, network: nn.Module) -> Iterator[None]:
        """Put the losses in evaluation mode, and a network with the student's layers in the student's place."""
        student, classifiers, tapped = self.student, self.classifiers, self._tapped
        self.student, self.classifiers = network, [find_classifier(network) for _ in classifiers]
        if self.taps is not None:
            self.taps.attach(network)
        self.losses.eval()
        try:
            yield
        finally:
            self.losses.train()
            remove_taps(network)
            self.student, self.classifiers, self._tapped = student, classifiers, False
            if tapped:
                self.attach_taps()

    def _learn_labels(self, view: Outputs, labels: Tensor) -> Tensor:
        for label_loss in self._label_loss:
            # A sum over the number of images is then the mean of this batch, which is what Trainer gets of every loss.
            return label_loss(ImageClassifierOutput(logits=view.class_logits), labels, num_items_in_batch=len(labels))
        return self.cross_entropy(view.class_logits, labels)

    def metrics(self) -> dict[str, Tensor]:
        """Return what the losses log besides their terms, such as CTKD's temperature, as 0-d tensors.

        Raises:
            HfkdError: if a name is taken.
        """
        values: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            for metric, value in loss.metrics().items():
                key = f"{name}_{metric}"
                if key in values or key in LOGGED or key.startswith(("loss_", "eval_")):
                    raise HfkdError(f"The metric '{metric}' of the loss '{name}' is logged as '{key}', which is taken.")
                values[key] = value
        return values
