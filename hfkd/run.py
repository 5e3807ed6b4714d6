"""A run from its recipe: what the scripts call."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoImageProcessor, PreTrainedModel, set_seed
from transformers.models.timm_wrapper import TimmWrapperForImageClassification
from transformers.utils import logging

from .arguments import DataArguments, DistillationConfig, ModelArguments
from .checkpointing import checkpoints, last_checkpoint
from .classes import class_names_of
from .data import (
    CenterCrop,
    ImageDataset,
    ImageSource,
    ImageSplit,
    LazyImageDataset,
    NoAugmentation,
    RandomResizedCrop,
    StreamingImageDataset,
    StreamSplit,
    WeakAugmentation,
    load_image_splits,
    open_streams,
)
from .features import InputSpec
from .finished_runs import read_run
from .loading import input_spec, load_pretrained, load_student, load_teacher
from .recipe import ArgumentParser, load_recipe, parse_recipe, recipe_name, to_argv
from .results import RESULTS_NAME, write_whole
from .saving import RECIPE_NAME
from .sharing import PRIVATE_KEYS, hub_id, last_part, public_value
from .teacher import Teacher
from .teacher_cache import CachedTeacher
from .trainer import DistillationTrainer

logger = logging.get_logger(__name__)

# On what is trained.
WITHOUT_EFFECT = PRIVATE_KEYS | {
    *("disable_tqdm", "report_to", "dataloader_num_workers", "per_device_eval_batch_size"),
    *("teacher_device_map", "shard_teacher"),
}


@dataclass
class EvaluationArguments:
    """How to evaluate."""

    _argument_group_name = "evaluation"  # in `--help`

    batch_size: int = field(default=500, metadata={"help": "Images a forward."})
    num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images, where they are not held in memory."}
    )
    bf16: bool = field(default=False, metadata={"help": "bf16 autocast; float32 by default."})


def distill(argv: list[str] | None = None) -> DistillationTrainer:
    """Trains the student of a recipe; `<output_dir>/student` holds it afterwards."""
    argv = sys.argv[1:] if argv is None else argv
    return train(*parse_recipe(argv), role="student", name=recipe_name(argv[0]))


def train_teacher(argv: list[str] | None = None) -> DistillationTrainer:
    """Trains the network that a recipe names as its student, from the labels alone; into `<output_dir>/teacher`.

    Raises:
        ValueError: if the recipe names a teacher or losses.
    """
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, config, recipe = parse_recipe(argv, command="hfkd train-teacher")
    if model_args.teacher_name_or_path or model_args.teacher_cache or config.losses:
        raise ValueError("train-teacher trains from the labels alone: use distill for a recipe with a teacher.")
    return train(model_args, data_args, config, recipe, role="teacher", name=recipe_name(argv[0]))


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
    checkpoint = claim_output_dir(config, recipe)
    logging.disable_progress_bar()  # of loading and saving weights: they break the training's own bar
    trainer = build_trainer(model_args, data_args, config)
    trainer.export_name, trainer.recipe = role, recipe
    trainer.stop_on_sigterm.time_is_up = time_is_up
    trainer.results.facts |= {"role": role, "recipe": name}
    if trainer.is_world_process_zero():
        write_whole(Path(config.output_dir, RECIPE_NAME), yaml.safe_dump(recipe, sort_keys=False))
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
    set_seed(config.seed)  # the student's initial weights are part of the recipe
    splits = load_splits(data_args)
    student = build_student(model_args, data_args, splits[0].class_names)
    teacher = open_cache(model_args) if model_args.teacher_cache else load_teachers(model_args) or None
    train_set, eval_set = image_sets(splits, input_spec(student), data_args, config)
    wrapped = isinstance(student, TimmWrapperForImageClassification)  # timm's config.json says how to prepare images
    processor = None if wrapped else AutoImageProcessor.from_pretrained(student.name_or_path)
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


def build_student(model_args: ModelArguments, data_args: DataArguments, class_names: list[str]) -> PreTrainedModel:
    """The student that the arguments name; see `load_student`."""
    return load_student(
        model_args.student_name_or_path,
        class_names,
        image_size=data_args.image_size,
        patch_size=model_args.patch_size,
        drop_path_rate=model_args.drop_path_rate,
        crop_pct=data_args.crop_pct,
        interpolation=data_args.interpolation,
    )


def open_cache(model_args: ModelArguments) -> CachedTeacher:
    """The cache that the arguments name, whose teacher is not loaded.

    Raises:
        ValueError: see `CachedTeacher`; also if they name another teacher, too.
    """
    teacher = CachedTeacher(model_args.teacher_cache)
    names = model_args.teacher_name_or_path
    if names:
        teacher.check_given(names, model_args.teacher_checkpoint, model_args.teacher_class_indices)
    return teacher


def load_teachers(model_args: ModelArguments) -> list[Teacher]:
    """The teachers that the arguments name; several are an ensemble.

    Raises:
        ValueError: see `load_teacher`; also for teacher_class_indices without one teacher to go with.
    """
    names = model_args.teacher_name_or_path or []
    indices = model_args.teacher_class_indices
    if indices is not None and len(names) != 1:
        raise ValueError(f"teacher_class_indices goes with one teacher, and teacher_name_or_path names {len(names)}.")
    checkpoints = model_args.teacher_checkpoint or [None] * len(names)
    device_map = model_args.teacher_device_map
    return [
        load_teacher(name, checkpoint, indices, device_map) for name, checkpoint in zip(names, checkpoints, strict=True)
    ]


def load_splits(
    data_args: DataArguments, class_names: list[str] | None = None
) -> tuple[ImageSplit | StreamSplit | None, ImageSplit | StreamSplit]:
    """The training and evaluation split that the arguments name, not decoded yet."""
    load = open_streams if data_args.streaming else load_image_splits
    return load(
        data_args.dataset_name,
        train_split=data_args.train_split,
        eval_split=data_args.eval_split,
        image_column=data_args.image_column,
        label_column=data_args.label_column,
        class_names=class_names,
    )


def image_sets(
    splits: tuple[ImageSplit | StreamSplit, ImageSplit | StreamSplit],
    spec: InputSpec,
    data_args: DataArguments,
    config: DistillationConfig,
) -> tuple[ImageSource, ImageSource]:
    """What is trained on and what is evaluated."""
    seed = config.seed if config.data_seed is None else config.data_seed
    return training_set(splits[0], spec, data_args, seed), evaluation_set(splits[1], spec, data_args)


def training_set(
    split: ImageSplit | StreamSplit, spec: InputSpec, data_args: DataArguments, seed: int
) -> ImageSource:
    """A split as the arguments say, augmented, for a student that expects `spec`."""
    if data_args.augmentation == "crop":
        transform = WeakAugmentation(flip=data_args.random_flip)
        return ImageDataset.from_split(
            split, transform=transform, seed=seed, skip_bad_images=data_args.skip_bad_images, **vars(spec)
        )
    transform = RandomResizedCrop(
        **vars(spec),
        interpolation=data_args.interpolation,
        flip=data_args.random_flip,
        color_jitter=data_args.color_jitter,
        auto_augment=data_args.auto_augment,
        random_erasing=data_args.random_erasing,
    )
    return _on_demand(split, transform, data_args, seed)


def evaluation_set(split: ImageSplit | StreamSplit, spec: InputSpec, data_args: DataArguments) -> ImageSource:
    """A split as the arguments say, not augmented."""
    if data_args.augmentation == "crop":
        transform = NoAugmentation()
        return ImageDataset.from_split(
            split, transform=transform, skip_bad_images=data_args.skip_bad_images, **vars(spec)
        )
    transform = CenterCrop(**vars(spec), crop_pct=data_args.crop_pct, interpolation=data_args.interpolation)
    return _on_demand(split, transform, data_args, seed=0)


def _on_demand(split, transform, data_args, seed):
    """Images that are decoded when their batch is asked for."""
    if isinstance(split, StreamSplit):
        return StreamingImageDataset(
            split,
            transform=transform,
            seed=seed,
            shuffle_buffer_size=data_args.shuffle_buffer_size,
            skip_bad_images=data_args.skip_bad_images,
        )
    return LazyImageDataset(split, transform=transform, seed=seed, skip_bad_images=data_args.skip_bad_images)


def evaluate(argv: list[str] | None = None) -> dict[str, float]:
    """Measures a saved model: `MODEL [--dataset_name ... --batch_size 500]`; prints and returns its metrics.

    MODEL is a folder or a Hub id. What is not said of the data comes from the recipe of the run that MODEL lies in.

    Raises:
        ValueError: without a data set, or for a key that is unknown.
    """
    argv = sys.argv[1:] if argv is None else argv
    name, data_args, args = parse_model(argv, "hfkd evaluate MODEL [--key value ...]")
    model, eval_set = load_evaluation(name, data_args)
    with tempfile.TemporaryDirectory() as folder:
        metrics = evaluating_trainer(model, eval_set, args, folder).evaluate()
    for key in ("eval_top1", "eval_top5", "eval_loss"):
        print(f"{key.removeprefix('eval_')}: {metrics[key]:.4f}")
    return metrics


def parse_model(argv: list[str], usage: str, *argument_classes: type) -> tuple:
    """Parses `MODEL [--key value ...]`: what is not said of the data comes from the recipe of the run that MODEL, a
    folder or a Hub id, lies in. A run's folder stands for the model in it.

    Returns:
        The model's name, its DataArguments, the EvaluationArguments, and one object for each of `argument_classes`.

    Raises:
        ValueError: without a model or a data set, or for a key that is unknown.
    """
    parser = ArgumentParser((DataArguments, EvaluationArguments, *argument_classes), usage=usage)
    if argv[:1] in (["-h"], ["--help"]):
        parser.parse_args(["--help"])
    if not argv or argv[0].startswith("-"):
        given = argv[0] if argv else ""
        raise ValueError(f"The first argument must be the model's folder or Hub id, got '{given}'. Usage: {usage}")
    name, overrides = argv[0], argv[1:]
    if (Path(name) / RESULTS_NAME).is_file():
        name = str(read_run(name).export or name)
    recipe_path = Path(name).parent / RECIPE_NAME
    keys = [field.name for field in dataclasses.fields(DataArguments)]
    recipe = load_recipe(recipe_path) if recipe_path.is_file() else {}
    defaults = to_argv({key: value for key, value in recipe.items() if key in keys}, parser)
    return name, *parser.parse(defaults + overrides)


def load_evaluation(name: str, data_args: DataArguments) -> tuple[PreTrainedModel, ImageSource]:
    """A saved model and the split that it is evaluated on."""
    model = load_pretrained(name)
    data_args.train_split = None
    _, split = load_splits(data_args, class_names_of(model))
    return model, evaluation_set(split, input_spec(model), data_args)


def evaluating_trainer(
    model: PreTrainedModel, eval_set: ImageSource, args: EvaluationArguments, folder: str
) -> DistillationTrainer:
    """A trainer that trains nothing; into the folder it writes nothing that is kept."""
    config = DistillationConfig(
        output_dir=folder,
        per_device_eval_batch_size=args.batch_size,
        dataloader_num_workers=args.num_workers,
        bf16=args.bf16,
        report_to="none",
    )
    return DistillationTrainer(model, None, config, eval_dataset=eval_set)


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
            raise ValueError(f"{text}\nGive another --output_dir, or remove the folder.")
        if not config.allow_recipe_change:
            raise ValueError(f"{text}\nGo on with the recipe given here by --allow_recipe_change true.")
        logger.warning(f"{text}\nTraining goes on from {checkpoint} with the recipe given here.")
    done = checkpoints(output_dir) or (output_dir / RESULTS_NAME).is_file()
    if done and resume in ("false", "none") and (output_dir / RECIPE_NAME).is_file():
        raise ValueError(
            f"{output_dir} holds a run of this recipe. Continue it with --resume_from_checkpoint true, give another "
            "--output_dir, or remove the folder."
        )
    return checkpoint


def recipe_differences(path: Path, recipe: dict[str, Any]) -> list[str]:
    """The keys on which the recipe of an earlier run, if there is one, has another value, with both values."""
    if not path.is_file():
        return []
    there = yaml.safe_load(path.read_text())
    # The workers of a stream share out its rows.
    without_effect = WITHOUT_EFFECT - ({"dataloader_num_workers"} if recipe.get("streaming") else set())
    return [
        f"{key}: {there.get(key)!r} there, {recipe.get(key)!r} here"
        for key in sorted({*there, *recipe} - without_effect)
        # Beside a checkpoint from the Hub lies the public recipe.
        if there.get(key) not in (recipe.get(key), public_value(key, recipe.get(key)))
    ]
