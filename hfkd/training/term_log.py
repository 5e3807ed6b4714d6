"""Log of the loss terms: their sums since the last log, and the training speed."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class TermLog:
    """Sums of the loss terms since the last log, kept on the device: nothing here waits for it before `drain`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.start()

    def start(self) -> None:
        """Forget what was added, and start the clock."""
        self.sums: Tensor | None = None
        self.steps = self.images = 0
        self._clock = time.perf_counter()

    def add(self, terms: dict[str, Tensor], images: int) -> Tensor:
        """Add the terms of one batch, each 0-d, and return their sum, which is the training loss."""
        values = torch.stack(list(terms.values()))
        if self.sums is None:
            self.names, self.sums = list(terms), torch.zeros_like(values.detach())
        self.sums += values.detach()
        self.steps += 1
        self.images += images
        return values.sum()

    def leave_out(self, seconds: float) -> None:
        """Take an evaluation's time out of the training speed."""
        self._clock += seconds

    def drain(self, accelerator: Accelerator, metrics: dict[str, Tensor], counts: dict[str, int]) -> dict[str, float]:
        """Return the means over steps and processes, `metrics`, `counts` and `images_per_second`, and start again.

        This is the only place where the values of training steps are read, which waits for the device.

        Args:
            metrics: further values to log, each 0-d.
            counts: further values to log that are on the host already.
        """
        means = accelerator.reduce(self.sums / self.steps, reduction="mean")
        logs = dict(zip(self.names, means.tolist(), strict=True))
        logs |= {name: value.item() for name, value in metrics.items()} | counts
        seconds = time.perf_counter() - self._clock
        logs["images_per_second"] = self.images * accelerator.num_processes / seconds
        self.start()
        return logs

    def state(self, accelerator: Accelerator, total_loss: Tensor, last_logged_step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that the next log of a resumed run is that of an undisturbed one.

        All processes must call it: each has its own sums.

        Args:
            total_loss: 0-d, Trainer's sum of the losses since the last log.
            last_logged_step: step of the last log.
        """
        if not self.steps:
            return {}
        sums = accelerator.gather(torch.stack([total_loss, *self.sums])[None]).tolist()
        return {"since": last_logged_step, "count": self.steps, "terms": self.names, "sums": sums}

    def restore(self, state: dict[str, Any], process: int, processes: int, device: torch.device) -> Tensor:
        """Take up what `state` returned, and return this process's sum of the losses, 0-d.

        A run of another number of processes takes the mean over those that wrote the checkpoint.
        """
        sums = torch.tensor([[_number(value) for value in row] for row in state["sums"]], device=device)
        own = sums[process] if len(sums) == processes else sums.mean(dim=0)
        self.steps, self.names, self.sums = state["count"], state["terms"], own[1:].clone()
        return own[0]


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON has no NaN
