"""Builders of the objects that a recipe names: student, teachers, data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedModel

from ..data import (
    CenterCrop,
    ImageDataset,
    ImageSource,
    ImageSplit,
    LazyImageDataset,
    MixedImageDataset,
    NoAugmentation,
    RandomResizedCrop,
    StreamingImageDataset,
    StreamSplit,
    WeakAugmentation,
    load_image_splits,
    open_streams,
)
from ..errors import HfkdError
from ..names import NO_LABELS
from ..networks.backbones import lacks_classifier
from ..networks.class_matching import check_class_indices, class_names_of, match_classes, name_lists_of
from ..networks.features import InputSpec
from ..networks.inheritance import inherit_blocks
from ..networks.loading import check_model
from ..networks.origins import RANDOM_WEIGHTS, student_weights, teacher_weights
from ..networks.student_loading import load_student
from ..networks.teacher import Teacher, check_ensemble_members
from ..networks.teacher_loading import load_teacher
from ..networks.zero_shot import check_has_texts
from ..recipe.arguments import DataArguments, ModelArguments
from ..recipe.checks import check_quantized_losses
from ..recipe.config import DistillationConfig
from ..teacher_cache.identity import given_teachers
from ..teacher_cache.teacher import CachedTeacher
from ..training.checks import check_reads_features


def build_student(
    model_args: ModelArguments,
    data_args: DataArguments,
    class_names: list[str],
    teachers: Sequence[Teacher] | CachedTeacher | None,
) -> PreTrainedModel:
    """Load the student that the arguments name, without classes as a backbone; see `load_student`.

    Args:
        teachers: loaded teachers; the weights of `teacher_blocks` are those of the one.
    """
    student = load_student(
        model_args.student_name_or_path,
        class_names,
        image_size=data_args.image_size,
        pretrained=model_args.pretrained,
        patch_size=model_args.patch_size,
        drop_path_rate=model_args.drop_path_rate,
        crop_pct=data_args.crop_pct,
        interpolation=data_args.interpolation,
        trust_remote_code=model_args.trust_remote_code,
    )
    if model_args.teacher_blocks:
        inherit_blocks(student, teachers[0], model_args.teacher_blocks)
    return student


def check_names(
    model_args: ModelArguments, config: DistillationConfig, losses: nn.ModuleDict, has_classifier: bool
) -> None:
    """Check what the names of student and teachers tell, before data and networks are loaded.

    Raises:
        HfkdError: if a name is that of no model, or the networks that are named do not suit losses and settings.
    """
    check_model(model_args.student_name_or_path, model_args.trust_remote_code)
    check_quantized_losses(losses, config, has_classifier)
    if config.quantize != "none":
        _check_has_weights(model_args)
    if not model_args.teacher_cache:
        check_teachers(model_args, losses)


def _check_has_weights(model_args: ModelArguments) -> None:
    """Check that the student does not start from random weights, whose ranges and norms `quantize` could not hold.

    Raises:
        HfkdError: if it does.
    """
    name = model_args.student_name_or_path
    if student_weights(name, model_args.pretrained) == RANDOM_WEIGHTS:
        raise HfkdError(
            f"quantize goes on from a trained student, and {name} has random weights. Train it without quantize first, "
            "then give its folder: --student runs/.../student."
        )


def check_teachers(model_args: ModelArguments, losses: nn.ModuleDict) -> None:
    """Check the names of the teachers, and that the losses read only what they have, before any network is loaded.

    Raises:
        HfkdError: if a name is that of no model; if a loss reads logits or a classifier of a teacher that has none; if
            an ensemble has such a member; or if there are prompts for a teacher that reads no texts.
    """
    names = model_args.teacher_name_or_path or []
    checkpoints = model_args.teacher_checkpoint or [None] * len(names)
    trusted = model_args.trust_remote_code
    for name in names:
        check_model(name, trusted)
    if model_args.teacher_prompts:
        return check_has_texts(names[0])
    headless = [name for name, file in zip(names, checkpoints, strict=True) if lacks_classifier(name, file, trusted)]
    if len(names) > 1:
        check_ensemble_members(headless)
    for name in headless:
        check_reads_features(losses, name)


def open_cache(model_args: ModelArguments) -> CachedTeacher:
    """Open the teacher cache that the arguments name, without loading the teacher.

    Raises:
        HfkdError: if the cache cannot be used (see `CachedTeacher`), or if the arguments also name another teacher.
    """
    teacher = CachedTeacher(model_args.teacher_cache)
    names = model_args.teacher_name_or_path
    if names:
        teacher.check_given(given_by(model_args))
    return teacher


def given_by(model_args: ModelArguments) -> list[dict[str, Any]]:
    """Return the teachers that the arguments name, for comparison with those of a cache."""
    names, prompts = model_args.teacher_name_or_path or [], model_args.teacher_prompts
    more = model_args.teacher_checkpoint, model_args.teacher_class_indices, model_args.teacher_image
    return given_teachers(names, *more, prompts)


def load_teachers(model_args: ModelArguments, class_names: Sequence[str] = ()) -> list[Teacher]:
    """Load the teachers that the arguments name; several form an ensemble.

    Args:
        class_names: names of the data set's classes, for teacher_prompts.

    Raises:
        HfkdError: if a teacher cannot be loaded (see `load_teacher`), or if teacher_class_indices is set for no teacher
            or for several.
    """
    names = model_args.teacher_name_or_path or []
    indices = model_args.teacher_class_indices
    if indices is not None and len(names) != 1:
        raise HfkdError(f"teacher_class_indices needs one teacher, and teacher_name_or_path names {len(names)}.")
    checkpoints = model_args.teacher_checkpoint or [None] * len(names)
    settings = {"trust_remote_code": model_args.trust_remote_code, "prompts": model_args.teacher_prompts}
    settings |= {"class_names": class_names, **model_args.teacher_image}
    return [
        load_teacher(name, checkpoint, indices, model_args.teacher_device_map, **settings)
        for name, checkpoint in zip(names, checkpoints, strict=True)
    ]


def weights_in_words(model_args: ModelArguments) -> dict[str, str]:
    """Return where the weights of the student and the teachers come from."""
    words = {"student": student_weights(model_args.student_name_or_path, model_args.pretrained)}
    if model_args.teacher_blocks:
        blocks = (f"{path} {' '.join(map(str, taken))}" for path, taken in model_args.teacher_blocks.items())
        words["student"] = f"weights of the teacher's blocks {', '.join(blocks)}"
    names = model_args.teacher_name_or_path or []
    checkpoints = model_args.teacher_checkpoint or [None] * len(names)
    teachers = " + ".join(map(teacher_weights, names, checkpoints))
    if model_args.teacher_prompts:
        number = len(model_args.teacher_prompts)
        teachers += f", zero-shot, {number} template{'s' if number > 1 else ''}"
    if model_args.teacher_cache:
        teachers = f"outputs from the cache {model_args.teacher_cache}"
    return words | ({"teacher": teachers} if teachers else {})


def load_splits(
    data_args: DataArguments, class_names: list[str] | None = None
) -> tuple[ImageSplit | StreamSplit | None, ImageSplit | StreamSplit]:
    """Load the training and evaluation splits that the arguments name, without decoding images."""
    load = open_streams if data_args.streaming else load_image_splits
    return load(
        data_args.dataset_name,
        train_split=data_args.train_split,
        eval_split=data_args.eval_split,
        image_column=data_args.image_column,
        label_column=data_args.label_column,
        class_names=class_names,
    )


def with_teacher_classes(
    splits: tuple[ImageSplit | StreamSplit, ImageSplit | StreamSplit], teacher: list[Teacher] | CachedTeacher
) -> tuple[ImageSplit | StreamSplit, ImageSplit | StreamSplit]:
    """Return splits, of which the training split has no labels, with the classes of a teacher.

    With class indices the classes are those of the evaluation split, if it has labels.

    Raises:
        HfkdError: if the evaluation split has classes that the teacher lacks, or a class index is out of range.
    """
    train_split, eval_split = splits
    if isinstance(teacher, CachedTeacher):
        names = teacher.facts["evaluation"]["class_names"]
        if eval_split.has_labels and eval_split.class_names != names:
            unknown = [name for name in eval_split.class_names if name not in names]
            if unknown:
                raise HfkdError(
                    f"{eval_split.name} has the class {unknown[0]!r}, which is none of those of the teacher cache "
                    f"{teacher.files.folder}: name the eval_split for which it was written."
                )
            eval_split = eval_split.renumbered(names, [names.index(name) for name in eval_split.class_names])
    elif not teacher[0].has_classifier:
        return splits
    else:
        names, indices = _classes_of(teacher[0].model), teacher[0].class_indices
        if indices is not None:
            check_class_indices(indices, len(eval_split.class_names) or len(indices), len(names))
            names = eval_split.class_names or [names[index] for index in indices]
        elif eval_split.has_labels:
            eval_split = with_classes_of(teacher[0].model, eval_split)
    named = [split if split.has_labels else replace(split, class_names=names) for split in (train_split, eval_split)]
    return named[0], named[1]


def _classes_of(model: nn.Module) -> list[str]:
    """Return the names of a teacher's classes; those of ImageNet, or numbers, for an architecture without names."""
    for names in (class_names_of(model), *name_lists_of(model)):
        if names:
            return names
    number: Any = model.num_classes  # of timm
    return [str(index) for index in range(number)]


