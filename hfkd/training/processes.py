"""The processes of a run: do all come, and do they go on from the same checkpoint?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.utils import logging

from ..errors import HfkdError

if TYPE_CHECKING:
    from ..recipe.arguments import DistillationConfig


logger = logging.get_logger(__name__)


def check_same_checkpoint(checkpoint: str | Path | None, output_dir: str) -> None:
    """All processes of a run call it.

    Raises:
        ValueError: in all of them, if they would not go on from the same step.
    """
    names = gather_object([checkpoint and Path(checkpoint).name])
    for process, name in enumerate(names):
        if name != names[0]:
            raise HfkdError(
                f"Process 0 would go on from {names[0] or 'no checkpoint'} and process {process} from "
                f"{name or 'none'}: all machines must see the same files in {output_dir}."
            )


def check_same_stream(checkpoint: str | Path, processes: int) -> None:
    """A stream's rows are shared out among the processes: in the middle of an epoch they cannot become others.

    Raises:
        ValueError: if another number of processes wrote the checkpoint.
    """
    before = _processes_of(checkpoint)
    if before != processes:
        raise HfkdError(
            f"{checkpoint} was written by {before} processes in the middle of an epoch, and this run has {processes}: "
            "with another number the rest of a streamed epoch would repeat some images and miss others. Start as many, "
            "or resume from a checkpoint at the end of an epoch."
        )


def check_same_steps(checkpoint: str | Path, state: TrainerState, batches: int, args: DistillationConfig) -> None:
    """Trainer counts a checkpoint's steps in epochs of the run that goes on: are they those that it was written after?

    Args:
        state: the checkpoint's.
        batches: of each process in an epoch of this run.

    Raises:
        ValueError: if not, unless the recipe may change.
    """
    before = _processes_of(checkpoint)
    processes = f"{checkpoint} was written by {before} processes, and this run has {args.world_size}"
    accumulated = args.gradient_accumulation_steps
    epochs, steps = divmod(state.global_step, -(-batches // accumulated))
    here = epochs + steps * accumulated / batches
    if abs(here - state.epoch) * batches < 0.01:  # but for rounding the same
        if before != args.world_size:
            logger.warning(f"{processes}: random numbers will be others than in an undisturbed run.")
        return
    text = (
        f"{processes}. It stands at epoch {state.epoch:.4g}, and its {state.global_step} steps would be {here:.4g} "
        "epochs here"
    )
    if args.allow_recipe_change:
        logger.warning(text)
        return
    raise HfkdError(f"{text}. {_way_out(before * state.train_batch_size, args)}")


def _processes_of(checkpoint: str | Path) -> int:
    """How many wrote it: Trainer stores a state of random numbers for each, a single process's without a number."""
    return len(list(Path(checkpoint).glob("rng_state_*.pth"))) or 1


def _way_out(images: int, args: DistillationConfig) -> str:
    """How a batch of all processes comes to so many images, as it did before."""
    share, rest = divmod(images, args.world_size)
    if rest:
        return f"{images} images a batch do not divide among {args.world_size}: start as many as before."
    if share != args.per_device_train_batch_size:
        return f"Keep the {images} images a batch by --per_device_train_batch_size {share} --allow_recipe_change true."
    return (
        "Have gradient_accumulation_steps or the training images changed? --allow_recipe_change true goes on all the "
        "same."
    )
