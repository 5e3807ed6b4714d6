"""What student and teacher say of the images of an evaluation set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import ImageSource
from ..errors import HfkdError
from ..networks.features import EMBEDDING
from ..networks.teacher import Teacher, TeacherEnsemble


@dataclass(frozen=True)
class NetworkOutputs:
    """Of N images.

    Attributes:
        logits: (N, C) float32.
        embeddings: (N, D) float32, what the classifier reads; None of an ensemble, and where nobody asked for them.
    """

    logits: np.ndarray
    embeddings: np.ndarray | None


@dataclass(frozen=True)
class Observations:
    """Of N images and C classes.

    Attributes:
        class_names: the C names.
        labels: (N,), in 0 ... C - 1.
        rows: (N,), the images' rows in the split.
        networks: by role, "student" or "teacher".
    """

    class_names: list[str]
    labels: np.ndarray
    rows: np.ndarray
    networks: dict[str, NetworkOutputs]


def observe(
    networks: Mapping[str, Teacher | TeacherEnsemble],
    batches: Iterable[dict[str, Tensor]],
    class_names: list[str],
    device: torch.device,
    chosen: np.ndarray,
) -> Observations:
    """One pass over the batches, with every network; what does not count is left out.

    Args:
        networks: by role; prepared, and aligned with the data set's classes.
        chosen: the rows of the split to look at.

    Raises:
        ValueError: for a network with more or fewer classes than the data set, or if there is no image.
    """
    labels, rows, outputs = [], [], {role: [] for role in networks}
    looked_at = torch.from_numpy(chosen).to(device)
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        counts = (batch["labels"] != ImageSource.IGNORED) & torch.isin(batch["index"], looked_at)
        if not counts.any():
            continue
        batch = {key: value[counts] for key, value in batch.items()}
        labels.append(batch["labels"].cpu())
        rows.append(batch["index"].cpu())
        for role, network in networks.items():
            said = network(batch)
            if said.logits.shape[1] != len(class_names):
                raise HfkdError(f"The {role} has {said.logits.shape[1]} classes and the data set {len(class_names)}.")
            kept = [said.logits, said.features.get(EMBEDDING)]
            outputs[role].append([None if values is None else values.float().cpu() for values in kept])
    if not labels:
        raise HfkdError("There is no image to look at: the evaluation set is empty.")
    return Observations(
        class_names,
        torch.cat(labels).numpy(),
        torch.cat(rows).numpy(),
        {role: NetworkOutputs(*map(_joined, zip(*pairs, strict=True))) for role, pairs in outputs.items()},
    )


def _joined(batches: tuple[Tensor | None, ...]) -> np.ndarray | None:
    return None if batches[0] is None else torch.cat(batches).numpy()
