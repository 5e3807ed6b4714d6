"""Outputs of student and teacher on the images of an evaluation set."""

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
    """Outputs of one network on N images.

    Attributes:
        logits: (N, C) float32.
        embeddings: (N, D) float32, the classifier's input; None for an ensemble, or if they were not requested.
    """

    logits: np.ndarray
    embeddings: np.ndarray | None


@dataclass(frozen=True)
class Observations:
    """Outputs of all networks on N images with C classes.

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
    """Run every network over the batches, without the images that do not count.

    Args:
        networks: networks by role, prepared and aligned with the data set's classes.
        chosen: rows of the split to run on.

    Raises:
        ValueError: for a network with more or fewer classes than the data set, or if there is no image.
    """
    labels, rows, outputs = [], [], {role: [] for role in networks}
    chosen_rows = torch.from_numpy(chosen).to(device)
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        counts = (batch["labels"] != ImageSource.IGNORED) & torch.isin(batch["index"], chosen_rows)
        if not counts.any():
            continue
        batch = {key: value[counts] for key, value in batch.items()}
        labels.append(batch["labels"].cpu())
        rows.append(batch["index"].cpu())
        for role, network in networks.items():
            output = network(batch)
            if output.logits.shape[1] != len(class_names):
                raise HfkdError(f"The {role} has {output.logits.shape[1]} classes and the data set {len(class_names)}.")
            kept = [output.logits, output.features.get(EMBEDDING)]
            outputs[role].append([None if values is None else values.float().cpu() for values in kept])
    if not labels:
        raise HfkdError("There is no image to run the networks on: the evaluation set is empty.")
    return Observations(
        class_names,
        torch.cat(labels).numpy(),
        torch.cat(rows).numpy(),
        {role: NetworkOutputs(*map(_concatenated, zip(*pairs, strict=True))) for role, pairs in outputs.items()},
    )


def _concatenated(batches: tuple[Tensor | None, ...]) -> np.ndarray | None:
    return None if batches[0] is None else torch.cat(batches).numpy()
