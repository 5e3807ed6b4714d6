"""Writing of teacher caches: a teacher's logits, and its embeddings, for every image and epoch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import ImageDataset, IndexedImageSource, collate_batch
from ..errors import HfkdError, RunError
from ..networks.features import EMBEDDING, InputSpec, Outputs
from ..networks.teacher import Teacher, TeacherEnsemble, check_placement
from ..recipe.config import DistillationConfig
from ..runs.claims import check_own
from ..runs.folder import environment
from ..runs.writing import write_whole
from .files import CACHE_NAME, CHOICE_DTYPE, EVALUATION_NAME, CacheFiles, is_whole, read_facts, write_rows
from .identity import appearance, describe_teacher, differences, same_augmentation
from .rows import RowFormat

# Facts that need not be equal: `appearance` is compared with a tolerance, and the same weights may have another path.
NOT_COMPARED = {"appearance", "given", "versions"}
ROWS_A_SHARD, MAX_SHARDS = 16_384, 256  # shards of an epoch; larger data sets get larger shards


# ---- Writing -------------------------------------------------------------------------------------------------------


def write_cache(
    folder: str | Path,
    teacher: Teacher | TeacherEnsemble,
    train_set: IndexedImageSource,
    eval_set: IndexedImageSource,
    config: DistillationConfig,
    row: RowFormat,
    *,
    epochs: int,
    given: Sequence[dict[str, Any]] = (),
    rows_a_shard: int | None = None,
    with_embeddings: bool = False,
) -> CacheFiles | None:
    """Store a teacher's logits for `epochs` epochs of the training set, and its classes for the evaluation set.

    Each process writes its share of the shards. Existing shards are kept if their checksums are right.

    Args:
        config: precision, memory format, batch size of evaluations, workers and device.
        given: result of `given_teachers`.
        rows_a_shard: rows in each shard; by default 16,384, or more so that an epoch has at most 256 shards.
        with_embeddings: store the embeddings as well, or alone for a teacher that has not the data set's classes.

    Returns:
        The files; None if other processes have not finished their share.

    Raises:
        HfkdError: if the folder holds another cache, or the teacher has other classes or none and embeddings are not
            wanted.
        RunError: if the disk is full, or numbers are not finite.
    """
    if not (teacher.has_classifier or with_embeddings):
        raise HfkdError(f"{teacher.name} has no classifier, and no loss reads the features that a cache can hold.")
    facts = {
        "teacher": describe_teacher(teacher),
        "train": train_set.identity(),
        "appearance": appearance(train_set),
        "evaluation": eval_set.identity(),
        "epochs": epochs,
        "rows_a_shard": rows_a_shard or max(ROWS_A_SHARD, math.ceil(train_set.num_rows / MAX_SHARDS)),
        "precision": str(_autocast_dtype(config) or torch.float32),
        "given": list(given),
        "versions": environment()["versions"],
    }
    row = prepare_teacher_and_images(teacher, train_set, eval_set, config, row, with_embeddings)
    if any(member.is_folded for member in teacher.members):  # unfinished caches of earlier versions are not continued
        facts["folded"] = [member.is_folded for member in teacher.members]
    files = CacheFiles(folder, json.loads(json.dumps(facts | {"row": row.facts()})))
    processes = PartialState()  # the state that `config` has set up
    if processes.is_main_process:
        claim_folder(files)
    processes.wait_for_everyone()
    if processes.is_main_process:
        _write_choices(files, teacher, eval_set, config)
    _write_shards(files, teacher, train_set, config, files.shards()[processes.process_index :: processes.num_processes])
    return files if files.finish() else None


def claim_folder(files: CacheFiles) -> None:
    """Check that a folder is free or holds this cache, check the disk space, and write `cache.json`.

    Raises:
        HfkdError: if the folder holds another cache; the message names the differences.
        RunError: if there is not enough disk space.
    """
    folder, path = files.folder, files.folder / CACHE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    epochs = [f"epoch-{epoch:04}" for epoch in range(files.epochs)]
    check_own(folder, [EVALUATION_NAME, *epochs], path.is_file(), "cache_dir")
    if path.is_file():
        there = read_facts(folder, whole=True)
        different = differences(there | {key: files.facts[key] for key in NOT_COMPARED}, files.facts)
        if not same_augmentation(there["appearance"], files.facts["appearance"]):
            different.append("augmentation: the same settings give other images now")
        if different:
            listed = "\n  ".join(different)
            raise HfkdError(
                f"{folder} holds another cache:\n  {listed}\nGive another --cache_dir, or remove the folder."
            )
    needed = sum(files.bytes_of(shard) for epoch, shard in files.shards() if not files.path(epoch, shard).is_file())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{folder} needs {needed / 2**30:,.2f} GiB more, and {free / 2**30:,.2f} GiB are free on its disk: free "
            "space, store fewer epochs, or set top_k."
        )
    if needed:
        print(f"{folder} will take {needed / 2**20:,.1f} MiB.", flush=True)
    if not path.is_file():
        write_whole(path, json.dumps(files.facts, indent=1))


def _autocast_dtype(config) -> torch.dtype | None:
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None


def prepare_teacher_and_images(
    teacher: Teacher | TeacherEnsemble,
    train_set: IndexedImageSource,
    eval_set: IndexedImageSource,
    config: DistillationConfig,
    row: RowFormat,
    with_embeddings: bool,
) -> RowFormat:
    """Prepare teacher and images as for training, and return the format of the rows, which depends on the teacher."""
    for dataset in (train_set, eval_set):
        if isinstance(dataset, ImageDataset) and config.dataloader_num_workers == 0:
            dataset.to(config.device)
    train_set.views, train_set.cache = row.views, None
    spec = InputSpec(train_set.image_size, train_set.mean, train_set.std)
    check_placement(teacher, config.world_size, config.torch_compile)
    layers = [EMBEDDING] if with_embeddings else []
    teacher.prepare(config.device, _autocast_dtype(config), config.channels_last, spec, layers)
    (pair,) = batches_of(train_set, [range(0, len(train_set), max(1, len(train_set) - 1))], config)
    teacher.align_classes(train_set.class_names, pair, required=not with_embeddings)
    if with_embeddings:
        width = teacher(pair).embedding.shape[1]
        row = dataclasses.replace(row, width=width, classes=row.classes if teacher.shares_classes else 0)
    if config.torch_compile:
        teacher.compile(backend=config.torch_compile_backend, mode=config.torch_compile_mode)
    return row


def rows_of(row: RowFormat, outputs: Outputs) -> np.ndarray:
    """Return the rows (B,) of a teacher's outputs for a batch."""
    embedding = None if row.width is None else outputs.embedding
    return row.encode([view.logits for view in outputs.views()], embedding)


