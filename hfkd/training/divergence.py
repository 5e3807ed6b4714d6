"""Divergence: a run whose losses, weights or logits are no longer finite is told of, stopped, and not exported."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import RunError
from ..recipe.config import DistillationConfig
from ..runs.checkpoints import checkpoints, defect
from ..runs.folder import RESULTS_NAME
from .results import ResultsWriter

logger = logging.get_logger(__name__)

NOT_MEASURED = ("teacher_top1", "model_preparation_time")  # metrics that do not depend on the student's logits


class Divergence(TrainerCallback):
    """Callback that ends a diverged run after its epoch, without another checkpoint.

    Only values that are read anyway are looked at: losses when they are logged, logits after an evaluation, weights
    when they are written.

    Args:
        args: the run's settings.
        results: results of the run, which record the divergence.

    Attributes:
        reason: what is not finite, and where; None for a run that has not diverged.
    """

    def __init__(self, args: DistillationConfig, results: ResultsWriter):
        self.args, self.results = args, results
        self.start()

    def start(self) -> None:
        """Forget what an earlier run came to."""
        self.reason: str | None = None
        self.logits_are_finite = True
        self._finite: Tensor | None = None
        self._epoch_is_over = False
        self.results.facts.pop("diverged", None)

    # ---- Finding ---------------------------------------------------------------------------------------------------

    def look_at_losses(self, logs: dict[str, float], state) -> None:
        """Note a loss term that is not finite; the sum is named only if no term is."""
        losses = [key for key in logs if key.startswith("loss_")] + ["loss"]
        for key in losses:
            if not math.isfinite(logs[key]):
                self._note(f"{key} is {logs[key]}", state)
                return

    def watch(self, logits: Tensor) -> None:
        """Remember, on the device, whether the logits of an evaluation are finite."""
        finite = logits.isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite

    def judge(self, metrics: dict[str, float], prefix: str, state) -> None:
        """Replace the metrics of an evaluation by NaN if its logits were not finite.

        All processes must call it.
        """
        watched, self._finite = self._finite, None
        self.logits_are_finite = watched is None or everywhere(watched, self.args)
        if self.logits_are_finite:
            return
        untouched = {f"{prefix}_{name}" for name in NOT_MEASURED}
        metrics.update({key: math.nan for key in metrics if key not in untouched})
        self._note("the logits of an evaluation are not finite", state)

    def weights_are_finite(self, tensors: Iterable[Tensor], state) -> bool:
        """Return whether weights are finite in all processes, which must all call it; note it if they are not."""
        finite = everywhere(all_finite(tensors), self.args)
        if not finite:
            self._note("the weights are not finite", state)
        return finite

    def _note(self, what: str, state) -> None:
        if self.reason is not None:
            return
        epoch = state.epoch or 0.0
        self.reason = f"{what} at step {state.global_step} (epoch {epoch:.4g})"
        ends = " Training ends with this epoch." if self.args.stop_when_diverged else ""
        logger.warning(f"The run has diverged: {self.reason}.{ends}")
        self.results.facts["diverged"] = {"step": state.global_step, "epoch": round(epoch, 4), "reason": what}
        if self.args.should_save and not state.is_hyper_param_search:
            self.results.write(Path(self.args.output_dir, RESULTS_NAME))

    # ---- Ending ----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self.start()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch_is_over = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self._epoch_is_over = True
        return self._end(state, control)

    def on_log(self, args, state, control, **kwargs):
        return self._end(state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        return self._end(state, control)

    def _end(self, state, control):
        # A search evaluates the trial once more, so that its pruner ends it.
        if self._epoch_is_over and self.stops and not state.is_hyper_param_search:
            control.should_save, control.should_training_stop = False, True
        return control

    @property
    def stops(self) -> bool:
        """True if the run has diverged and does not go on."""
        return self.reason is not None and self.args.stop_when_diverged

    def error(self) -> RunError:
        """Return the error of a diverged run: what happened, what to try, and the last finite checkpoint."""
        last = last_finite_checkpoint(self.args.output_dir)
        kept = f"The last checkpoint with finite weights is {last}." if last else "No checkpoint has finite weights."
        return RunError(
            f"The run has diverged: {self.reason}. Nothing is exported. Try a lower learning_rate (it is "
            f"{self.args.learning_rate:g}), warmup_steps, or max_grad_norm. {kept}"
        )


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return whether all floating-point values are finite, 0-d, without waiting for the device."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    finite = [tensor.isfinite().all() for tensor in local if tensor.is_floating_point()]
    return torch.stack(finite).all() if finite else torch.tensor(True)


def everywhere(finite: Tensor, args: DistillationConfig) -> bool:
    """Return whether a 0-d tensor is True in all processes."""
    if args.world_size > 1:
        finite = finite.to(args.device, torch.int32)
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)


def last_finite_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the last whole checkpoint of a run whose weights are finite, or None."""
    for folder in reversed(checkpoints(output_dir)):
        if defect(folder) is None and all(_is_finite(path) for path in folder.glob("*.safetensors")):
            return folder
    return None


def _is_finite(path: Path) -> bool:
    return bool(all_finite(safetensors.torch.load_file(path).values()))
