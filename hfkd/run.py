"""A run from its recipe: what the scripts call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .arguments import DataArguments, DistillationConfig, ModelArguments
from .data import ImageDataset, load_image_splits
from .loading import input_spec, load_student, load_teacher
from .recipe import parse_recipe
from .results import ResultsWriter, environment
from .trainer import DistillationTrainer

logger = logging.get_logger(__name__)

RECIPE_NAME = "recipe.yaml"


def distill(argv: list[str] | None = None) -> DistillationTrainer:
    """Trains the student of a recipe; `<output_dir>/student` holds it afterwards."""
    return train(*parse_recipe(argv), role="student")


def train_teacher(argv: list[str] | None = None) -> DistillationTrainer:
    """Trains the network that a recipe names as its student, from the labels alone; into `<output_dir>/teacher`.

    Raises:
        ValueError: if the recipe names a teacher or losses.
    """
    model_args, data_args, config, recipe = parse_recipe(argv)
    if model_args.teacher_name_or_path or config.losses:
        raise ValueError("train_teacher trains from the labels alone: use distill for a recipe with a teacher.")
    return train(model_args, data_args, config, recipe, role="teacher")


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: DistillationConfig,
    recipe: dict[str, Any],
    role: str,
) -> DistillationTrainer:
    """Builds everything, trains, and leaves in `output_dir` the trained model (in a folder named by its role), the
    resolved recipe, `results.json`, the trainer's state and the best and last checkpoint."""
    claim_output_dir(config, recipe)
    trainer = build_trainer(model_args, data_args, config)
    facts = {
        "role": role,
        "student": model_args.student_name_or_path,
        "teacher": model_args.teacher_name_or_path,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "teacher_parameters": trainer.teacher.parameter_count() if trainer.teacher else None,
        "published_top1": config.published_top1,
        "exported": "best" if config.load_best_model_at_end else "last",
        "devices": f"{config.world_size} x {config.device.type}",
    }
    trainer.add_callback(ResultsWriter(facts | environment()))
    if trainer.is_world_process_zero():
        Path(config.output_dir, RECIPE_NAME).write_text(yaml.safe_dump(recipe, sort_keys=False))
    trainer.train(resume_from_checkpoint=_resume_point(config))
    trainer.save_state()
    trainer.save_model(str(Path(config.output_dir, role)))
    return trainer


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, config: DistillationConfig
) -> DistillationTrainer:
    """Networks, data and trainer of a recipe, checked against one another."""
    train_set, eval_set = load_data(data_args, model_args, config)
    student = load_student(model_args.student_name_or_path, train_set.class_names)
    teacher = None
    if model_args.teacher_name_or_path:
        classes = train_set.num_classes if model_args.teacher_checkpoint else None
        teacher = load_teacher(model_args.teacher_name_or_path, model_args.teacher_checkpoint, classes)
    return DistillationTrainer(student, teacher, config, train_dataset=train_set, eval_dataset=eval_set)


def claim_output_dir(config: DistillationConfig, recipe: dict[str, Any]) -> None:
    """Refuses an output folder that holds another recipe's run, or this one's unless it is to be resumed.

    Raises:
        ValueError: naming the folder, the first keys that differ, and the way out.
    """
    output_dir = Path(config.output_dir)
    if not (output_dir / RECIPE_NAME).is_file():
        return
    found = yaml.safe_load((output_dir / RECIPE_NAME).read_text())
    different = [
        f"{key}: {found.get(key)!r} there, {recipe.get(key)!r} here"
        for key in sorted({*found, *recipe} - {"resume_from_checkpoint"})
        if found.get(key) != recipe.get(key)
    ]
    if different:
        raise ValueError(
            f"{output_dir} holds the run of another recipe ({'; '.join(different[:5])}). "
            "Give another --output_dir, or remove the folder."
        )
    if get_last_checkpoint(str(output_dir)) and not _resume_point(config):
        raise ValueError(
            f"{output_dir} holds a run of this recipe. Continue it with --resume_from_checkpoint true, give another "
            "--output_dir, or remove the folder."
        )


def _resume_point(config: DistillationConfig) -> str | bool | None:
    """`resume_from_checkpoint` as Trainer takes it: 'true' means the last checkpoint, anything else a folder."""
    given = config.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(given).lower(), given)
