"""Repositories on the Hub: creating one for an export, checking it, and uploading files in one commit."""

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
from .errors import READ_TIMEOUT, PushError, hub_access, write_denied


def export_files(folder: Path) -> dict[str, Path]:
    """Return the files of an export by name, without hidden files and Trainer's arguments, which hold the Hub token."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {path.name: path for path in files if path.name[0] != "." and path.name != TRAINING_ARGS_NAME}


def open_repository(repo_id: str, config: Mapping[str, Any] | None, **settings: Any) -> str:
    """Call `ensure_repository` before training starts.

    Raises:
        HfkdError: if `ensure_repository` raises PushError.
    """
    try:
        return ensure_repository(repo_id, config, **settings)
    except PushError as error:
        raise HfkdError(
            f"{error} Training has not started. Leave push_to_hub out to train without the Hub; `hfkd push` uploads "
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
    """Create a model repository, and a branch, if they do not exist, and check that the model may be pushed there.

    Args:
        repo_id: `owner/name`, or a name alone for the token's user.
        config: the model's configuration. A model in the repository must have the same architecture and classes. None:
            the repository must hold no model.
        private: visibility of a new repository.
        token: token for the Hub; by default the one of `hf auth login`.
        revision: a branch; a new one starts from main.

    Returns:
        The full id of the repository.

    Raises:
        PushError: if the id is not valid; if the token is missing, not valid or without write access; if the Hub is not
            reached; if the repository is public and should be private, or holds something else.
    """
    with hub_access(repo_id, revision, token) as token:
        validate_repo_id(repo_id)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with hub_access(repo_id, revision, token):
        _check_write_access(api, repo_id)
        try:
            info, new_branch = api.model_info(repo_id, revision=revision, timeout=READ_TIMEOUT), False
        except RevisionNotFoundError:
            info, new_branch = api.model_info(repo_id, timeout=READ_TIMEOUT), True
        if private and not info.private:
            raise PushError(
                f"{repo_id} exists and is public, and hub_private_repo applies to a new repository only. Make it "
                f"private in its settings ({constants.ENDPOINT}/{repo_id}/settings), or give another hub_model_id."
            )
        _check_content(info, config, token)
        if new_branch:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _check_write_access(api: HfApi, repo_id: str) -> None:
    """Check that a valid token may write; `create_repo` may only have found that the repository exists.

    Raises:
        PushError: if it may not.
    """
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise PushError(write_denied(error, repo_id)) from error
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
    """Upload files to an existing repository in one commit.

    Args:
        files: paths or contents by their path in the repository.
        background: return at once; such uploads run one after the other, in the order of the calls.

    Returns:
        The commit or, in the background, its Future.

    Raises:
        PushError: if the Hub refuses or is not reached; in the background, the Future holds it.
    """
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]

    def commit() -> CommitInfo:
        try:
            with hub_access(repo_id, revision, token) as used:
                return HfApi(token=used).create_commit(repo_id, operations, commit_message=message, revision=revision)
        except PushError as error:
            raise PushError(f"{error} {_recovery_hint(files, repo_id, revision)}") from error.__cause__

    return run_as_future(commit) if background else commit()


def _recovery_hint(files: Mapping[str, Path | bytes], repo_id: str, revision: str | None) -> str:
    """Return the sentence that tells how to complete a failed push."""
    weights = files.get(WEIGHTS_NAME)
    if not isinstance(weights, Path):  # the files of a checkpoint, for example, which are no export
        return "Nothing is lost: the files are on disk."
    command = ["hfkd", "push", str(weights.parent), "--hub_model_id", repo_id]
    command += ["--hub_revision", revision] if revision else []
    return f"Nothing is lost: {weights.parent} holds the whole model. Complete the push with: {shlex.join(command)}"


# ---- Content of an existing repository -----------------------------------------------------------------------------


def _check_content(info: ModelInfo, config: Mapping[str, Any] | None, token: str) -> None:
    """Check that a repository is empty, except for the files of every new one, or holds the same model.

    Raises:
        PushError: if it holds something else.
    """
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
    """Return how the model of a config.json differs from another one; None if one may replace the other."""
    try:
        found = json.loads(Path(path).read_text())
        there, here = _architecture(found), _architecture(config)
        classes, expected = _class_names(found), _class_names(config)
    except (ValueError, LookupError, AttributeError, TypeError):
        return " (its config.json is not an image classifier's)"
    if there != here:
        return f" (its model is a {there}, this one a {here})"
    if len(classes) != len(expected):
        return f" (its {there} has {len(classes)} classes, this one {len(expected)})"
    for index, names in enumerate(zip(classes, expected, strict=True)):
        if names[0] != names[1]:
            return f" (class {index} of its {there} is '{names[0]}', of this one '{names[1]}')"
    return None


def _architecture(config: Mapping[str, Any]) -> str:
    """Return timm's name of the architecture, which a wrapped timm model has too, or transformers' model type."""
    return config.get("architecture") or config["model_type"]


def _class_names(config: Mapping[str, Any]) -> Sequence[str]:
    """Return the class names in the order of the labels; a config.json leaves out transformers' default names."""
    if config.get("label_names"):  # timm's key
        return config["label_names"]
    names = config.get("id2label") or {index: f"LABEL_{index}" for index in range(config.get("num_classes", 2))}
    return [names[key] for key in sorted(names, key=int)]
