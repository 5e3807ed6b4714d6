"""Class matrices: differences between student and teacher in their logits for pairs of classes.

After Figures 3 and 5 of Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024. Their code calls the
matrix of `class_means` (of logits, or of Z-scores) a correlation matrix; the third matrix here is the correlation.
"""

from __future__ import annotations

import numpy as np
import torch

from ..losses.standardize import standardize
from ..plots import new_sheet
from ..runs.folder import ROLES
from .observations import Observations
from .tables import LeftOutError, Table, rows_where

LOGITS, SCORES, CORRELATION = "mean logits", "mean Z-scores", "correlations"
NAMED_CLASSES = 20  # the axes name the classes up to this number


def class_means(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean logits of each class (C, C): row i is the mean over the images of class i, NaN without any.

    Args:
        logits: (N, C), or their Z-scores.
        labels: (N,), in 0 ... C - 1.
    """
    classes = logits.shape[1]
    sums = np.zeros((classes, classes))
    np.add.at(sums, labels, logits)
    counts = np.bincount(labels, minlength=classes)[:, None]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def class_correlations(logits: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation (C, C) between the logits (N, C) of two classes over the images.

    A class with a constant logit has NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.corrcoef(logits, rowvar=False)


def absolute_difference(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Return the absolute difference of two matrices (C, C), with a diagonal of 0.

    As in the published code, only pairs of different classes count.
    """
    difference = np.abs(student - teacher)
    np.fill_diagonal(difference, 0)
    return difference


def measure(observed: Observations) -> Table:
    """Measure the absolute differences of the three matrices.

    Returns:
        Columns `matrix`, `class` and one for each class, with index and name; the matrices are stacked.

    Raises:
        LeftOutError: without a teacher.
    """
    if not set(ROLES) <= observed.networks.keys():
        raise LeftOutError("there is no teacher to compare the student's matrices with")
    pair = [observed.networks[role].logits for role in ROLES]
    labels = observed.labels
    differences = {
        LOGITS: [class_means(logits, labels) for logits in pair],
        SCORES: [class_means(standardize(torch.from_numpy(logits)).numpy(), labels) for logits in pair],
        CORRELATION: [class_correlations(logits) for logits in pair],
    }
    rows = np.concatenate([absolute_difference(*matrices) for matrices in differences.values()])
    # Names may occur twice: ImageNet has two classes called crane.
    names = [f"{index} {name}" for index, name in enumerate(observed.class_names)]
    table = {"matrix": np.repeat(list(differences), len(names)), "class": np.array(names * len(differences))}
    return table | {name: rows[:, index] for index, name in enumerate(names)}


def matrices_of(table: Table) -> dict[str, np.ndarray]:
    """Return the differences (C, C) of a table by the name of their matrix."""
    matrices = {}
    for name in dict.fromkeys(table["matrix"].tolist()):
        columns = list(rows_where(table, "matrix", name).values())[2:]
        matrices[name] = np.stack(columns, axis=1)
    return matrices


def draw(table: Table):
    """Draw a heat map of each matrix; darker is a larger difference, grey is unknown."""
    import matplotlib

    figure = new_sheet(14, 5)
    colours = matplotlib.colormaps["Reds"].with_extremes(bad="lightgrey")
    names = list(table)[2:]
    for axes, (matrix, values) in zip(figure.subplots(1, 3), matrices_of(table).items(), strict=True):
        image = axes.imshow(values, cmap=colours, vmin=0, interpolation="nearest")
        figure.colorbar(image, ax=axes, shrink=0.75, label="|student - teacher|")
        # Short and small, because it would run into the colour bar's numbers beside a matrix with long class names.
        axes.set_title(f"{matrix}\nmean {np.nanmean(values):.3f}, max {np.nanmax(values):.3f}", fontsize="medium")
        pairs = matrix == CORRELATION
        axes.set_xlabel("class" if pairs else "logit of class" if matrix == LOGITS else "Z-score of class")
        axes.set_ylabel("class" if pairs else "images of class")
        if len(names) <= NAMED_CLASSES:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
    return figure
