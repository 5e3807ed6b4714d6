"""Checks that all processes of a run resume from the same checkpoint, and that their number fits it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.utils import logging

from ..errors import HfkdError

if TYPE_CHECKING:
    from ..recipe.config import DistillationConfig


logger = logging.get_logger(__name__)


def check_same_checkpoint(checkpoint: str | Path | None, output_dir: str) -> None:
    """Check that all processes resume from the same step; all of them must call this function.

    Raises:
        HfkdError: in all processes, if they do not.
    """
    names = gather_object([checkpoint and Path(checkpoint).name])
    for process, name in enumerate(names):
        if name != names[0]:
            raise HfkdError(
                f"Process 0 would resume from {names[0] or 'no checkpoint'} and process {process} from "
                f"{name or 'none'}: all machines must see the same files in {output_dir}."
            )


def check_same_stream(checkpoint: str | Path, processes: int) -> None:
    """Check that a checkpoint in the middle of a streamed epoch was written by the same number of processes.

    A stream's rows are divided among the processes, and the division cannot change within an epoch.

    Raises:
        HfkdError: if another number of processes wrote the checkpoint.
    """
    before = _process_count(checkpoint)
    if before != processes:
        raise HfkdError(
            f"{checkpoint} was written by {before} processes in the middle of an epoch, and this run has {processes}: "
            "with another number the rest of a streamed epoch would repeat some images and miss others. Start "
            f"{before} processes, or resume from a checkpoint at the end of an epoch."
        )


def check_same_steps(checkpoint: str | Path, state: TrainerState, batches: int, args: DistillationConfig) -> None:
    """Check that a checkpoint's steps amount to the same epoch in this run as in the run that wrote it.

    Trainer computes the epoch from the number of steps and the length of this run's epochs. With another batch size,
    the run would resume in another epoch, or end at once. `allow_recipe_change` cannot change that.

    Args:
        state: state of the checkpoint.
        batches: number of batches of each process in an epoch of this run.

    Raises:
        HfkdError: if they do not.
    """
    before = _process_count(checkpoint)
    processes = f"{checkpoint} was written by {before} processes, and this run has {args.world_size}"
    images, images_here = before * state.train_batch_size, args.world_size * args.per_device_train_batch_size
    if before == args.world_size:
        processes = f"{checkpoint} was written with {images} images a batch, and this run has {images_here}"
    accumulated = args.gradient_accumulation_steps
    epochs, steps = divmod(state.global_step, -(-batches // accumulated))
    here = epochs + steps * accumulated / batches
    if abs(here - state.epoch) * batches < 0.01:  # equal up to rounding
        if before != args.world_size:
            logger.warning(f"{processes}: its random numbers will differ from those of an uninterrupted run.")
        return
    raise HfkdError(
        f"{processes}. It stands at epoch {state.epoch:.4g}, and its {state.global_step} steps would be {here:.4g} "
        f"epochs here. {_batch_size_hint(images, state.train_batch_size, args)}"
    )


def _process_count(checkpoint: str | Path) -> int:
    """Return the number of processes that wrote a checkpoint.

    Trainer stores a random state for each process in a numbered file; a single process's file has no number.
    """
    return len(list(Path(checkpoint).glob("rng_state_*.pth"))) or 1


def _batch_size_hint(images: int, recorded: int, args: DistillationConfig) -> str:
    """Return the advice that keeps the number of images in a batch over all processes.

    Args:
        images: images a batch of the run that wrote the checkpoint, over all processes.
        recorded: images a batch of each of its processes, as its recipe says.
    """
    share, rest = divmod(images, args.world_size)
    if rest:
        return (
            f"A batch of {images} images cannot be divided among {args.world_size} processes: start as many as before."
        )
    if share != args.per_device_train_batch_size:
        changed = "" if share == recorded else " --allow_recipe_change true"
        return f"Keep the {images} images a batch by --per_device_train_batch_size {share}{changed}."
    return "Keep gradient_accumulation_steps and the training images as they were, or begin anew in another output_dir."
