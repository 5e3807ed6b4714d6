"""Reliability diagram: accuracy of a network by its confidence.

Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017.
"""

from __future__ import annotations

import numpy as np
import torch

from ..plots import BLUE, VERMILION, new_sheet, tidy
from .observations import Observations
from .tables import Table, panel_title, rows_where, stacked

BINS = 15


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Table:
    """Measure accuracy by confidence, the largest probability, in bins of equal width.

    Args:
        logits: (N, C).
        labels: (N,).

    Returns:
        Columns `from` and `to` (the upper end belongs to a bin), `images`, `accuracy` and `confidence`, both the mean
        over a bin and NaN in an empty one. All but `images` are in percent.
    """
    probabilities = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    images = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        accuracy = 100 * np.bincount(bin_of, right, minlength=bins) / images
        mean_confidence = 100 * np.bincount(bin_of, confidence, minlength=bins) / images
    return {
        "from": 100 * edges[:-1],
        "to": 100 * edges[1:],
        "images": images,
        "accuracy": accuracy,
        "confidence": mean_confidence,
    }


def calibration_error(table: Table) -> float:
    """Return the expected calibration error in percent: |accuracy - confidence|, averaged over the images."""
    gaps = np.abs(table["accuracy"] - table["confidence"])
    return float(np.nansum(gaps * table["images"]) / table["images"].sum())


def measure(observed: Observations) -> Table:
    """Measure the `reliability` of each network; the column `network` names it."""
    tables = []
    for role, network in observed.networks.items():
        table = reliability(network.logits, observed.labels)
        tables.append({"network": np.full(BINS, role)} | table)
    return stacked(tables)


def draw(table: Table):
    """Draw accuracy and mean confidence of each bin as a bar and a dot, and below them the share of the images.

    For a calibrated network the dot lies on top of the bar.
    """
    roles = list(dict.fromkeys(table["network"].tolist()))
    figure = new_sheet(1 + 4.5 * len(roles), 6)
    panels = figure.subplots(2, len(roles), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, role in enumerate(roles):
        rows = rows_where(table, "network", role)
        above, below = panels[:, column]
        box = {"x": rows["from"], "width": rows["to"] - rows["from"], "align": "edge", "edgecolor": "white"}
        above.bar(height=np.nan_to_num(rows["accuracy"]), color=BLUE, label="accuracy", **box)
        above.plot([0, 100], [0, 100], color="black", linestyle="--", linewidth=1, label="calibrated")
        middles = (rows["from"] + rows["to"]) / 2
        above.plot(middles, rows["confidence"], "o", color=VERMILION, markersize=5, label="mean confidence")
        title = f"expected calibration error {calibration_error(rows):.2f} %"
        above.set_title(panel_title(role, roles, title))
        below.bar(height=100 * rows["images"] / rows["images"].sum(), color="grey", **box)
        below.set_xlabel("confidence (%)")
        tidy(above)
        tidy(below)
    panels[0, 0].set_ylabel("accuracy (%)")
    panels[1, 0].set_ylabel("images (%)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    panels[0, 0].set(xlim=(0, 100), ylim=(0, 100))
    return figure
