"""The published values and curves of the recipes."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PublishedRun:
    """What was published of a recipe.

    Attributes:
        top1: the paper's number, in percent.
        best: the best test epoch of the published log; None where there is none.
        test_top1: that log's accuracy after each epoch, in percent; empty where there is none.
        temperature: CTKD's after each epoch, likewise.
    """

    top1: float
    best: float | None = None
    test_top1: tuple[float, ...] = ()
    temperature: tuple[float, ...] = ()


@functools.cache
def published_runs() -> dict[str, PublishedRun]:
    """By the recipe's name, such as `cifar100/resnet56-resnet20/kd_zscore`.

    The logs are those of Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024.
    """
    rows = json.loads(Path(__file__).with_name("published.json").read_text())
    return {row.pop("recipe"): PublishedRun(**{key: _frozen(value) for key, value in row.items()}) for row in rows}


def _frozen(value: float | list[float]) -> float | tuple[float, ...]:
    return tuple(value) if isinstance(value, list) else value
