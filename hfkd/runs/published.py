"""The published values and curves of the recipes, and in what a run departs from the published one."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipe.arguments import DataArguments, DistillationConfig, ModelArguments

# Training and test images of the published runs, whatever a copy of the data set is called.
IMAGES = {"uoft-cs/cifar100": (100, 50_000), "ILSVRC/imagenet-1k": (1_000, 1_281_167)}  # classes, training images
# Keys that make up a published protocol. They are a list of their own and not all keys with the effect RESULT: the
# results of a run say better which teacher, images and batch size it had, and another seed, precision or number of
# evaluations is no departure from a protocol.
COMPARED_KEYS = (
    *("student_name_or_path", "drop_path_rate", "patch_size", "image_size", "random_flip", "augmentation"),
    *("interpolation", "crop_pct", "auto_augment", "color_jitter", "random_erasing", "teacher_cache", "losses"),
    *("logit_standardization", "ce_weight", "decay_all_parameters", "lr_milestones", "lr_gamma", "mixup", "cutmix"),
    *("ema_decay", "num_train_epochs", "max_steps", "learning_rate", "weight_decay", "optim", "optim_args"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "label_smoothing_factor", "dataloader_drop_last"),
)


@dataclass(frozen=True)
class PublishedRun:
    """What was published of a recipe.

    Attributes:
        top1: the paper's number, in percent.
        best: the best test epoch of the published log; None where there is none.
        test_top1: that log's accuracy after each epoch, in percent; empty where there is none.
        temperature: CTKD's after each epoch, likewise.
        settings: `COMPARED_KEYS` that the recipe sets, its data set and batch size; `teacher` is an architecture or a
            Hub id, as in results.
    """

    top1: float
    best: float | None = None
    test_top1: tuple[float, ...] = ()
    temperature: tuple[float, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@functools.cache
def published_runs() -> dict[str, PublishedRun]:
    """By the recipe's name, such as `cifar100/resnet56-resnet20/kd_zscore`.

    The logs are those of Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024.
    """
    rows = json.loads(Path(__file__).with_name("published.json").read_text())
    return {row.pop("recipe"): PublishedRun(**{key: _frozen(value) for key, value in row.items()}) for row in rows}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def departures(recipe: Mapping[str, Any], results: Mapping[str, Any], published: PublishedRun) -> list[str]:
    """In what a run differs from the published one of its recipe, in words for a table; nothing where it repeats it.

    Args:
        recipe: the resolved recipe of the run.
        results: its results.json.
    """
    theirs = published.settings
    words = []
    epochs = theirs["num_train_epochs"]
    if recipe.get("max_steps", -1) > 0:
        words.append(f"{recipe['max_steps']} steps in place of {epochs:g} epochs")
    elif recipe.get("num_train_epochs", 3) != epochs:  # 3: the default of TrainingArguments
        words.append(f"{recipe.get('num_train_epochs', 3):g} of {epochs:g} epochs")
    ours, there = flat_settings(recipe), flat_settings(theirs)
    keys = [key for key in {**ours, **there} if key not in ("num_train_epochs", "max_steps")]
    others = [key for key in keys if ours.get(key) != there.get(key)]
    if results["teacher"] != theirs["teacher"]:
        others.append("teacher")
    if global_batch(recipe, results) != theirs["per_device_train_batch_size"]:
        others.append("batch size")
    if not _same_images(results["dataset"], theirs):
        others.append("images")
    return words + ([f"other {', '.join(others)}"] if others else [])


def flat_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `COMPARED_KEYS`, defaults included, with a key for each parameter of a loss."""
    settings = _defaults() | {key: recipe[key] for key in COMPARED_KEYS if key in recipe}
    losses = settings.pop("losses") or {}
    for method, parameters in losses.items():
        settings[f"losses.{method}"] = True
        settings |= {f"losses.{method}.{name}": value for name, value in (parameters or {}).items()}
    return settings


@functools.cache
def _defaults() -> dict[str, Any]:
    classes = (ModelArguments, DataArguments, DistillationConfig)
    fields = {each.name: each.default for cls in classes for each in dataclasses.fields(cls)}
    return {key: fields[key] for key in COMPARED_KEYS}


def global_batch(recipe: Mapping[str, Any], results: Mapping[str, Any]) -> int:
    """Images a step, of all processes together."""
    images = recipe.get("per_device_train_batch_size", 8)  # the default of TrainingArguments
    return images * recipe.get("gradient_accumulation_steps", 1) * processes(results)


def processes(results: Mapping[str, Any]) -> int:
    """How many trained, of `2 x cuda`."""
    return int(results["devices"].split()[0])


def _same_images(dataset: Mapping[str, Any] | None, theirs: Mapping[str, Any]) -> bool:
    if dataset is None:
        return False
    classes, training_images = IMAGES[theirs["dataset_name"]]
    same_number = dataset["classes"] == classes and dataset["train_images"] == training_images
    return same_number and dataset["eval_split"] == theirs["eval_split"]
