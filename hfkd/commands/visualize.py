"""`hfkd visualize`: figures of a trained student beside its teacher, as pictures and as tables of their numbers."""

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
from transformers import PreTrainedModel

from ..data import ImageSource, IndexedImageSource
from ..errors import HfkdError, did_you_mean
from ..figures import class_matrices, embeddings, logit_spread, reliability, temperature
from ..figures.observations import Observations, observe
from ..figures.tables import LeftOutError, Table, is_table, panel_title, write_csv
from ..losses.checks import count, positive
from ..names import last_part
from ..networks.features import EMBEDDING
from ..networks.input_spec import input_spec
from ..networks.teacher import Teacher, TeacherEnsemble
from ..networks.teacher_loading import as_teacher
from ..recipe.arguments import DataArguments, ModelArguments
from ..runs.claims import check_own
from ..runs.finished import FinishedRun, RecipeTeacher, read_run, teacher_of
from ..runs.folder import RESULTS_NAME, check_writable
from ..runs.writing import writing
from .build import load_teachers
from .evaluate import EvaluationArguments, evaluating_trainer, load_evaluation, parse_model

USAGE = "hfkd visualize MODEL [--teacher NAME] [--figures NAME ...] [--key value ...]"
SEED = 0  # for drawing images from a split with more than max_images


