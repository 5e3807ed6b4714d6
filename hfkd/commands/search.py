"""`hfkd search`: search of the temperature, weights and learning rate for a pair of networks."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import set_seed
from transformers.utils import logging

from ..errors import HfkdError, require
from ..losses import build_losses
from ..losses.base import trains_classifier
from ..names import counted
from ..networks.input_spec import input_spec
from ..networks.loading import check_model
from ..recipe.arguments import DataArguments, ModelArguments
from ..recipe.config import DistillationConfig
from ..recipe.differences import recipe_differences
from ..recipe.finding import find_recipe
from ..recipe.parser import ArgumentParser
from ..recipe.reading import ARGUMENT_CLASSES, RECIPE_HELP, load_recipe, parse_recipe
from ..recipe.yaml_file import dump_yaml, read_yaml
from ..runs.claims import check_own, folders_among
from ..runs.folder import check_writable
from ..runs.planned import missing_teacher
from ..runs.writing import write_whole
from ..search.figure import save_search
from ..search.results import (
    DATABASE_NAME,
    SearchedTrial,
    best_of,
    best_recipe,
    summary_table,
    trials_csv,
    trials_markdown,
)
from ..search.space import TRIAL_SETTINGS, Parameter, search_space
from ..teacher_cache.files import read_facts
from ..training.trainer import DistillationTrainer
from .arguments import parse_known, split_subject
from .build import (
    build_student,
    check_teachers,
    held_out_sets,
    image_sets,
    load_splits,
    load_teachers,
    open_cache,
)
from .messages import hide_token
from .train import check_teacher_is_used, train_first
from .without_recipe import with_recipe

SETTINGS_NAME, BEST_NAME = "search.yaml", "best.yaml"  # settings of the search, best recipe
FILES = (SETTINGS_NAME, BEST_NAME, DATABASE_NAME, "trials.csv", "trials.md", "search.png")
LOCK_NAME = "study.lock"
USAGE = "hfkd search RECIPE [--n_trials N] [--held_out SHARE] [--key value ...]"


@dataclass
class SearchArguments:
    """Settings of the search."""

    _argument_group_name = "search"  # in `--help`

    n_trials: int = field(
        default=20,
        metadata={"help": "Total number of trials, including those of earlier calls and of other processes."},
    )
    held_out: float = field(
        default=0.1,
        metadata={
            "help": "Share of the training images that is not trained on and on which trials are compared; 0: compare "
            "on the evaluation split, whose accuracy is then too optimistic for the best trial."
        },
    )
    search_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the search. By default runs/search/ and the recipe's name."},
    )

    def __post_init__(self):
        if self.n_trials < 1:
            raise HfkdError(f"n_trials must be 1 or more, got {self.n_trials}.")
        if not 0 <= self.held_out < 1:
            raise HfkdError(f"held_out is a share, 0 or above and below 1, got {self.held_out}.")


def search(argv: list[str] | None = None) -> list[SearchedTrial]:
    """Search for the best values of a recipe's keys: `RECIPE [--n_trials 20 --key value ...]`.

    Each trial trains the student with other values of the keys in the recipe's `search` section. The same command
    resumes an interrupted search. If several processes run it, they share the trials.

    Returns:
        The trials.

    Raises:
        MissingLibraryError: if Optuna is not installed.
        HfkdError: for a space that cannot be searched (see `search_space`), several processes a trial, a stream with
            `held_out`, or a folder that holds another search.
    """
    argv = with_recipe(sys.argv[1:] if argv is None else argv)
    search_args, model_args, data_args, config, recipe = _parse(argv)
    check_teacher_is_used(model_args, config)
    require("optuna", "search")
    written = load_recipe(argv[0])
    space = search_space(written.get("search"), config)
    _check(search_args, model_args, data_args, config, space)
    folder = Path(search_args.search_dir or Path("runs", "search", find_recipe(argv[0]).name))
    config.output_dir = str(folder)
    check_writable(folder, "search_dir")
    check_own(folder, FILES, _is_search(folder / SETTINGS_NAME), "search_dir")
    check_own(folder, folders_among(folder, (*FILES, LOCK_NAME)), False, "search_dir")
    lock = FileLock(folder / LOCK_NAME)  # several processes may share the search
    with lock:
        searched = {each.key: each.entry() for each in space}
        _claim_folder(folder, recipe | {"held_out": search_args.held_out, "search": searched})
        teacher = missing_teacher(argv[0], model_args, recipe)
        if teacher is not None:
            train_first(teacher, model_args)  # while other processes of the search wait
            _, model_args, data_args, config, recipe = _parse(argv)
            config.output_dir = str(folder)

    losses = config.losses  # before trials change them
    trainer = build_search_trainer(model_args, data_args, config, search_args.held_out)
    from ..search.study import run_trials  # Optuna takes a second to import

    trials = run_trials(trainer, space, folder, lock, search_args.n_trials)
    images = len(trainer.eval_dataset)
    held_out = "training image that was held out", "training images that were held out"
    measured_on = counted(images, *(held_out if search_args.held_out else ("evaluation image",)))
    found = summary_table(trials, space, measured_on, images)
    given = {key: value for key, value in recipe.items() if written.get(key) != value}
    with lock:
        best = best_recipe(find_recipe(argv[0]), folder, given, losses, best_of(trials))
        write_whole(folder / BEST_NAME, _header(argv, found, folder) + dump_yaml(best))
        write_whole(folder / "trials.csv", trials_csv(trials, space))
        write_whole(folder / "trials.md", f"{trials_markdown(trials, space)}\n\n{found}\n")
        save_search(trials, space, folder / "search.png")
    print(f"{found}\n{folder} holds every trial (trials.md, search.png) and the best as a recipe, {BEST_NAME}.")
    return trials


def _parse(argv: list[str]) -> tuple[SearchArguments, ModelArguments, DataArguments, DistillationConfig, dict]:
    """Return the settings of the search, and the results of `parse_recipe` for the other arguments."""
    parser = ArgumentParser((SearchArguments, *ARGUMENT_CLASSES), USAGE, RECIPE_HELP)
    path, rest = split_subject(argv, parser, "a recipe")
    parser.check_keys(rest)
    search_args, rest = parse_known(rest, ArgumentParser((SearchArguments,), USAGE))
    if any(word.partition("=")[0] in ("--output_dir", "--output-dir") for word in rest):
        raise HfkdError("output_dir is the folder of a run, and a search has many: give --search_dir.")
    trial_settings = [f"--{key}={value}" for key, value in TRIAL_SETTINGS.items()]
    return search_args, *parse_recipe([path, *rest, *trial_settings], command="hfkd search")


def _check(
    search_args: SearchArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    config: DistillationConfig,
    space: list[Parameter],
) -> None:
    """Check, before anything is loaded, that the settings can be used in a search.

    Raises:
        HfkdError: if they cannot.
    """
    if config.world_size > 1:
        raise HfkdError(
            f"A trial is trained by one process, and {config.world_size} were started. Start one command for each GPU "
            "(CUDA_VISIBLE_DEVICES=0 hfkd search ...); they share the trials."
        )
    losses = build_losses(config.losses, config.logit_standardization)  # type: ignore[arg-type]  # a mapping by now
    searched = {parameter.key for parameter in space}
    if not trains_classifier(losses.values(), config.ce_weight) and "ce_weight" not in searched:
        raise HfkdError(
            "A search compares the top-1 of its trials, and no loss reads logits, so that nothing trains a classifier: "
            "set ce_weight above 0."
        )
    if data_args.streaming and search_args.held_out:
        raise HfkdError("No images of a stream can be held out: set streaming: false, or --held_out 0.")
    if model_args.teacher_cache is None:
        return
    top_k = read_facts(Path(model_args.teacher_cache))["row"]["top_k"]
    for parameter in space:
        if top_k is not None and parameter.choices is None and parameter.key.endswith(".temperature"):
            raise HfkdError(
                f"{parameter.key} is searched, and the teacher cache {model_args.teacher_cache} holds the largest "
                f"{top_k} logits for some temperatures only: write a cache without --top_k, or give `choices`."
            )


def _claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Check that a folder holds no trials with other settings, and write the settings into it.

    Raises:
        HfkdError: if it holds trials with other settings; the message lists the differences.
    """
    path = folder / SETTINGS_NAME
    different = recipe_differences(path, settings) if (folder / DATABASE_NAME).is_file() else []
    if different:
        raise HfkdError(
            f"{folder} holds another search, whose trials cannot be compared with these:\n  "
            + "\n  ".join(different)
            + "\nGive another --search_dir, or remove the folder."
        )
    write_whole(path, dump_yaml(settings))


