"""`hfkd evaluate`: measure a trained model."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from ..data import (
    ImageSource,
)
from ..errors import HfkdError
from ..networks.class_matching import class_names_of
from ..networks.loading import input_spec, load_pretrained
from ..recipe.arguments import DataArguments, DistillationConfig
from ..recipe.parser import ArgumentParser, to_argv
from ..recipe.reading import load_recipe
from ..runs.finished import read_run
from ..runs.folder import RECIPE_NAME, RESULTS_NAME
from ..training.trainer import DistillationTrainer
from .build import (
    evaluation_set,
    load_splits,
)


@dataclass
class EvaluationArguments:
    """How to evaluate."""

    _argument_group_name = "evaluation"  # in `--help`

    batch_size: int = field(default=500, metadata={"help": "Images a forward."})
    num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images, where they are not held in memory."}
    )
    bf16: bool = field(default=False, metadata={"help": "bf16 autocast; float32 by default."})


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
    parser.answer_help(argv[:1])
    if not argv or argv[0].startswith("-"):
        given = argv[0] if argv else ""
        raise HfkdError(f"The first argument must be the model's folder or Hub id, got '{given}'. Usage: {usage}")
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
