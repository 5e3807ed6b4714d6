"""A teacher's classes for the evaluation images, kept from one run to the next.

    <cache of datasets>/hfkd_teachers/<key>.bin    the teacher's class for every row, in the format of a cache's file

A teacher is often several times as large as its student, and every run of a table, every trial of a search and every
seed evaluates the same teacher on the same images before its first step.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from ..data import ImageDataset, ImageSource, IndexedImageSource
from ..errors import HfkdError
from ..networks.teacher import Teacher, TeacherEnsemble
from ..networks.zero_shot import ZeroShotNetwork
from .files import CHOICE_DTYPE, map_rows, write_rows
from .identity import describe_teacher

logger = logging.get_logger(__name__)


class KeptChoices:
    """Files of a teacher's classes, one for each data set on which it was evaluated.

    Create it before the teacher is prepared, which rounds the weights.

    Args:
        teacher: what says the classes.
        arithmetic: plain values on which rounding depends, such as device, precision and batch size.
    """

    def __init__(self, teacher: Teacher | TeacherEnsemble, arithmetic: dict[str, Any]):
        # The same weights under another structure or in other class names say something else.
        modules = [repr(member.model) for member in teacher.members]
        names = [str(getattr(getattr(member.model, "config", None), "id2label", None)) for member in teacher.members]
        texts = [_digest_of_texts(member.model) for member in teacher.members]
        versions = [module.__version__ for module in (torch, timm, transformers)]
        self._teacher = teacher
        self._facts = [describe_teacher(teacher), modules, names, texts, versions, arithmetic]

    def read(self, dataset: ImageSource) -> Tensor | None:
        """Return the classes (N,) int64 for the rows of a data set; None if they are not kept."""
        path = self._path(dataset)
        if path is None or not path.is_file():
            return None
        try:
            return torch.from_numpy(map_rows(path, CHOICE_DTYPE, dataset.num_rows).astype("int64"))
        except HfkdError:  # damaged: it is written anew
            return None

    def write(self, dataset: ImageSource, choices: Tensor) -> None:
        """Keep the classes (N,) for the rows of a data set. Where they cannot be written, the next run asks again."""
        path = self._path(dataset)
        if path is None:
            return
        try:
            write_rows(path, choices.cpu().numpy().astype(CHOICE_DTYPE))
        except (HfkdError, OSError) as error:
            logger.info(f"The teacher's classes are not kept for later runs: {error}")

    def _path(self, dataset: ImageSource) -> Path | None:
        """Return the file for a data set; None for a stream, whose rows have no number."""
        if not isinstance(dataset, IndexedImageSource):
            return None
        folded = [member.is_folded for member in self._teacher.members]  # known once it is prepared
        facts = [*self._facts, folded, dataset.identity()]
        if isinstance(dataset, ImageDataset):  # in memory: every image, where the identity reads a sample
            facts.append(zlib.crc32(dataset.images.cpu().contiguous().numpy().data))
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        return Path(datasets.config.HF_DATASETS_CACHE, "hfkd_teachers", f"{key}.bin")


def _digest_of_texts(model: nn.Module) -> str | None:
    """Return the hash of a zero-shot classifier's text features, which are not in its state; None for others."""
    if not isinstance(model, ZeroShotNetwork):
        return None
    return hashlib.sha256(model.classifier.features.cpu().numpy().tobytes()).hexdigest()


def kept_choices(teacher: Any, args: Any) -> KeptChoices | None:
    """Return where a teacher's classes are kept; None where there is no teacher, or its weights lie elsewhere."""
    if not isinstance(teacher, (Teacher, TeacherEnsemble)) or not args.keep_teacher_evaluation:
        return None
    if args.shard_teacher or any(member.is_sharded or member.dispatched for member in teacher.members):
        return None
    keys = ("bf16", "fp16", "tf32", "channels_last", "torch_compile", "per_device_eval_batch_size", "world_size")
    return KeptChoices(teacher, {"device": str(args.device.type)} | {key: getattr(args, key) for key in keys})
