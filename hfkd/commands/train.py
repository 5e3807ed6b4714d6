"""`hfkd distill` and `hfkd train-teacher`: training runs from recipes."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..errors import HfkdError
from ..losses import build_losses
from ..losses.base import trains_classifier
from ..names import NO_LABELS, hub_id, last_part
from ..recipe.arguments import DataArguments, ModelArguments
from ..recipe.checks import check_probe, check_without_labels
from ..recipe.config import DistillationConfig
from ..recipe.differences import recipe_differences
from ..recipe.finding import find_recipe
from ..recipe.reading import parse_recipe
from ..recipe.yaml_file import dump_yaml
from ..runs.checkpoints import MANIFEST_NAME, checkpoints, last_checkpoint
from ..runs.claims import STATE_NAME, check_run_folder, claimed
from ..runs.folder import RECIPE_NAME, RESULTS_NAME, ROLES, check_writable
from ..runs.planned import PlannedRun, check_learns_from_labels, missing_teacher
from ..runs.writing import write_whole
from .importing import importing
from .next_command import next_command
from .without_recipe import WITHOUT_RECIPE, with_recipe

if TYPE_CHECKING:
    from ..data import ImageSource
    from ..training.trainer import DistillationTrainer

logger = logging.get_logger(__name__)


def distill(argv: list[str] | None = None) -> DistillationTrainer:
    """Train the student of a recipe, after its teacher if that is missing, and export it to `<output_dir>/student`."""
    argv = with_recipe(sys.argv[1:] if argv is None else argv)
    with importing():
        settings = parse_recipe(argv)
    model_args, data_args, config, recipe = settings
    check_teacher_is_used(model_args, config)
    check_declared_labels(data_args, config)
    teacher = missing_teacher(argv[0], model_args, recipe)
    if teacher is not None:
        check_writable(Path(config.output_dir), "output_dir")
        claim_output_dir(config, recipe)
        train_first(teacher, model_args)
        settings = parse_recipe(argv)  # see train_first
    return train(*settings, role="student", name=find_recipe(argv[0]).name)


def train_teacher(argv: list[str] | None = None) -> DistillationTrainer:
    """Train the student network of a recipe from the labels alone and export it to `<output_dir>/teacher`.

    Raises:
        HfkdError: if the recipe names a teacher or losses.
    """
    argv = with_recipe(sys.argv[1:] if argv is None else argv, role="teacher")
    with importing():
        settings = parse_recipe(argv, command="hfkd train-teacher")
    check_learns_from_labels(settings)
    check_declared_labels(settings[1], settings[2])
    return train(*settings, role="teacher", name=find_recipe(argv[0]).name)


def train_first(teacher: PlannedRun, model_args: ModelArguments) -> None:
    """Train a teacher that is missing, before its student. All processes must call it.

    An interrupted training is resumed. Afterwards `parse_recipe` must be called again for the student, because
    accelerate's state is that of the teacher's run.

    Raises:
        HfkdError: before training, if the student's name is that of no model.
    """
    from ..networks.loading import check_model  # imports timm, which takes seconds

    check_model(model_args.student_name_or_path)
    if teacher.config.process_index == 0:
        print(
            f"There is no teacher at {teacher.folder / teacher.role} yet. Its recipe {teacher.name} is trained first "
            f"({teacher.state()}).",
            flush=True,
        )
    trainer = train(*teacher.settings, role=teacher.role, name=teacher.name)
    trainer.accelerator.wait_for_everyone()  # until the first process has written the model
    del trainer
    gc.collect()  # what is left in reference cycles would keep memory of the device


def check_teacher_is_used(model_args: ModelArguments, config: DistillationConfig) -> None:
    """Check that a recipe with a teacher has a loss that reads it, and that one with such a loss has a teacher.

    Raises:
        HfkdError: if either is missing.
    """
    losses = build_losses(config.losses, config.logit_standardization)  # type: ignore[arg-type]  # a mapping by now
    taught = sorted(name for name, loss in losses.items() if loss.needs_teacher)
    if taught and not (model_args.teacher_name_or_path or model_args.teacher_cache):
        raise HfkdError(f"The losses {taught} need a teacher: set teacher_name_or_path, or remove them.")
    key = "teacher_name_or_path" if model_args.teacher_name_or_path else "teacher_cache"
    if getattr(model_args, key) and not taught:
        raise HfkdError(
            f"{key} names a teacher, and no loss learns from it. Add a loss, such as --losses.kd.temperature 4, or "
            f"leave {key} out."
        )


def check_declared_labels(data_args: DataArguments, config: DistillationConfig) -> None:
    """Check that nothing learns from labels where `label_column` declares that there are none.

    Raises:
        HfkdError: if something does.
    """
    if data_args.label_column == NO_LABELS:
        losses = build_losses(config.losses, config.logit_standardization)  # type: ignore[arg-type]  # a mapping
        check_without_labels(losses, config, "with label_column none the training images")


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: DistillationConfig,
    recipe: dict[str, Any],
    role: str,
    name: str,
    time_is_up: Callable[[], bool] = lambda: False,
) -> DistillationTrainer:
    """Train the network of a recipe, and write the run into `output_dir`.

    The folder then holds the exported model, the resolved recipe, `results.json`, the trainer's state and the best and
    the last checkpoint.

    Args:
        role: name of the folder of the exported model, "student" or "teacher".
        name: name of the recipe in `results.json`.
        time_is_up: called after every step; when it returns True, the run ends as it does after SIGTERM.
    """
    folder = Path(config.output_dir)
    if not folder.exists() and str(config.resume_from_checkpoint).lower() != "true":
        claim_output_dir(config, recipe)  # refused before the folder is made
    check_writable(folder, "output_dir")
    check_run_folder(folder)
    with claimed(folder, "output_dir") if config.should_save else contextlib.nullcontext():
        return _train(model_args, data_args, config, recipe, role, name, time_is_up)


def _train(model_args, data_args, config, recipe, role, name, time_is_up) -> DistillationTrainer:
    """Train as `train` does, in a folder that is claimed."""
    with importing():  # takes seconds, see build_trainer
        from ..training.unlabelled import has_labels

    checkpoint = claim_output_dir(config, recipe)
    logging.disable_progress_bar()  # loading and saving weights would break the bar of the training
    trainer = build_trainer(model_args, data_args, config)
    trainer.exports.name, trainer.exports.recipe = role, recipe
    trainer.stop_on_sigterm.time_is_up = time_is_up
    trainer.results.facts |= {"role": role, "recipe": name}
    if trainer.is_world_process_zero():
        write_whole(Path(config.output_dir, RECIPE_NAME), dump_yaml(recipe))
    trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.results.rows:  # eval_strategy: no
        trainer.evaluate()
    if not trainer.results.rows:  # no loss of a backbone can be measured on evaluation images
        trainer.results.write_for(trainer.args)
    if config.should_save:
        state = dataclasses.asdict(trainer.state)
        write_whole(Path(config.output_dir, STATE_NAME), json.dumps(state, indent=2, sort_keys=True) + "\n")
    if config.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.export()
    if trainer.is_world_process_zero():
        weights = "best" if config.load_best_model_at_end else "last"
        measured = f"{trainer.results.text()} " if trainer.results.rows else ""
        print(f"{measured}{trainer.export_folder} holds the {weights}.")
        ready = trainer.has_classifier and has_labels(trainer.train_dataset)
        data = data_args if name == WITHOUT_RECIPE["teacher"] else None
        print(f"Next: {next_command(role, trainer.export_folder, ready, data, name)}")
    return trainer


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, config: DistillationConfig
) -> DistillationTrainer:
    """Build the networks, the data sets and the trainer of a recipe, and check that they fit.

    Raises:
        HfkdError: if they do not fit.
    """
    # Imported here, because these import timm, datasets and transformers' models, which takes seconds. `--help` and
    # mistakes in a recipe are answered without them.
    with importing():
        from transformers import set_seed
        from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperPreTrainedModel

        from ..networks.input_spec import input_spec, load_processor
        from ..training.label_loss import check_weight_count
        from ..training.student import check_layer_names
        from ..training.trainer import DistillationTrainer
        from .build import (
            build_student,
            check_names,
            image_sets,
            load_splits,
            load_teachers,
            open_cache,
            weights_in_words,
            with_teacher_classes,
        )

    losses = build_losses(config.losses, config.logit_standardization)  # type: ignore[arg-type]  # a mapping by now
    has_classifier = trains_classifier(losses.values(), config.ce_weight)
    check_names(model_args, config, losses, has_classifier)
    teacher: Any = open_cache(model_args) if model_args.teacher_cache else None
    if not (teacher or model_args.teacher_prompts):  # a teacher that cannot be loaded is told before data are
        teacher = load_teachers(model_args) or None
    splits = load_splits(data_args)
    check_probe(config, splits[1].has_labels)
    if not splits[0].has_labels:
        check_without_labels(losses, config, f"the images of {splits[0].name}")
    teacher = teacher or load_teachers(model_args, splits[1].class_names) or None
    set_seed(config.seed)  # the student's initial weights are part of the recipe
    if has_classifier and not splits[0].has_labels:
        splits = with_teacher_classes(splits, teacher)
    check_weight_count(config.class_weights, len(splits[0].class_names))
    class_names = splits[0].class_names if has_classifier else []
    student = build_student(model_args, data_args, class_names, teacher)
    check_layer_names(student, config)
    train_set, eval_set = image_sets(splits, input_spec(student), data_args, config)
    wrapped = isinstance(student, TimmWrapperPreTrainedModel)  # timm's config.json holds the preprocessing
    processor = None if wrapped else load_processor(student.name_or_path, model_args.trust_remote_code)
    trainer = DistillationTrainer(
        student,
        teacher,
        config,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=processor,
        teacher_cache_limit=model_args.outputs_limit(by_default=False),
    )
    trainer.run_block.weights |= weights_in_words(model_args)
    trainer.results.facts["dataset"] = dataset_facts(splits[1], train_set)
    return trainer


def dataset_facts(evaluated: Any, train_set: ImageSource) -> dict[str, Any]:
    """Return what results.json says of the data: the split that is evaluated, classes and numbers of images."""
    source = evaluated.source
    names = {"name": last_part(source), "hub_id": hub_id(source), "eval_split": evaluated.split}
    return names | {"classes": train_set.num_classes} | image_counts(train_set)


def image_counts(train_set: ImageSource) -> dict[str, int]:
    """Return the numbers of training images with and without labels; one that is 0 is left out."""
    from ..data import MixedImageDataset

    if isinstance(train_set, MixedImageDataset):
        return {"train_images": train_set.labelled.num_rows, "unlabelled_images": train_set.unlabelled.num_rows}
    return {"train_images" if train_set.has_labels else "unlabelled_images": train_set.num_rows}


def claim_output_dir(config: DistillationConfig, recipe: dict[str, Any]) -> str | None:
    """Check that the output folder belongs to this run, and return the checkpoint to resume from.

    Returns:
        The last complete checkpoint if `resume_from_checkpoint` is true, or the folder that it names. None starts a new
        run, also if an earlier run ended before its first checkpoint.

    Raises:
        HfkdError: if the output folder or the checkpoint's folder holds the run of another recipe and
            `allow_recipe_change` is not set, or if the output folder holds a run of this recipe that is not resumed.
            The message lists the differences and the possible actions.
    """
    output_dir, resume = Path(config.output_dir), str(config.resume_from_checkpoint).lower()
    checkpoint = None
    if resume == "true":
        checkpoint = last_checkpoint(output_dir)
        if checkpoint is None:
            logger.warning(f"There is no complete checkpoint in {output_dir}: training starts from the beginning.")
    elif resume not in ("false", "none"):
        checkpoint = config.resume_from_checkpoint
    done = _has_results(output_dir)
    for folder in dict.fromkeys([output_dir, Path(checkpoint).parent] if checkpoint else [output_dir] if done else []):
        different = _differences(folder / RECIPE_NAME, recipe)
        if not different:
            continue
        text = f"{folder} holds the run of another recipe:\n  " + "\n  ".join(different)
        if not checkpoint:
            raise HfkdError(f"{text}\nGive another --output_dir, or remove the folder.")
        if not config.allow_recipe_change:
            raise HfkdError(f"{text}\nTo resume with the recipe given here, set --allow_recipe_change true.")
        logger.warning(f"{text}\nTraining resumes from {checkpoint} with the recipe given here.")
    if done and resume in ("false", "none") and (output_dir / RECIPE_NAME).is_file():
        raise HfkdError(
            f"{output_dir} holds a run of this recipe. Continue it with --resume_from_checkpoint true, give another "
            "--output_dir, or remove the folder."
        )
    return checkpoint


def _has_results(folder: Path) -> bool:
    """Return True if a run's folder holds more than the recipe of a run that ended before its first checkpoint."""
    names = (RESULTS_NAME, *ROLES)
    return any((folder / name).exists() for name in names) or any(
        (checkpoint / MANIFEST_NAME).is_file() for checkpoint in checkpoints(folder)
    )


def _differences(path: Path, recipe: dict[str, Any]) -> list[str]:
    """Return the differences from the recipe of the run; none, with a warning, if that is damaged."""
    try:
        return recipe_differences(path, recipe)
    except HfkdError as error:
        logger.warning(f"{error}\nThe recipe given here takes its place, and is not compared with it.")
        return []
