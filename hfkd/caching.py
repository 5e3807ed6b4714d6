"""`hfkd cache-teacher`: a teacher's logits for every image and epoch, stored once for many students."""

from __future__ import annotations

import itertools
import json
import math
import operator
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .arguments import DistillationConfig
from .cache_files import CACHE_NAME, CHOICE, EVALUATION_NAME, CacheFiles, is_whole, read_facts, write_rows
from .cache_identity import appearance, describe_teacher, differences, given_teachers, looks_alike
from .cache_rows import RowFormat
from .checks import check_placement
from .data import ImageDataset, IndexedImageSource, collate_batch
from .features import InputSpec
from .loading import as_teacher, input_spec
from .losses import DistillationLoss, build_losses
from .recipe import ARGUMENT_CLASSES, ArgumentParser, parse_recipe, recipe_name
from .results import environment, write_whole
from .run import build_student, image_sets, load_splits, load_teachers
from .teacher import Teacher, TeacherEnsemble
from .teacher_cache import check_supported

USAGE = "hfkd cache-teacher recipe.yaml [--epochs N] [--top_k K] [--key value ...]"
NOT_COMPARED = {"appearance", "given", "versions"}  # numbers; and the same weights may lie elsewhere
ROWS_A_SHARD, MAX_SHARDS = 16_384, 256  # of an epoch; larger data sets get larger shards


