"""What can go wrong with the Hub, said so that a person knows what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of huggingface_hub's HTTP client, which its versions 1 and 2 do not share
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import RunError

CONNECTING, SILENCE = 10, 60  # seconds without a connection, or without a byte, that are taken for a dead network
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
WAYS_TO_LOG_IN = "`hf auth login`, HF_TOKEN or hub_token"


class PushError(RunError):
    """The Hub refused or was not reached; what is on disk is whole."""


@contextmanager
def asking(repo_id: str, revision: str | None, token: str | None) -> Iterator[str]:
    """Gives the token to use; what goes wrong within becomes a PushError that says what to do, without the token.

    huggingface_hub itself tries an upload again, up to five times within half a minute, and says so.
    """
    token = token or get_token()
    if not token:
        raise PushError(f"There is no token for the Hub: log in with {WAYS_TO_LOG_IN} ({TOKENS_PAGE}).")
    if not re.fullmatch("[!-~]+", token):  # the HTTP client's error would print it
        raise PushError(
            f"The token for the Hub holds a blank or another character that no token has: {WAYS_TO_LOG_IN}."
        )
    get_session().timeout = (CONNECTING, SILENCE, SILENCE, SILENCE)  # by default the client waits for ever
    try:
        yield token
    except PushError:
        raise
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        raise PushError(_explained(error, repo_id, revision).replace(token, "***")) from error


def _explained(error: Exception, repo_id: str, revision: str | None) -> str:
    """What one of huggingface_hub's errors means to a person."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of the upload of one large file
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked: unset it."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access at {constants.ENDPOINT}/{repo_id}, or give another hub_model_id."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision '{revision}'."
    if isinstance(error, HfHubHTTPError):
        return _explained_answer(error, repo_id)
    if isinstance(error, (HTTPError, LocalEntryNotFoundError)):
        cause = error.__cause__ or error  # a download names it
        return f"The Hub ({constants.ENDPOINT}) was not reached or fell silent ({type(cause).__name__}: {cause})."
    if isinstance(error, HFValidationError):
        return f"hub_model_id: '{repo_id}' is no name of a repository, such as me/deit-tiny-kd is one. {error}"
    return f"What was asked of the Hub failed ({type(error).__name__}: {error})."


def _explained_answer(error: HfHubHTTPError, repo_id: str) -> str:
    status, said = error.response.status_code, error.server_message or ""
    if status == 401:
        return (
            f"The Hub does not accept the token: it is mistyped, expired or revoked. Make a new one, which may write, "
            f"at {TOKENS_PAGE}, and log in with {WAYS_TO_LOG_IN}."
        )
    if status == 403:
        return no_right(error, repo_id)
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no repository {repo_id}, or none that the token may see: give another hub_model_id."
    return f"The Hub answered {status} ({said or error})."


def no_right(error: HfHubHTTPError, repo_id: str) -> str:
    said = error.server_message or error
    return (
        f"The token may not write to {repo_id} ({said}). Give a hub_model_id of your own or of an organisation that "
        f"you write for, or a token that may write ({TOKENS_PAGE})."
    )
