"""The Hub: a repository for an export, one commit an upload, and errors that say what to do."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    ModelInfo,
    constants,
    hf_hub_download,
    run_as_future,
)
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.trainer import TRAINING_ARGS_NAME

from ..errors import HfkdError
from ..runs.folder import CONFIG_NAME, WEIGHTS_NAME
from .errors import SILENCE, PushError, asking, no_right


def export_files(folder: Path) -> dict[str, Path]:
    """The files of an export, by their names, without hidden ones and Trainer's arguments, which hold the Hub token."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {path.name: path for path in files if path.name[0] != "." and path.name != TRAINING_ARGS_NAME}


def open_repository(repo_id: str, config: Mapping[str, Any] | None, **settings: Any) -> str:
    """`ensure_repository`, before anything is trained.

    Raises:
        ValueError: where that raises PushError.
    """
    try:
        return ensure_repository(repo_id, config, **settings)
    except PushError as error:
        raise HfkdError(
            f"{error} Training has not started. Without push_to_hub it does without the Hub, and `hfkd push` uploads "
            "the result later."
        ) from error.__cause__


def ensure_repository(
    repo_id: str,
    config: Mapping[str, Any] | None,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Creates a model repository, and a branch of it, unless they are there, and checks that a model may go there.

    Args:
        repo_id: `owner/name`, or the name of one of the token's user.
        config: the model's configuration; what it replaces must be of the same architecture and classes. None: it
            replaces nothing.
        private: for a new repository.
        token: by default the one that is logged in.
        revision: a branch; a new one starts from main.

    Returns:
        The repository's full id.

    Raises:
        PushError: if the id is not valid, the token is missing, not valid or without the right to write there, the
            Hub cannot be reached, or the repository is public and should be private, or holds something else.
    """
    with asking(repo_id, revision, token) as token:
        validate_repo_id(repo_id)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with asking(repo_id, revision, token):
        _check_right(api, repo_id)
        try:
            info, new_branch = api.model_info(repo_id, revision=revision, timeout=SILENCE), False
        except RevisionNotFoundError:
            info, new_branch = api.model_info(repo_id, timeout=SILENCE), True
        if private and not info.private:
            raise PushError(
                f"{repo_id} exists and is public, and hub_private_repo applies to a new repository only. Make it "
                f"private in its settings ({constants.ENDPOINT}/{repo_id}/settings), or give another hub_model_id."
            )
        _check_content(info, config, token)
        if new_branch:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _check_right(api: HfApi, repo_id: str) -> None:
    """Raises PushError if a valid token may not write: that the repository exists may be all `create_repo` found."""
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise PushError(no_right(error, repo_id)) from error
        raise


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    message: str,
    token: str | None = None,
    revision: str | None = None,
    background: bool = False,
) -> CommitInfo | Future[CommitInfo]:
    """One commit of files to a repository that is there.

    Args:
        files: by their path in the repository.
        background: whether to return at once; such uploads run one after the other, in the order of the calls.

    Returns:
        The commit or, in the background, its Future.

    Raises:
        PushError: if the Hub refuses or is not reached; in the background, the Future holds it.
    """
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]

    def commit() -> CommitInfo:
        try:
            with asking(repo_id, revision, token) as used:
                return HfApi(token=used).create_commit(repo_id, operations, commit_message=message, revision=revision)
        except PushError as error:
            raise PushError(f"{error} {_way_on(files, repo_id, revision)}") from error.__cause__

    return run_as_future(commit) if background else commit()


def _way_on(files: Mapping[str, Path | bytes], repo_id: str, revision: str | None) -> str:
    weights = files.get(WEIGHTS_NAME)
    if not isinstance(weights, Path):  # a checkpoint's files, say, which are no export
        return "Nothing is lost: what was to be uploaded is on disk."
    command = ["hfkd", "push", str(weights.parent), "--hub_model_id", repo_id]
    command += ["--hub_revision", revision] if revision else []
    return f"Nothing is lost: {weights.parent} holds the whole model. Complete the push with: {shlex.join(command)}"


# ---- What is there already -----------------------------------------------------------------------------------------


def _check_content(info: ModelInfo, config: Mapping[str, Any] | None, token: str) -> None:
    """Raises PushError if a repository holds more than what every new one does, unless it is the same model."""
    files = sorted(file.rfilename for file in info.siblings)
    bare = re.compile(r"\.gitattributes|\.gitignore|README\.md|LICENSE.*", re.IGNORECASE)
    others = [name for name in files if not bare.fullmatch(name)]
    if not others:
        return
    difference = ""
    if CONFIG_NAME in others and config is not None:
        path = hf_hub_download(info.id, CONFIG_NAME, revision=info.sha, token=token)
        difference = _difference(path, config)
        if difference is None:
            return
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    raise PushError(
        f"{info.id} holds something else: {', '.join(others[:5])}{more}{difference}. Give another hub_model_id or "
        f"hub_revision, or delete what is at {constants.ENDPOINT}/{info.id} if nobody needs it."
    )


def _difference(path: str, config: Mapping[str, Any]) -> str | None:
    """How the model of a config.json differs from another one; None: the one may replace the other."""
    try:
        found = json.loads(Path(path).read_text())
        there, here = _architecture(found), _architecture(config)
        classes, expected = _class_names(found), _class_names(config)
    except (ValueError, LookupError, AttributeError, TypeError):
        return " (its config.json is not that of an image classifier)"
    if there != here:
        return f" (its model is a {there}, this one a {here})"
    if len(classes) != len(expected):
        return f" (its {there} has {len(classes)} classes, this one {len(expected)})"
    for index, names in enumerate(zip(classes, expected, strict=True)):
        if names[0] != names[1]:
            return f" (class {index} of its {there} is '{names[0]}', of this one '{names[1]}')"
    return None


def _architecture(config: Mapping[str, Any]) -> str:
    return config.get("architecture") or config["model_type"]  # timm's name, which a wrapped timm model has, too


def _class_names(config: Mapping[str, Any]) -> Sequence[str]:
    """In the order of the labels; a config.json leaves out the names that transformers gives by default."""
    if config.get("label_names"):  # timm's
        return config["label_names"]
    names = config.get("id2label") or {index: f"LABEL_{index}" for index in range(config.get("num_classes", 2))}
    return [names[key] for key in sorted(names, key=int)]
