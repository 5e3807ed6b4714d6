"""Log of the loss terms."""

from __future__ import annotations

UNLOGGED_NAME = "unlogged.json"
