"""A run from its recipe: what the scripts call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..errors import HfkdError
from ..names import hub_id, last_part
from ..recipe.arguments import DataArguments, DistillationConfig, ModelArguments
from ..recipe.differences import recipe_differences
from ..recipe.reading import parse_recipe, recipe_name
from ..recipe.yaml_file import dump_yaml
from ..runs.checkpoints import checkpoints, last_checkpoint
from ..runs.folder import RECIPE_NAME, RESULTS_NAME, check_writable, write_whole

if TYPE_CHECKING:
    from ..training.trainer import DistillationTrainer

logger = logging.get_logger(__name__)


def distill(argv: list[str] | None = None) -> DistillationTrainer:
    """Trains the student of a recipe; `<output_dir>/student` holds it afterwards."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, config, recipe = parse_recipe(argv)
    check_teacher_is_used(model_args, config)
    return train(model_args, data_args, config, recipe, role="student", name=recipe_name(argv[0]))


def train_teacher(argv: list[str] | None = None) -> DistillationTrainer:
    """Trains the network that a recipe names as its student, from the labels alone; into `<output_dir>/teacher`.

    Raises:
        ValueError: if the recipe names a teacher or losses.
    """
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, config, recipe = parse_recipe(argv, command="hfkd train-teacher")
    if model_args.teacher_name_or_path or model_args.teacher_cache or config.losses:
        raise HfkdError("train-teacher trains from the labels alone: use distill for a recipe with a teacher.")
    return train(model_args, data_args, config, recipe, role="teacher", name=recipe_name(argv[0]))


def check_teacher_is_used(model_args: ModelArguments, config: DistillationConfig) -> None:
    """Check that a recipe with a teacher has a loss that reads it.

    Raises:
        HfkdError: if it has none.
    """
    key = "teacher_name_or_path" if model_args.teacher_name_or_path else "teacher_cache"
    if getattr(model_args, key) and not config.losses:
        raise HfkdError(
            f"{key} names a teacher, and no loss learns from it. Add a loss, such as --losses.kd.temperature 4, or "
            f"leave {key} out."
        )


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: DistillationConfig,
    recipe: dict[str, Any],
    role: str,
    name: str,
    time_is_up: Callable[[], bool] = lambda: False,
) -> DistillationTrainer:
    """Builds everything, trains, and leaves in `output_dir` the trained model (in a folder named by its role), the
    resolved recipe, `results.json` (which calls it by `name`), the trainer's state and the best and last checkpoint.

    Once `time_is_up`, which is asked after every step, it ends as at SIGTERM.
    """
    check_writable(Path(config.output_dir), "output_dir")
    checkpoint = claim_output_dir(config, recipe)
    logging.disable_progress_bar()  # of loading and saving weights: they break the training's own bar
    trainer = build_trainer(model_args, data_args, config)
    trainer.exports.name, trainer.exports.recipe = role, recipe
    trainer.stop_on_sigterm.time_is_up = time_is_up
    trainer.results.facts |= {"role": role, "recipe": name}
    if trainer.is_world_process_zero():
        write_whole(Path(config.output_dir, RECIPE_NAME), dump_yaml(recipe))
    trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.results.rows:  # eval_strategy: no
        trainer.evaluate()
    trainer.save_state()
    if config.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.export()
    if trainer.is_world_process_zero():
        weights = "best" if config.load_best_model_at_end else "last"
        print(f"{trainer.results.text()} {trainer.export_folder} holds the {weights}.")
    return trainer


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, config: DistillationConfig
) -> DistillationTrainer:
    """Networks, data and trainer of a recipe, checked against one another.

    Raises:
        ValueError: if they do not fit.
    """
    # Here and not above: these import timm, datasets and transformers' models, which takes seconds. `--help` and
    # mistakes in a recipe are answered without them.
    from transformers import set_seed
    from transformers.models.timm_wrapper import TimmWrapperForImageClassification

    from ..networks.loading import check_model, input_spec, load_processor
    from ..training.trainer import DistillationTrainer
    from .build import build_student, image_sets, load_splits, load_teachers, open_cache

    check_model(model_args.student_name_or_path)
    teacher = open_cache(model_args) if model_args.teacher_cache else load_teachers(model_args) or None
    set_seed(config.seed)  # the student's initial weights are part of the recipe
    splits = load_splits(data_args)
    student = build_student(model_args, data_args, splits[0].class_names)
    train_set, eval_set = image_sets(splits, input_spec(student), data_args, config)
    wrapped = isinstance(student, TimmWrapperForImageClassification)  # timm's config.json says how to prepare images
    processor = None if wrapped else load_processor(student.name_or_path)
    trainer = DistillationTrainer(
        student, teacher, config, train_dataset=train_set, eval_dataset=eval_set, processing_class=processor
    )
    trainer.results.facts["dataset"] = {
        "name": last_part(splits[1].source),
        "hub_id": hub_id(splits[1].source),
        "eval_split": splits[1].split,
        "classes": train_set.num_classes,
        "train_images": train_set.num_rows,
    }
    return trainer


def claim_output_dir(config: DistillationConfig, recipe: dict[str, Any]) -> str | None:
    """Makes sure that the output folder is this run's, and finds the checkpoint to go on from.

    Returns:
        The last whole checkpoint for `resume_from_checkpoint: true`, the folder that it names, or None to start: also
        where a run ended before its first checkpoint.

    Raises:
        ValueError: if the folder, or the checkpoint's, holds the run of another recipe and `allow_recipe_change` is not
            set, or if it holds this one's and that is not to be resumed. It names what differs, and the way out.
    """
    output_dir, resume = Path(config.output_dir), str(config.resume_from_checkpoint).lower()
    checkpoint = None
    if resume == "true":
        checkpoint = last_checkpoint(output_dir)
        if checkpoint is None:
            logger.warning(f"There is no whole checkpoint in {output_dir}: training begins anew.")
    elif resume not in ("false", "none"):
        checkpoint = config.resume_from_checkpoint
    for folder in dict.fromkeys([output_dir, Path(checkpoint).parent] if checkpoint else [output_dir]):
        different = recipe_differences(folder / RECIPE_NAME, recipe)
        if not different:
            continue
        text = f"{folder} holds the run of another recipe:\n  " + "\n  ".join(different)
        if not checkpoint:
            raise HfkdError(f"{text}\nGive another --output_dir, or remove the folder.")
        if not config.allow_recipe_change:
            raise HfkdError(f"{text}\nGo on with the recipe given here by --allow_recipe_change true.")
        logger.warning(f"{text}\nTraining goes on from {checkpoint} with the recipe given here.")
    done = checkpoints(output_dir) or (output_dir / RESULTS_NAME).is_file()
    if done and resume in ("false", "none") and (output_dir / RECIPE_NAME).is_file():
        raise HfkdError(
            f"{output_dir} holds a run of this recipe. Continue it with --resume_from_checkpoint true, give another "
            "--output_dir, or remove the folder."
        )
    return checkpoint
