"""What a training leaves for others: the exported student, on disk and on the Hub."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..hub.card import write_card
from ..hub.repository import ensure_repository, export_files, open_repository, upload
from ..recipe.keys import NOT_RECORDED, public_recipe
from ..runs.checkpoints import MANIFEST_NAME, file_facts
from ..runs.folder import RECIPE_NAME, RESULTS_NAME, write_whole
from .checkpoints import ResumableTrainer
from .results import ResultsWriter

logger = logging.get_logger(__name__)


class SavingTrainer(ResumableTrainer):
    """Exports and pushes of a student that is trained with losses of their own.

    Attributes:
        export_name: the folder of `output_dir` that the trained model is exported to.
        recipe: what an export says of its settings; None: every field of `args` that is not at its default.
        results: the rows and facts of `results.json`.
    """

    export_name = "student"
    recipe: dict[str, Any] | None = None
    results: ResultsWriter

    # ---- Export ----------------------------------------------------------------------------------------------------

    def export(self, repo_id: str | None = None, **metadata) -> Path:
        """Writes what others are to get: model, card, results, recipe and curves, whole or not at all.

        Args:
            repo_id: the repository that the card is to speak of.
            **metadata: of the card; see `write_card`.

        Returns:
            `<output_dir>/student`, or what `export_name` says.

        Raises:
            RuntimeError: if it cannot be written, on a full disk for one; the export before it is whole.
        """
        folder = self.export_folder
        try:
            with _replacing(folder, self.args.should_save) as partial:
                self.save_model(str(partial), _internal_call=True)
                if self.args.should_save:
                    self._describe(partial, repo_id, metadata)
        except (OSError, SafetensorError) as error:
            raise self._unwritten(folder, error) from error
        return folder

    @property
    def export_folder(self) -> Path:
        return Path(self.args.output_dir, self.export_name)

    def _describe(self, folder: Path, repo_id: str | None, metadata: dict[str, Any], **facts) -> None:
        """What stands beside the weights of an export; `facts` are what its results.json says otherwise than the
        run's."""
        results = copy.copy(self.results)
        results.facts = results.facts | facts
        results.write(folder / RESULTS_NAME)
        recipe = _changed(self.args) if self.recipe is None else self.recipe
        write_whole(folder / RECIPE_NAME, yaml.safe_dump(public_recipe(recipe), sort_keys=False))
        write_card(folder, repo_id, **metadata)

    def create_model_card(
        self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, dataset=None, **kwargs
    ) -> None:
        """Exports the student with its card; `kwargs`, which Trainer takes as well, the run knows itself."""
        metadata = {"language": language, "license": license, "tags": tags, "model_name": model_name}
        self.export(**metadata, finetuned_from=finetuned_from, dataset=dataset)

    # ---- The Hub ---------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes sure that the repository is there and may be written to: Trainer calls it before anything is trained.

        Raises:
            ValueError: see `open_repository`.
        """
        self._find_repository(open_repository, token, private, revision=None)

    def _find_repository(self, find, token, private, revision) -> None:
        if not self.is_world_process_zero():
            return
        args = self.args
        self.hub_model_id = find(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            self.model.config.to_dict() if isinstance(self.model, PreTrainedModel) else None,
            private=args.hub_private_repo if private is None else private,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
        )
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **metadata,
    ):
        """Exports the student and uploads that folder: model, card, results, recipe, curves, and nothing else.

        Args:
            commit_message, blocking, token, revision, private: as Trainer's.
            **metadata: of the card; see `write_card`.

        Returns:
            The commit, or, if not blocking, its Future; None in all processes but the first.

        Raises:
            PushError: if the Hub refuses or cannot be reached. The export is whole, and another call completes it.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        if self.hub_model_id is None or (revision or self.args.hub_revision) != self.args.hub_revision:
            self._find_repository(ensure_repository, token, private, revision)
        folder = self.export(self.hub_model_id, **metadata)
        if not self.is_world_process_zero():
            return None
        pushed = self._upload(export_files(folder), commit_message, not blocking, token, revision)
        if not blocking:
            self.push_in_progress = PushInProgress([pushed])  # the next one waits for it, and then replaces its files
        return pushed

    def _upload(self, files, message, background, token=None, revision=None):
        return upload(
            files,
            self.hub_model_id,
            message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            background=background,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if self._pushing():
            if not args.hub_always_push:
                return
            self.push_in_progress.wait_until_done()  # its files are about to be replaced
        self._report_failed_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        folder, checkpoint = self.export_folder, Path(checkpoint_folder)
        with _replacing(folder) as partial:
            for path in checkpoint.iterdir():
                if path.name == "config.json" or path.match("model*.safetensors*"):
                    shutil.copy2(path, partial)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(partial)
            self._describe(partial, self.hub_model_id, {}, exported="last")
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(export_files(folder), message, background=True)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            files = {f"{name}/{path}": content for path, content in _public_checkpoint(checkpoint).items()}
            jobs.append(self._upload(files, f"{message}, checkpoint", background=True))
        self.push_in_progress = PushInProgress(jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_failed_push()

    def _report_failed_push(self) -> None:
        """Training goes on without the Hub; the next push, or the last, brings what is missing there."""
        push = self.push_in_progress if self.hub_model_id is not None else None
        for job in push.jobs if push is not None else []:
            if job.exception() is not None:
                logger.warning(f"{job.exception()} Training goes on.")
                self.push_in_progress = None


@contextlib.contextmanager
def _replacing(folder: Path, writes: bool = True) -> Iterator[Path]:
    """A folder to write to, which takes the other's place once all is written; until then that one stays."""
    partial, former = (folder.with_name(f"{folder.name}.{state}") for state in ("partial", "former"))
    if not writes:
        yield partial
        return
    for path in (partial, former):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(former)
        partial.rename(folder)
    finally:
        for path in (partial, former):
            shutil.rmtree(path, ignore_errors=True)


def _changed(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that are not at their defaults; of a loss that is given as an instance, the name of its class."""

    def plain(args):
        return json.loads(json.dumps(args.to_dict(), default=lambda loss: type(loss).__name__))

    given, default = plain(args), plain(type(args)(output_dir=args.output_dir))
    return {key: value for key, value in given.items() if value != default[key] and key not in NOT_RECORDED}


def _files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir())}


def _public_checkpoint(checkpoint: Path) -> dict[str, Path | bytes]:
    """A checkpoint's files for others: the state without the path of the output folder, and a manifest to match."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    if state["best_model_checkpoint"]:
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    files: dict[str, Path | bytes] = _files_of(checkpoint)
    files[TRAINER_STATE_NAME] = json.dumps(state, indent=2).encode()
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
    manifest["files"][TRAINER_STATE_NAME] = file_facts(files[TRAINER_STATE_NAME])
    files[MANIFEST_NAME] = json.dumps(manifest, indent=2).encode()
    return files
