"""Callbacks of the trainer: what it does at the borders of steps, epochs and the training."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from pathlib import Path

from timm.utils import ModelEmaV3
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..data import ImageSource, StreamingImageDataset
from ..networks.int8 import move_ranges
from ..runs.checkpoints import UNLOGGED_NAME
from .metrics import measured
from .term_log import TermLog


class SetEpoch(TrainerCallback):
    """Sets the epoch of the training data: Trainer forgets a resumed epoch, and every epoch under DDP.

    Attributes:
        batches_to_skip: batches of the resumed epoch that were trained on already. A stream need not decode them.
    """

    def __init__(self, dataset: ImageSource):
        self.dataset = dataset
        self.batches_to_skip = 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))
        if self.batches_to_skip and isinstance(self.dataset, StreamingImageDataset):
            self.dataset.skip_batches(self.batches_to_skip)  # after set_epoch, which skips nothing
        self.batches_to_skip = 0


class UpdateAverage(TrainerCallback):
    """Moves the average towards the student after every update.

    timm's warm-up makes the decay grow with the steps: with the final decay from the beginning, most of the average of
    a short run would be the untrained student.
    """

    def __init__(self, average: ModelEmaV3, student: nn.Module):
        self.average, self.student = average, student

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update(self.student, state.global_step)


class MoveRanges(TrainerCallback):
    """Lets the ranges of a student in simulated int8 follow the batches, and holds them for the rest of the training.

    Held ranges are what the file has, so that the last steps train for it.
    """

    MOVING = 0.5  # share of the training
    MOMENTUM = 0.01  # as that of torch's MovingAverageMinMaxObserver, after a mean of the first hundred batches

    def __init__(self, student: nn.Module):
        self.student = student

    def on_step_begin(self, args, state, control, **kwargs):
        moving = state.global_step < self.MOVING * state.max_steps
        move_ranges(self.student, max(self.MOMENTUM, 1 / (1 + state.global_step)) if moving else 0.0)

    def on_train_end(self, args, state, control, **kwargs):
        move_ranges(self.student, 0.0)


class ContinueLog(TrainerCallback):
    """Starts the log of terms, on resuming from what the checkpoint kept of it.

    It acts on `on_train_begin`, because Trainer sets its own sums to 0 just before that. It refers to the trainer
    weakly: a trainer in a circle of references would outlive its last use, and its loaders' workers with it.
    """

    def __init__(self, trainer: Trainer, term_log: TermLog):
        self.trainer, self.term_log = weakref.proxy(trainer), term_log
        self.checkpoint: str | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.term_log.start()
        if self.checkpoint is None:
            return
        unlogged = json.loads(Path(self.checkpoint, UNLOGGED_NAME).read_text())
        if unlogged:
            loss = self.term_log.restore(unlogged, args.process_index, args.world_size, args.device)
            self.trainer._tr_loss.copy_(loss)
            self.trainer._globalstep_last_logged = unlogged["since"]


class EndWhereDone(TrainerCallback):
    """Ends a training that was resumed at its last step, with nothing logged, evaluated or saved a second time.

    `DistillationTrainer.get_batch_samples` gives no batches then.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.done = state.global_step >= state.max_steps

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.done:
            control.should_log = control.should_evaluate = control.should_save = False
            control.should_training_stop = True
        return control


class EpochLines(TrainerCallback):
    """Prints one line an epoch, with the losses and the evaluation."""

    _training = False  # an evaluation alone is printed by who asked for it

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._held = {}
        self._training = True

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        self._training = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not (state.is_world_process_zero and self._training):
            return
        if "loss" in logs and args.logging_strategy == args.eval_strategy == "epoch":
            self._held = logs  # the evaluation follows, and both make one line
        elif "loss" in logs or measured(logs):
            by_epochs = f"epoch {state.epoch:.4g}/{args.num_train_epochs:g}"
            place = f"step {state.global_step}/{state.max_steps}" if args.max_steps > 0 else by_epochs
            self.write(f"{place}  {_line(self._held | logs)}")
            self._held = {}

    def write(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)


class ProgressLines(EpochLines, ProgressCallback):
    """Trainer's progress bar, with one line an epoch in place of Trainer's dictionaries."""

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        self.training_bar.write(line)


def place_tensorboard(callbacks: Iterable[TrainerCallback], folder: Path) -> None:
    """Have TensorBoard's files written into a folder, where transformers makes `runs/<date>_<host>` in the run's.

    A resumed run goes on with its curves there. TENSORBOARD_LOGGING_DIR comes before the folder.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def _line(logs: dict[str, float]) -> str:
    """Format losses, temperatures and accuracies with four digits each."""
    shown = [key for key in logs if key == "loss" or key.startswith("loss_") or key.endswith("temperature")]
    shown += [key for key in measured(logs) if not key.endswith(("_loss", "_teacher_top1"))]
    values = [f"{_name_in_line(key)} {logs[key]:.4g}" for key in shown]
    speed = [f"{logs['images_per_second']:,.0f} images/s"] if "images_per_second" in logs else []
    return "  ".join(values + speed)


def _name_in_line(key: str) -> str:
    """Return the short name of a figure; a loss term of the evaluation keeps its prefix, unlike one of the training."""
    if key.startswith("eval_loss_"):
        return key.replace("eval_loss_", "eval_")
    return key.removeprefix("eval_").removeprefix("loss_")
