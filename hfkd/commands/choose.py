"""`hfkd choose`: the way of teaching that is best for one's own data and networks, or none."""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset
from transformers import PrinterCallback, set_seed
from transformers.utils import logging

from ..data import IndexedImageSource
from ..errors import HfkdError, RunError
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
from ..recipe.yaml_file import dump_yaml
from ..runs.claims import check_own, claimed
from ..runs.folder import check_writable
from ..runs.planned import missing_teacher
from ..runs.writing import finite_or_none, write_whole
from ..search.candidates import ALONE, OWN, Candidate, candidates
from ..search.halving import TRIALS_NAME, Journal, Plan, Trial, halve
from ..search.results import TRIAL_ONLY_KEYS
from ..search.space import TRIAL_SETTINGS
from ..search.verdict import gains, page
from ..teacher_cache.filling import kept_layers, reads_more
from ..training.teacher_report import TeacherReport
from ..training.trainer import DistillationTrainer
from .arguments import parse_known, split_subject
from .build import build_student, check_teachers, held_out_sets, load_splits, load_teachers, open_cache
from .train import train_first
from .without_recipe import with_recipe

USAGE = "hfkd choose RECIPE [--minutes M] [--key value ...]"
SETTINGS_NAME, PAGE_NAME, BEST_NAME = "choice.yaml", "choice.md", "best.yaml"
TIMED_STEPS = 5, 25  # of the two trainings whose difference is the time of a step
# Of every training: nothing is measured before its end, nor ends it.
TRAINING_SETTINGS = TRIAL_SETTINGS | {
    "eval_strategy": "no",
    "early_stopping_patience": "null",
    "early_stopping_threshold": "0",
    "logging_strategy": "no",
}


@dataclass
class ChoiceArguments:
    """Settings of the choice."""

    _argument_group_name = "choice"  # in `--help`

    minutes: float = field(default=60.0, metadata={"help": "Time for all trainings together."})
    held_out: float = field(
        default=0.2,
        metadata={"help": "Share of the training images that is not trained on: half to choose by, half to judge by."},
    )
    choose_dir: str | None = field(
        default=None, metadata={"help": "Folder of the choice. By default runs/choose/ and the recipe's name."}
    )

    def __post_init__(self):
        if not self.minutes > 0:
            raise HfkdError(f"minutes must be above 0, got {self.minutes:g}.")
        if not 0 < self.held_out < 1:
            raise HfkdError(f"held_out is a share, above 0 and below 1, got {self.held_out}.")


def choose(argv: list[str] | None = None) -> str:
    """Choose a way of teaching by successive halving: `RECIPE [--minutes 60 --key value ...]`, or no recipe.

    The same command goes on with an interrupted choice.

    Returns:
        The page that says what to take.

    Raises:
        HfkdError: for too little time, several processes, a stream, or a folder that holds another choice.
    """
    argv = with_recipe(sys.argv[1:] if argv is None else argv)
    choice_args, model_args, data_args, config, recipe = _parse(argv)
    if config.world_size > 1:
        raise HfkdError(f"A choice runs in one process, and {config.world_size} were started.")
    if data_args.streaming:
        raise HfkdError("No images of a stream can be held out: set streaming: false.")
    if data_args.unlabelled_dataset_name is not None:
        raise HfkdError("A choice trains on one data set: leave unlabelled_dataset_name out, and set it in the runs.")
    if not (model_args.teacher_name_or_path or model_args.teacher_cache):
        raise HfkdError("A choice needs a teacher: set teacher_name_or_path.")
    folder = Path(choice_args.choose_dir or Path("runs", "choose", find_recipe(argv[0]).name))
    check_writable(folder, "choose_dir")
    _claim_folder(folder, recipe | {"held_out": choice_args.held_out})
    with claimed(folder, "choose_dir"):
        teacher = missing_teacher(argv[0], model_args, recipe)
        if teacher is not None:
            train_first(teacher, model_args)
            _, model_args, data_args, config, recipe = _parse(argv)
        trainings = Trainings(model_args, data_args, config, choice_args.held_out, folder)
        own = Candidate(OWN, config.losses, config.ce_weight, config.logit_standardization)  # type: ignore[arg-type]
        found = candidates(own if _has_top1(config) else None)
        journal = Journal(folder / TRIALS_NAME)
        if journal.plan is None:
            found = trainings.fitting(found)
            journal.candidates = [candidate.name for candidate in found]
            journal.plan = trainings.plan(found, choice_args.minutes)
            journal.write()
        found = [candidate for candidate in found if candidate.name in journal.candidates]
        trainings.expect(sum(Plan.sizes(len(found))), len(journal.trials))
        rounds = halve(found, journal, trainings.train, config.seed)
        command = f"hfkd distill {folder / BEST_NAME}"
        best = gains(rounds[-1])[0]
        taken = next(each for each in found if each.name == (best.candidate if best.is_sure else ALONE))
        judged_on = counted(
            len(trainings.judged), "training image that was held out", "training images that were held out"
        )
        text = page(rounds, judged_on, command)
        write_whole(folder / BEST_NAME, _header(text) + dump_yaml(_best_recipe(argv[0], folder, recipe, taken)))
        write_whole(folder / PAGE_NAME, text)
    print(f"\n{text}\n{folder} holds this page ({PAGE_NAME}) and the recipe ({BEST_NAME}).")
    return text


