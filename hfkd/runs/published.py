"""Published values and curves of the recipes, and the differences of a run from the published one."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipe.arguments import DataArguments, ModelArguments
from ..recipe.config import DistillationConfig

# Classes and training images of the published data sets. A copy of a data set may have another name, so counts are
# compared.
IMAGE_COUNTS = {"uoft-cs/cifar100": (100, 50_000), "ILSVRC/imagenet-1k": (1_000, 1_281_167)}
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
    """Published values of a recipe.

    Attributes:
        top1: number in the paper, in percent.
        best: best test epoch of the published log; None without a log.
        test_top1: accuracy after each epoch in that log, in percent; empty without a log.
        temperature: temperature of CTKD after each epoch; empty without a log.
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
    """Return the published runs by the recipe's name, such as `cifar100/resnet56-resnet20/kd_zscore`.

    The logs were published with Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024.
    """
    rows = json.loads(Path(__file__).with_name("published.json").read_text())
    return {row.pop("recipe"): PublishedRun(**{key: _frozen(value) for key, value in row.items()}) for row in rows}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def departures(recipe: Mapping[str, Any], results: Mapping[str, Any], published: PublishedRun) -> list[str]:
    """Return the differences of a run from the published run of its recipe, in words; empty for a repetition.

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
    """Return the values of `COMPARED_KEYS`, defaults included, with a key for each parameter of a loss."""
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
    """Return the number of images in a step, over all processes."""
    images = recipe.get("per_device_train_batch_size", 8)  # the default of TrainingArguments
    return images * recipe.get("gradient_accumulation_steps", 1) * processes(results)


def processes(results: Mapping[str, Any]) -> int:
    """Return the number of processes that trained, from a description such as `2 x cuda`."""
    return int(results["devices"].split()[0])


def _same_images(dataset: Mapping[str, Any] | None, theirs: Mapping[str, Any]) -> bool:
    if dataset is None:
        return False
    classes, training_images = IMAGE_COUNTS[theirs["dataset_name"]]
    same_number = dataset["classes"] == classes and dataset["train_images"] == training_images
    return same_number and dataset["eval_split"] == theirs["eval_split"]
