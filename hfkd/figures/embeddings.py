"""t-SNE of the networks' embeddings of a few classes.

After Figure 4 of Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, which shows all classes.
"""

from __future__ import annotations

import numpy as np

from ..plots import CLASS_COLOURS, new_sheet
from .observations import Observations
from .tables import LeftOutError, Table, panel_title

MARKERS = "osD^vP*X<>"
SEED = 0


def project(embeddings: np.ndarray, perplexity: float) -> np.ndarray:
    """Project embeddings (N, D) to (N, 2) by t-SNE; the result is the same every time.

    t-SNE starts from the first two principal components.

    Raises:
        LeftOutError: unless there are more images than the perplexity, which is about the neighbours of an image.
    """
    from sklearn.manifold import TSNE

    if len(embeddings) <= perplexity:
        raise LeftOutError(
            f"t-SNE with a perplexity of {perplexity:g} needs more images than that, and there are {len(embeddings)}: "
            "give more classes or images, or a smaller --tsne_perplexity"
        )
    # float32 would lose the principal components of almost equal embeddings.
    return TSNE(init="pca", perplexity=perplexity, random_state=SEED).fit_transform(embeddings.astype(np.float64))


def choose(labels: np.ndarray, classes: int, images: int) -> np.ndarray:
    """Return the rows to show, given the labels (N,): at most `images` rows of the first classes, drawn at random."""
    rows = np.flatnonzero(labels < classes)
    if len(rows) <= images:
        return rows
    return np.sort(np.random.default_rng(SEED).choice(rows, images, replace=False))


def measure(observed: Observations, classes: int = 10, images: int = 2000, perplexity: float = 30.0) -> Table:
    """Measure the positions of the images.

    Returns:
        Columns `image` (its row in the split), `label`, `class`, and `<role>_x`, `<role>_y` for each network with
        embeddings.

    Raises:
        LeftOutError: see `project`.
    """
    chosen = choose(observed.labels, classes, images)
    labels = observed.labels[chosen]
    table = {"image": observed.rows[chosen], "label": labels, "class": np.array(observed.class_names)[labels]}
    for role, network in observed.networks.items():
        if network.embeddings is not None:
            points = project(network.embeddings[chosen], perplexity)
            table |= {f"{role}_x": points[:, 0], f"{role}_y": points[:, 1]}
    return table


def draw(table: Table):
    """Draw a panel for each network; each class has a colour and a marker, hollow after all colours are used."""
    roles = [name.removesuffix("_x") for name in table if name.endswith("_x")]
    figure = new_sheet(1 + 5.5 * len(roles), 6.5)
    panels = figure.subplots(1, len(roles), squeeze=False)[0]
    classes = dict(sorted(zip(table["label"].tolist(), table["class"].tolist(), strict=True)))
    for axes, role in zip(panels, roles, strict=True):
        for index, label in enumerate(classes):
            colour, hollow = CLASS_COLOURS[index % len(CLASS_COLOURS)], index // len(CLASS_COLOURS) % 2
            style = {"facecolors": "none" if hollow else colour, "edgecolors": colour, "linewidths": 0.8 * hollow}
            rows = table["label"] == label
            marker = MARKERS[index % len(MARKERS)]
            axes.scatter(table[f"{role}_x"][rows], table[f"{role}_y"][rows], s=18, marker=marker, **style)
        axes.set_title(panel_title(role, roles, f"t-SNE of {len(table['image']):,} embeddings"))
        axes.set(xticks=[], yticks=[], aspect="equal")  # t-SNE has no units
    columns = min(5, len(classes))
    figure.legend(
        panels[0].collections,
        classes.values(),
        loc="outside lower center",
        ncols=columns,
        markerscale=1.8,
        frameon=False,
    )
    return figure
