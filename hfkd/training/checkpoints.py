"""Checkpoints that are whole, and training that goes on from them as if it had never stopped."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from timm.utils import ModelEmaV3
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..data import StreamingImageDataset
from ..data.subsets import image_source
from ..errors import HfkdError, RunError
from ..networks.loading import exported_state_dict, load_exported
from ..networks.sharding import gathered
from ..runs.checkpoints import defect, drop_old, last_checkpoint, seal, set_aside_later
from .distiller import Distiller
from .loaders import ImageTrainer
from .preemption import EXIT_CODE, StopOnSigterm, ignore_sigterm
from .processes import check_same_checkpoint, check_same_steps, check_same_stream
from .term_log import UNLOGGED_NAME

logger = logging.get_logger(__name__)

LOSSES_NAME = "losses.safetensors"
TRAINING_WEIGHTS_NAME = "training_weights.safetensors"  # beside model.safetensors, which then holds the average
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: beyond a limit on the size of files


class ResumableTrainer(ImageTrainer):
    """Checkpoints of a student that is trained with losses of their own, and resumption from them.

    Attributes:
        average: the student's moving average, which is then what is exported.
        distiller: student and losses.
        stop_on_sigterm: ends training at SIGTERM.
    """

    average: ModelEmaV3 | None
    distiller: Distiller
    stop_on_sigterm: StopOnSigterm

    # ---- Training, up to a signal ----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As Trainer's, but resumes only from checkpoints that are whole, and ends at SIGTERM.

        Args:
            resume_from_checkpoint: a folder, or True for the last whole checkpoint of `output_dir`.

        Raises:
            ValueError: if there is no such checkpoint, or it does not fit this run.
            RuntimeError: if a checkpoint or `results.json` cannot be written; what was written before is whole.
            SystemExit: with code 143 after SIGTERM, once the step in hand is in a checkpoint.
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
        check_same_checkpoint(checkpoint, self.args.output_dir)
        # A trial of a search leaves no checkpoint: SIGTERM ends it at once, and the search begins it again.
        with self.stop_on_sigterm.listening() if trial is None else contextlib.nullcontext():
            try:
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
            except OSError as error:
                if error.errno not in DISK_IS_FULL:
                    raise
                raise self._unwritten(self.args.output_dir, error) from error
        if self.stop_on_sigterm.stopped:
            raise SystemExit(EXIT_CODE)
        return output

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._check_position(resume_from_checkpoint, max_steps, train_dataloader)
            state, best = self.state, Path(resume_from_checkpoint).resolve()
            if state.global_step != state.best_global_step:  # else it is the best itself, whatever it is called
                best = best.with_name(f"checkpoint-{state.best_global_step}")
            # The state names it by the path that the run had then.
            if best.is_dir() or (state.best_global_step and state.best_model_checkpoint is None):
                state.best_model_checkpoint = str(best)
            if self.args.should_save:
                set_aside_later(self.args.output_dir, state.global_step)
        return prepared

    def _run_epoch(self, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at the end; Trainer would take a step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _determine_best_metric(self, metrics, trial):
        # save_strategy: best saves only what this calls the best.
        return super()._determine_best_metric(metrics, trial) or self.stop_on_sigterm.stopping

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper around the one that has the workers
        inner.worker_init_fn = functools.partial(ignore_sigterm, inner.worker_init_fn)
        return loader

    def _check_position(self, checkpoint: str, max_steps: int, loader) -> None:
        within_epoch = not float(self.state.epoch).is_integer()
        if within_epoch and isinstance(image_source(self.train_dataset), StreamingImageDataset):
            check_same_stream(checkpoint, self.args.world_size)  # there no other batch size helps
        batches = len(loader) if has_length(loader) else max_steps * self.args.gradient_accumulation_steps
        check_same_steps(checkpoint, self.state, batches, self.args)

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        args, step = self.args, self.state.global_step
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir, f"checkpoint-{step}")
        if args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt: its files need not be this one's
        self.accelerator.wait_for_everyone()
        # Trainer would push and remove older checkpoints before this one is known to be whole.
        changes = {"save_total_limit": None, "push_to_hub": False}
        if self.stop_on_sigterm.stopping:
            changes["save_only_model"] = False
        try:
            with _changed_for_now(args, **changes):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process writes its random state
            if args.should_save:
                seal(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            if args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise self._unwritten(folder, error) from error
        self.accelerator.wait_for_everyone()  # a launcher ends the others when one process ends
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save and not self._pushing():  # what is being uploaded stays
            keep = [str(folder), self.state.best_model_checkpoint or str(folder)]
            drop_old(run_dir, args.save_total_limit, keep)

    def _unwritten(self, path: str | Path, error: Exception) -> RuntimeError:
        """What could not be written, how much room there is, and where the run stands."""
        output_dir = self.args.output_dir
        last = last_checkpoint(output_dir)
        free = shutil.disk_usage(output_dir).free / 2**20
        stands = f"The run stands at {last}: go on from there" if last else "There is no checkpoint yet: start again"
        return RunError(
            f"{path} could not be written ({error}); {free:,.0f} MiB are free on its disk. {stands} "
            "(resume_from_checkpoint: true) once there is room."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        exported = self.model if self.average is None else self.average.module
        super()._save(output_dir, exported_state_dict(exported) if state_dict is None else state_dict)
        if self.args.should_save:  # Trainer's pickle of the arguments holds the Hub token
            os.remove(os.path.join(output_dir or self.args.output_dir, TRAINING_ARGS_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            self.optimizer.state_dict()  # sharded, it is gathered: see `take_whole_states`
        super()._save_optimizer_and_scheduler(output_dir)
        unlogged, state = self._unlogged(), gathered(self.distiller.losses.state_dict())
        if not self.args.should_save:
            return
        Path(output_dir, UNLOGGED_NAME).write_text(json.dumps(unlogged))
        if state:
            safetensors.torch.save_file(state, os.path.join(output_dir, LOSSES_NAME))
        if self.average is not None:
            state = exported_state_dict(self.distiller.student)
            safetensors.torch.save_file(state, os.path.join(output_dir, TRAINING_WEIGHTS_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        try:
            with self._settings_of_this_recipe():
                super()._load_optimizer_and_scheduler(checkpoint)
            self._load_losses_and_average(checkpoint)
        except (OSError, RuntimeError, ValueError) as error:
            raise HfkdError(
                f"{checkpoint} cannot be loaded into this run ({error}). If its losses, optimizer or ema_decay are not "
                "those that it was written with: begin anew, in another output_dir."
            ) from error

    @contextlib.contextmanager
    def _settings_of_this_recipe(self) -> Iterator[None]:
        """Loading a state brings the learning rate, weight decay, ... of the checkpoint's recipe along; where the
        recipe may change, those of this run's take their place."""
        groups = [dict(group, params=None) for group in self.optimizer.param_groups]
        schedule = self.lr_scheduler.state_dict()
        yield
        if not self.args.allow_recipe_change or self.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            return  # those two set the learning rate by what they measure
        steps = self.lr_scheduler.last_epoch
        for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(settings, params=group["params"])
        self.lr_scheduler.load_state_dict(schedule)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(steps):
                self.lr_scheduler.step()

    def _load_losses_and_average(self, checkpoint: str) -> None:
        if self.distiller.losses.state_dict():
            self.distiller.losses.load_state_dict(safetensors.torch.load_file(os.path.join(checkpoint, LOSSES_NAME)))
        if self.average is not None:  # Trainer has just loaded it into the student
            student = self.distiller.student
            self.average.module.load_state_dict(student.state_dict())
            weights = safetensors.torch.load_file(os.path.join(checkpoint, TRAINING_WEIGHTS_NAME))
            load_exported(student, weights)

    def _issue_warnings_after_load(self, load_result) -> None:
        # Trainer warns, and goes on with a network that is only partly the checkpoint's.
        unknown = load_result.unexpected_keys
        if unknown:
            raise HfkdError(
                f"The checkpoint is not this student's, which has no parameter {unknown[0]!r}, nor {len(unknown) - 1} "
                "others of it: resume with the student that it was written for."
            )
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        found = defect(best)
        if found is not None:
            raise RunError(
                f"Training is over, but its best checkpoint cannot be exported: {best}: {found}. Export the last one "
                "by --resume_from_checkpoint true --load_best_model_at_end false --allow_recipe_change true."
            )
        super()._load_best_model()
        if self.average is not None:
            self.average.module.load_state_dict(self.model.state_dict())

    def _finalize_training(self, *args):
        if self.average is not None:  # what was trained becomes what was evaluated
            self.model.load_state_dict(self.average.module.state_dict())
        # With a limit of 1 Trainer would remove the last checkpoint where another is the best.
        changes = {"save_total_limit": None}
        if self.stop_on_sigterm.stopped:
            changes["load_best_model_at_end"] = False
        with _changed_for_now(self.args, **changes):
            return super()._finalize_training(*args)

    def _pushing(self) -> bool:
        push = self.push_in_progress if self.hub_model_id is not None else None
        return push is not None and not push.is_done()


@contextlib.contextmanager
def _changed_for_now(args: TrainingArguments, **changes: Any) -> Iterator[None]:
    former = {name: getattr(args, name) for name in changes}
    vars(args).update(changes)
    try:
        yield
    finally:
        vars(args).update(former)