def _is_search(path: Path) -> bool:
    """Return True if the settings of a search, or a damaged file of them, are at a path."""
    try:
        settings = read_yaml(path)
    except HfkdError:
        return path.is_file()
    return settings is None or (isinstance(settings, dict) and "held_out" in settings)


def build_search_trainer(
    model_args: ModelArguments, data_args: DataArguments, config: DistillationConfig, held_out: float
) -> DistillationTrainer:
    """Build the trainer of a search, which makes a new student of the recipe for each trial.

    Args:
        held_out: share of the training images, drawn at random, that is evaluated and not trained on; 0 evaluates the
            evaluation split.
    """
    logging.disable_progress_bar()  # every trial loads weights
    if data_args.unlabelled_dataset_name is not None:
        raise HfkdError("A search trains on one data set: leave unlabelled_dataset_name out, and set it in the runs.")
    check_model(model_args.student_name_or_path, model_args.trust_remote_code)
    if not model_args.teacher_cache:
        check_teachers(model_args, build_losses(config.losses, config.logit_standardization))  # type: ignore[arg-type]
    cached = open_cache(model_args) if model_args.teacher_cache else None
    splits = load_splits(data_args)
    if not splits[0 if held_out else 1].has_labels:
        raise HfkdError(
            f"A search looks for the highest top-1, and {splits[1].name} has no labels: give a data set with labels."
        )
    teacher = cached or load_teachers(model_args, splits[1].class_names) or None

    def make_student():
        return build_student(model_args, data_args, splits[0].class_names, teacher)

    set_seed(config.seed)
    spec = input_spec(make_student())
    if held_out:
        train_set, eval_set = held_out_sets(splits[0], spec, data_args, config, held_out)
    else:
        train_set, eval_set = image_sets(splits, spec, data_args, config)
    return DistillationTrainer(
        None,
        teacher,
        config,
        train_dataset=train_set,
        eval_dataset=eval_set,
        model_init=make_student,
        teacher_cache_limit=model_args.outputs_limit(by_default=True),
    )


def _header(argv: list[str], found: str, folder: Path) -> str:
    """Return the comment above the best recipe: the command that found it, and the command that trains it."""
    words = ["hfkd", "search", *argv]
    hide_token(words)
    lines = [f"Found by `{shlex.join(words)}`:", *found.splitlines()]
    lines += ["Settings that shortened the trials are not in this recipe.", f"  hfkd distill {folder / BEST_NAME}"]
    return "".join(f"# {line}\n" for line in lines)
