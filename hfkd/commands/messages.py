"""Removal of secrets from a command line."""

from __future__ import annotations

import re


def hide_token(words: list[str]) -> None:
    """Replace the Hub token among the words of a command line, since W&B shows `sys.argv` to all who see a run."""
    for position, word in enumerate(words):
        if re.match("--hub[_-]token=", word):
            words[position] = "--hub_token=<HUB_TOKEN>"
        elif position and re.fullmatch("--hub[_-]token", words[position - 1]):
            words[position] = "<HUB_TOKEN>"
