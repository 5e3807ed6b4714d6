"""Teacher in training whose outputs are kept: a batch that an earlier run has kept is read, any other is computed."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging

from ..data import ImageSource, IndexedImageSource, MixedImageDataset
from ..losses import DistillationLoss
from ..networks.features import AVERAGED_MAP, EMBEDDING, Layer, Outputs
from ..networks.teacher import Teacher, TeacherEnsemble
from ..recipe.checks import AUTO
from ..recipe.config import DistillationConfig
from .batches import KeptBatches, NoRoomError
from .identity import PROBE_IMAGES, arithmetic_of, images_facts, key_of
from .rows import EMBEDDINGS, LOGITS
from .teacher import reads_beyond

STRONG_LOGITS = "teacher_logits_strong"
KEPT_LAYERS = {EMBEDDING: EMBEDDINGS, AVERAGED_MAP: "teacher_averaged_map"}  # and their entries in a batch
FILE_BYTES = 2**26  # outputs that are collected, on their device, before they are written

logger = logging.get_logger(__name__)


class FillingTeacher:
    """Teacher and the outputs of it that are kept, for the batches of one training set.

    The outputs are kept in a type that holds them exactly, so that the losses see the same numbers whether they are
    read or computed. Create it after the dry run, which prepares the teacher; `source.cache` is then set.

    Args:
        teacher: the teacher, prepared.
        source: training images, whose batches hold the outputs that are found.
        facts: result of `teacher_facts`.
        losses: those that read them; embedding and averaged map are kept if one reads them.
        args: settings of the run.
        limit: GiB that the outputs of all teachers may take.
    """

    def __init__(
        self,
        teacher: Any,
        source: Any,
        facts: list[Any] | None,
        losses: Iterable[Any],
        args: DistillationConfig,
        limit: float,
    ):
        self.teacher: Teacher | TeacherEnsemble = teacher
        self.source: IndexedImageSource = source
        self._layers = kept_layers(losses)
        pixels, outputs = self._probe(args)
        self._classifier, probed = outputs.classifier, self._values(outputs)
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self._kinds = {name: (value.dtype, value.stride()) for name, value in probed.items()}
        formats = {name: (_exact_type(value, half), tuple(value.shape[1:])) for name, value in probed.items()}
        about = {
            "teacher": facts,
            "images": images_facts(source),
            "arithmetic": arithmetic_of(args) | {"threads": torch.get_num_threads(), "compiled": _compiled(args)},
            # What shows that another library augments otherwise, or another processor rounds otherwise.
            "probe": [_digest(each) for each in (*pixels, *probed.values())],
            "outputs": {name: [str(dtype), list(shape)] for name, (dtype, shape) in formats.items()},
        }
        self.batches = KeptBatches(about, key_of(about), formats, int(limit * 2**30))
        self._limit = limit
        self._pending: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._pending_bytes, self._epoch = 0, 0
        self._exact = torch.ones((), dtype=torch.bool, device=args.device)
        self._keeping = True
        source.cache = self.batches

    def describe(self, images: int) -> str:
        """Return where the outputs are kept and how much they may take, in words.

        Args:
            images: number of images in an epoch.
        """
        epoch = self.batches.row_bytes * images / 2**20
        size = f"{epoch:,.1f}" if epoch > 1 else f"{epoch:.2g}"
        return (
            f"{size} MiB of the teacher's outputs an epoch, read from or written to {self.batches.folder}; those "
            f"of all teachers take at most {self._limit:g} GiB (teacher_cache_limit)"
        )

    def begin(self) -> None:
        """Prepare for a training, for which earlier ones may have kept more since."""
        self.source.cache = self.batches  # another trainer on the same images may have set its own
        self.batches.look_again()
        self._keeping = True
        self._exact.fill_(True)

    def write(self) -> None:
        """Write what was collected, for which it waits for the device; if that fails, nothing more is kept."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        if not (pending and self._keeping):
            return
        if not self._exact:
            return self._stop("they are not finite, or of another precision than for the first images")
        try:
            rows = [index.cpu().numpy() for index, _ in pending]
            outputs = [{name: value.cpu() for name, value in kept.items()} for _, kept in pending]
            self.batches.write(self._epoch, list(zip(rows, outputs, strict=True)))
        except (NoRoomError, OSError, SafetensorError) as error:
            self._stop(getattr(error, "strerror", None) or str(error))

    def __call__(self, batch: dict[str, Tensor]) -> Outputs:
        """Return the outputs for a training batch, as the teacher gives them; nothing here waits for the device."""
        if all(name in batch for name in self._kinds):
            return self._read(batch)
        outputs = self.teacher(batch)
        if self._keeping and "index" in batch:
            self._keep(batch["index"], outputs)
        return outputs

    def _read(self, batch: Mapping[str, Tensor]) -> Outputs:
        found = {}
        for name, (dtype, stride) in self._kinds.items():
            # In the teacher's layout: an embedding may be part of a larger tensor, of which a sum is rounded otherwise.
            value = torch.empty_strided(batch[name].shape, stride, dtype=dtype, device=batch[name].device)
            found[name] = value.copy_(batch[name])
        features = {layer: found[KEPT_LAYERS[layer]] for layer in self._layers}
        outputs = Outputs(found[LOGITS], found[LOGITS], features, self._classifier)
        if STRONG_LOGITS in found:
            outputs.strong = Outputs(found[STRONG_LOGITS], found[STRONG_LOGITS])
        return outputs

    def _values(self, outputs: Outputs) -> dict[str, Tensor]:
        views = outputs.views()
        classes = None if self.teacher.shares_classes else 0  # logits of other classes are read by no loss
        values = {name: view.logits[:, :classes] for name, view in zip((LOGITS, STRONG_LOGITS), views, strict=False)}
        return values | {KEPT_LAYERS[layer]: outputs.features[layer] for layer in self._layers}

    def _keep(self, index: Tensor, outputs: Outputs) -> None:
        epoch = self.source.shown_epoch
        if epoch != self._epoch:
            self.write()
        self._epoch, kept = epoch, {}
        for name, value in self._values(outputs).items():
            kept[name] = value.to(self.batches.formats[name][0], copy=True)
            self._exact &= (kept[name].to(value.dtype) == value).all()
        self._pending.append((index.clone(), kept))
        self._pending_bytes += len(index) * self.batches.row_bytes
        if self._pending_bytes >= FILE_BYTES:
            self.write()

    def _stop(self, reason: str) -> None:
        self._keeping = False
        logger.warning_once(f"The teacher's further outputs are not kept: {reason}. The training goes on without.")

    def _probe(self, args: DistillationConfig) -> tuple[list[Tensor], Outputs]:
        """Return the pixels of a few images of epoch 0, and the teacher's outputs for them."""
        source, epoch = self.source, self.source.epoch
        rows = np.linspace(0, len(source) - 1, min(len(source), PROBE_IMAGES), dtype=np.int64)
        source.set_epoch(0)
        batch = {name: value.to(args.device) for name, value in source.__getitems__(rows.tolist()).items()}
        source.set_epoch(epoch)
        eager = torch.compiler.set_stance("force_eager") if args.torch_compile else contextlib.nullcontext()
        with eager:  # compiled code is for batches of the training's size
            outputs = self.teacher(batch)
        return [value for name, value in batch.items() if name.startswith("pixel")], outputs