def with_classes_of(model: nn.Module, split: ImageSplit | StreamSplit) -> ImageSplit | StreamSplit:
    """Return the split with the model's classes, matched by name.

    Raises:
        HfkdError: the names do not tell the model's class for each of the split's.
    """
    names, given = _classes_of(model), split.class_names
    if given == names:
        return split
    try:
        indices = match_classes(given, model, len(names))
    except HfkdError as error:
        unknown = [name for name in given if name not in names]
        raise HfkdError(
            f"{split.name} has {len(given)} classes and the model {len(names)}, and their names do not say which is "
            f"which. Not among the model's: {', '.join(map(repr, unknown[:3]))}{', ...' if len(unknown) > 3 else ''}. "
            f"The model's: {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}."
        ) from error
    return split.renumbered(names, range(len(names)) if indices is None else indices)


def image_sets(
    splits: tuple[ImageSplit | StreamSplit, ImageSplit | StreamSplit],
    spec: InputSpec,
    data_args: DataArguments,
    config: DistillationConfig,
) -> tuple[ImageSource, ImageSource]:
    """Build the training and evaluation data sets."""
    seed = config.seed if config.data_seed is None else config.data_seed
    train_set = training_set(splits[0], spec, data_args, seed)
    if data_args.unlabelled_dataset_name is not None:
        train_set = _with_unlabelled(train_set, spec, data_args, config.per_device_train_batch_size, seed)
    return train_set, evaluation_set(splits[1], spec, data_args)


