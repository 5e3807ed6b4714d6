"""Embeddings of a network: recorded in its forward passes, or collected over a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..losses.standardize import at_least_float32
from .features import as_embedding, find_classifier
from .teacher import Teacher


@contextlib.contextmanager
def recording_embeddings(model: nn.Module) -> Iterator[list[Tensor]]:
    """Give a list to which every forward pass of a model adds its embedding (B, D), in float32 or wider.

    Taps of the model stay as they are. Who reads the list empties it.
    """
    found: list[Tensor] = []

    def record(classifier: nn.Module, arguments: tuple) -> None:
        found.append(at_least_float32(as_embedding(classifier, arguments)))

    hook = find_classifier(model).register_forward_pre_hook(record)
    try:
        yield found
    finally:
        hook.remove()


def collect_embeddings(
    networks: Sequence[Teacher], batches: Iterable[dict[str, Tensor]], uncounted: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Return the embeddings (N, D) of each network for all images that count, and the labels (N,), on the CPU.

    Args:
        networks: prepared to record EMBEDDING.
        uncounted: label of rows that do not count.

    Raises:
        RunError: for an embedding that is not finite.
    """
    embeddings: list[list[Tensor]] = [[] for _ in networks]
    labels = []
    for batch in batches:
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        counts = batch["labels"] != uncounted
        batch = {key: value[counts] for key, value in batch.items()}
        labels.append(batch["labels"].cpu())
        for network, parts in zip(networks, embeddings, strict=True):
            parts.append(network(batch).embedding.cpu())
    whole = [torch.cat(parts) for parts in embeddings]
    for network, values in zip(networks, whole, strict=True):
        if not values.isfinite().all():
            raise RunError(f"{network.name} gives features that are not finite. Its training may have diverged.")
    return whole, torch.cat(labels)