@dataclass
class CacheArguments:
    """What to store of the teacher."""

    _argument_group_name = "cache"  # in `--help`

    epochs: int | None = field(
        default=None,
        metadata={
            "help": "Epochs whose augmentation is stored; longer runs replay them. By default the recipe's "
            "num_train_epochs."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={"help": "Store only so many largest logits, and what the others come to; by default all."},
    )
    temperatures: list[float] | None = field(
        default=None,
        metadata={"help": "At which losses can read what top_k stores; by default those of the recipe's losses."},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the cache. By default runs/cache/ and the recipe's path below its recipes folder"},
    )

    def __post_init__(self):
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be 1 or more, got {self.epochs}.")
        if self.temperatures is not None and self.top_k is None:
            raise ValueError("temperatures go with top_k: all logits can be read at any temperature. Leave them out.")
        for temperature in self.temperatures or ():
            if not (temperature > 0 and math.isfinite(temperature)):
                raise ValueError(f"temperatures must be above 0, got {temperature}.")


def cache_teacher(argv: list[str] | None = None) -> Path:
    """Stores what the teacher of a recipe says of its images: `recipe.yaml --epochs 30 [--top_k 16] [--key value ...]`.

    Several processes (torchrun, `accelerate launch`) share the work. The same command goes on with a cache that was not
    finished, and replaces what is damaged.

    Returns:
        The folder, for `teacher_cache`.

    Raises:
        ValueError: if the recipe has no teacher, or asks for what cannot be cached, or the folder holds another cache.
        RuntimeError: if there is no room for it.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"}.isdisjoint(argv):
        ArgumentParser((CacheArguments, *ARGUMENT_CLASSES), USAGE).parse_args(["--help"])
    cache_args, rest = ArgumentParser((CacheArguments,), USAGE).parse_args_into_dataclasses(
        argv[1:], return_remaining_strings=True, look_for_args_file=False
    )
    model_args, data_args, config, _ = parse_recipe([*argv[:1], *rest], command="hfkd cache-teacher")
    if any(token.partition("=")[0] == "--output_dir" for token in rest):
        raise ValueError("--output_dir is a run's: --cache_dir says where the cache goes.")
    folder = Path(cache_args.cache_dir or Path("runs", "cache", recipe_name(argv[0])))
    if not model_args.teacher_name_or_path:
        raise ValueError(f"{argv[0]} names no teacher to cache: set teacher_name_or_path.")
    if config.shard_teacher:
        raise ValueError("Each process caches a part of the images with a teacher of its own: leave shard_teacher out.")
    if data_args.streaming:
        raise ValueError("A teacher cache knows images by their row, and a stream does not: set streaming: false.")
    files = _write_from_arguments(folder, cache_args, model_args, data_args, config)
    if files is not None:
        size = sum(files.bytes_of(shard) for _, shard in files.shards()) / 2**20
        print(f"{folder} holds {files.epochs} epochs of {files.num_rows:,} images ({size:,.1f} MiB).")
    return folder


def _write_from_arguments(folder, cache_args, model_args, data_args, config) -> CacheFiles | None:
    """`write_cache` of what a recipe names."""
    losses = build_losses(config.losses, config.logit_standardization)
    check_supported(losses, config)
    temperatures = temperatures_of(losses, cache_args)
    splits = load_splits(data_args)
    classes, views = len(splits[0].class_names), max([loss.views for loss in losses.values()], default=1)
    if cache_args.top_k is not None and not 1 <= cache_args.top_k <= classes:
        raise ValueError(f"top_k must be 1 ... {classes}, the number of classes, got {cache_args.top_k}.")
    names, checkpoints = model_args.teacher_name_or_path, model_args.teacher_checkpoint
    teacher = as_teacher(load_teachers(model_args), config.logit_standardization)
    spec = input_spec(build_student(model_args, data_args, splits[0].class_names))  # whose images they are
    return write_cache(
        folder,
        teacher,
        *image_sets(splits, spec, data_args, config),
        config,
        RowFormat(classes, views, cache_args.top_k, temperatures),
        epochs=cache_args.epochs or math.ceil(config.num_train_epochs),
        given=given_teachers(names, checkpoints, model_args.teacher_class_indices),
    )


def temperatures_of(losses: Mapping[str, DistillationLoss], cache_args: CacheArguments) -> tuple[float, ...]:
    """At which the largest logits are to be read; none where all are stored.

    Raises:
        ValueError: if neither the arguments nor the losses tell.
    """
    if cache_args.top_k is None:
        return ()
    temperatures = cache_args.temperatures or [loss.teacher_temperature for loss in losses.values()]
    if not temperatures or None in temperatures:
        names = [name for name, loss in losses.items() if loss.teacher_temperature is None]
        reason = f"the loss '{names[0]}' needs all logits" if names else "the recipe has no loss that tells it"
        raise ValueError(
            f"top_k needs the temperature at which losses will read the logits, and {reason}: leave top_k out, or set "
            "--temperatures for other losses."
        )
    return tuple(sorted(set(temperatures)))


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
) -> CacheFiles | None:
    """Stores a teacher's logits for `epochs` epochs of the training set, and its classes of the evaluation set.

    Each process takes its share of the shards, those that are there already excepted: they are read and compared with
    their checksums.

    Args:
        config: precision, memory format, batch size of evaluations, workers and device.
        given: see `given_teachers`.
        rows_a_shard: by default 16,384, and no more than 256 shards an epoch.

    Returns:
        What was written; None where other processes have not finished their share.

    Raises:
        ValueError: if the folder holds another cache, or the teacher has other classes.
        RuntimeError: if there is no room, or logits are no finite numbers.
    """
    facts = {
        "teacher": describe_teacher(teacher),
        "train": train_set.identity(),
        "appearance": appearance(train_set),
        "evaluation": eval_set.identity(),
        "row": row.facts(),
        "epochs": epochs,
        "rows_a_shard": rows_a_shard or max(ROWS_A_SHARD, math.ceil(train_set.num_rows / MAX_SHARDS)),
        "precision": str(_autocast_dtype(config) or torch.float32),
        "given": list(given),
        "versions": environment()["versions"],
    }
    files = CacheFiles(folder, json.loads(json.dumps(facts)))
    processes = PartialState()  # `config` has made it
    if processes.is_main_process:
        claim(files)
    processes.wait_for_everyone()
    _make_ready(teacher, train_set, eval_set, config, row.views)
    if processes.is_main_process:
        _write_choices(files, teacher, eval_set, config)
    _write_shards(files, teacher, train_set, config, files.shards()[processes.process_index :: processes.num_processes])
    return files if files.finish() else None


def claim(files: CacheFiles) -> None:
    """Makes sure that the folder is that of this cache, and that the disk has room for it.

    Raises:
        ValueError: if it holds another, with what differs.
        RuntimeError: if the room is not enough.
    """
    folder, path = files.folder, files.folder / CACHE_NAME
    if path.is_file():
        there = read_facts(folder)
        different = differences(there | {key: files.facts[key] for key in NOT_COMPARED}, files.facts)
        if not looks_alike(there["appearance"], files.facts["appearance"]):
            different.append("augmentation: the same settings give other images now")
        if different:
            listed = "\n  ".join(different)
            raise ValueError(
                f"{folder} holds another cache:\n  {listed}\nGive another --cache_dir, or remove the folder."
            )
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(files.bytes_of(shard) for epoch, shard in files.shards() if not files.path(epoch, shard).is_file())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RuntimeError(
            f"{folder} needs {needed / 2**30:,.2f} GiB more, and {free / 2**30:,.2f} GiB are free on its disk: make "
            "room, store fewer epochs, or set top_k."
        )
    if not path.is_file():
        write_whole(path, json.dumps(files.facts, indent=1))


def _autocast_dtype(config) -> torch.dtype | None:
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None


def _make_ready(teacher, train_set, eval_set, config, views) -> None:
    """Teacher and images as in a training."""
    for dataset in (train_set, eval_set):
        if isinstance(dataset, ImageDataset) and config.dataloader_num_workers == 0:
            dataset.to(config.device)
    train_set.views, train_set.cache = views, None
    spec = InputSpec(train_set.image_size, train_set.mean, train_set.std)
    check_placement(teacher, config)
    teacher.prepare(config.device, _autocast_dtype(config), config.channels_last, spec)
    (pair,) = _batches(train_set, [range(0, len(train_set), max(1, len(train_set) - 1))], config)
    teacher.align_classes(train_set.class_names, pair)
    if config.torch_compile:
        teacher.compile(backend=config.torch_compile_backend, mode=config.torch_compile_mode)


def _write_choices(files, teacher, eval_set, config) -> None:
    """The teacher's class for every row of the evaluation set."""
    path, number = files.folder / EVALUATION_NAME, len(eval_set)
    if is_whole(path, CHOICE, number):
        return
    choices = np.empty(number, CHOICE)
    batches = _batches(eval_set, [range(number)], config)
    for start, batch in zip(range(0, number, config.eval_batch_size), batches, strict=True):
        chosen = teacher({"pixel_values": batch["pixel_values"]}).logits.argmax(dim=1)
        choices[start : start + len(chosen)] = chosen.cpu().numpy()
    write_rows(path, choices)


def _write_shards(files, teacher, train_set, config, shards: Sequence[tuple[int, int]]) -> None:
    """Those that are not there, or damaged."""
    dtype = files.format.dtype
    missing = [key for key in shards if not is_whole(files.path(*key), dtype, len(files.rows_of(key[1])))]
    total = sum(len(files.rows_of(shard)) for _, shard in missing)
    hidden = config.disable_tqdm or not PartialState().is_main_process
    with tqdm(total=total, unit="images", unit_scale=True, desc=str(files.folder), disable=hidden) as progress:
        for epoch, group in itertools.groupby(missing, key=operator.itemgetter(0)):
            group = list(group)
            train_set.set_epoch(epoch)
            batches = _batches(train_set, [files.rows_of(shard) for _, shard in group], config)
            for _, shard in group:
                rows = np.empty(len(files.rows_of(shard)), dtype)
                for start in range(0, len(rows), config.eval_batch_size):
                    part = files.format.encode([view.logits for view in teacher(next(batches)).views()])
                    rows[start : start + len(part)] = part
                    progress.update(len(part))
                write_rows(files.path(epoch, shard), rows)


def _batches(dataset, parts: Sequence[range], config) -> Iterator[dict[str, Tensor]]:
    """Of each part of the rows, in their order, on the device."""
    size = config.eval_batch_size
    rows = [part[start : start + size] for part in parts for start in range(0, len(part), size)]
    loader = DataLoader(
        dataset, batch_sampler=rows, num_workers=config.dataloader_num_workers, collate_fn=collate_batch
    )
    for batch in loader:
        yield {key: value.to(config.device, non_blocking=True) for key, value in batch.items()}
