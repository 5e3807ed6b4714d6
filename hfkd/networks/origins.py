"""Origins of weights, in words: what the name of a student or a teacher starts from."""

from __future__ import annotations

import timm
from timm.models import split_model_name_tag

from ..names import hub_id
from .sources import resolve_name

RANDOM_WEIGHTS = "random weights"


def student_weights(name_or_path: str, pretrained: bool = False) -> str:
    """Return what `load_student` starts from.

    Args:
        pretrained: an architecture without a tag starts from timm's default weights.
    """
    name_or_path = resolve_name(name_or_path)
    if timm.is_model(name_or_path):
        tagged = bool(split_model_name_tag(name_or_path)[1])
        return _of_timm(name_or_path) if tagged or pretrained else RANDOM_WEIGHTS
    return _of_place(name_or_path)


def teacher_weights(name_or_path: str, checkpoint: str | None = None) -> str:
    """Return what `load_teacher` loads."""
    name_or_path = resolve_name(name_or_path)
    if checkpoint is not None:
        return f"weights from the file {checkpoint}"
    return _of_timm(name_or_path) if timm.is_model(name_or_path) else _of_place(name_or_path)


def _of_timm(architecture: str) -> str:
    cfg = timm.get_pretrained_cfg(architecture)
    tag = cfg.tag if cfg is not None else ""
    return f"timm's pretrained weights {tag}".rstrip()


def _of_place(name_or_path: str) -> str:
    return f"weights from {'the Hub, ' if hub_id(name_or_path) else 'the folder '}{name_or_path}"
