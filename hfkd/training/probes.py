"""Evaluations of a training that measure `knn`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipe.arguments import DistillationConfig
from .checks import PLATEAU


def is_due(args: DistillationConfig, state: Any) -> bool:
    """Return whether an evaluation measures `knn`: every `probe_every` epochs, before the first step, after the last.

    Args:
        state: Trainer's, whose log tells when it was last measured, also before a run was resumed.
    """
    if args.probe_every is None:
        return False
    if state.global_step == 0 or state.global_step >= state.max_steps or args.lr_scheduler_type in PLATEAU:
        return True
    probed = [entry["epoch"] for entry in state.log_history if any(key.endswith("_knn") for key in entry)]
    return state.epoch - max((epoch for epoch in probed if epoch < state.epoch), default=0.0) >= args.probe_every


def between_probes(wanted: str | None, metrics: Mapping[str, Any]) -> bool:
    """Return whether the best checkpoint is to be chosen by `knn` and an evaluation has not measured it."""
    name = f"eval_{(wanted or '').removeprefix('eval_')}"
    return name.endswith("_knn") and name not in metrics
