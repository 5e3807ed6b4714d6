"""Rows of a comparison: runs that belong together, and their measures."""

from __future__ import annotations

import functools
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import HfkdError
from ..recipe.differences import settings_of
from ..recipe.keys import SEEDS, WITHOUT_EFFECT
from ..runs.claims import is_claimed
from ..runs.finished import FinishedRun
from ..runs.published import PublishedRun, departures, processes, published_runs

# Runs that differ in these keys alone share a row, which shows their mean.
OF_ONE_RUN = WITHOUT_EFFECT.union(SEEDS)
DEFAULTS = "photographs/"  # recipes of runs that were started without one


@dataclass(frozen=True)
class Spread:
    """Mean of several runs and their standard deviation (n - 1 in the denominator), which is None for one run."""

    mean: float
    deviation: float | None

    def text(self, digits: int = 2) -> str:
        """Return `71.53 ± 0.21`, or for one run its value alone."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:,.{digits}f}{deviation}"


@dataclass(frozen=True)
class Row:
    """Whole runs of one recipe with several seeds, or a single run.

    Attributes:
        label: the recipe's name, with the settings in which it differs from other rows of that name.
    """

    label: str
    runs: tuple[FinishedRun, ...]

    @property
    def first(self) -> FinishedRun:
        """First run, which stands for all in what they share."""
        return self.runs[0]

    @property
    def published(self) -> PublishedRun | None:
        """Published run of the recipe, whose schedule may differ."""
        return published_runs().get(self.first.results["recipe"])

    @property
    def published_top1(self) -> float | None:
        """Top-1 of the paper, or the one that a recipe from elsewhere names."""
        return self.first.results["published_top1"] if self.published is None else self.published.top1

    @property
    def difference(self) -> float | None:
        """Best top-1 minus the published one; None if the runs depart from the published run."""
        top1 = self.value("best", "top1")
        return None if top1 is None or self.published_top1 is None or self.note else top1.mean - self.published_top1

    @functools.cached_property
    def note(self) -> str:
        """Reasons not to compare the row with the published value or with whole runs; empty if there are none."""
        run = self.first
        notes = [] if run.is_whole and not run.diverged else [_state(run)]
        if run.results["dataset"] is None:
            notes.append("data set not recorded")
        if self.published is not None:
            notes += departures(run.recipe, run.results, self.published)
        elif self.published_top1 is not None:
            notes.append("published schedule not known")
        return "; ".join(notes)

    def value(self, when: str, name: str) -> Spread | None:
        """Return a measure of the `best` or the `last` epoch; None if a run lacks it."""
        return spread([run.results[when].get(name) for run in self.runs])

    @property
    def teacher_top1(self) -> Spread | None:
        """Top-1 of the teacher on the same images, from the student's last epoch."""
        return spread([run.results["epochs"][-1].get("eval_teacher_top1") for run in self.runs])

    @property
    def images_per_second(self) -> Spread | None:
        """Training images per second, without the evaluations."""
        return spread([run.results.get("images_per_second") for run in self.runs])


def spread(values: Sequence[float | None]) -> Spread | None:
    """Return mean and standard deviation; None if a value is missing."""
    if None in values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def compared(runs: Sequence[FinishedRun]) -> list[Row]:
    """Return a row for each recipe, in the order of the runs.

    A run that did not end, or that was started from code, has a row of its own.

    Raises:
        ValueError: if the runs were evaluated on different images.
    """
    check_same_images(runs)
    groups: dict[Any, list[FinishedRun]] = {}
    for run in runs:
        alone = not run.is_whole or run.diverged or not run.recipe
        groups.setdefault(run.folder if alone else _identity(run), []).append(run)
    return [Row(label, tuple(group)) for label, group in zip(_labels(groups.values()), groups.values(), strict=True)]


def check_same_images(runs: Sequence[FinishedRun]) -> None:
    """Check that all runs with a recorded data set were evaluated on the same images.

    Raises:
        ValueError: if they were not, naming the runs.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        if run.results["dataset"] is not None:
            groups.setdefault(evaluated_on(run), []).append(run)
    if len(groups) > 1:
        lines = [
            f"{images}: {', '.join(str(run.folder) for run in group[:4])}"
            + (f" and {len(group) - 4} more" if len(group) > 4 else "")
            for images, group in groups.items()
        ]
        raise HfkdError(
            "These runs were evaluated on different images, so that their accuracies cannot be compared:\n  "
            + "\n  ".join(lines)
            + "\nName those of one data set."
        )


def evaluated_on(run: FinishedRun) -> str:
    """Return the evaluation images of a run in words: `cifar100, split test, 100 classes`."""
    dataset = run.results["dataset"]
    return f"{dataset['name']}, split {dataset['eval_split']}, {dataset['classes']} classes"


def _identity(run: FinishedRun) -> str:
    settings = {key: value for key, value in settings_of(run.recipe).items() if key not in OF_ONE_RUN}
    return json.dumps([run.name, run.results["role"], processes(run.results), settings], sort_keys=True)


def _labels(groups: Sequence[list[FinishedRun]]) -> list[str]:
    """Return a name for each group: the recipe's, then the settings in which it differs from others of that name."""
    firsts = [group[0] for group in groups]
    labels = []
    for run in firsts:
        name = _name(run)
        namesakes = [
            _settings(other, settings_of(other.recipe)) for other in firsts if _name(other) == name and other.recipe
        ]
        own = _settings(run, run.recipe)  # a default that is written out is shown
        keys = [key for key in sorted(set().union(*namesakes)) if len({str(each.get(key)) for each in namesakes}) > 1]
        words = [f"{key} {_written(own.get(key))}" for key in keys] if run.recipe else []
        words += [] if run.is_whole and not run.diverged else [_state(run)]
        labels.append(f"{name} ({', '.join(words)})" if words else name)
    seen = Counter(labels)
    return [
        label if seen[label] == 1 else f"{label} in {run.folder}" for label, run in zip(labels, firsts, strict=True)
    ]


def _name(run: FinishedRun) -> str:
    """Return the name of the recipe, or of the folder: runs without a recipe all have that of the defaults."""
    return run.folder.name if run.name.startswith(DEFAULTS) else run.name


def _state(run: FinishedRun) -> str:
    state = "under way, measured" if is_claimed(run.folder) else "stopped"
    return run.diverged or f"{state} at step {run.steps} of {run.results['planned_steps']}"


def _settings(run: FinishedRun, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with a key for each parameter of a loss, and the number of processes."""
    settings = {key: value for key, value in recipe.items() if key not in OF_ONE_RUN}
    losses = settings.pop("losses", None) or {}
    for method, parameters in losses.items():
        settings[f"losses.{method}"] = True
        settings |= {f"losses.{method}.{name}": value for name, value in (parameters or {}).items()}
    return settings | {"processes": processes(run.results)}


def _written(value: Any) -> str:
    if value is None:
        return "default"
    return (
        " ".join(map(_written, value)) if isinstance(value, list) else f"{value:g}" if _is_number(value) else str(value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
