"""What the trainer does at the borders of epochs and steps."""

from __future__ import annotations

from timm.utils import ModelEmaV3
from torch import nn
from transformers import TrainerCallback

from .data import ImageSource


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