class Trainings:
    """Trainings of one student by one teacher on the same images, which differ in candidate, length and seed.

    Args:
        held_out: share of the training images, of which one half is `chosen_by` and the other `judged`.
        folder: of the choice; a training's own files lie below it and are removed.
    """

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: DataArguments,
        config: DistillationConfig,
        held_out: float,
        folder: Path,
    ):
        logging.disable_progress_bar()
        check_model(model_args.student_name_or_path, model_args.trust_remote_code)
        if not model_args.teacher_cache:
            check_teachers(model_args, build_losses({"kd": {}}, False))  # nearly all candidates read logits
        self.config, self.folder, self.outputs_limit = config, folder, model_args.outputs_limit(by_default=True)
        splits = load_splits(data_args)
        if not splits[0].has_labels:
            raise HfkdError(
                f"A choice looks for the highest top-1, and {splits[0].name} has no labels: give data with labels."
            )
        cached = open_cache(model_args) if model_args.teacher_cache else None
        self.teacher = cached or load_teachers(model_args, splits[0].class_names)
        class_names = splits[0].class_names
        self.make_student: Callable = lambda: build_student(model_args, data_args, class_names, self.teacher)
        set_seed(config.seed)
        self.train_set, held = held_out_sets(splits[0], input_spec(self.make_student()), data_args, config, held_out)
        rows = list(held.indices)
        drawn = np.random.default_rng(config.seed).permutation(rows).tolist()  # the rows are ascending
        middle = len(drawn) // 2
        if middle == 0:
            raise HfkdError(f"held_out {held_out:g} of the training images leaves one: two halves are needed.")
        source: IndexedImageSource = held.dataset  # type: ignore[assignment]
        self.chosen_by, self.judged = (Subset(source, sorted(part)) for part in (drawn[:middle], drawn[middle:]))
        batch = config.train_batch_size * config.gradient_accumulation_steps
        steps = -(-len(self.train_set) // batch) * config.num_train_epochs
        self.longest = config.max_steps if config.max_steps > 0 else max(1, round(steps))
        self._number = self._total = 0
        self._told = False

    def fitting(self, found: list[Candidate]) -> list[Candidate]:
        """Return the candidates that networks, teacher cache and data allow; a line tells of each other one.

        Raises:
            HfkdError: if none of them has a teacher, or not even the student alone can be trained.
        """
        kept, refused = [], None
        for candidate in found:
            with tempfile.TemporaryDirectory(dir=self.folder, prefix="training-") as output_dir:
                try:
                    self._trainer(candidate, self._settings(candidate, 1, self.config.seed, output_dir))
                    kept.append(candidate)
                except HfkdError as error:
                    if not candidate.losses:
                        raise
                    refused = error
                    print(f"{candidate.name} is left out. {error}", flush=True)
        gc.collect()
        if refused is not None and not any(candidate.losses for candidate in kept):
            raise refused
        return kept

    def plan(self, found: list[Candidate], minutes: float) -> Plan:
        """Return the lengths of the rounds that fit into the time, by the time that a taught student takes here.

        Raises:
            HfkdError: if the time is too short.
        """
        began = time.monotonic()
        taught = min((each for each in found if each.losses), key=lambda each: set(each.losses) != {"kd"})
        short, long = (min(steps, self.longest) for steps in TIMED_STEPS)
        # The first prepares what later trainings find. Where the teacher's outputs are kept, the second still computes
        # those of most of its steps, and the others read them.
        lengths = (short, long, short, long) if self.outputs_limit else (short, short, long)
        seconds = [self.train(taught, steps, self.config.seed).seconds for steps in lengths]
        difference = max(1, long - short)
        step = max(1e-4, (seconds[-1] - seconds[-2]) / difference)
        teacher = max(0.0, (seconds[1] - seconds[-1]) / difference) if self.outputs_limit else 0.0
        overhead = max(0.0, seconds[-2] - short * step)
        losses: list[list[Any]] = [list(build_losses(each.losses, False).values()) for each in found]
        kept = [each for each in losses if not any(reads_more(loss) for loss in each)]
        kinds, inside = len({tuple(kept_layers(each)) for each in kept if each}), len(losses) - len(kept)
        spent = (time.monotonic() - began) / 60
        return Plan.fit(len(found), minutes, step, overhead, self.longest, spent, teacher, kinds, inside)

    def expect(self, total: int, done: int) -> None:
        """Announce the number of trainings, for the lines that are printed."""
        self._number, self._total = done, total

    def train(self, candidate: Candidate, steps: int, seed: int) -> Trial:
        """Train a new student, and measure it."""
        began = time.monotonic()
        set_seed(seed)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="training-") as output_dir:
            trainer = self._trainer(candidate, self._settings(candidate, steps, seed, output_dir))
            if self._told:
                trainer.pop_callback(trainer.run_block)
            self._told = True
            try:
                trainer.train()
                right = [self._right(trainer, images) for images in (self.chosen_by, self.judged)]
            except RunError:
                if trainer.divergence.reason is None:
                    raise
                right = [np.zeros(len(images), dtype=bool) for images in (self.chosen_by, self.judged)]
        diverged = trainer.divergence.reason is not None
        top1 = finite_or_none(float("nan") if diverged else 100 * float(right[0].mean()))
        judged = "".join("1" if each else "0" for each in right[1])
        trial = Trial(candidate.name, steps, seed, top1, judged, round(time.monotonic() - began, 2))
        del trainer
        gc.collect()  # a trainer has reference cycles, which would keep its networks on the device
        if self._total:
            self._number += 1
            measured = "diverged" if diverged else f"top-1 {top1:.2f}"
            print(f"[{self._number}/{self._total}] {candidate.name}, {steps:,} steps: {measured}", flush=True)
        return trial

    def _settings(self, candidate: Candidate, steps: int, seed: int, output_dir: str) -> DistillationConfig:
        config: Any = copy.copy(self.config)
        for key, value in candidate.keys().items():
            setattr(config, key, value)
        share = steps / self.longest
        config.output_dir, config.seed, config.max_steps = output_dir, seed, steps
        config.disable_tqdm = True  # here, so that a teacher that is trained first shows its epochs
        config.data_seed = self.config.seed if config.data_seed is None else config.data_seed
        if config.lr_milestones:
            config.lr_milestones = [share * epoch for epoch in config.lr_milestones]
        if config.warmup_steps >= 1:
            config.warmup_steps = round(share * config.warmup_steps)
        return config

    def _trainer(self, candidate: Candidate, config: DistillationConfig) -> DistillationTrainer:
        teacher = self.teacher if candidate.losses else None
        trainer = DistillationTrainer(
            self.make_student(),
            teacher,
            config,
            train_dataset=self.train_set,
            teacher_cache_limit=self.outputs_limit,
        )
        trainer.run_block.tells_training = False  # a short training into a folder that is removed
        trainer.pop_callback(TeacherReport)
        trainer.pop_callback(PrinterCallback)  # of transformers, for a dictionary at the end of each training
        return trainer

    @staticmethod
    def _right(trainer: DistillationTrainer, images: Subset) -> np.ndarray:
        found = trainer.predict(images)
        return found.predictions.argmax(axis=1) == found.label_ids


