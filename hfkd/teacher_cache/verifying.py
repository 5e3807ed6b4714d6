"""Check of a finished cache: some of its rows are computed again and compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ..data import IndexedImageSource
from ..errors import HfkdError, RunError
from ..networks.teacher import Teacher, TeacherEnsemble
from ..recipe.config import DistillationConfig
from .files import CacheFiles, read_facts
from .identity import describe_teacher, differences
from .rows import EMBEDDINGS, LOGITS, VALUES
from .writing import batches_of, prepare_teacher_and_images, rows_of

SAMPLE = 256  # rows, spread over all epochs
# Largest difference, as a share of the largest number of the row: float16 rounds by 2**-11, bfloat16 by 2**-8.
TOLERANCE = {"torch.float32": 2**-9, "torch.float16": 2**-6, "torch.bfloat16": 2**-4}


def verify_cache(
    folder: str | Path,
    teacher: Teacher | TeacherEnsemble,
    train_set: IndexedImageSource,
    eval_set: IndexedImageSource,
    config: DistillationConfig,
) -> tuple[int, float]:
    """Compute a sample of a cache's rows again, and return their number and the largest difference found.

    Differences are shares of the largest number of a row.

    Raises:
        HfkdError: if the cache is not finished, or was written for another teacher or other images.
        RunError: if a row differs by more than the precision of the cache explains.
    """
    files = CacheFiles(folder, read_facts(folder, whole=True))
    files.check_complete()
    here = json.loads(json.dumps({"teacher": describe_teacher(teacher), "train": train_set.identity()}))
    different = differences({key: files.facts[key] for key in here}, here)
    if different:
        raise HfkdError(f"{folder} was written for another run:\n  " + "\n  ".join(different))
    prepare_teacher_and_images(teacher, train_set, eval_set, config, files.format, files.format.width is not None)
    allowed = TOLERANCE[files.facts["precision"]]
    number, largest = 0, 0.0
    for epoch, rows in _sample(files):
        train_set.set_epoch(epoch)
        for start, batch in enumerate(batches_of(train_set, [rows], config)):  # type: ignore[list-item]
            part = rows[start * config.eval_batch_size :][: len(batch["index"])]
            found = _differences(files, rows_of(files.format, teacher(batch)), epoch, part)
            if found.max() > allowed:
                raise RunError(
                    f"{folder} does not hold what the teacher gives now: image {part[found.argmax()]} of epoch {epoch} "
                    f"differs by {found.max():.2g} of its largest number, and {allowed:.2g} are to be expected. Write "
                    "the cache again, in another folder."
                )
            number, largest = number + len(part), max(largest, float(found.max()))
    return number, largest


def _sample(files: CacheFiles) -> list[tuple[int, list[int]]]:
    """Return some rows of each epoch, other ones in each."""
    each = min(files.num_rows, max(1, SAMPLE // files.epochs))
    step = files.num_rows / each
    return [
        (epoch, [int(step * (index + epoch / files.epochs)) for index in range(each)]) for epoch in range(files.epochs)
    ]


def _differences(files: CacheFiles, computed: np.ndarray, epoch: int, rows: list[int]) -> np.ndarray:
    """Return for each row (B,) its largest difference from the stored one, as a share of its largest number."""
    stored = files.read(epoch, np.array(rows))
    largest = np.zeros(len(rows))
    for name in {LOGITS, VALUES, EMBEDDINGS}.intersection(computed.dtype.names or ()):
        here = torch.from_numpy(computed[name].copy()).float().flatten(1)
        there = stored[name].float().flatten(1)
        share = (here - there).abs().amax(dim=1) / there.abs().amax(dim=1).clamp(min=1e-6)
        largest = np.maximum(largest, share.numpy())
    return largest
