"""Errors of the Hub, with messages that tell a person what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # imported from huggingface_hub, whose versions 1 and 2 use different HTTP clients
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import RunError

CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60  # seconds
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
WAYS_TO_LOG_IN = "`hf auth login`, HF_TOKEN or hub_token"


class PushError(RunError):
    """Error for a Hub that refused or was not reached; the files on disk are whole."""


@contextmanager
def hub_access(repo_id: str, revision: str | None, token: str | None) -> Iterator[str]:
    """Yield the token to use, and turn errors of the Hub within into a PushError without the token.

    huggingface_hub itself retries an upload up to five times within half a minute, and logs it.

    Raises:
        PushError: if there is no valid token, or the Hub refuses or is not reached.
    """
    token = token or get_token()
    if not token:
        raise PushError(f"There is no token for the Hub: log in with {WAYS_TO_LOG_IN} ({TOKENS_PAGE}).")
    if not re.fullmatch("[!-~]+", token):  # checked here, since the HTTP client's error would print the token
        raise PushError(
            f"The token for the Hub holds a blank or another invalid character: log in again with {WAYS_TO_LOG_IN}."
        )
    # By default the client waits without limit.
    get_session().timeout = (CONNECT_TIMEOUT, READ_TIMEOUT, READ_TIMEOUT, READ_TIMEOUT)
    try:
        yield token
    except PushError:
        raise
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        raise PushError(_explain(error, repo_id, revision).replace(token, "***")) from error


def _explain(error: Exception, repo_id: str, revision: str | None) -> str:
    """Return the message for an error of huggingface_hub."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # huggingface_hub wraps the error of a large file's upload
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not contacted: unset it."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access at {constants.ENDPOINT}/{repo_id}, or give another hub_model_id."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision '{revision}'."
    if isinstance(error, HfHubHTTPError):
        return _explain_response(error, repo_id)
    if isinstance(error, (HTTPError, LocalEntryNotFoundError)):
        cause = error.__cause__ or error  # the error of a download wraps its cause
        return f"The Hub ({constants.ENDPOINT}) was not reached or did not answer ({type(cause).__name__}: {cause})."
    if isinstance(error, HFValidationError):
        return f"hub_model_id: '{repo_id}' is no valid name of a repository, such as me/deit-tiny-kd. {error}"
    return f"The request to the Hub failed ({type(error).__name__}: {error})."


def _explain_response(error: HfHubHTTPError, repo_id: str) -> str:
    """Return the message for an HTTP error status of the Hub."""
    status, said = error.response.status_code, error.server_message or ""
    if status == 401:
        return (
            f"The Hub does not accept the token: it is mistyped, expired or revoked. Create one with write access "
            f"at {TOKENS_PAGE}, and log in with {WAYS_TO_LOG_IN}."
        )
    if status == 403:
        return write_denied(error, repo_id)
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no repository {repo_id}, or none that the token may see: give another hub_model_id."
    return f"The Hub answered {status} ({said or error})."


def write_denied(error: HfHubHTTPError, repo_id: str) -> str:
    """Return the message for a token without write access to a repository."""
    said = error.server_message or error
    return (
        f"The token may not write to {repo_id} ({said}). Give a hub_model_id of your own or of an organisation that "
        f"you write for, or a token that may write ({TOKENS_PAGE})."
    )
