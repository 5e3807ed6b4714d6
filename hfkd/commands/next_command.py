"""The command that is proposed after a training."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from ..recipe.arguments import DataArguments
from ..recipe.finding import packaged_names
from ..recipe.reading import load_recipe

WHICH_IMAGES = ("dataset_name", "train_split", "eval_split", "image_column", "label_column", "streaming")
SMALL_STUDENT = "mobilenetv4_conv_small"  # proposed where no student has been named


def next_command(
    role: str, export: Path, knows_labels: bool = True, data_args: DataArguments | None = None, recipe: str = ""
) -> str:
    """Return the command that a person is likely to want after a training.

    Args:
        export: folder of the trained model.
        knows_labels: False for a student without a classifier or without labelled images.
        data_args: images of a teacher that was trained without a recipe. Its student needs no recipe either.
        recipe: name of the recipe that was trained.
    """
    if not knows_labels:
        return f"hfkd train-teacher --dataset_name LABELLED --student {export}, or hfkd distill with a teacher as well"
    if role == "student":
        return f"hfkd visualize {export.parent}, or hfkd export {export} for one ONNX file"
    if data_args is None:
        return f"hfkd distill {_recipe_of_student(recipe)} --teacher_name_or_path {export}"
    return f"hfkd distill {_images_in_words(data_args)} --teacher {export} --student {SMALL_STUDENT}"


def _recipe_of_student(teacher_recipe: str) -> str:
    """Return the first recipe of KD with Z-score that comes with hfkd and has this teacher; else the word RECIPE."""
    table, _, teacher = teacher_recipe.rpartition("/teachers/")
    # By their names: reading all recipes takes half a minute.
    pairs = [
        name for name in packaged_names() if name.startswith(f"{table}/{teacher}-") and name.endswith("/kd_zscore")
    ]
    taught = (name for name in pairs if load_recipe(name).get("teacher_recipe") == teacher_recipe)
    return next(taught, "RECIPE")


def _images_in_words(data_args: DataArguments) -> str:
    """Return the options of a command line that name the images."""
    fields = [each for each in dataclasses.fields(data_args) if each.name in WHICH_IMAGES]
    given = {each.name: value for each in fields if (value := getattr(data_args, each.name)) != each.default}
    return shlex.join(word for key, value in given.items() for word in (f"--{key}", str(value)))
