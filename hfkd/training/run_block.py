"""Block of lines before a training: device, data, networks, steps and folder."""

from __future__ import annotations

import weakref
from collections.abc import Sized
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..data import ImageSource, MixedImageDataset
from ..data.subsets import image_source
from ..names import counted
from ..networks.teacher import Teacher
from ..teacher_cache.teacher import CachedTeacher
from .loaders import first_set
from .unlabelled import has_labels


class RunBlock(TrainerCallback):
    """Callback that prints what is about to be trained, once, before the first step.

    It refers to the trainer weakly: a trainer in a circle of references would outlive its last use.

    Args:
        weights: for "student" and "teacher", where the weights come from; missing where only the caller knows.

    Attributes:
        cache: where what the teacher says is kept, or why it is not; None where nobody asked for it.
        tells_training: whether the steps and the folder are told, which are no user's where a command has many runs.
    """

    def __init__(self, trainer: Trainer, weights: dict[str, str]):
        self.trainer = weakref.proxy(trainer)
        self.weights = weights
        self.cache: str | None = None
        self.tells_training = True
        self.printed = False

    def on_train_begin(self, args, state, control, **kwargs):
        if self.printed or not state.is_world_process_zero:
            return
        self.printed = True  # a search prints it for its first trial
        lines = {"device": _device(args), "data": self._data(), **self._networks(), "cache": self.cache}
        lines |= {"training": _training(args, state)} if self.tells_training else {}
        if not has_labels(self.trainer.train_dataset):
            lines["labels"] = "none in training: ce_weight is 0, and no loss reads labels"
        print("\n".join(f"{name:<10}{text}" for name, text in lines.items() if text), flush=True)

    def _data(self) -> str:
        trainer, facts = self.trainer, self.trainer.results.facts
        name = f"{facts['dataset']['name']}: " if facts["dataset"] else ""
        counts = [_images(trainer.train_dataset, "training image")]
        if isinstance(trainer.train_dataset, MixedImageDataset):
            counts = [trainer.train_dataset.describe()]
        if trainer.eval_dataset is not None:
            counts.append(_images(first_set(trainer.eval_dataset), "evaluation image"))
            counts[-1] += "" if has_labels(first_set(trainer.eval_dataset)) else " without labels"
        classes = [counted(trainer.num_classes, "class", "classes")] if trainer.num_classes else []
        source = image_source(trainer.train_dataset)
        size = [f"{source.image_size} x {source.image_size} pixels"] if source is not None else []
        return name + ", ".join(counts + classes + size)

    def _networks(self) -> dict[str, str]:
        facts = self.trainer.results.facts  # the parameters of a sharded network cannot be counted here
        number = f"{facts['parameters']:,} parameters"
        if "trained_parameters" in facts:
            number += f" ({facts['trained_parameters']:,} trained)"
        trained = [facts["student"], number, self.weights.get("student")]
        trained += [] if self.trainer.has_classifier else ["no classifier"]
        lines = {self.trainer.exports.name: trained}
        if facts["teacher"] is not None:
            number = f"{facts['teacher_parameters']:,} parameters"
            teacher = self.trainer.teacher
            lines["teacher"] = [facts["teacher"], number, self.weights.get("teacher"), _classes(teacher)]
            lines["teacher"] += [] if isinstance(teacher, CachedTeacher) else map(_folding, teacher.members)
        return {role: ", ".join(filter(None, parts)) for role, parts in lines.items()}


def _classes(teacher: Any) -> str | None:
    """Return what a teacher has in place of the student's classes; None if it has them."""
    if teacher.shares_classes:
        return None
    return "its features only" if teacher.has_classifier else "no classifier"


def _folding(member: Teacher) -> str | None:
    """Return how the network that is run differs from the teacher's own; None if it is that."""
    return None if member.folded is None else str(member.folded)


def _images(dataset: Any, kind: str) -> str:
    if isinstance(dataset, ImageSource):
        return counted(dataset.num_rows, kind)
    return counted(len(dataset), kind) if isinstance(dataset, Sized) else f"streamed {kind}s"


def _device(args) -> str:
    kind = args.device.type
    name = torch.cuda.get_device_name(args.device) if kind == "cuda" else f"{torch.get_num_threads()} threads"
    number = f"{args.world_size} processes, each with " if args.world_size > 1 else ""
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    return f"{number}{kind} ({name}), {precision}"


def _training(args, state) -> str:
    since = f" from step {state.global_step:,}" if state.global_step else ""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return f"{counted(state.max_steps, 'step')} of {counted(batch, 'image')}{since}, into {args.output_dir}"