def _with_unlabelled(train_set, spec, data_args, batch_size, seed) -> MixedImageDataset:
    """Add the images of `unlabelled_dataset_name` to the batches of a training set."""
    name = data_args.unlabelled_dataset_name
    if not train_set.has_labels:
        raise HfkdError(
            f"unlabelled_dataset_name goes with images that have labels, and those of {data_args.dataset_name} have "
            "none: give one data set without labels, or name the label_column."
        )
    _, split = load_image_splits(name, train_split=None, eval_split=data_args.unlabelled_split, label_column=NO_LABELS)
    unlabelled = training_set(split, spec, data_args, seed)
    number = round(data_args.unlabelled_share * batch_size)
    return MixedImageDataset(train_set, unlabelled, unlabelled_images=number, batch_size=batch_size)


def held_out_sets(
    split: ImageSplit | StreamSplit,
    spec: InputSpec,
    data_args: DataArguments,
    config: DistillationConfig,
    share: float,
) -> tuple[Subset, Subset]:
    """Return the training images without a share drawn at random, and that share, prepared for evaluation.

    Both contain the whole split, so that their row numbers are the row numbers in a teacher cache.

    Raises:
        HfkdError: if one of them is empty.
    """
    train_set, eval_set = image_sets((split, split), spec, data_args, config)
    kept, drawn = _split_rows(train_set.num_rows, share, config.seed)
    return Subset(train_set, kept), Subset(eval_set, drawn)  # type: ignore[arg-type]  # no streams


def _split_rows(rows: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw a share of the rows at random; return the other row numbers and the drawn ones, each ascending.

    Raises:
        HfkdError: if one of them is empty.
    """
    count = round(share * rows)
    if not 0 < count < rows:
        raise HfkdError(
            f"held_out {share:g} of {rows:,} training images leaves none to {'hold out' if not count else 'train on'}."
        )
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(drawn[count:]), sorted(drawn[:count])


def training_set(split: ImageSplit | StreamSplit, spec: InputSpec, data_args: DataArguments, seed: int) -> ImageSource:
    """Build the augmented training set from a split, for a student with the input `spec`."""
    if data_args.augmentation == "crop":
        return _decoded_set(split, WeakAugmentation(flip=data_args.random_flip), spec, data_args, seed)
    transform = RandomResizedCrop(
        **vars(spec),
        interpolation=data_args.interpolation,
        flip=data_args.random_flip,
        color_jitter=data_args.color_jitter,
        auto_augment=data_args.auto_augment,
        random_erasing=data_args.random_erasing,
    )
    return _lazy_set(split, transform, data_args, seed)


def evaluation_set(split: ImageSplit | StreamSplit, spec: InputSpec, data_args: DataArguments) -> ImageSource:
    """Build the evaluation set from a split, without augmentation, for a student with the input `spec`."""
    if data_args.augmentation == "crop":
        return _decoded_set(split, NoAugmentation(), spec, data_args, seed=0)
    transform = CenterCrop(**vars(spec), crop_pct=data_args.crop_pct, interpolation=data_args.interpolation)
    return _lazy_set(split, transform, data_args, seed=0)


def _decoded_set(split, transform, spec, data_args, seed):
    """Build a data set of images that are decoded once."""
    skip, keep = data_args.skip_bad_images, data_args.decoded_cache
    return ImageDataset.from_split(
        split, transform=transform, seed=seed, skip_bad_images=skip, decoded_cache=keep, **vars(spec)
    )


def _lazy_set(split, transform, data_args, seed):
    """Build a data set that decodes images when their batch is loaded."""
    if isinstance(split, StreamSplit):
        return StreamingImageDataset(
            split,
            transform=transform,
            seed=seed,
            shuffle_buffer_size=data_args.shuffle_buffer_size,
            skip_bad_images=data_args.skip_bad_images,
        )
    return LazyImageDataset(split, transform=transform, seed=seed, skip_bad_images=data_args.skip_bad_images)