def why_not_kept(facts: list[Any] | None, losses: Iterable[Any], source: ImageSource | None, args: Any) -> str | None:
    """Return why a teacher's outputs cannot be kept in a run, in words; None if they can.

    Args:
        facts: result of `teacher_facts`, None for a teacher that is not whole on this device.
    """
    if facts is None:
        return "it has a cache already, or is spread over devices or processes"
    if args.torch_compile == AUTO:
        return "torch_compile: auto decides in the middle of the training how it computes"
    if args.mixes:
        return "mixup and cutmix mix images in each batch anew"
    if not isinstance(source, IndexedImageSource) or isinstance(source, MixedImageDataset):
        return "the training images have no rows of one data set, as those of a stream"
    if args.accelerator_config.dispatch_batches:
        return "dispatch_batches joins the batches of several processes"
    inside = [type(loss).__name__ for loss in losses if loss.needs_teacher and reads_more(loss)]
    return f"{inside[0]} reads more of it than logits, embedding and averaged map" if inside else None


def reads_more(loss: DistillationLoss) -> bool:
    """Return whether a loss reads more of the teacher than is kept, so that the teacher runs in every step."""
    return reads_beyond(loss, KEPT_LAYERS)


def kept_layers(losses: Iterable[DistillationLoss]) -> list[Layer]:
    """Return the layers that are kept beside the logits for losses that read no more than that."""
    read = {layer for loss in losses for layer in loss.teacher_layers or ()}
    return [layer for layer in KEPT_LAYERS if layer in read]


def _exact_type(value: Tensor, half: torch.dtype) -> torch.dtype:
    """Return the type of the run's precision if it holds the numbers exactly, as of a layer under autocast."""
    return half if torch.equal(value.to(half).to(value.dtype), value) else value.dtype


def _compiled(args: DistillationConfig) -> list[str | None]:
    return [args.torch_compile_backend, args.torch_compile_mode]


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
