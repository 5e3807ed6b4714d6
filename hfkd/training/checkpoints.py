"""Checkpoints of a run: what hfkd adds to Trainer's files, whole writes, and resuming to the bit."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from timm.utils import ModelEmaV3
from torch import nn
from transformers import TrainerState
from transformers.utils import logging

from ..data import StreamingImageDataset
from ..data.subsets import image_source
from ..errors import HfkdError, RunError
from ..networks.features import timm_model_of
from ..networks.sharding import gathered
from ..networks.wrapping import exported_state_dict, load_exported, with_own_memory
from ..recipe.config import DistillationConfig
from ..runs.checkpoints import (
    UNLOGGED_NAME,
    begin_checkpoint,
    defect,
    drop_old,
    last_checkpoint,
    remove_checkpoint,
    set_aside_newer,
    write_manifest,
)
from ..runs.writing import strict_json
from .distiller import Distiller
from .processes import check_same_checkpoint, check_same_steps, check_same_stream

logger = logging.get_logger(__name__)

WEIGHTS_PATTERN = "model*.safetensors"
LOSSES_NAME = "losses.safetensors"
TRAINING_WEIGHTS_NAME = "training_weights.safetensors"  # beside model.safetensors, which then holds the average
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last one: beyond a limit on the size of files


class Checkpoints:
    """Checkpoints of one run.

    Args:
        args: the run's settings: its folder, which process writes, what may change on resuming.
        wait_for_everyone: waits until all processes of the run have called it.
    """

    def __init__(self, args: DistillationConfig, wait_for_everyone: Callable[[], None]):
        self.args = args
        self.wait_for_everyone = wait_for_everyone

    # ---- Resuming --------------------------------------------------------------------------------------------------

    def find(self, resume_from_checkpoint: str | bool | None, student: nn.Module) -> str | None:
        """Return the checkpoint to resume from, None to begin.

        Args:
            resume_from_checkpoint: a folder, or True for the last whole checkpoint of the run.

        Raises:
            HfkdError: if there is no such checkpoint, it is not whole, or it is another student's.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise HfkdError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
        if checkpoint is not None:
            found = defect(checkpoint)
            if found is not None:
                raise HfkdError(
                    f"{checkpoint} cannot be resumed from: {found}. resume_from_checkpoint: true takes the last whole "
                    "one of the output folder."
                )
            if not Path(checkpoint, UNLOGGED_NAME).is_file():
                raise HfkdError(f"{checkpoint} cannot be resumed from: with save_only_model it holds the model alone.")
            _check_student(checkpoint, student)
        check_same_checkpoint(checkpoint, self.args.output_dir)
        return checkpoint

    def check_position(self, checkpoint: str, state: TrainerState, batches: int, train_dataset) -> None:
        """Check that the checkpoint's steps are the same share of this run's epochs.

        Args:
            batches: batches of each process in an epoch of this run.

        Raises:
            HfkdError: if they are not, and the recipe may not change.
        """
        within_epoch = not float(state.epoch).is_integer()
        if within_epoch and isinstance(image_source(train_dataset), StreamingImageDataset):
            check_same_stream(checkpoint, self.args.world_size)  # there no other batch size helps
        check_same_steps(checkpoint, state, batches, self.args)

    def continue_from(self, checkpoint: str, state: TrainerState) -> None:
        """Find the best checkpoint so far beside the one that is resumed, and set later ones aside."""
        best = Path(checkpoint).resolve()
        if state.global_step != state.best_global_step:  # else it is the best itself, whatever it is called
            best = best.with_name(f"checkpoint-{state.best_global_step}")
        # The state names the best by the path that the run had when it was written. Where it is lost and is to be
        # loaded, it is named all the same, and `check_best` says so: the last would be exported in silence.
        lost = self.args.load_best_model_at_end and state.best_global_step and state.best_model_checkpoint is None
        if best.is_dir() or lost:
            state.best_model_checkpoint = str(best)
        if self.args.should_save:
            set_aside_newer(self.args.output_dir, state.global_step)

    @contextlib.contextmanager
    def loading(self, checkpoint: str) -> Iterator[None]:
        """Say of an error while a checkpoint is loaded what to do.

        Raises:
            HfkdError: for any error within.
        """
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise HfkdError(
                f"{checkpoint} cannot be loaded into this run ({error}). If its losses, optimizer or ema_decay are not "
                "those that it was written with: begin anew, in another output_dir."
            ) from error

    @contextlib.contextmanager
    def settings_of_this_recipe(self, optimizer, lr_scheduler) -> Iterator[None]:
        """Restore this recipe's learning rate, weight decay, ... after the states of optimizer and schedule are loaded.

        Loading a state brings along the settings of the checkpoint's recipe. This recipe's take their place where it
        may change.
        """
        groups = [dict(group, params=None) for group in optimizer.param_groups]
        schedule = lr_scheduler.state_dict()
        yield
        if not self.args.allow_recipe_change or self.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            return  # those two set the learning rate by what they measure
        steps = lr_scheduler.last_epoch
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings, params=group["params"])
        lr_scheduler.load_state_dict(schedule)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(steps):
                lr_scheduler.step()

    def load_training_state(self, checkpoint: str, distiller: Distiller, average: ModelEmaV3 | None) -> None:
        """Load the losses' state and, with an average, the weights that are trained.

        Trainer has just loaded model.safetensors into the student; with an average it holds that.
        """
        if distiller.losses.state_dict():
            distiller.losses.load_state_dict(safetensors.torch.load_file(os.path.join(checkpoint, LOSSES_NAME)))
        if average is not None:
            average.module.load_state_dict(distiller.student.state_dict())
            weights = safetensors.torch.load_file(os.path.join(checkpoint, TRAINING_WEIGHTS_NAME))
            load_exported(distiller.student, weights)

    # ---- Saving ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """Write a checkpoint within: sealed with its manifest at the end, removed if anything goes wrong.

        Raises:
            RunError: if it cannot be written, naming the checkpoint that the run stands at.
        """
        if self.args.should_save:
            begin_checkpoint(folder)  # without the files of an earlier attempt, which need not be this one's
        self.wait_for_everyone()
        try:
            yield
            self.wait_for_everyone()  # every process writes its random state
            if self.args.should_save:
                write_manifest(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                remove_checkpoint(folder)
            raise self.unwritten(folder, error) from error
        self.wait_for_everyone()  # a launcher ends the others when one process ends

    def save_training_state(
        self, folder: str, unlogged: dict[str, Any], distiller: Distiller, average: ModelEmaV3 | None
    ) -> None:
        """Write the sums of the log, the losses' state and, with an average, the weights that are trained.

        All processes must call it: sharded states are gathered.
        """
        state = gathered(distiller.losses.state_dict())
        if not self.args.should_save:
            return
        Path(folder, UNLOGGED_NAME).write_text(strict_json(unlogged))
        if state:
            safetensors.torch.save_file(with_own_memory(state), os.path.join(folder, LOSSES_NAME))
        if average is not None:
            weights = exported_state_dict(distiller.student)
            safetensors.torch.save_file(weights, os.path.join(folder, TRAINING_WEIGHTS_NAME))

    def drop_old(self, run_dir: str, folder: Path, best: str | None, limit: int | None) -> None:
        """Remove the oldest checkpoints beyond the limit, but neither the newest nor the best."""
        if self.args.should_save:
            drop_old(run_dir, limit, [str(folder), best or str(folder)])

    def unwritten(self, path: str | Path, error: Exception) -> RunError:
        """Return the error for what could not be written: how much room there is, and where the run stands."""
        output_dir = self.args.output_dir
        last = last_checkpoint(output_dir)
        free = shutil.disk_usage(output_dir).free / 2**20
        stands = f"The run stands at {last}: go on from there" if last else "There is no checkpoint yet: start again"
        other_cause = isinstance(error, OSError) and error.errno not in DISK_IS_FULL
        return RunError(
            f"{path} could not be written ({error}); {free:,.0f} MiB are free on its disk. {stands} "
            f"(resume_from_checkpoint: true) once {'it can be written' if other_cause else 'there is room'}."
        )

    @contextlib.contextmanager
    def full_disk_explained(self) -> Iterator[None]:
        """Say of a full disk within where the run stands.

        Raises:
            RunError: for an OSError of a full disk; any other error passes.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            raise self.unwritten(self.args.output_dir, error) from error


