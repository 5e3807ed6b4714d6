"""Pushes to the Hub: the repository of a run, its export, and its checkpoints while it trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..hub.repository import ensure_repository, export_files, open_repository, upload
from ..recipe.config import DistillationConfig
from ..runs.checkpoints import MANIFEST_NAME, size_and_checksum
from .exports import Exports

logger = logging.get_logger(__name__)


class Pushes(TrainerCallback):
    """Uploads of one run, from the first process alone.

    While training, every checkpoint's model is exported and pushed as `hub_strategy` says. Trainer would push it before
    it is whole. A failed push is a warning: the next one, or the last, brings what is missing.

    Args:
        args: the run's settings.
        exports: the run's exported model.
        on_begin: called before each push, to tell the callbacks of the trainer.

    Attributes:
        repository: full id of the repository, None before it was found.
    """

    def __init__(self, args: DistillationConfig, exports: Exports, on_begin: Callable[[], None]):
        self.args, self.exports, self.on_begin = args, exports, on_begin
        self.repository: str | None = None
        self._jobs: list[Future] = []

    @property
    def running(self) -> bool:
        """Whether files are being uploaded now."""
        return any(not job.done() for job in self._jobs)

    # ---- The repository --------------------------------------------------------------------------------------------

    def open(self, model, token: str | None, private: bool | None) -> None:
        """Create the repository unless it exists, before anything is trained.

        Raises:
            HfkdError: if the Hub refuses, cannot be reached, or the repository holds something else.
        """
        self._find(open_repository, model, token, private, revision=None)

    def find(self, model, token: str | None, private: bool | None, revision: str | None) -> None:
        """Find the repository for a push, unless it was found for the same revision.

        Raises:
            PushError: as `open` raises HfkdError.
        """
        if self.repository is None or (revision or self.args.hub_revision) != self.args.hub_revision:
            self._find(ensure_repository, model, token, private, revision)

    def _find(self, find, model, token, private, revision) -> None:
        args = self.args
        self.repository = find(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            model.config.to_dict() if isinstance(model, PreTrainedModel) else None,
            private=args.hub_private_repo if private is None else private,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
        )

    # ---- Uploads ---------------------------------------------------------------------------------------------------

    def push_export(self, message: str | None, blocking: bool, token: str | None, revision: str | None):
        """Upload the export; return the commit or, if not blocking, its Future."""
        pushed = self._upload(export_files(self.exports.folder), message, not blocking, token, revision)
        if not blocking:
            self._jobs = [pushed]  # the next push waits for it, and then replaces its files
        return pushed

    def _upload(self, files, message, background, token=None, revision=None):
        return upload(
            files,
            self.repository,
            message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            background=background,
        )

    def finish(self) -> None:
        """Wait for uploads in the background, and warn of one that failed."""
        if self.running:
            logger.info("Waiting for the current push to the Hub, which may take minutes.")
        wait(self._jobs)
        self._report_failed()

    def _report_failed(self) -> None:
        for job in self._jobs:
            if job.exception() is not None:
                logger.warning(f"{job.exception()} Training goes on.")
                self._jobs = []
                return

    # ---- While training --------------------------------------------------------------------------------------------

    def on_save(self, args, state, control, processing_class=None, **kwargs):
        if not args.push_to_hub or not state.is_world_process_zero or args.hub_strategy == HubStrategy.END:
            return
        if self.running:
            if not args.hub_always_push:
                return
            wait(self._jobs)  # its files are about to be replaced
        self._report_failed()
        self.on_begin()
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        folder = self.exports.write_checkpoint(checkpoint, processing_class, self.repository)
        message = f"Training in progress, step {state.global_step}"
        self._jobs = [self._upload(export_files(folder), message, background=True)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            files = {f"{name}/{path}": content for path, content in _public_checkpoint(checkpoint).items()}
            self._jobs.append(self._upload(files, f"{message}, checkpoint", background=True))

    def on_train_end(self, args, state, control, **kwargs):
        self.finish()


def _public_checkpoint(checkpoint: Path) -> dict[str, Path | bytes]:
    """Return a checkpoint's files for others: the state without local paths, and a manifest to match."""
    files: dict[str, Any] = {path.name: path for path in sorted(checkpoint.iterdir())}
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    if state["best_model_checkpoint"]:
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    files[TRAINER_STATE_NAME] = json.dumps(state, indent=2).encode()
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
    manifest["files"][TRAINER_STATE_NAME] = size_and_checksum(files[TRAINER_STATE_NAME])
    files[MANIFEST_NAME] = json.dumps(manifest, indent=2).encode()
    return files
