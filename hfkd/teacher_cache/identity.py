"""Which teacher's logits a cache holds, and of which images: what is compared before it is used."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ..data import IndexedImageSource
from ..names import hub_id
from ..networks.teacher import Teacher, TeacherEnsemble

PROBED, ALIKE = 8, 0.01  # images, and normalised pixels: a crop that is off by one moves some mean further
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt"}


def describe_teacher(teacher: Teacher | TeacherEnsemble) -> dict[str, Any]:
    """What `cache.json` says of it. Call it before `prepare`, which rounds the weights."""
    return {
        "name": teacher.name,
        "weights": weights_digest([member.model for member in teacher.members]),
        "members": [
            {
                "name": member.name,
                "hub_id": member.hub_id,
                "input_spec": member.input_spec and dataclasses.asdict(member.input_spec),
                "class_indices": member.class_indices and list(member.class_indices),
            }
            for member in teacher.members
        ],
        "standardized_mean": teacher.standardized if isinstance(teacher, TeacherEnsemble) else None,
        "parameters": teacher.parameter_count(),
    }


def appearance(dataset: IndexedImageSource) -> list[float]:
    """What a few images of epoch 0 look like once they are augmented: the mean of each quarter of each.

    Settings do not say whether another version of a library makes other images of them.
    """
    rows, epoch = np.linspace(0, len(dataset) - 1, min(len(dataset), PROBED), dtype=np.int64), dataset.epoch
    dataset.set_epoch(0)
    pixels = dataset.__getitems__(rows.tolist())["pixel_values"]
    dataset.set_epoch(epoch)
    return F.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), 2).flatten().tolist()


def looks_alike(cached: Sequence[float], here: Sequence[float]) -> bool:
    """Up to what decoders and devices round differently."""
    return np.allclose(cached, here, rtol=0, atol=ALIKE)


def given_teachers(
    names: Sequence[str], checkpoints: Sequence[str] | None, class_indices: Sequence[int] | None
) -> list[dict[str, Any]]:
    """The teachers as a recipe gives them, with the hash of the weights that lie on this machine."""
    return [
        {"name": name, "files": _files_digest(name, checkpoint), "class_indices": class_indices and list(class_indices)}
        for name, checkpoint in zip(names, checkpoints or [None] * len(names), strict=True)
    ]


def is_public(name: str) -> bool:
    """Does it name certain weights, wherever it is read?"""
    return hub_id(name) is not None or timm.is_model(name)


def with_weights(given: Mapping[str, Any]) -> str:
    """One of `given_teachers`, for a message."""
    return given["name"] + (f" with the weights {_short(given['files'])}" if given["files"] else "")


def _files_digest(name: str, checkpoint: str | None) -> str | None:
    """Of a checkpoint, or of the weights in a folder; None where there are none."""
    folder = Path(checkpoint or name)
    files = [folder] if folder.is_file() else sorted(folder.iterdir()) if folder.is_dir() else []
    digest, found = hashlib.sha256(), False
    for path in files:
        if path.suffix in WEIGHT_SUFFIXES:
            found = True
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest() if found else None


def weights_digest(models: Sequence[nn.Module]) -> str:
    """Of the parameters and buffers of networks, with their names."""
    digest = hashlib.sha256()
    for model in models:
        for name, value in sorted(model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(cached: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two descriptions do not have in common, one a line; of mappings in them, entry by entry."""
    found = []
    for key in dict.fromkeys([*cached, *here]):
        one, other = cached.get(key), here.get(key)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{key}.{line}" for line in differences(one, other)]
        else:
            found.append(f"{key}: {_short(one)} in the cache, {_short(other)} here")
    return found


def _short(value: Any) -> str:
    """A value for a message: of a hash or a long list the beginning."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..." if isinstance(value, str) else f"{text[:57]}..."
