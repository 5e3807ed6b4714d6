"""`hfkd cache-teacher`: a teacher's logits and embeddings for every image and epoch, stored for many students."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import HfkdError
from ..losses import DistillationLoss, build_losses
from ..losses.base import trains_classifier
from ..networks.input_spec import input_spec
from ..networks.teacher_loading import as_teacher
from ..recipe.checks import check_without_labels
from ..recipe.finding import find_recipe
from ..recipe.parser import ArgumentParser
from ..recipe.reading import ARGUMENT_CLASSES, RECIPE_HELP, parse_recipe
from ..runs.folder import check_writable
from ..runs.planned import missing_teacher
from ..teacher_cache.files import CacheFiles
from ..teacher_cache.rows import RowFormat
from ..teacher_cache.teacher import check_supported, reads_embedding
from ..teacher_cache.verifying import verify_cache
from ..teacher_cache.writing import write_cache
from .arguments import parse_known, split_subject
from .build import (
    build_student,
    check_teachers,
    given_by,
    image_sets,
    load_splits,
    load_teachers,
    with_teacher_classes,
)
from .train import train_first
from .without_recipe import with_recipe

USAGE = "hfkd cache-teacher RECIPE [--epochs N] [--top_k K] [--key value ...]"


@dataclass
class CacheArguments:
    """Settings of the teacher cache."""

    _argument_group_name = "cache"  # in `--help`

    epochs: int | None = field(
        default=None,
        metadata={
            "help": "Number of epochs to store, each with its own augmentation; longer runs replay them. By default "
            "the recipe's num_train_epochs."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={"help": "Number of largest logits to store, with a summary of the others; by default all."},
    )
    temperatures: list[float] | None = field(
        default=None,
        metadata={"help": "Temperatures at which losses can read a top_k cache; by default the recipe's."},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the cache. By default runs/cache/ and the recipe's name."},
    )

    verify: bool = field(
        default=False,
        metadata={"help": "Write nothing: compute some rows of a finished cache again, and compare them."},
    )

    def __post_init__(self):
        if self.epochs is not None and self.epochs < 1:
            raise HfkdError(f"epochs must be 1 or more, got {self.epochs}.")
        if self.temperatures is not None and self.top_k is None:
            raise HfkdError("temperatures go with top_k: all logits can be read at any temperature. Leave them out.")
        for temperature in self.temperatures or ():
            if not (temperature > 0 and math.isfinite(temperature)):
                raise HfkdError(f"temperatures must be above 0, got {temperature}.")


def cache_teacher(argv: list[str] | None = None) -> Path:
    """Store the logits of a recipe's teacher: `recipe.yaml --epochs 30 [--top_k 16] [--key value ...]`.

    Several processes (torchrun, `accelerate launch`) share the work. The same command completes an unfinished cache and
    replaces damaged files.

    Returns:
        The folder of the cache, for the key `teacher_cache`.

    Raises:
        HfkdError: if the recipe has no teacher or a setting that cannot be cached, or the folder holds another cache.
        RunError: if writing fails, as on a full disk.
    """
    given = sys.argv[1:] if argv is None else argv
    argv = with_recipe(given)
    parser = ArgumentParser((CacheArguments, *ARGUMENT_CLASSES), USAGE, RECIPE_HELP)
    path, rest = split_subject(argv, parser, "a recipe")
    parser.check_keys(rest)
    cache_args, rest = parse_known(rest, ArgumentParser((CacheArguments,), USAGE))
    settings = parse_recipe([path, *rest], command="hfkd cache-teacher")
    model_args, data_args, config, _ = settings
    if any(token.partition("=")[0] == "--output_dir" for token in given):
        raise HfkdError("--output_dir is the folder of a run. --cache_dir says where the cache is written.")
    folder = Path(cache_args.cache_dir or Path("runs", "cache", find_recipe(path).name))
    if not model_args.teacher_name_or_path:
        raise HfkdError(f"{path} names no teacher to cache: set teacher_name_or_path.")
    if config.shard_teacher:
        raise HfkdError("Each process loads the whole teacher and caches some of the images: leave shard_teacher out.")
    if data_args.streaming:
        raise HfkdError("A teacher cache finds images by their row, and a stream has no rows: set streaming: false.")
    if data_args.unlabelled_dataset_name is not None:
        raise HfkdError("A teacher cache holds the rows of one data set: leave unlabelled_dataset_name out.")
    check_writable(folder, "cache_dir")
    teacher = missing_teacher(path, model_args, settings[3])
    if teacher is not None:
        train_first(teacher, model_args)
        model_args, data_args, config, _ = parse_recipe([path, *rest])  # see train_first
    files = _write_from_arguments(folder, cache_args, model_args, data_args, config)
    if cache_args.verify:
        return folder
    if files is not None:
        size = sum(files.bytes_of(shard) for _, shard in files.shards()) / 2**20
        print(f"{folder} holds {files.epochs} epochs of {files.num_rows:,} images ({size:,.1f} MiB).")
    return folder


def _write_from_arguments(folder, cache_args, model_args, data_args, config) -> CacheFiles | None:
    """Build what a recipe names, and write its cache."""
    losses = build_losses(config.losses, config.logit_standardization)
    check_supported(losses, config)
    temperatures = temperatures_of(losses, cache_args)
    splits = load_splits(data_args)
    if splits[0].has_labels:
        check_top_k(cache_args.top_k, len(splits[0].class_names))
    check_teachers(model_args, losses)
    teachers = load_teachers(model_args, splits[1].class_names)
    if not splits[0].has_labels:
        check_without_labels(losses, config, f"the images of {splits[0].name}")
        if trains_classifier(losses.values(), config.ce_weight):  # else the student has no classes either
            splits = with_teacher_classes(splits, teachers)
        check_top_k(cache_args.top_k, len(splits[0].class_names))
    teacher = as_teacher(teachers, config.logit_standardization)
    # The student's input, because the teacher sees the student's images.
    spec = input_spec(build_student(model_args, data_args, splits[0].class_names, teachers))
    image_data = image_sets(splits, spec, data_args, config)
    if cache_args.verify:
        number, largest = verify_cache(folder, teacher, *image_data, config)
        print(
            f"{folder} holds what the teacher gives: {number:,} rows were computed again, and differ by at most "
            f"{largest:.2g} of their largest number."
        )
        return None
    views = max([loss.views for loss in losses.values()], default=1)
    return write_cache(
        folder,
        teacher,
        *image_data,
        config,
        RowFormat(len(splits[0].class_names), views, cache_args.top_k, temperatures),
        epochs=cache_args.epochs or math.ceil(config.num_train_epochs),
        given=given_by(model_args),
        with_embeddings=reads_embedding(losses),
    )


def check_top_k(top_k: int | None, classes: int) -> None:
    """Check that there are as many classes as logits are to be stored.

    Raises:
        HfkdError: if there are fewer.
    """
    if top_k is not None and not 1 <= top_k <= classes:
        raise HfkdError(f"top_k must be 1 ... {classes}, the number of classes, got {top_k}.")


def temperatures_of(losses: Mapping[str, DistillationLoss], cache_args: CacheArguments) -> tuple[float, ...]:
    """Return the temperatures at which losses can read the largest logits; none if all logits are stored.

    Raises:
        HfkdError: if neither the arguments nor the losses give the temperatures.
    """
    if cache_args.top_k is None:
        return ()
    reading = {name: loss for name, loss in losses.items() if loss.needs_teacher and loss.reads_logits}
    needed = {name: loss.teacher_temperature for name, loss in reading.items()}
    temperatures = cache_args.temperatures or list(needed.values())
    if not temperatures or None in temperatures:
        names = [name for name, temperature in needed.items() if temperature is None]
        reason = f"the loss '{names[0]}' needs all logits" if names else "the recipe has no loss that tells it"
        raise HfkdError(
            f"top_k needs the temperature at which losses will read the logits, and {reason}: leave top_k out, or set "
            "--temperatures for other losses."
        )
    return tuple(sorted(set(temperatures)))
