"""Savings of a student over its teacher, in sentences: accuracy kept, parameters, multiply-adds and time saved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import NotFoundError
from ..models.checkpoints import load_architecture
from ..names import architecture_of, hub_id
from ..networks.costs import latencies, multiply_adds, parameter_count
from ..networks.input_spec import input_spec
from ..networks.int8 import without_rounding
from ..networks.loading import load_pretrained
from ..runs.finished import RecipeTeacher
from .rows import Row

ROUNDS = 30  # of measuring the time of a forward pass
UNREADABLE = (OSError, ValueError, SafetensorError)  # raised for a model that is missing or damaged


class Networks:
    """Networks to be measured together.

    Networks with the same architecture, image size and number of parameters are measured once.
    """

    def __init__(self):
        self.models: dict[str, nn.Module] = {}
        self.sizes: dict[str, int] = {}  # side of the images in pixels
        self.multiply_adds: dict[str, int] = {}
        self.milliseconds: dict[str, float] = {}

    def add(self, model: nn.Module) -> str:
        """Add a network and return the name under which it is measured."""
        size = input_spec(model).image_size
        name = f"{architecture_of(model)}, {parameter_count(model)} parameters, {size} px"
        self.models.setdefault(name, model)
        self.sizes.setdefault(name, size)
        return name

    def measure(self, rounds: int) -> None:
        """Count multiply-adds, and measure the time on the CPU; the networks take turns."""
        self.multiply_adds = {name: multiply_adds(model, self.sizes[name]) for name, model in self.models.items()}
        self.milliseconds = latencies(self.models, self.sizes, rounds=rounds)


def savings_text(rows: Sequence[Row], teacher: str | None = None, rounds: int = ROUNDS) -> str:
    """Compare students with their teachers: a sentence for each row, then how the time was measured.

    Costs are unknown if a network is missing. The text is empty if no row has a teacher.

    Args:
        teacher: folder, Hub id or architecture, for rows whose own teacher is not where the recipe says.
    """
    rows = [row for row in rows if row.teacher_top1 is not None]
    networks, pairs = Networks(), {}
    for row in rows:
        try:
            members = [networks.add(model) for model in teacher_networks(row, teacher)]
            pairs[row.label] = [networks.add(_student(row))], members
        except UNREADABLE as error:
            pairs[row.label] = str(error)
    networks.measure(rounds)
    sentences = [_sentence(row, pairs[row.label], networks) for row in rows]
    if any(isinstance(pair, tuple) for pair in pairs.values()):
        threads = torch.get_num_threads()
        sentences.append(
            f"Time of a forward of one image in float32 on this CPU, {threads} thread{'s' if threads > 1 else ''}: the "
            f"fastest of {rounds} rounds, in which all networks take turns."
        )
    return "\n".join(sentences)


def _student(row: Row) -> nn.Module:
    folder = next((run.export for run in row.runs if run.export is not None), None)
    if folder is None:
        raise NotFoundError(f"{row.first.folder} holds no trained model")
    return without_rounding(load_pretrained(str(folder)))  # int8 files have a table of their own


def teacher_networks(row: Row, given: str | None) -> list[nn.Module]:
    """Load the teacher's networks, several of an ensemble: those that the recipe names, else the one given.

    Raises:
        FileNotFoundError: if neither has the teacher's number of parameters.
    """
    expected = row.first.results["teacher_parameters"]
    dataset = row.first.results["dataset"] or {}
    own = row.first.teacher
    reasons = [] if own.names else ["the run does not say where its teacher lies"]
    for teacher in (own, RecipeTeacher((given,), (None,)) if given else RecipeTeacher()):
        if not teacher.names:
            continue
        try:
            for models in _variants(teacher.members, dataset.get("classes")):
                parameters = sum(map(parameter_count, models))
                if parameters == expected:
                    return [without_rounding(model) for model in models]
            reasons.append(
                f"the model at {teacher.names[0]} has {parameters:,} parameters, the teacher had {expected:,}"
            )
        except UNREADABLE as error:
            reasons.append(str(error).splitlines()[0].rstrip("."))
    raise NotFoundError(f"{'; '.join(reasons)}: give the teacher with --teacher")


def _variants(members: Sequence[tuple[str, str | None]], classes: int | None) -> Iterator[list[nn.Module]]:
    """Yield the networks, then, if all are architectures without weights, the same with the data set's classes."""
    yield [_network(name, checkpoint) for name, checkpoint in members]
    if all(timm.is_model(name) and checkpoint is None for name, checkpoint in members) and classes:
        yield [timm.create_model(name, num_classes=classes) for name, _ in members]


def _network(name: str, checkpoint: str | None) -> nn.Module:
    if timm.is_model(name):  # the costs do not depend on the weights
        return timm.create_model(name) if checkpoint is None else load_architecture(name, checkpoint)
    if not os.path.isdir(name) and hub_id(name) is None:
        raise NotFoundError(f"teacher not found at {name}")
    return load_pretrained(name)


def _sentence(row: Row, pair: tuple[list[str], list[str]] | str, networks: Networks) -> str:
    top1, teacher_top1, results = row.value("best", "top1"), row.teacher_top1.mean, row.first.results
    parts = [f"{100 * top1.mean / teacher_top1:.1f} % of the teacher's top-1 ({top1.text()} of {teacher_top1:.2f})"]
    ours, theirs = results["parameters"], results["teacher_parameters"]
    parts.append(f"{_change(ours / theirs, 'fewer', 'as many')} parameters ({ours:,} of {theirs:,})")
    if isinstance(pair, str):
        return f"{row.label}: {', '.join(parts)}; multiply-adds and time on the CPU unknown: {pair}."
    sizes = list(dict.fromkeys(networks.sizes[name] for names in pair for name in names))
    ours, theirs = (sum(networks.multiply_adds[name] for name in names) for names in pair)
    parts.append(
        f"{_change(ours / theirs, 'fewer', 'as many')} multiply-adds ({ours / 1e6:,.1f} of {theirs / 1e6:,.1f} million "
        f"an image, at {' and '.join(map(str, sizes))} px)"
    )
    ours, theirs = (sum(networks.milliseconds[name] for name in names) for names in pair)
    parts.append(
        f"{_change(ours / theirs, 'less', 'as much')} time on the CPU ({ours:.2f} of {theirs:.2f} ms an image)"
    )
    return f"{row.label}: {', '.join(parts)}."


def _change(ratio: float, less: str, as_much: str) -> str:
    """Return a ratio in words: `67.7 % fewer`, `3.5 % more` or `2.4 times as many`."""
    if ratio >= 2:
        return f"{ratio:.1f} times {as_much}"
    return f"{100 * (1 - ratio):.1f} % {less}" if ratio <= 1 else f"{100 * (ratio - 1):.1f} % more"
