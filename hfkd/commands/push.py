"""`hfkd push`: upload an exported model to the Hub."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    ModelCard,
)

from ..errors import HfkdError
from ..hub.card import write_card
from ..hub.repository import (
    WEIGHTS_NAME,
    ensure_repository,
    export_files,
    upload,
)
from ..recipe.parser import ArgumentParser

PARTS = ("config.json", WEIGHTS_NAME, "results.json")  # every export holds these
ROLES = ("student", "teacher")


@dataclass
class PushArguments:
    """Where to push."""

    hub_model_id: str = field(
        metadata={"help": "Repository to push to, me/name or an organisation's; it is created unless it is there."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private; by default as its owner's settings say."}
    )
    hub_revision: str | None = field(
        default=None, metadata={"help": "Branch to push to; it is created unless it is there. By default main."}
    )
    hub_token: str | None = field(
        default=None,
        metadata={"help": "Token that may write. Better than here, where other users see it: `hf auth login`."},
    )


def push(argv: list[str] | None = None) -> CommitInfo:
    """Uploads what a run exported: `FOLDER --hub_model_id me/name`; prints its address.

    FOLDER is an export, or a run's folder that holds one. Its card is written again, for the repository. A push that
    was cut off is completed by another one, which does not send again what the Hub has stored.

    Raises:
        ValueError: for a folder that is no export, or a key that is unknown.
        PushError: if the Hub refuses or is not reached.
    """
    argv = sys.argv[1:] if argv is None else argv
    usage = "hfkd push FOLDER --hub_model_id me/name [--key value ...]"
    parser = ArgumentParser((PushArguments,), usage, "Uploads what a run exported, with its card, to the Hub.")
    parser.answer_help(argv)
    name = argv[0].partition("=")[0] if argv else ""  # what is behind it may be the token
    if not name or name.startswith("-"):
        raise HfkdError(f"The first argument must be the folder to push, got '{name}': {usage}.")
    [args] = parser.parse(argv[1:])
    folder = find_export(Path(argv[0]))
    access = {"token": args.hub_token, "revision": args.hub_revision}
    config = _read_config(folder / "config.json")
    repo_id = ensure_repository(args.hub_model_id, config, private=args.hub_private_repo, **access)
    write_card(folder, repo_id, **_given_metadata(folder))
    commit = upload(export_files(folder), repo_id, message="Upload with hfkd push", **access)
    place = f"/tree/{args.hub_revision}" if args.hub_revision else ""
    print(f"Pushed {folder} to {commit.repo_url}{place}")
    return commit


def _given_metadata(folder: Path) -> dict[str, Any]:
    """What `trainer.push_to_hub(license=...)` was told of a card and no run knows, so that a new one says it again."""
    if not (folder / "README.md").is_file():
        return {}
    data = ModelCard.load(folder / "README.md").data
    return {"language": data.language, "license": data.license, "tags": data.tags}


def find_export(folder: Path) -> Path:
    """The export that a folder is or, one of a run, holds.

    Raises:
        ValueError: if it is none and holds none, or several.
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
        return json.loads(path.read_text())
    except ValueError as error:
        raise HfkdError(f"{path} is damaged ({error}): export the model again.") from error
