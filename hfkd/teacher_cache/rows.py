"""What a row of a teacher cache holds: all logits, or the largest ones and what the others come to."""

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


@dataclass(frozen=True)
class RowFormat:
    """The row of an image in an epoch, of fixed size; the fields are the keys of batches.

    Without `top_k`: LOGITS (V, C) float16. With it:

    - VALUES (V, k) float16, the largest logits as Z-scores: rounding then costs 1/2048 of the distance to the mean,
      wherever the mean lies;
    - INDICES (V, k), their classes;
    - STATISTICS (V, 2 + 2 * temperatures) float32: mean and standard deviation of all logits; then for each
      temperature T the logit of an equivalent class, and the same among Z-scores. If each of the C - k others had it,
      they would have the probability at T that they have together. It is T * (logsumexp(others / T) - log(C - k)).
      That, and not the log-sum-exp of all classes: where the top k hold nearly all probability, the others' would be
      the difference of two rounded numbers that nearly agree.

    Attributes:
        classes: C.
        views: V.
        top_k: k; None: all classes.
        temperatures: where `top_k` is set; else none.
    """

    classes: int
    views: int
    top_k: int | None = None
    temperatures: tuple[float, ...] = ()

    @property
    def dtype(self) -> np.dtype:
        """Of a row, packed."""
        if self.top_k is None:
            return np.dtype([(LOGITS, "<f2", (self.views, self.classes))])
        index = "<i2" if self.classes <= np.iinfo(np.int16).max + 1 else "<i4"
        return np.dtype(
            [
                (VALUES, "<f2", (self.views, self.top_k)),
                (INDICES, index, (self.views, self.top_k)),
                (STATISTICS, "<f4", (self.views, 2 + 2 * len(self.temperatures))),
            ]
        )

    # ---- From logits to rows ---------------------------------------------------------------------------------------

    def encode(self, views: Sequence[Tensor]) -> np.ndarray:
        """Rows (B,) of the logits (B, C) of each view.

        Raises:
            RuntimeError: if logits are not finite, or too large for float16.
        """
        logits = torch.stack([view.float() for view in views], dim=1)  # (B, V, C)
        fields = {LOGITS: logits.half()} if self.top_k is None else self._largest(logits.flatten(0, 1))
        rows = np.empty(len(logits), self.dtype)
        for name, values in fields.items():
            rows[name] = values.cpu().numpy().reshape(rows[name].shape)
        numbers = rows[LOGITS if self.top_k is None else STATISTICS]
        if not np.isfinite(numbers).all():
            raise RunError(
                f"The teacher's logits reach from {logits.min().item():g} to {logits.max().item():g}, and the cache "
                "needs finite numbers, up to 65,504 where all logits are stored: look at the teacher's weights and at "
                "the precision of the run, or set top_k, which stores Z-scores."
            )
        return rows

    def _largest(self, logits: Tensor) -> dict[str, Tensor]:
        """The fields of logits (N, C), of all views."""
        std, mean = torch.std_mean(logits, dim=1)
        indices = logits.topk(self.top_k).indices
        scores = standardize(logits)
        statistics = [mean, std]
        for temperature in self.temperatures:
            statistics += [_equivalent(values, indices, temperature) for values in (logits, scores)]
        return {VALUES: scores.gather(1, indices), INDICES: indices, STATISTICS: torch.stack(statistics, dim=1)}

    # ---- From rows to logits ---------------------------------------------------------------------------------------

    def tensors(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Rows (B,) as batch entries, one a field."""
        return {name: torch.from_numpy(rows[name].copy()) for name in rows.dtype.names}

    def decode(self, batch: Mapping[str, Tensor], view: int, temperature: float | None, standardized: bool) -> Tensor:
        """Logits (B, C), float32, of one view.

        Args:
            temperature: with `top_k`, the one at which they will be read.
            standardized: with `top_k`, give Z-scores.
        """
        if self.top_k is None:
            return batch[LOGITS][:, view].float()
        values, indices, statistics = (batch[key][:, view] for key in (VALUES, INDICES, STATISTICS))
        values = values.float()
        column = 2 + 2 * self.temperatures.index(temperature) + standardized
        if not standardized:
            mean, std = statistics[:, 0:1], statistics[:, 1:2]
            values = values * std + mean
        others = statistics[:, column : column + 1]
        return others.repeat(1, self.classes).scatter_(1, indices.long(), values)

    def facts(self) -> dict[str, Any]:
        """As `cache.json` holds it."""
        return {
            "classes": self.classes,
            "views": self.views,
            "top_k": self.top_k,
            "temperatures": list(self.temperatures),
        }


def _equivalent(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """The logit (N,) that each class beside `indices` (N, k) would have if all had the same, together as probable at
    the temperature as they are."""
    others = logits.shape[1] - indices.shape[1]
    if others == 0:
        return logits.new_zeros(len(logits))  # of no class
    rest = logits.scatter(1, indices, -torch.inf) / temperature
    return temperature * (rest.logsumexp(1) - math.log(others))
