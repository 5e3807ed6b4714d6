"""Exports of a run: the student's folder with model, card, results and recipe, whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..errors import RunError
from ..hub.card import CARD_NAME, FIGURE_NAME, write_card
from ..recipe.config import DistillationConfig
from ..recipe.keys import NOT_RECORDED, public_recipe
from ..recipe.yaml_file import dump_yaml
from ..runs.claims import is_own_export
from ..runs.folder import RECIPE_NAME, RESULTS_NAME
from ..runs.writing import FORMER, PARTIAL, beside, leftovers, settle, sync_folder, write_whole
from .checkpoints import WEIGHTS_PATTERN
from .results import ResultsWriter


class Exports:
    """The exported model of one run.

    Args:
        args: the run's settings.
        results: rows and facts of `results.json`.

    Attributes:
        name: folder in `output_dir` that the trained model is exported to.
        recipe: the settings that an export records; None for every field of `args` that is not at its default.
    """

    def __init__(self, args: DistillationConfig, results: ResultsWriter):
        self.args, self.results = args, results
        self.name = "student"
        self.recipe: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """Folder of the exported model."""
        return Path(self.args.output_dir, self.name)

    def write(self, save: Callable[[str], None], repo_id: str | None, metadata: dict[str, Any]) -> Path:
        """Write the export and return its folder. All processes must call it.

        Args:
            save: writes the model into a folder.
            repo_id: repository that the card names.
            metadata: of the card; see `write_card`.
        """
        with _replacing(self.folder, self.args.should_save) as partial:
            save(str(partial))
            if self.args.should_save:
                self._describe(partial, repo_id, metadata)
        return self.folder

    def write_checkpoint(self, checkpoint: Path, processing_class, repo_id: str | None) -> Path:
        """Write the model of a checkpoint as the export, and return its folder."""
        with _replacing(self.folder) as partial:
            for path in checkpoint.iterdir():
                if path.name == "config.json" or path.match(f"{WEIGHTS_PATTERN}*"):
                    shutil.copy2(path, partial)
            if processing_class is not None:
                processing_class.save_pretrained(partial)
            self._describe(partial, repo_id, {}, exported="last")
        return self.folder

    def _describe(self, folder: Path, repo_id: str | None, metadata: dict[str, Any], **facts: Any) -> None:
        """Write results, recipe and card beside the weights; `facts` replace the run's in results.json."""
        results = copy.copy(self.results)
        results.facts = results.facts | facts
        results.write(folder / RESULTS_NAME)
        recipe = _changed_fields(self.args) if self.recipe is None else self.recipe
        write_whole(folder / RECIPE_NAME, dump_yaml(public_recipe(recipe)))
        write_card(folder, repo_id, **metadata)


@contextlib.contextmanager
def _replacing(folder: Path, writes: bool = True) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of an export at the end; until then that one stays.

    Files that somebody added to the export are kept.

    Raises:
        RunError: if the folder is not an export of hfkd.
    """
    partial, former = beside(folder, PARTIAL), beside(folder, FORMER)
    if not writes:
        yield partial
        return
    _clear_up(folder)
    if not is_own_export(folder):
        raise RunError(f"{folder} is not an export of hfkd, and the trained model would replace it: move it.")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            _keep_others(folder, partial)
        settle(partial)
        if folder.exists():
            folder.rename(former)
        partial.rename(folder)
        sync_folder(folder.parent)
    finally:
        for path in (partial, former) if folder.exists() else (partial,):
            shutil.rmtree(path, ignore_errors=True)


def _clear_up(folder: Path) -> None:
    """Put back an export whose process was killed while replacing it, and remove what such processes left."""
    for former in leftovers(folder, FORMER):
        if not folder.exists():
            former.rename(folder)
    for path in (*leftovers(folder, PARTIAL), *leftovers(folder, FORMER)):
        shutil.rmtree(path, ignore_errors=True)


def _keep_others(folder: Path, partial: Path) -> None:
    """Copy the files of an export that hfkd did not write to the one that takes its place."""
    for path in folder.iterdir():
        own = path.name in (CARD_NAME, FIGURE_NAME) or path.match(f"{WEIGHTS_PATTERN}*")
        if own or (partial / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, partial / path.name, symlinks=True)
        else:
            shutil.copy2(path, partial, follow_symlinks=False)


def _changed_fields(args: TrainingArguments) -> dict[str, Any]:
    """Return the fields that are not at their defaults; a loss given as an instance is named by its class."""

    def plain(args):
        return json.loads(json.dumps(args.to_dict(), default=lambda loss: type(loss).__name__))

    given, default = plain(args), plain(type(args)(output_dir=args.output_dir))
    return {key: value for key, value in given.items() if value != default[key] and key not in NOT_RECORDED}
