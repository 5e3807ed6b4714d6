"""Row format of a teacher cache: all logits, or the largest ones and an equivalent of the others; the embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from ..losses.standardize import standardize

LOGITS, VALUES, INDICES, STATISTICS = "teacher_logits", "teacher_values", "teacher_classes", "teacher_statistics"
EMBEDDINGS = "teacher_embedding"


@dataclass(frozen=True)
class RowFormat:
    """Row of an image in an epoch, of fixed size; its fields are keys of batches.

    Without `top_k`, the row holds LOGITS (V, C) float16. With `top_k`, it holds:

    - VALUES (V, k) float16, the largest logits as Z-scores. Rounding then costs 1/2048 of the distance to the mean, at
      any value of the mean.
    - INDICES (V, k), their classes.
    - STATISTICS (V, 2 + 2 * temperatures) float32: mean and standard deviation of all logits; then, for each
      temperature T, the equivalent logit of the other classes, among logits and among Z-scores. If each of the C - k
      others had this logit, together they would have their true probability at T. It is T * (logsumexp(others / T) -
      log(C - k)).

    With `width`, it also holds EMBEDDINGS (D,) float16, of the first view: no loss reads those of the second.

    Attributes:
        classes: C; 0 for no logits, of a teacher without a classifier or with other classes.
        views: V.
        top_k: k; None for all classes.
        temperatures: temperatures at which rows can be read, with `top_k`; empty without.
        width: D; None where no embedding is stored.
    """

    classes: int
    views: int
    top_k: int | None = None
    temperatures: tuple[float, ...] = ()
    width: int | None = None

    @property
    def dtype(self) -> np.dtype:
        """Packed dtype of a row."""
        embedding = [] if self.width is None else [(EMBEDDINGS, "<f2", (self.width,))]
        if self.top_k is None:
            logits = [(LOGITS, "<f2", (self.views, self.classes))] if self.classes else []
            return np.dtype([*logits, *embedding])
        index = "<i2" if self.classes <= np.iinfo(np.int16).max + 1 else "<i4"
        return np.dtype(
            [
                (VALUES, "<f2", (self.views, self.top_k)),
                (INDICES, index, (self.views, self.top_k)),
                (STATISTICS, "<f4", (self.views, 2 + 2 * len(self.temperatures))),
                *embedding,
            ]
        )

    # ---- From logits to rows ---------------------------------------------------------------------------------------

    def encode(self, views: Sequence[Tensor], embedding: Tensor | None = None) -> np.ndarray:
        """Return the rows (B,) of the logits (B, C) of each view, and of the embedding (B, D) where it is stored.

        Raises:
            RunError: if numbers are not finite, or too large for float16.
        """
        logits = torch.stack([view.float() for view in views], dim=1)  # (B, V, C)
        fields = {LOGITS: logits.half()} if self.top_k is None else self._top_k_fields(logits.flatten(0, 1))
        fields = fields if self.classes else {}
        if self.width is not None and embedding is not None:
            fields[EMBEDDINGS] = embedding.half()
        rows = np.empty(len(logits), self.dtype)
        for name, values in fields.items():
            rows[name] = values.cpu().numpy().reshape(rows[name].shape)
        if self.classes and not np.isfinite(rows[LOGITS if self.top_k is None else STATISTICS]).all():
            raise RunError(
                f"The teacher's logits reach from {logits.min().item():g} to {logits.max().item():g}, and the cache "
                "needs finite numbers, up to 65,504 without top_k. Check the teacher's weights and the precision of "
                "the run, or set top_k, which stores Z-scores."
            )
        if self.width is not None and not np.isfinite(rows[EMBEDDINGS]).all():
            raise RunError(
                "The teacher's features are not finite, or beyond 65,504, the largest number of float16, in which the "
                "cache holds them. Check the teacher's weights and the precision of the run."
            )
        return rows

    def _top_k_fields(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the fields for logits (N, C) of all views."""
        std, mean = torch.std_mean(logits, dim=1)
        indices = logits.topk(self.top_k).indices
        scores = standardize(logits)
        # The equivalent logit of the others is stored, and not the log-sum-exp of all classes. Where the top k hold
        # nearly all probability, the others' share would be a difference of two rounded numbers that nearly agree.
        statistics = [mean, std]
        for temperature in self.temperatures:
            statistics += [_equivalent_logit(values, indices, temperature) for values in (logits, scores)]
        return {VALUES: scores.gather(1, indices), INDICES: indices, STATISTICS: torch.stack(statistics, dim=1)}

    # ---- From rows to logits ---------------------------------------------------------------------------------------

    def tensors(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return rows (B,) as batch entries, one for each field."""
        return {name: torch.from_numpy(rows[name].copy()) for name in rows.dtype.names}

    def decode(self, batch: Mapping[str, Tensor], view: int, temperature: float | None, standardized: bool) -> Tensor:
        """Return the logits (B, C), float32, of one view.

        Args:
            temperature: with `top_k`, the temperature at which the logits will be read.
            standardized: with `top_k`, return Z-scores.

        Returns:
            (B, 0) where no logits are stored.
        """
        if not self.classes:
            return batch[EMBEDDINGS].new_zeros(len(batch[EMBEDDINGS]), 0, dtype=torch.float32)
        if self.top_k is None:
            return batch[LOGITS][:, view].float()
        values, indices, statistics = (batch[key][:, view] for key in (VALUES, INDICES, STATISTICS))
        values = values.float()
        column = 2 + 2 * self.temperatures.index(temperature) + standardized
        if not standardized:
            mean, std = statistics[:, 0:1], statistics[:, 1:2]
            values = values * std + mean
        # Every class gets the equivalent logit of the others; then the top k get their own.
        others = statistics[:, column : column + 1]
        return others.repeat(1, self.classes).scatter_(1, indices.long(), values)

    def facts(self) -> dict[str, Any]:
        """Return the format as `cache.json` holds it."""
        return {
            "classes": self.classes,
            "views": self.views,
            "top_k": self.top_k,
            "temperatures": list(self.temperatures),
            **({} if self.width is None else {"width": self.width}),  # earlier caches have no such entry
        }


def _equivalent_logit(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Return the equivalent logit (N,) of the classes that are not in `indices` (N, k).

    If all of them had this logit, together they would keep their probability at the temperature.
    """
    others = logits.shape[1] - indices.shape[1]
    if others == 0:
        return logits.new_zeros(len(logits))  # never read: there is no other class
    rest = logits.scatter(1, indices, -torch.inf) / temperature
    return temperature * (rest.logsumexp(1) - math.log(others))
