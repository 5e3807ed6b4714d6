"""Spread of an image's logits before and after the Z-score: a student can hardly match its teacher's logits.

After Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024.
"""

from __future__ import annotations

import numpy as np
import torch

from ..losses.standardize import standardize
from ..plots import ROLE_STYLES, new_sheet, tidy
from .observations import Observations
from .tables import Table

BINS = 100
QUANTITIES = {"range": "largest minus smallest", "std": "standard deviation"}
STAGES = {"": "logits", "_standardized": "Z-scores"}


def spread(logits: np.ndarray) -> dict[str, np.ndarray]:
    """Return `range` (N,), the largest minus the smallest logit, and `std` (N,), unbiased, of logits (N, C)."""
    return {"range": np.ptp(logits, axis=1), "std": logits.std(axis=1, ddof=1)}


def measure(observed: Observations) -> Table:
    """Measure the spread of the logits of each image.

    Returns:
        Columns `image` (its row in the split), `label`, `class`, and `<role>_range`, `<role>_std` of the logits;
        the same two ending in `_standardized` are of the Z-scores.
    """
    names = np.array(observed.class_names)
    table = {"image": observed.rows, "label": observed.labels, "class": names[observed.labels]}
    for role, network in observed.networks.items():
        scores = standardize(torch.from_numpy(network.logits)).numpy()
        for stage, values in zip(STAGES, (network.logits, scores), strict=True):
            table |= {f"{role}_{name}{stage}": column for name, column in spread(values).items()}
    return table


def draw(table: Table):
    """Draw histograms over the images: logits above, Z-scores below, on the same scale."""
    figure = new_sheet(9, 6)
    panels = figure.subplots(2, 2, sharex="col")
    roles = [role for role in ROLE_STYLES if f"{role}_std" in table]
    for column, (quantity, description) in enumerate(QUANTITIES.items()):
        names = {stage: [f"{role}_{quantity}{stage}" for role in roles] for stage in STAGES}
        largest = max(table[name].max() for stage in STAGES for name in names[stage])
        edges = np.linspace(0, largest * 1.02, BINS + 1)
        for row, (stage, subject) in enumerate(STAGES.items()):
            axes = panels[row, column]
            for role, name in zip(roles, names[stage], strict=True):
                share = 100 * np.histogram(table[name], edges)[0] / len(table[name])
                label = f"{role}, mean {table[name].mean():.2f}"
                axes.stairs(share, edges, label=label, linewidth=1.5, **ROLE_STYLES[role])
            axes.set_title(f"{subject}: {description}")
            axes.legend(frameon=False)
            tidy(axes)
        panels[1, column].set_xlabel(f"{description}, over the classes of an image")
    for axes in panels[:, 0]:
        axes.set_ylabel("images (%)")
    return figure