def check_best(checkpoint: str) -> None:
    """Raise RunError unless the best checkpoint is whole, with the command that exports the last one in its place."""
    found = defect(checkpoint)
    if found is not None:
        raise RunError(
            f"Training is over, but its best checkpoint cannot be exported: {checkpoint}: {found}. Export the last one "
            "by --resume_from_checkpoint true --load_best_model_at_end false --allow_recipe_change true."
        )


def _check_student(checkpoint: str, student: nn.Module) -> None:
    """Raise HfkdError if a checkpoint has weights that the student lacks.

    Trainer warns, and goes on with a network that is only partly the checkpoint's.
    """
    own = timm_model_of(student).state_dict().keys()
    unknown = []
    for path in sorted(Path(checkpoint).glob(WEIGHTS_PATTERN)):
        with safe_open(path, framework="pt") as file:
            unknown += [name for name in file.keys() if name not in own]  # noqa: SIM118  (it is no mapping)
    if unknown:
        raise HfkdError(
            f"The checkpoint is not this student's, which has no parameter {unknown[0]!r}, nor {len(unknown) - 1} "
            "others of it: resume with the student that it was written for."
        )


@contextlib.contextmanager
def changed_for_now(holder: Any, **changes: Any) -> Iterator[None]:
    """Change attributes of the settings of a run, or of its trainer, within, and put them back."""
    former = {name: getattr(holder, name) for name in changes}
    vars(holder).update(changes)
    try:
        yield
    finally:
        vars(holder).update(former)
