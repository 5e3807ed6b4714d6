"""Evaluation: what the student says of images, and the teacher, which is asked once."""

from __future__ import annotations

import functools
import time
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import ImageSource, StreamingImageDataset
from ..data.subsets import image_source
from ..losses.standardize import at_least_float32
from ..networks.features import logits_of
from ..teacher_cache.teacher import CachedTeacher
from .backends import PreparingTrainer


class EvaluatingTrainer(PreparingTrainer):
    """How `DistillationTrainer` evaluates: the moving average where there is one, with the teacher beside it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._keep_logits = False
        self._teacher_memories: WeakKeyDictionary[ImageSource, Tensor | None] = WeakKeyDictionary()
        self._teacher_memory: Tensor | None = None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        started = time.perf_counter()
        student = self.model
        if self.average is not None:
            self.model = self.average.module
        if self.args.world_size > 1:
            # Every rank has seen other images since the last forward: all evaluate with rank 0's BatchNorm statistics.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        self._keep_logits = description == "Prediction"
        self._teacher_memory = self._memory_of(dataloader.dataset)
        streamed = isinstance(dataloader.dataset, StreamingImageDataset)
        if streamed:  # nothing to leave out: its padding is marked, and accelerate does not know its length
            self.gather_function = self.accelerator.gather
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.model = student
        if streamed:  # Trainer takes the number of batches
            output = output._replace(num_samples=dataloader.dataset.num_rows)
        output.metrics.update(self._skipped(f"{metric_key_prefix}_skipped_images", dataloader.dataset))
        self._clock += time.perf_counter() - started  # images_per_second speaks of training alone
        return output

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Cross-entropy, predictions, labels. `predict()` gets logits; `evaluate()` only the best classes of student
        and teacher, so that ImageNet's logits need not be gathered."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with self._autocast():
            forward = self.distiller.logits if self.shards else functools.partial(logits_of, model)
            logits = at_least_float32(forward(inputs["pixel_values"]))
        if prediction_loss_only and labels is not None:
            counting = (labels != ImageSource.IGNORED).sum().clamp(min=1)
            return F.cross_entropy(logits, labels, reduction="sum") / counting, None, None
        if self._keep_logits or labels is None:
            return None, logits, labels
        ranked = logits.topk(min(5, logits.shape[1])).indices
        # One loss an image: Trainer's mean over batches would count twice the images that pad a rank's last batch.
        losses = F.cross_entropy(logits, labels, reduction="none")
        choice = None if self.teacher is None else self._teacher_choice(inputs)
        return None, (ranked, losses) if choice is None else (ranked, losses, choice), labels

    def _memory_of(self, dataset) -> Tensor | None:
        """What the teacher chose in earlier evaluations of an unaugmented data set of ours, (N,), -1 where not known.

        The teacher never changes, and is often several times the student: asking it once saves most of the time of
        every later evaluation.
        """
        source = image_source(dataset)
        if source is None or source.augmented:
            return None
        if source not in self._teacher_memories:
            cached = isinstance(self.teacher, CachedTeacher)
            known = self.teacher.choices(source) if cached else torch.full((source.num_rows,), -1)
            self._teacher_memories[source] = None if known is None else known.to(self.args.device)
        return self._teacher_memories[source]

    def _teacher_choice(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """The teacher's most probable class for each image, (B,); None where a cache does not tell."""
        index = inputs.get("index")
        memory = None if index is None else self._teacher_memory
        if isinstance(self.teacher, CachedTeacher):
            return None if memory is None else memory[index]
        if memory is not None and self._everywhere((memory[index] >= 0).all()):
            return memory[index]
        choice = self.teacher({"pixel_values": inputs["pixel_values"]}).logits.argmax(dim=1)
        if memory is not None:
            memory[index] = choice
        return choice

    def _everywhere(self, known: Tensor) -> bool:
        """Is it so in this process; where they must all ask the teacher, or none, in all of them?"""
        if any(member.shared_out for member in self.teacher.members):
            known = known.int()
            torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MIN)
        return bool(known)
