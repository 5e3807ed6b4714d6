"""`hfkd evaluate`: accuracy of a trained model, or probes of its features."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import timm
from transformers import PreTrainedModel

from ..data import ImageSource
from ..errors import HfkdError, RunError
from ..names import NO_LABELS
from ..networks.class_matching import class_names_of
from ..networks.input_spec import input_spec
from ..networks.loading import load_pretrained
from ..networks.sources import resolve_name
from ..recipe.arguments import DataArguments
from ..recipe.checks import AT_LEAST_1, NOT_NEGATIVE, check_ranges
from ..recipe.config import DistillationConfig
from ..recipe.parser import HELP_WORDS, ArgumentParser, to_argv
from ..recipe.reading import load_recipe
from ..runs.finished import read_run
from ..runs.folder import RECIPE_NAME, RESULTS_NAME
from ..training.trainer import DistillationTrainer
from .arguments import check_trained, split_subject
from .build import evaluation_set, load_splits, with_classes_of
from .features import FeatureArguments, measure_features

# Keys of DataArguments that only a training reads, and a probe the first.
OF_TRAINING = ("train_split", "random_flip", "auto_augment", "color_jitter", "random_erasing", "shuffle_buffer_size")
OF_TRAINING += ("unlabelled_dataset_name", "unlabelled_split", "unlabelled_share")
USAGE = "hfkd evaluate MODEL [--key value ...]"


@dataclass
class EvaluationArguments:
    """Settings of the evaluation."""

    _argument_group_name = "evaluation"  # in `--help`

    batch_size: int = field(default=500, metadata={"help": "Images per forward pass."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode images that are not held in memory."})
    bf16: bool = field(default=False, metadata={"help": "bf16 autocast; float32 by default."})

    def __post_init__(self):
        check_ranges(self, {"batch_size": AT_LEAST_1, "num_workers": NOT_NEGATIVE})


def evaluate(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate a saved model, print and return its metrics: `MODEL [--dataset_name ... --batch_size 500]`.

    MODEL is a folder or a Hub id. Data settings that are not given come from the recipe of MODEL's run. With `--probe`
    or `--teacher` the features are measured in place of the classifier, and MODEL may also be a timm architecture with
    weights.

    Raises:
        ValueError: without a data set, or for an unknown key.
        RunError: if the model's logits or features are not finite.
    """
    argv = sys.argv[1:] if argv is None else argv
    probing = any(word.partition("=")[0] in ("--probe", "--teacher", *HELP_WORDS) for word in argv)
    name, data_args, args, features = parse_model(argv, USAGE, FeatureArguments, probing=probing)
    if features.probe or features.teacher:
        metrics = measure_features(name, data_args, args, features)
        shown = list(metrics)
    else:
        check_trained(name)
        metrics = _accuracy(name, data_args, args)
        shown = ["eval_top1", "eval_top5", "eval_loss"]
    for key in shown:
        print(f"{key.removeprefix('eval_')}: {metrics[key]:.4f}")
    return metrics


def _accuracy(name: str, data_args: DataArguments, args: EvaluationArguments) -> dict[str, float]:
    """Return the metrics of a classifier on the evaluation split."""
    model, eval_set = load_evaluation(name, data_args)
    with tempfile.TemporaryDirectory() as folder:
        metrics = evaluating_trainer(model, eval_set, args, folder).evaluate()
    if not math.isfinite(metrics["eval_top1"]):
        raise RunError(f"{name} gives logits that are not finite: it has no accuracy. Its training may have diverged.")
    return metrics


def parse_model(argv: list[str], usage: str, *argument_classes: type, probing: bool = False) -> tuple:
    """Parse `MODEL [--key value ...]`.

    MODEL is a folder or a Hub id; a run's folder stands for the model in it. Data settings that are not given come from
    the recipe of MODEL's run.

    Args:
        probing: MODEL may also be a timm architecture, and the training split is read.

    Returns:
        The model's name, its DataArguments, the EvaluationArguments, and one object for each of `argument_classes`.

    Raises:
        ValueError: without a model or a data set, or for an unknown key.
    """
    parser = ArgumentParser((DataArguments, EvaluationArguments, *argument_classes), usage=usage)
    parser.without_help(*OF_TRAINING[probing:])
    parser.not_required("dataset_name", "that of the model's run")
    name, overrides = split_subject(argv, parser)
    if (Path(name) / RESULTS_NAME).is_file():
        name = str(read_run(name).export or name)
    name = resolve_name(name)
    if not (probing and timm.is_model(name)):
        check_trained(name)
    recipe_path = Path(name).parent / RECIPE_NAME
    keys = [field.name for field in dataclasses.fields(DataArguments)]
    recipe = load_recipe(recipe_path) if recipe_path.is_file() else {}
    named = any(word.partition("=")[0] == "--dataset_name" for word in overrides)
    if named and recipe.get("label_column") == NO_LABELS:  # of the run's images, and these are others
        del recipe["label_column"]
    defaults = to_argv({key: value for key, value in recipe.items() if key in keys}, parser)
    return name, *parser.parse(defaults + overrides)


def load_evaluation(name: str, data_args: DataArguments) -> tuple[PreTrainedModel, ImageSource]:
    """Load a saved model and the split that it is evaluated on, with the model's classes.

    Raises:
        HfkdError: the split has no labels, or classes that the model lacks.
    """
    model = load_pretrained(name)
    _, split = load_splits(dataclasses.replace(data_args, train_split=None), class_names_of(model))
    if not split.has_labels:
        raise HfkdError(
            f"{split.name} has no labels, and an accuracy needs them: name the label_column, or another data set."
        )
    return model, evaluation_set(with_classes_of(model, split), input_spec(model), data_args)


def evaluating_trainer(
    model: PreTrainedModel, eval_set: ImageSource, args: EvaluationArguments, folder: str
) -> DistillationTrainer:
    """Return a trainer that only evaluates; the folder may be a temporary one."""
    config = DistillationConfig(
        output_dir=folder,
        per_device_eval_batch_size=args.batch_size,
        dataloader_num_workers=args.num_workers,
        bf16=args.bf16,
        report_to="none",
    )
    return DistillationTrainer(model, None, config, eval_dataset=eval_set)
