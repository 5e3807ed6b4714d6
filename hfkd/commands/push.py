"""`hfkd push`: upload of an exported model to the Hub."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard

from ..errors import HfkdError
from ..hub.card import CARD_NAME, REQUIRED, write_card
from ..hub.repository import ensure_repository, export_files, upload
from ..recipe.parser import ArgumentParser
from ..runs.claims import check_own
from ..runs.folder import CONFIG_NAME, RESULTS_NAME, ROLES, WEIGHTS_NAME
from ..runs.onnx_files import PREPROCESSING_NAME, export_command, onnx_files
from ..runs.reading import read_results
from .arguments import parse_with_subject

USAGE = "hfkd push FOLDER --hub_model_id me/name [--key value ...]"
DESCRIPTION = "Uploads what a run exported, with its card and the ONNX files of `hfkd export`, to the Hub."
PARTS = (CONFIG_NAME, WEIGHTS_NAME, RESULTS_NAME)  # every export holds these


@dataclass
class PushArguments:
    """Repository to push to, and the right to do so."""

    hub_model_id: str = field(
        metadata={"help": "Repository to push to, me/name or organisation/name; it is created if it does not exist."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Make a new repository private; by default its owner's settings decide."}
    )
    hub_revision: str | None = field(
        default=None, metadata={"help": "Branch to push to, by default main; it is created if it does not exist."}
    )
    hub_token: str | None = field(
        default=None,
        metadata={"help": "Token with write access. `hf auth login` is safer: other users see a command line."},
    )


def push(argv: list[str] | None = None) -> CommitInfo:
    """Upload an export and print its address: `FOLDER --hub_model_id me/name`.

    FOLDER is an export, or a run's folder that holds one. Its card is written again, for the repository, and its ONNX
    files go with it. If a push is
    cut off, the same command completes it, without sending again the files that the Hub has stored.

    Raises:
        ValueError: for a folder that is no export, or an unknown key.
        PushError: if the Hub refuses the push or cannot be reached.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser((PushArguments,), USAGE, DESCRIPTION)
    name, args = parse_with_subject(argv, parser, "the folder to push")
    folder = find_export(Path(name))
    access = {"token": args.hub_token, "revision": args.hub_revision}
    config = _read_config(folder / CONFIG_NAME)
    read_results(folder / RESULTS_NAME, REQUIRED)
    metadata = _given_metadata(folder)
    repo_id = ensure_repository(args.hub_model_id, config, private=args.hub_private_repo, **access)
    try:
        write_card(folder, repo_id, **metadata)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # values of another form than hfkd's
        if isinstance(error, HfkdError):
            raise
        raise HfkdError(
            f"{folder}: no card can be written from its {RESULTS_NAME} and recipe ({type(error).__name__}: {error}). "
            "Give the folder that a run of hfkd wrote."
        ) from error
    commit = upload(export_files(folder) | _onnx(folder), repo_id, message="Upload with hfkd push", **access)
    place = f"/tree/{args.hub_revision}" if args.hub_revision else ""
    print(f"Pushed {folder} to {commit.repo_url}{place}")
    return commit


def _onnx(folder: Path) -> dict[str, Path]:
    """Return the ONNX files of an export's weights by their path in the repository, and print which are of others."""
    files, reasons = onnx_files(folder)
    for precision, reason in reasons.items():
        print(f"Not pushed: {reason}. Export again: {export_command(folder, precision)}")
    paths = [path for file in files for path in (file.path, file.path.with_name(PREPROCESSING_NAME))]
    return {f"{path.parent.name}/{path.name}": path for path in paths}


def _given_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata given to `trainer.push_to_hub(license=...)`, which only the card has, to keep it."""
    path = folder / CARD_NAME
    if not path.is_file():
        return {}
    data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    check_own(folder, [CARD_NAME], "hfkd" in (data.tags or []), "FOLDER")
    return {"language": data.language, "license": data.license, "tags": data.tags}


def find_export(folder: Path) -> Path:
    """Return the export: the folder itself, or the one in a run's folder.

    Raises:
        ValueError: if the folder is no export and holds none, or several.
    """
    if not folder.is_dir():
        raise HfkdError(f"There is no folder {folder} to push.")
    candidates = [folder, *(folder / role for role in ROLES)]
    found = [place for place in candidates if all((place / name).is_file() for name in PARTS)]
    if len(found) == 1:
        return found[0]
    if found:
        raise HfkdError(f"{folder} holds several exports: push one of {', '.join(map(str, found))}.")
    missing = ", ".join(name for name in PARTS if not (folder / name).is_file())
    raise HfkdError(
        f"{folder} is no export: it has no {missing}. Give the folder that a run wrote for its trained model, such as "
        f"{folder / ROLES[0]}, or the run's own."
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise HfkdError(f"{path} is damaged ({error}): export the model again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise HfkdError(f"{path} is damaged (it names no model_type): export the model again.")
    return config
