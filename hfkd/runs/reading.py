"""Reading of JSON files and results that others may have written: damaged, of another program, or hostile."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import HfkdError

LARGEST_JSON = 2**28  # bytes; the results of a long run have some hundred thousand
NUMBER = (int, float)
# Types of the entries of results.json that tables, figures and cards read.
TYPES: dict[str, Any] = {
    **dict.fromkeys(("role", "student", "exported", "devices"), str),
    **dict.fromkeys(("recipe", "teacher", "git_commit"), (str, type(None))),
    **dict.fromkeys(("parameters", "planned_steps", "seed"), int),
    **dict.fromkeys(("ce_weight", "seconds"), NUMBER),
    **dict.fromkeys(("teacher_parameters", "published_top1", "images_per_second"), (*NUMBER, type(None))),
    **dict.fromkeys(("losses", "versions", "best", "last", "teacher_cache"), dict),
    **dict.fromkeys(("base_models", "epochs"), list),
    "dataset": (dict, type(None)),
    "logit_standardization": bool,
}
CONTROL = dict.fromkeys([*range(32), *range(127, 160)], " ")  # a terminal would obey some of them


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        HfkdError: if it cannot be read, is empty, damaged or far too large.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size > LARGEST_JSON:
        raise HfkdError(f"{path} has {size:,} bytes, which is more than hfkd writes.")
    if not size:
        raise HfkdError(f"{path} is {'empty' if path.is_file() else 'no file'}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HfkdError(f"{path} is damaged: {error}") from error


def read_results(path: Path, required: Iterable[str] = ()) -> dict[str, Any]:
    """Return the content of a results.json, without control characters in its texts.

    Args:
        required: entries that the reader relies on.

    Raises:
        HfkdError: if the file is damaged, or not the results of a run.
    """
    results = read_json(path)
    missing = [name for name in required if not isinstance(results, dict) or name not in results]
    if missing:
        raise HfkdError(f"{path} was written by another program or an earlier hfkd: it lacks {', '.join(missing)}.")
    for name, kind in TYPES.items():
        if name in results and not isinstance(results[name], kind):
            raise HfkdError(f"{path} is not the results of a run: its {name} is a {type(results[name]).__name__}.")
    if not all(isinstance(each, dict) for each in [*results.get("epochs", ()), *results.get("losses", {}).values()]):
        raise HfkdError(f"{path} is not the results of a run: an entry of its epochs or losses is no mapping.")
    return printable(results)


def is_results(path: Path) -> bool:
    """Return True if a file is a results.json of hfkd."""
    try:
        results = read_json(path)
    except HfkdError:
        return False
    versions = results.get("versions") if isinstance(results, dict) else None
    return not path.is_symlink() and isinstance(versions, dict) and "hfkd" in versions


def printable(value: Any) -> Any:
    """Return a value from a file with spaces in place of the control characters in its texts."""
    if isinstance(value, str):
        return value.translate(CONTROL)
    if isinstance(value, dict):
        return {printable(key): printable(each) for key, each in value.items()}
    return [printable(each) for each in value] if isinstance(value, list) else value
