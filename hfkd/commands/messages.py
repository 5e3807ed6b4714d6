"""Messages of the command line: errors written for people, and no secrets."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def raised_here(error: BaseException) -> bool:
    """Does a `raise` of this package stand at the root of an error? Then its message is written for a person."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return Path(frame.filename).is_relative_to(PACKAGE) and frame.line.startswith("raise ")


def hide_token(words: list[str]) -> None:
    """Replaces the Hub token among the words of a command line: W&B shows `sys.argv` to all who see a run."""
    for position, word in enumerate(words):
        if re.match("--hub[_-]token=", word):
            words[position] = "--hub_token=<HUB_TOKEN>"
        elif position and re.fullmatch("--hub[_-]token", words[position - 1]):
            words[position] = "<HUB_TOKEN>"
