"""Command lines without a recipe: data, teacher and student are enough; the rest suits photographs and the machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import HfkdError
from ..recipe.keys import AUTO_CACHE
from ..recipe.parser import HELP_WORDS, ArgumentParser
from ..recipe.reading import ARGUMENT_CLASSES

INTERPOLATIONS = ("bicubic", "bilinear")
MAX_WORKERS = 8
WITHOUT_RECIPE = {role: f"photographs/{role}" for role in ("student", "teacher", "features")}  # recipes of defaults
SHORT = {
    "dataset_name": "--dataset_name",
    "student_name_or_path": "--student",
    "teacher_name_or_path": "--teacher",
}


def with_recipe(argv: Sequence[str], role: str = "student") -> list[str]:
    """Return a command line with a recipe as its first word: the one given, or else `photographs/<role>`.

    The defaults of the recipe are followed by what suits the student and the machine, and then by the words given. With
    a teacher without a classifier the recipe is `photographs/features`.

    Args:
        role: "student", which needs a teacher, or "teacher".

    Raises:
        HfkdError: if some of data, student and teacher are named, and another is not.
    """
    words = list(argv)
    if (words and not words[0].startswith("-")) or not set(HELP_WORDS).isdisjoint(words):
        return words
    parser = ArgumentParser(ARGUMENT_CLASSES, "")
    keys = (*SHORT, "teacher_cache", "teacher_checkpoint", "teacher_prompts")
    given = {key: value for key in keys if (value := _value(words, key, parser))}
    if given.keys().isdisjoint(SHORT):
        return words  # whose reader asks for a recipe
    needed = [key for key in SHORT if role == "student" or key != "teacher_name_or_path"]
    missing = [SHORT[key] for key in needed if key not in given]
    if given.get("teacher_cache", AUTO_CACHE) != AUTO_CACHE and "--teacher" in missing:
        missing.remove("--teacher")
    if missing:
        raise HfkdError(
            f"Without a recipe, {' and '.join(missing)} must be given as well: "
            f"{' '.join(f'{SHORT[key]} NAME' for key in needed)}. `hfkd recipes` lists recipes."
        )
    student = given["student_name_or_path"]
    # As they are written: a link keeps its own name.
    folder = Path("runs", *(Path(os.path.abspath(name)).name for name in (given["dataset_name"], student)))
    suited = [f"--output_dir={folder}", *_for_machine(), *_for_student(student)]
    teacher = None if "teacher_prompts" in given else given.get("teacher_name_or_path")
    if role == "student" and _lacks_classifier(teacher, given.get("teacher_checkpoint")):
        named = any(word.startswith("--losses") for word in words)
        return [WITHOUT_RECIPE["features"], *suited, *([] if named else ["--losses.token_mse.weight=1"]), *words]
    return [WITHOUT_RECIPE[role], *suited, *words]


def _lacks_classifier(teacher: str | None, checkpoint: str | None) -> bool:
    """Return True for a teacher without a classifier; False for a name that cannot be read, which is refused later."""
    from ..networks.backbones import lacks_classifier  # takes seconds, and a recipe does without

    try:
        return teacher is not None and lacks_classifier(teacher, checkpoint)
    except HfkdError:
        return False


def _value(words: Sequence[str], key: str, parser: ArgumentParser) -> str | None:
    """Return the last value of a key among the words; None if it is not given."""
    for position, word in reversed(list(enumerate(words))):
        option = parser.option(word)
        if option is not None and option.dest == key:
            _, equals, value = word.partition("=")
            return value if equals else next(iter(words[position + 1 :]), None)
    return None


def _for_machine() -> list[str]:
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return [f"--bf16={bf16}", f"--dataloader_num_workers={min(MAX_WORKERS, os.cpu_count() or 1)}"]


def _for_student(student: str) -> list[str]:
    """Return the preprocessing of a timm architecture's pretraining, and its pretrained weights where timm has some."""
    import timm  # takes seconds, and a recipe does without

    pretraining = timm.get_pretrained_cfg(student) if timm.is_model(student) else None
    if pretraining is None or not pretraining.has_weights:
        return []
    words = ["--pretrained=true", f"--crop_pct={pretraining.crop_pct}"]
    if pretraining.interpolation in INTERPOLATIONS:
        words.append(f"--interpolation={pretraining.interpolation}")
    return words
