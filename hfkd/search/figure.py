"""Figure of a search: top-1 over each searched parameter, and the best top-1 so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plots import BLACK, BLUE, GREEN, VERMILION, mark_decades, new_sheet, tidy
from ..runs.writing import writing
from .results import SearchedTrial, best_of, recipe_of
from .space import Parameter, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2


def save_search(trials: Sequence[SearchedTrial], space: Sequence[Parameter], path: Path) -> None:
    """Write `search_figure` as a PNG."""
    figure = search_figure(trials, space)
    with writing(path) as file:
        figure.savefig(file)


def search_figure(trials: Sequence[SearchedTrial], space: Sequence[Parameter]) -> Figure:
    """Draw a panel for each parameter, and one for the best top-1 up to each trial.

    Trials that were stopped early, and so measured after fewer epochs, are crosses.
    """
    from matplotlib.ticker import MaxNLocator

    rows = -(-(len(space) + 1) // COLUMNS)
    figure = new_sheet(9, 3.0 * rows + 0.5)
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharey=True).flat
    for axes, parameter in zip(panels, space, strict=False):
        _draw_parameter(axes, trials, parameter)
    progress = panels[len(space)]
    _draw_progress(progress, trials)
    progress.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for axes in panels[: len(space) + 1]:
        tidy(axes)
        axes.set_ylabel("top-1 (%)")
        axes.yaxis.set_tick_params(labelleft=True)
    for axes in panels[len(space) + 1 :]:
        axes.remove()
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    handles |= dict(zip(*reversed(progress.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _draw_parameter(axes: Axes, trials: Sequence[SearchedTrial], parameter: Parameter) -> None:
    places = parameter.choices and {choice: index for index, choice in enumerate(parameter.choices)}
    _scatter(axes, trials, [trial.values[parameter.key] for trial in trials], places)
    axes.set_xlabel(parameter.key)
    if places:
        axes.set_xticks(list(places.values()), [short(choice) for choice in places])
        axes.set_xlim(-0.5, len(places) - 0.5)
    elif parameter.log:
        axes.set_xscale("log")
        mark_decades(axes.xaxis)


def _draw_progress(axes: Axes, trials: Sequence[SearchedTrial]) -> None:
    numbers = [trial.number for trial in trials]  # as in the tables: those of failed trials are left out
    _scatter(axes, trials, numbers)
    best, reached = [], float("-inf")
    for trial in trials:
        reached = reached if trial.pruned else max(reached, trial.top1)
        best.append(reached)
    axes.step(numbers, best, where="post", color=BLACK, linewidth=1.2, zorder=1, label="best so far")
    axes.set_xlabel("trial")


def _scatter(axes: Axes, trials: Sequence[SearchedTrial], xs: Sequence, places: dict | None = None) -> None:
    """Draw every trial by its kind; the best trial is drawn as the best even if it has the recipe's own values."""
    recipe, best = recipe_of(trials), best_of(trials)
    kinds = {
        "trial": {"color": BLUE, "marker": "o", "s": 22},
        "stopped early": {"color": VERMILION, "marker": "x", "s": 26},
        "the recipe's own values": {"color": GREEN, "marker": "s", "s": 60},
        "the best": {"color": BLACK, "marker": "*", "s": 120},
    }
    points: dict[str, list[tuple]] = {kind: [] for kind in kinds}
    for trial, x in zip(trials, xs, strict=True):
        kind = "the best" if trial is best else "the recipe's own values" if trial is recipe else None
        kind = kind or ("stopped early" if trial.pruned else "trial")
        points[kind].append((places[x] if places else x, trial.top1))
    for kind, found in points.items():
        if found:
            axes.scatter(*zip(*found, strict=True), **kinds[kind], label=kind, zorder=3)
