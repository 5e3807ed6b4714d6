"""What each recipe key is: public or private, and whether it changes the result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import timm
import yaml

from ..names import DIGITS, is_local, last_part

PATH_KEYS = {"dataset_name", "student_name_or_path", "teacher_name_or_path", "teacher_checkpoint", "teacher_cache"}

# Where a run writes, and to whom it reports and pushes, says nothing of its student.
PRIVATE_KEYS = {
    "output_dir",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
}
# Secrets, and what is no setting.
NOT_RECORDED = {"hub_token", "push_to_hub_token", "resume_from_checkpoint", "allow_recipe_change"}

# On what is trained.
WITHOUT_EFFECT = PRIVATE_KEYS | {
    *("disable_tqdm", "report_to", "dataloader_num_workers", "per_device_eval_batch_size"),
    *("teacher_device_map", "shard_teacher"),
}


def recipe_differences(path: Path, recipe: dict[str, Any]) -> list[str]:
    """The keys on which the recipe of an earlier run, if there is one, has another value, with both values."""
    if not path.is_file():
        return []
    there = yaml.safe_load(path.read_text())
    # The workers of a stream share out its rows.
    without_effect = WITHOUT_EFFECT - ({"dataloader_num_workers"} if recipe.get("streaming") else set())
    return [
        f"{key}: {there.get(key)!r} there, {recipe.get(key)!r} here"
        for key in sorted({*there, *recipe} - without_effect)
        # Beside a checkpoint from the Hub lies the public recipe.
        if there.get(key) not in (recipe.get(key), public_value(key, recipe.get(key)))
    ]


def public_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe for others: `path/to/<name>` in place of a local path, nothing of `PRIVATE_KEYS`."""
    return {key: public_value(key, value) for key, value in recipe.items() if key not in PRIVATE_KEYS}


def public_value(key: str, value: Any) -> Any:
    """The value of one key for others."""
    if isinstance(value, dict):
        return {name: public_value(name, entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [public_value(key, entry) for entry in value]
    if not isinstance(value, str):
        return value
    bare_folder = key in PATH_KEYS and os.path.exists(value) and not timm.is_model(value) and value != DIGITS
    return f"path/to/{last_part(value)}" if bare_folder or is_local(value) else value
