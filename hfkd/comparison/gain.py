"""What distillation gains, in sentences: accuracy kept, parameters, multiply-adds and time saved."""

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
from ..networks.costs import latencies, multiply_adds
from ..networks.loading import input_spec, load_pretrained
from .rows import Row

ROUNDS = 30  # of measuring the time of a forward
UNREADABLE = (OSError, ValueError, SafetensorError)  # of a model that is not there, or not whole


class Networks:
    """Distinct networks, to be measured together: those of one architecture, size and number of parameters are one."""

    def __init__(self):
        self.models: dict[str, nn.Module] = {}
        self.sizes: dict[str, int] = {}  # side of the images in pixels
        self.multiply_adds: dict[str, int] = {}
        self.milliseconds: dict[str, float] = {}

    def add(self, model: nn.Module) -> str:
        """The name under which the network is measured."""
        size = input_spec(model).image_size
        name = f"{architecture_of(model)}, {_parameters(model)} parameters, {size} px"
        self.models.setdefault(name, model)
        self.sizes.setdefault(name, size)
        return name

    def measure(self, rounds: int) -> None:
        """Counts multiply-adds, and takes the time on the CPU, in turns."""
        self.multiply_adds = {name: multiply_adds(model, self.sizes[name]) for name, model in self.models.items()}
        self.milliseconds = latencies(self.models, self.sizes, rounds=rounds)


def gain_text(rows: Sequence[Row], teacher: str | None = None, rounds: int = ROUNDS) -> str:
    """A sentence for each row of students against their teacher, and how their time was taken; empty without any.

    What cannot be measured, since a network is not there, is said to be unknown.

    Args:
        teacher: folder, Hub id or architecture, for rows whose own teacher is not where the recipe says.
    """
    rows = [row for row in rows if row.teacher_top1 is not None]
    networks, pairs = Networks(), {}
    for row in rows:
        try:
            members = [networks.add(model) for model in _teacher(row, teacher)]
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
    return load_pretrained(str(folder))


def _teacher(row: Row, given: str | None) -> list[nn.Module]:
    """The teacher's networks, several of an ensemble: from where the recipe says, else the one given.

    Raises:
        FileNotFoundError: if neither has the teacher's number of parameters.
    """
    recipe, expected = row.first.recipe, row.first.results["teacher_parameters"]
    names = recipe.get("teacher_name_or_path") or []
    names = [names] if isinstance(names, str) else names
    checkpoints = recipe.get("teacher_checkpoint") or [None] * len(names)
    checkpoints = [checkpoints] if isinstance(checkpoints, str) else checkpoints
    reasons = [] if names else ["the run does not say where its teacher lies"]
    for members in (list(zip(names, checkpoints, strict=True)), [(given, None)] if given else []):
        if not members:
            continue
        try:
            dataset = row.first.results["dataset"] or {}
            for models in _variants(members, dataset.get("classes")):
                parameters = sum(map(_parameters, models))
                if parameters == expected:
                    return models
            reasons.append(f"what lies at {members[0][0]} has {parameters:,} parameters, the teacher had {expected:,}")
        except UNREADABLE as error:
            reasons.append(str(error).splitlines()[0].rstrip("."))
    raise NotFoundError(f"{'; '.join(reasons)}: give the teacher with --teacher")


def _variants(members: Sequence[tuple[str, str | None]], classes: int | None) -> Iterator[list[nn.Module]]:
    """The networks, and, where they are architectures without weights, the same with the data set's classes."""
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
    """`67.7 % fewer`, `3.5 % more` or `2.4 times as many`."""
    if ratio >= 2:
        return f"{ratio:.1f} times {as_much}"
    return f"{100 * (1 - ratio):.1f} % {less}" if ratio <= 1 else f"{100 * (ratio - 1):.1f} % more"


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
