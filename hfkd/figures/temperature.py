"""Temperature of CTKD over training, with the published one."""

from __future__ import annotations

import json
import math

import numpy as np
from transformers.trainer import TRAINER_STATE_NAME

from ..plots import BLUE, GREEN, marker, new_sheet, tidy
from ..runs.finished import FinishedRun
from ..runs.published import published_runs
from .tables import LeftOutError, Table, rows_where

METRIC = "ctkd_temperature"


def measure(run: FinishedRun | None) -> Table:
    """Read the logged temperatures of a run, and the published ones of as many epochs.

    Measured are all logged values (trainer_state.json), or else those of the evaluations (results.json). Published is
    one value after each epoch.

    Returns:
        Columns `curve` ("measured" or "published"), `epoch`, `temperature`.

    Raises:
        LeftOutError: for a run without CTKD, or without a logged temperature.
    """
    if run is None or "ctkd" not in run.results["losses"]:
        raise LeftOutError("only CTKD learns a temperature, and this model was trained without it")
    state = run.folder / TRAINER_STATE_NAME
    entries = json.loads(state.read_text())["log_history"] if state.is_file() else run.results["epochs"]
    measured = [(entry["epoch"], entry[METRIC]) for entry in entries if METRIC in entry]
    if not measured:
        raise LeftOutError(f"{run.folder} holds no {METRIC}: log it (logging_strategy)")
    published = published_runs()[run.name].temperature if run.name in published_runs() else ()
    shown = list(enumerate(published[: math.ceil(measured[-1][0])], start=1))
    epochs, temperatures = zip(*measured, *shown, strict=True)
    return {
        "curve": np.array(["measured"] * len(measured) + ["published"] * len(shown)),
        "epoch": np.array(epochs, dtype=float),
        "temperature": np.array(temperatures, dtype=float),
    }


def draw(table: Table):
    """Draw both curves over the epochs, the published one dotted."""
    figure = new_sheet(8, 4)
    axes = figure.subplots()
    for curve, style in (("measured", {"color": BLUE}), ("published", {"color": GREEN, "linestyle": ":"})):
        rows = rows_where(table, "curve", curve)
        points = len(rows["epoch"])
        if points:
            look = style | {"marker": marker(points), "markersize": 4, "clip_on": False}  # whole markers at the edge
            axes.plot(rows["epoch"], rows["temperature"], label=curve, **look)
    axes.set_xlabel("epoch")
    axes.set_ylabel("temperature of CTKD")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    tidy(axes)
    return figure
