"""Probes in a model card: what `hfkd evaluate --probe` measured of an export's features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runs.folder import RESULTS_NAME
from ..runs.reading import read_results
from ..runs.tables import markdown_table
from ..runs.writing import write_whole
from .card_text import code

HEADING = "## Probes of the features"
KEY = "probes"  # in an export's results.json: a list with an entry for each pair of splits
WORDS = {"knn": "20 nearest neighbours", "linear": "logistic regression"}


def record_probes(folder: Path, images: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Add the probes of an export's features to its results.json, in place of earlier ones on the same images.

    Args:
        images: `dataset`, `train_split`, `train_images`, `eval_split` and `eval_images` of the probes.
        metrics: top-1 in percent of `knn` or `linear`, or both.
    """
    results = read_results(folder / RESULTS_NAME)
    known = [entry for entry in results.get(KEY, []) if not all(entry.get(key) == images[key] for key in images)]
    same = [entry for entry in results.get(KEY, []) if entry not in known]
    results[KEY] = [*known, {**(same[0] if same else {}), **images, **metrics}]
    write_whole(folder / RESULTS_NAME, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def probes_section(results: dict[str, Any]) -> str | None:
    """Return the table of the probes; None where nothing was probed."""
    entries = results.get(KEY)
    if not entries:
        return None
    rows = [
        [
            code(entry["dataset"]),
            f"{code(entry['train_split'])}, {entry['train_images']:,}",
            f"{code(entry['eval_split'])}, {entry['eval_images']:,}",
            *(f"{entry[probe]:.2f}" if probe in entry else "" for probe in WORDS),
        ]
        for entry in entries
    ]
    header = ["data set", "labelled images", "evaluated images", *WORDS.values()]
    return f"{HEADING}\n\nTop-1 in percent, of the frozen features of these weights.\n\n{markdown_table(header, rows)}"