def _has_top1(config: DistillationConfig) -> bool:
    """Return whether a recipe trains a classifier."""
    losses = build_losses(config.losses, config.logit_standardization)  # type: ignore[arg-type]  # a mapping by now
    return trains_classifier(losses.values(), config.ce_weight)


def _parse(argv: list[str]) -> tuple[ChoiceArguments, ModelArguments, DataArguments, DistillationConfig, dict]:
    """Return the settings of the choice, and the results of `parse_recipe` for the other arguments."""
    parser = ArgumentParser((ChoiceArguments, *ARGUMENT_CLASSES), USAGE, RECIPE_HELP)
    path, rest = split_subject(argv, parser, "a recipe")
    parser.check_keys(rest)
    choice_args, rest = parse_known(rest, ArgumentParser((ChoiceArguments,), USAGE))
    if find_recipe(path).name != "photographs/student" and any(
        word.partition("=")[0] in ("--output_dir", "--output-dir") for word in rest
    ):
        raise HfkdError("output_dir is the folder of a run, and a choice has many: give --choose_dir.")
    settings = [f"--{key}={value}" for key, value in TRAINING_SETTINGS.items()]
    return choice_args, *parse_recipe([path, *rest, *settings], command="hfkd choose")


def _claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Check that a folder holds no choice with other settings, and write the settings into it."""
    path = folder / SETTINGS_NAME
    check_own(folder, (SETTINGS_NAME, TRIALS_NAME, PAGE_NAME, BEST_NAME), path.is_file(), "choose_dir")
    different = recipe_differences(path, settings) if path.is_file() else []
    if different:
        raise HfkdError(
            f"{folder} holds another choice:\n  " + "\n  ".join(different) + "\nGive another --choose_dir, or remove "
            "the folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, dump_yaml(settings))


def _best_recipe(name: str, folder: Path, recipe: dict[str, Any], taken: Candidate) -> dict[str, Any]:
    """Return the recipe that trains the chosen candidate with the whole schedule."""
    written, trial_only = load_recipe(name), {*TRIAL_ONLY_KEYS, *TRAINING_SETTINGS}
    given = {key: value for key, value in recipe.items() if written.get(key) != value and key not in trial_only}
    best: dict[str, Any] = {"extends": find_recipe(name).reference(folder)} | given | taken.keys()
    if not taken.losses:
        best |= {key: None for key in recipe if key.startswith("teacher_")}
    return best | {"published_top1": None, "output_dir": str(folder / "best")}


def _header(text: str) -> str:
    return "".join(f"# {line}\n".replace("# \n", "#\n") for line in text.splitlines())
