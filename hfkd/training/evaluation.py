"""Evaluation: ranked predictions of the student, and the teacher's top choices, which are computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageDataset, ImageSource
from ..data.subsets import image_source, training_labels
from ..networks.teacher import Teacher, TeacherEnsemble
from ..teacher_cache.choices import KeptChoices
from ..teacher_cache.teacher import CachedTeacher

PROBE_IMAGES = 64  # whose choices decide whether those of an earlier run are believed


class TeacherMemory:
    """The teacher's most probable class for every evaluation image, remembered from one evaluation to the next.

    The teacher never changes and is often several times as large as the student: running it once saves most of the time
    of every later evaluation.

    Args:
        teacher: the teacher, None for a student without one.
        device: device of the batches.
        kept: where the classes are kept for later runs, None for nowhere.

    Attributes:
        current: classes (N,) of the data set that is being evaluated, -1 where not known; None where nothing is kept.
    """

    def __init__(
        self,
        teacher: Teacher | TeacherEnsemble | CachedTeacher | None,
        device: torch.device,
        kept: KeptChoices | None = None,
    ):
        self.teacher, self.device, self.kept = teacher, device, kept
        self.current: Tensor | None = None
        self._source: ImageSource | None = None
        self._dataset: Any = None  # the source, or a subset of it
        self._memories: WeakKeyDictionary[ImageSource, Tensor | None] = WeakKeyDictionary()

    def open(self, dataset) -> None:
        """Turn to a data set. Only an hfkd data set that is not augmented has rows to remember."""
        source = image_source(dataset)
        if source is None or source.augmented:
            self.current = None
            return
        if source not in self._memories:
            cached = isinstance(self.teacher, CachedTeacher)
            known = self.teacher.choices(source) if cached else torch.full((source.num_rows,), -1)
            self._memories[source] = None if known is None else known.to(self.device)
        self.current, self._source, self._dataset = self._memories[source], source, dataset

    def top1(
        self, batches: Iterable[dict[str, Tensor]], processes: int, prepare: Callable[[Any], dict[str, Tensor]]
    ) -> float | None:
        """Return the teacher's top-1 in percent over the batches of an opened data set, and remember its choices.

        All processes must call it. None where nothing can be remembered: then each evaluation runs the teacher anyway.
        Choices that an earlier run kept are believed if the teacher chooses the same for the first images.

        Args:
            prepare: makes of what the data set gives for some images a batch as those of `batches`.
        """
        if self.current is None:
            return None
        believed = self._believe_kept(prepare)
        if believed and processes == 1 and isinstance(self._source, ImageDataset):  # no image has to be shown
            labels = self._labels()
            return _share(self.current == labels, labels != ImageSource.IGNORED)
        hits = torch.full_like(self.current, -1)  # of rows in no batch: -1
        for inputs in batches:
            choice, counting = self.choice(inputs), inputs["labels"] != ImageSource.IGNORED
            hits[inputs["index"][counting]] = (choice == inputs["labels"])[counting].long()
        if processes > 1:
            for rows in (hits, self.current):
                torch.distributed.all_reduce(rows, torch.distributed.ReduceOp.MAX)
        if self.kept is not None and not believed and (self.current >= 0).all():
            self.kept.write(self._source, self.current)
        return _share(hits == 1, hits >= 0)

    def choice(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Return the teacher's class for each image of a batch, (B,); None without a teacher or a row in its cache."""
        if self.teacher is None:
            return None
        index = inputs.get("index")
        memory = None if index is None else self.current
        if isinstance(self.teacher, CachedTeacher):
            return None if memory is None else memory[index]
        if memory is not None and self._known_everywhere((memory[index] >= 0).all()):
            return memory[index]
        logits = self.teacher({"pixel_values": inputs["pixel_values"]}).logits
        choice = logits.argmax(dim=1).masked_fill_(~logits.isfinite().all(dim=1), -1)  # NaN would be the first class
        if memory is not None:
            memory[index] = choice
        return choice

    def _believe_kept(self, prepare: Callable[[Any], dict[str, Tensor]]) -> bool:
        """Remember the choices that an earlier run kept, if the teacher makes the same for the first images."""
        if self.kept is None or (self.current >= 0).any():
            return False
        kept = self.kept.read(self._source)
        if kept is None:
            return False
        kept = kept.to(self.device)
        first = prepare(self._dataset.__getitems__(list(range(min(PROBE_IMAGES, len(self._dataset))))))
        believed = torch.equal(kept[first["index"]], self.choice(first))
        if believed:
            self.current.copy_(kept)
        else:
            self.current.fill_(-1)  # also of the first images, which other batches may round differently
        return believed

    def _labels(self) -> Tensor:
        """Return the labels (N,) of the data set's rows, IGNORED outside a subset."""
        return training_labels(self._dataset).to(self.device)

    def _known_everywhere(self, known: Tensor) -> bool:
        """Return whether the batch is known here and, for a sharded teacher, which all must run, in all processes."""
        if any(member.is_sharded for member in self.teacher.members):
            known = known.int()
            torch.distributed.all_reduce(known, torch.distributed.ReduceOp.MIN)
        return bool(known)


def _share(hits: Tensor, counting: Tensor) -> float | None:
    """Return the share of hits in percent among the rows that count; None if there is none."""
    measured = hits[counting]
    return 100 * measured.double().mean().item() if len(measured) else None


@contextlib.contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Give a model its forward back: in an evaluation before training, accelerate wraps it in autocast for good."""
    attributes = vars(model)
    former = {name: attributes[name] for name in ("forward", "_original_forward") if name in attributes}
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            attributes.pop(name, None)
        attributes.update(former)


def ranked_predictions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best five classes (B, 5), or all of fewer, and the cross-entropy (B,) of each image.

    The classes alone are gathered from all processes, not the logits: of ImageNet those would be gigabytes. The loss is
    one value an image, because Trainer's mean over batches would count the images twice that pad a last batch.
    """
    ranked = logits.topk(min(5, logits.shape[1])).indices
    return ranked, F.cross_entropy(logits, labels, reduction="none")


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy, 0-d, over the images that are no padding."""
    counting = (labels != ImageSource.IGNORED).sum().clamp(min=1)
    return F.cross_entropy(logits, labels, reduction="sum") / counting
