"""What the trainer does at the borders of epochs and steps."""

from __future__ import annotations

from timm.utils import ModelEmaV3
from torch import nn
from transformers import ProgressCallback, TrainerCallback

from ..data import ImageSource


class SetEpoch(TrainerCallback):
    """Tells the training set which epoch it is: Trainer forgets a resumed epoch, and every epoch under DDP."""

    def __init__(self, dataset: ImageSource):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


class UpdateAverage(TrainerCallback):
    """Moves the average towards the student after every update."""

    def __init__(self, average: ModelEmaV3, student: nn.Module):
        self.average, self.student = average, student

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update(self.student)


class ProgressLines(ProgressCallback):
    """Trainer's bar, and in place of its dictionaries one line an epoch: what was trained, and what measured then."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._held = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:
            return
        if "loss" in logs and args.logging_strategy == args.eval_strategy == "epoch":
            self._held = logs  # the evaluation follows
        elif "loss" in logs or "eval_loss" in logs:
            self.training_bar.write(f"epoch {state.epoch:.4g}/{args.num_train_epochs:g}  {_line(self._held | logs)}")
            self._held = {}


def _line(logs: dict[str, float]) -> str:
    """Losses, temperatures and accuracies, four digits each."""
    shown = [key for key in logs if key == "loss" or key.startswith("loss_") or key.endswith("temperature")]
    shown += [key for key in ("eval_top1", "eval_top5", "eval_agreement") if key in logs]
    values = [f"{key.removeprefix('eval_').removeprefix('loss_')} {logs[key]:.4g}" for key in shown]
    speed = [f"{logs['images_per_second']:,.0f} images/s"] if "images_per_second" in logs else []
    return "  ".join(values + speed)
