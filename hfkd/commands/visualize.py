"""`hfkd visualize`: figures of a trained student beside its teacher, each as a picture and as the numbers in it."""

from __future__ import annotations

import functools
import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm

from ..data import IndexedImageSource
from ..errors import HfkdError, did_you_mean, require
from ..figures import class_matrices, embeddings, logit_spread, reliability, temperature
from ..figures.observations import Observations, observe
from ..figures.tables import LeftOutError, Table, write_csv
from ..losses.checks import count, positive
from ..names import last_part
from ..networks.features import EMBEDDING
from ..networks.loading import as_teacher, input_spec
from ..networks.teacher import Teacher, TeacherEnsemble
from ..recipe.arguments import DataArguments, ModelArguments
from ..runs.finished import FinishedRun, read_run
from ..runs.folder import RESULTS_NAME
from .build import load_teachers
from .evaluate import EvaluationArguments, evaluating_trainer, load_evaluation, parse_model

USAGE = "hfkd visualize MODEL [--teacher NAME] [--figures NAME ...] [--key value ...]"
SEED = 0  # of which images are looked at, where they are too many


@dataclass
class FigureArguments:
    """What to draw."""

    _argument_group_name = "figures"  # in `--help`

    figures: list[str] | None = field(
        default=None,
        metadata={
            "help": "Some of temperature, class_matrices, tsne, logit_spread and reliability; by default all that can "
            "be drawn."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where to write; by default `figures` in the folder of the run."}
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder, Hub id or timm architecture; by default the teacher that the run's recipe names."},
    )
    teacher_checkpoint: str | None = field(
        default=None, metadata={"help": "Weights for a timm architecture that --teacher names."}
    )
    teacher_class_indices: list[int] | None = field(
        default=None,
        metadata={"help": "For each of the student's classes that of --teacher; by default matched by name."},
    )
    max_images: int = field(
        default=10_000, metadata={"help": "Look at so many images of the split at most, drawn at random."}
    )
    tsne_classes: int = field(default=10, metadata={"help": "t-SNE shows so many classes, the first ones."})
    tsne_images: int = field(default=2_000, metadata={"help": "t-SNE shows so many of their images at most."})
    tsne_perplexity: float = field(default=30.0, metadata={"help": "About how many neighbours an image has in t-SNE."})

    def __post_init__(self):
        for name in self.figures or []:
            if name not in FIGURES:
                raise HfkdError(f"There is no figure '{name}'.{did_you_mean(name, FIGURES)}")
        for key in ("max_images", "tsne_classes", "tsne_images"):
            count(key, getattr(self, key))
        positive("tsne_perplexity", self.tsne_perplexity)
        if self.teacher is None and (self.teacher_checkpoint or self.teacher_class_indices):
            raise HfkdError("teacher_checkpoint and teacher_class_indices go with --teacher: name it, too.")


class Subject:
    """What figures are drawn of: a model, the run that it lies in, if any, and its teacher, if any."""

    def __init__(self, name: str, data_args: DataArguments, evaluation: EvaluationArguments, args: FigureArguments):
        self.name, self.data_args, self.evaluation, self.args = name, data_args, evaluation, args
        folder = Path(name).parent
        self.run: FinishedRun | None = read_run(folder) if (folder / RESULTS_NAME).is_file() else None
        self.title = self.run.name if self.run else last_part(name)

    @functools.cached_property
    def observed(self) -> Observations:
        """What the networks say of the evaluation split; they are loaded when the first figure asks for it."""
        model, eval_set = load_evaluation(self.name, self.data_args)
        teacher = self._load_teacher()
        role = self.run.results["role"] if self.run and not teacher else "student"
        spec = input_spec(model)
        networks = {role: Teacher(model, input_spec=spec)} | ({"teacher": teacher} if teacher else {})
        chosen = some_rows(eval_set.num_rows, self.args.max_images)
        with tempfile.TemporaryDirectory() as folder:
            images = Subset(eval_set, chosen.tolist()) if isinstance(eval_set, IndexedImageSource) else eval_set
            trainer = evaluating_trainer(model, images, self.evaluation, folder)
            loader = trainer.get_eval_dataloader()
        device, dtype = trainer.args.device, torch.bfloat16 if self.evaluation.bf16 else None
        for network in networks.values():
            layers = [EMBEDDING] if isinstance(network, Teacher) else []  # an ensemble has none
            network.prepare(device, dtype, channels_last=False, student_input=spec, layers=layers)
        batches = iter(tqdm(loader, desc="images", unit="batch", disable=None))
        first = next(batches)
        if teacher is not None:
            pair = {key: value[:2].to(device) for key, value in first.items()}
            teacher.align_classes(eval_set.class_names, pair)
        names = ", ".join(f"{role} {network.name}" for role, network in networks.items())
        self.title += f"\n{names}; {len(chosen):,} images of {last_part(self.data_args.dataset_name)}"
        return observe(networks, itertools.chain([first], batches), eval_set.class_names, device, chosen)

    def _load_teacher(self) -> Teacher | TeacherEnsemble | None:
        """The teacher that was named, else that of the recipe, if it names one."""
        recipe = self.run.recipe if self.run else {}
        keys = ("teacher_name_or_path", "teacher_checkpoint", "teacher_class_indices")
        chosen = {key: recipe.get(key) for key in keys}
        if self.args.teacher is not None:
            given = (self.args.teacher, self.args.teacher_checkpoint, self.args.teacher_class_indices)
            chosen = dict(zip(keys, given, strict=True))
        members = load_teachers(ModelArguments(self.name, **chosen))
        return as_teacher(members, bool(recipe.get("logit_standardization"))) if members else None


def some_rows(rows: int, most: int) -> np.ndarray:
    """All of so many rows, or `most` of them, drawn at random, always the same; in order."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(SEED).choice(rows, most, replace=False))


def _tsne(subject: Subject) -> Table:
    args = subject.args
    return embeddings.measure(subject.observed, args.tsne_classes, args.tsne_images, args.tsne_perplexity)


# name: what measures a subject, and what draws the table that this gives.
FIGURES: dict[str, tuple[Callable[[Subject], Table], Callable[[Table], Any]]] = {
    "temperature": (lambda subject: temperature.measure(subject.run), temperature.draw),
    "class_matrices": (lambda subject: class_matrices.measure(subject.observed), class_matrices.draw),
    "tsne": (_tsne, embeddings.draw),
    "logit_spread": (lambda subject: logit_spread.measure(subject.observed), logit_spread.draw),
    "reliability": (lambda subject: reliability.measure(subject.observed), reliability.draw),
}


def visualize(argv: list[str] | None = None) -> list[Path]:
    """Draws a saved model beside its teacher: `MODEL [--teacher NAME] [--figures NAME ...]`.

    MODEL is what `hfkd evaluate` takes, and the images are those that it would be evaluated on. Prints and returns the
    PNGs, beside which lie the numbers as CSV, and prints which figures cannot be drawn of it, and why.

    Raises:
        ImportError: without matplotlib.
        ValueError: for an unknown figure, one asked for by name that cannot be drawn, or networks and data that do not
            fit one another.
    """
    argv = sys.argv[1:] if argv is None else argv
    subject = Subject(*parse_model(argv, USAGE, FigureArguments))
    require("matplotlib", "figures")
    default = subject.run.folder / "figures" if subject.run else Path("figures", last_part(subject.name))
    folder = Path(subject.args.output_dir or default)
    written = []
    for name in subject.args.figures or FIGURES:
        measure, draw = FIGURES[name]
        try:
            table = measure(subject)
        except LeftOutError as reason:
            if subject.args.figures:
                raise
            print(f"{name} is left out: {reason}.")
            continue
        figure = draw(table)
        figure.suptitle(subject.title, fontsize="medium")
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1])
        write_csv(table, folder / f"{name}.csv")
        print(f"{written[-1]} and {name}.csv")
    return written
