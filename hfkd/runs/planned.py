"""Planned runs: a recipe's settings, the state of its folder, and the teachers that recipes of their own train."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HfkdError
from ..names import NO_LABELS, hub_id
from ..recipe.arguments import DataArguments, ModelArguments
from ..recipe.config import DistillationConfig
from ..recipe.differences import recipe_differences
from ..recipe.finding import find_recipe
from ..recipe.reading import load_recipe, parse_recipe
from .checkpoints import last_checkpoint
from .claims import is_claimed
from .finished import FinishedRun, read_run
from .folder import CONFIG_NAME, RECIPE_NAME, RESULTS_NAME, ROLES, WEIGHTS_NAME
from .published import published_runs

# Settings of a student's run that its teacher's run takes over: the images, and from the command line what depends on
# the machine.
DATA_KEYS = ("dataset_name", "train_split", "eval_split", "image_column", "label_column", "skip_bad_images")
MACHINE_KEYS = ("use_cpu", "bf16", "fp16", "dataloader_num_workers", "dataloader_persistent_workers", "ddp_backend")
MACHINE_KEYS += ("ddp_timeout", "disable_tqdm", "report_to")


@dataclass(frozen=True)
class PlannedRun:
    """Training of a recipe, or of the teacher that it needs.

    Attributes:
        name: name of the recipe.
        role: "student" or "teacher".
        settings: result of `parse_recipe`.
    """

    name: str
    role: str
    settings: tuple[ModelArguments, DataArguments, DistillationConfig, dict[str, Any]]

    @property
    def config(self) -> DistillationConfig:
        """Configuration of the training."""
        return self.settings[2]

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.config.output_dir)

    @property
    def title(self) -> str:
        """Recipe and seed, for a person."""
        return f"{self.name}, seed {self.config.seed}"

    @property
    def published_top1(self) -> float | None:
        """Top-1 of the paper, at the published schedule."""
        published = published_runs().get(self.name)
        return None if published is None else published.top1

    def run(self) -> FinishedRun | None:
        """Read the run as far as it went; None before the first evaluation, and where its results are damaged."""
        if not (self.folder / RESULTS_NAME).is_file():
            return None
        try:
            run = read_run(self.folder)
        except HfkdError as error:
            warnings.warn(f"{error} Its checkpoints are used.", stacklevel=2)
            return None
        return run if run.results["epochs"] else None

    def is_done(self) -> bool:
        """Return True if the training ended and the model was written.

        A teacher's model is enough: it may have been copied without its run.
        """
        run = self.run()
        if run is None:
            return self.role == "teacher" and (self.folder / self.role / WEIGHTS_NAME).is_file()
        return run.is_whole and run.export is not None

    def state(self) -> str:
        """Return how far the training is, for a person."""
        if self.is_done():
            return "done"
        checkpoint = last_checkpoint(self.folder)
        if checkpoint is None:
            begun = (self.folder / RECIPE_NAME).is_file()
            return "ended before its first checkpoint" if begun else "not begun"
        from transformers.trainer import TRAINER_STATE_NAME  # takes seconds, and most recipes have their teacher

        state = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())
        word = "under way," if is_claimed(self.folder) else "stopped"
        return f"{word} at step {state['global_step']:,} of {state['max_steps']:,}"

    def check_folder(self) -> None:
        """Check that the folder holds no run with other settings, unless `allow_recipe_change` is set.

        Raises:
            HfkdError: if it does; the message names the settings.
        """
        try:
            different = recipe_differences(self.folder / RECIPE_NAME, self.settings[3])
        except HfkdError:
            return  # damaged: training says so
        if different and not self.config.allow_recipe_change:
            way_out = "Give another --output_dir, or remove the folder"
            if self.role == "teacher":
                way_out += f", or take the teacher as it is: --teacher_name_or_path {self.folder / self.role}"
            lines = "\n  ".join(different)
            raise HfkdError(f"{self.folder} holds a run with other settings:\n  {lines}\n{way_out}.")


def plan_run(name: str, role: str, folder: Path, overrides: Sequence[str]) -> PlannedRun:
    """Return the training of a recipe in a folder, where it resumes an earlier call."""
    argv = [name, "--output_dir", str(folder), *overrides]
    if (folder / RECIPE_NAME).is_file():
        argv += ["--resume_from_checkpoint", "true"]
    return PlannedRun(find_recipe(name).name, role, parse_recipe(argv))


def missing_teacher(name: str, model_args: ModelArguments, recipe: Mapping[str, Any]) -> PlannedRun | None:
    """Return the training of a recipe's teacher, if its `teacher_recipe` trains one that does not exist yet.

    Args:
        name: name of the student's recipe.
        model_args: the student's.
        recipe: the student's recipe, resolved.

    Raises:
        NotFoundError: if there is no such teacher_recipe.
        HfkdError: if the teacher is missing and `train_missing_teacher` is false; if it has a teacher or losses itself;
            or if the folder holds a run with other settings.
    """
    names = model_args.teacher_name_or_path or []
    if model_args.teacher_recipe is None or model_args.teacher_cache or len(names) != 1 or not _is_missing(names[0]):
        return None
    path = Path(names[0]).expanduser()
    role = path.name if path.name in ROLES else "teacher"
    overrides = _for_teacher(load_recipe(model_args.teacher_recipe), load_recipe(name), recipe)
    if not model_args.train_missing_teacher:
        command = " ".join(["hfkd train-teacher", model_args.teacher_recipe, *overrides])
        raise HfkdError(
            f"There is no teacher at {path}, and train_missing_teacher is false. Train it with `{command}`, or name "
            "another teacher: --teacher_name_or_path."
        )
    folder = path.parent if path.name in ROLES else path
    planned = plan_run(model_args.teacher_recipe, role, folder, overrides)
    check_learns_from_labels(planned.settings)
    planned.check_folder()
    return planned


def check_learns_from_labels(settings: tuple[ModelArguments, DataArguments, DistillationConfig, dict]) -> None:
    """Check that a recipe trains a network from the labels alone.

    Raises:
        HfkdError: if it names a teacher or losses.
    """
    model_args, _, config, _ = settings
    if model_args.teacher_name_or_path or model_args.teacher_cache or config.losses:
        raise HfkdError("train-teacher trains from the labels alone: use distill for a recipe with a teacher.")


def _is_missing(name: str) -> bool:
    """Return True for the path of a run or its model, if there is no model."""
    if "/" not in name or hub_id(name) is not None:
        return False
    return not any((Path(name).expanduser() / part / CONFIG_NAME).is_file() for part in ("", *ROLES))


def _for_teacher(teacher: Mapping[str, Any], written: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Return the words of the command line that give a teacher the student's images and machine.

    Args:
        teacher: the teacher's recipe.
        written: the student's recipe without its command line.
        recipe: the same, resolved.
    """
    taken = {key: recipe.get(key) for key in DATA_KEYS if recipe.get(key) != teacher.get(key)}
    if taken.get("label_column") == NO_LABELS:  # a teacher learns from labels
        del taken["label_column"]
    taken |= {key: recipe[key] for key in MACHINE_KEYS if key in recipe and recipe[key] != written.get(key)}
    words = []
    for key, value in taken.items():
        values = value if isinstance(value, list) else ["null" if value is None else value]
        words += [f"--{key}", *map(str, values)]
    return words