def _write_choices(files, teacher, eval_set, config) -> None:
    """Write the teacher's class for every row of the evaluation set."""
    path, number = files.folder / EVALUATION_NAME, len(eval_set)
    if is_whole(path, CHOICE_DTYPE, number):
        return
    choices = np.full(number, -1, CHOICE_DTYPE)
    if not files.format.classes:
        return write_rows(path, choices)
    batches = batches_of(eval_set, [range(number)], config)
    with _progress(number, "evaluation images", config) as progress:
        for start, batch in zip(range(0, number, config.eval_batch_size), batches, strict=True):
            chosen = teacher({"pixel_values": batch["pixel_values"]}).logits.argmax(dim=1)
            choices[start : start + len(chosen)] = chosen.cpu().numpy()
            progress.update(len(chosen))
    write_rows(path, choices)


def _write_shards(files, teacher, train_set, config, shards: Sequence[tuple[int, int]]) -> None:
    """Write the shards that are missing or damaged."""
    dtype = files.format.dtype
    missing = [key for key in shards if not is_whole(files.path(*key), dtype, len(files.rows_of(key[1])))]
    total = sum(len(files.rows_of(shard)) for _, shard in missing)
    with _progress(total, f"images of {files.epochs} epochs", config) as progress:
        for epoch, group in itertools.groupby(missing, key=operator.itemgetter(0)):
            group = list(group)
            train_set.set_epoch(epoch)
            batches = batches_of(train_set, [files.rows_of(shard) for _, shard in group], config)
            for _, shard in group:
                rows = np.empty(len(files.rows_of(shard)), dtype)
                for start in range(0, len(rows), config.eval_batch_size):
                    part = rows_of(files.format, teacher(next(batches)))
                    rows[start : start + len(part)] = part
                    progress.update(len(part))
                write_rows(files.path(epoch, shard), rows)


def _progress(total: int, what: str, config: DistillationConfig) -> tqdm:
    """Return the progress bar of the first process; where standard output is no terminal, print one line instead."""
    hidden = config.disable_tqdm or not PartialState().is_main_process
    terminal = sys.stdout.isatty()
    if total and not (hidden or terminal):
        print(f"The teacher sees {total:,} {what}.", flush=True)
    return tqdm(total=total, unit="images", unit_scale=True, desc=what, disable=hidden or not terminal)


def batches_of(dataset, parts: Sequence[range], config) -> Iterator[dict[str, Tensor]]:
    """Yield batches of each part of the rows, in order, on the device."""
    size = config.eval_batch_size
    rows = [part[start : start + size] for part in parts for start in range(0, len(part), size)]
    loader = DataLoader(
        dataset, batch_sampler=rows, num_workers=config.dataloader_num_workers, collate_fn=collate_batch
    )
    for batch in loader:
        yield {key: value.to(config.device, non_blocking=True) for key, value in batch.items()}