@dataclass
class FigureArguments:
    """Figures, teacher and images."""

    _argument_group_name = "figures"  # in `--help`

    figures: list[str] | None = field(
        default=None,
        metadata={
            "help": "Any of temperature, class_matrices, tsne, logit_spread and reliability; by default all that can "
            "be drawn."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the figures; by default `figures` in the folder of the run."}
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
        metadata={"help": "For each of the student's classes, the class of --teacher; by default matched by name."},
    )
    max_images: int = field(
        default=10_000, metadata={"help": "Largest number of images to evaluate, drawn at random from the split."}
    )
    tsne_classes: int = field(default=10, metadata={"help": "Number of classes in t-SNE, from the first one on."})
    tsne_images: int = field(default=2_000, metadata={"help": "Largest number of images in t-SNE."})
    tsne_perplexity: float = field(
        default=30.0, metadata={"help": "Perplexity of t-SNE, about the neighbours of an image."}
    )

    def __post_init__(self):
        for name in self.figures or []:
            if name not in FIGURES:
                raise HfkdError(f"There is no figure '{name}'.{did_you_mean(name, FIGURES)}")
        for key in ("max_images", "tsne_classes", "tsne_images"):
            count(key, getattr(self, key))
        positive("tsne_perplexity", self.tsne_perplexity)
        if self.teacher is None and (self.teacher_checkpoint or self.teacher_class_indices):
            raise HfkdError("teacher_checkpoint and teacher_class_indices go with --teacher: name the teacher, too.")


class Subject:
    """Model to draw, with the run that it belongs to and its teacher, if any.

    Networks and images are loaded when the first figure needs them.
    """

    def __init__(self, name: str, data_args: DataArguments, evaluation: EvaluationArguments, args: FigureArguments):
        self.name, self.data_args, self.evaluation, self.args = name, data_args, evaluation, args
        folder = Path(name).parent
        self.run: FinishedRun | None = read_run(folder) if (folder / RESULTS_NAME).is_file() else None

    @property
    def title(self) -> str:
        """Name of the run, or else of the model."""
        return self.run.name if self.run else last_part(self.name)

    @property
    def title_with_networks(self) -> str:
        """Title of a figure that is drawn from the networks' outputs."""
        names = [panel_title(role, [*self.networks], network.name) for role, network in self.networks.items()]
        images = f"{len(self.chosen_rows):,} images of {last_part(self.data_args.dataset_name)}"
        return f"{self.title}\n{', '.join(names)}; {images}"

    @functools.cached_property
    def model_and_images(self) -> tuple[PreTrainedModel, ImageSource]:
        """The model and its evaluation split."""
        return load_evaluation(self.name, self.data_args)

    @functools.cached_property
    def networks(self) -> dict[str, Teacher | TeacherEnsemble]:
        """The model and its teacher by role, frozen."""
        model, _ = self.model_and_images
        teacher = self._load_teacher()
        role = self.run.results["role"] if self.run and not teacher else "student"
        networks = {role: Teacher(model, input_spec=input_spec(model))}
        return networks | ({"teacher": teacher} if teacher else {})

    @functools.cached_property
    def chosen_rows(self) -> np.ndarray:
        """Rows of the evaluation split that the figures show."""
        _, eval_set = self.model_and_images
        return some_rows(eval_set.num_rows, self.args.max_images)

    @functools.cached_property
    def observed(self) -> Observations:
        """Outputs of the networks on the chosen rows."""
        model, eval_set = self.model_and_images
        with tempfile.TemporaryDirectory() as folder:
            indexed = isinstance(eval_set, IndexedImageSource)
            images = Subset(eval_set, self.chosen_rows.tolist()) if indexed else eval_set
            trainer = evaluating_trainer(model, images, self.evaluation, folder)
            loader = trainer.get_eval_dataloader()
        spec = next(iter(self.networks.values())).input_spec
        device, dtype = trainer.args.device, torch.bfloat16 if self.evaluation.bf16 else None
        for network in self.networks.values():
            layers = [EMBEDDING] if isinstance(network, Teacher) else []  # an ensemble has none
            network.prepare(device, dtype, channels_last=False, student_input=spec, layers=layers)
        batches = iter(tqdm(loader, desc="images", unit="batch", disable=not sys.stdout.isatty()))
        first = next(batches)
        if len(self.networks) == 2:
            pair = {key: value[:2].to(device) for key, value in first.items()}
            self.networks["teacher"].align_classes(eval_set.class_names, pair, required=self.args.teacher is not None)
            if not self.networks["teacher"].shares_classes:
                left_out = self.networks.pop("teacher").name
                print(f"The figures leave out the teacher {left_out}: it lacks the student's classes.")
        return observe(self.networks, itertools.chain([first], batches), eval_set.class_names, device, self.chosen_rows)

    def _load_teacher(self) -> Teacher | TeacherEnsemble | None:
        """Load the teacher that was given, or else the one that the recipe names."""
        args, recipe = self.args, self.run.recipe if self.run else {}
        teacher = teacher_of(recipe)
        if args.teacher is not None:
            teacher = RecipeTeacher((args.teacher,), (args.teacher_checkpoint,), args.teacher_class_indices)
        _, images = self.model_and_images
        members = load_teachers(ModelArguments(self.name, **teacher.settings), images.class_names)
        if args.teacher is not None and not members[0].has_classifier:
            raise HfkdError(f"The figures compare logits, and {args.teacher} has no classifier: leave --teacher out.")
        return as_teacher(members, bool(recipe.get("logit_standardization"))) if members else None


def some_rows(rows: int, most: int) -> np.ndarray:
    """Return the numbers of all rows, or of `most` rows drawn at random, the same ones every time; ascending."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(SEED).choice(rows, most, replace=False))


def _tsne(subject: Subject) -> Table:
    args = subject.args
    return embeddings.measure(subject.observed, args.tsne_classes, args.tsne_images, args.tsne_perplexity)


@dataclass(frozen=True)
class FigureKind:
    """Kind of figure.

    Attributes:
        measure: measures a subject.
        draw: draws the table of `measure`.
        title: title of the picture.
    """

    measure: Callable[[Subject], Table]
    draw: Callable[[Table], Any]
    title: Callable[[Subject], str] = lambda subject: subject.title_with_networks


FIGURES = {
    "temperature": FigureKind(
        lambda subject: temperature.measure(subject.run), temperature.draw, lambda subject: subject.title
    ),
    "class_matrices": FigureKind(lambda subject: class_matrices.measure(subject.observed), class_matrices.draw),
    "tsne": FigureKind(_tsne, embeddings.draw),
    "logit_spread": FigureKind(lambda subject: logit_spread.measure(subject.observed), logit_spread.draw),
    "reliability": FigureKind(lambda subject: reliability.measure(subject.observed), reliability.draw),
}


def visualize(argv: list[str] | None = None) -> list[Path]:
    """Draw a saved model beside its teacher: `MODEL [--teacher NAME] [--figures NAME ...]`.

    MODEL and its images are the same as for `hfkd evaluate`. Each figure is a PNG with its numbers as CSV beside it.
    The command prints which figures cannot be drawn, and why.

    Returns:
        The paths of the PNGs.

    Raises:
        ValueError: for an unknown figure, a figure of `--figures` that cannot be drawn, or networks and data that do
            not fit one another.
    """
    argv = sys.argv[1:] if argv is None else argv
    subject = Subject(*parse_model(argv, USAGE, FigureArguments))
    default = subject.run.folder / "figures" if subject.run else Path("figures", last_part(subject.name))
    folder = Path(subject.args.output_dir or default)
    written = []
    for name in subject.args.figures or FIGURES:
        kind = FIGURES[name]
        try:
            table = kind.measure(subject)
        except LeftOutError as reason:
            if subject.args.figures:
                raise
            print(f"{name} is left out: {reason}.")
            continue
        check_writable(folder, "output_dir")
        names = [f"{name}.csv", f"{name}.png"]
        check_own(folder, names, is_table(folder / names[0], table), "output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        figure = kind.draw(table)
        figure.suptitle(kind.title(subject), fontsize="medium")
        written.append(folder / f"{name}.png")
        folder.mkdir(parents=True, exist_ok=True)
        with writing(written[-1]) as file:
            figure.savefig(file)
        write_csv(table, folder / f"{name}.csv")
        print(f"{written[-1]} and {name}.csv")
    return written
