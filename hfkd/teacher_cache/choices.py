"""A teacher's classes for the evaluation images, kept from one run to the next.

    <cache of datasets>/hfkd_teachers/<key>.bin    the teacher's class for every row, in the format of a cache's file

A teacher is often several times as large as its student, and every run of a table, every trial of a search and every
seed evaluates the same teacher on the same images before its first step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers.utils import logging

from ..data import ImageSource, IndexedImageSource
from ..errors import HfkdError
from ..networks.teacher import Teacher, TeacherEnsemble
from .files import CHOICE_DTYPE, map_rows, write_rows
from .identity import arithmetic_of, images_facts, key_of

logger = logging.get_logger(__name__)


class KeptChoices:
    """Files of a teacher's classes, one for each data set on which it was evaluated.

    Args:
        teacher: whose classes they are; it is prepared before they are read.
        facts: result of `teacher_facts`.
        arithmetic: plain values on which rounding depends, such as device, precision and batch size.
    """

    def __init__(self, teacher: Teacher | TeacherEnsemble, facts: list[Any], arithmetic: dict[str, Any]):
        self._teacher, self._facts = teacher, [*facts, arithmetic]

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
        key = key_of([*self._facts, folded, *images_facts(dataset)])
        return Path(datasets.config.HF_DATASETS_CACHE, "hfkd_teachers", f"{key}.bin")


def kept_choices(teacher: Any, facts: list[Any] | None, args: Any) -> KeptChoices | None:
    """Return where a teacher's classes are kept; None where they are not.

    Args:
        facts: result of `teacher_facts`.
    """
    if facts is None or not args.keep_teacher_evaluation:
        return None
    arithmetic = arithmetic_of(args) | {"per_device_eval_batch_size": args.per_device_eval_batch_size}
    return KeptChoices(teacher, facts, arithmetic)
