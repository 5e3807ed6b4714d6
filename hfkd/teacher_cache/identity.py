"""Identity of a cache: the teacher and the images that it was written for, compared with those of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from ..data import ImageDataset, IndexedImageSource
from ..names import hub_id
from ..networks.teacher import Teacher, TeacherEnsemble
from ..networks.zero_shot import ZeroShotNetwork
from ..recipe.config import DistillationConfig

PROBE_IMAGES = 8
PROBE_TOLERANCE = 0.01  # of normalised pixels; a crop that is off by one pixel changes some mean by more
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt"}


def describe_teacher(teacher: Teacher | TeacherEnsemble) -> dict[str, Any]:
    """Return the description of a teacher for `cache.json`.

    Call it before `prepare`, which rounds the weights.
    """
    return {
        "name": teacher.name,
        "weights": weights_digest([member.model for member in teacher.members]),
        "members": [
            {
                "name": member.name,
                "hub_id": member.hub_id,
                "input_spec": member.input_spec and dataclasses.asdict(member.input_spec),
                "class_indices": member.class_indices and list(member.class_indices),
                **_texts(member.model),
            }
            for member in teacher.members
        ],
        "standardized_mean": teacher.standardized if isinstance(teacher, TeacherEnsemble) else None,
        "parameters": teacher.parameter_count(),
    }


def _texts(model: nn.Module) -> dict[str, Any]:
    """Return the classes and templates of a zero-shot classifier; nothing for another network."""
    if not isinstance(model, ZeroShotNetwork):
        return {}
    return {"class_names": model.class_names, "prompts": model.prompts}


_FACTS: WeakKeyDictionary[Teacher, list[Any]] = WeakKeyDictionary()


def teacher_facts(teacher: Any, args: DistillationConfig) -> list[Any] | None:
    """Return plain values that identify a teacher for files that are made without a user's doing.

    Call it before `prepare`; later calls for the same object return the same.

    Returns:
        None where there is no teacher, or its weights lie elsewhere.
    """
    if not isinstance(teacher, (Teacher, TeacherEnsemble)):
        return None
    if args.shard_teacher or any(member.is_sharded or member.dispatched for member in teacher.members):
        return None
    standardized = teacher.standardized if isinstance(teacher, TeacherEnsemble) else None
    versions = [module.__version__ for module in (torch, timm, transformers)]
    return [[_member_facts(member) for member in teacher.members], standardized, versions]


def _member_facts(member: Teacher) -> list[Any]:
    """Return what identifies one teacher, as it was before a first trainer rounded its weights."""
    if member not in _FACTS:
        # The same weights under another structure or in other class names say something else.
        names = str(getattr(getattr(member.model, "config", None), "id2label", None))
        _FACTS[member] = [describe_teacher(member), repr(member.model), names, _digest_of_texts(member.model)]
    return _FACTS[member]


def _digest_of_texts(model: nn.Module) -> str | None:
    """Return the hash of a zero-shot classifier's text features, which are not in its state; None for others."""
    if not isinstance(model, ZeroShotNetwork):
        return None
    return hashlib.sha256(model.classifier.features.cpu().numpy().tobytes()).hexdigest()


def arithmetic_of(args: DistillationConfig) -> dict[str, Any]:
    """Return the settings of a run on which the last digits of a teacher's outputs depend."""
    keys = ("bf16", "fp16", "tf32", "channels_last", "torch_compile", "world_size")
    return {"device": str(args.device.type)} | {key: getattr(args, key) for key in keys}


def images_facts(dataset: IndexedImageSource) -> list[Any]:
    """Return `identity()`, and of images in memory the checksum of all, where the identity reads a sample."""
    in_memory = isinstance(dataset, ImageDataset)
    return [dataset.identity(), *([zlib.crc32(dataset.images.cpu().contiguous().numpy().data)] if in_memory else [])]


def key_of(facts: Any) -> str:
    """Return the name of a file for plain values."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def appearance(dataset: IndexedImageSource) -> list[float]:
    """Return the mean of each quarter of a few augmented images of epoch 0.

    Settings alone do not identify the images: another version of a library may augment differently under the same
    settings.
    """
    rows, epoch = np.linspace(0, len(dataset) - 1, min(len(dataset), PROBE_IMAGES), dtype=np.int64), dataset.epoch
    dataset.set_epoch(0)
    pixels = dataset.__getitems__(rows.tolist())["pixel_values"]
    dataset.set_epoch(epoch)
    return F.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), 2).flatten().tolist()


def same_augmentation(cached: Sequence[float], here: Sequence[float]) -> bool:
    """Return True if two results of `appearance` agree, up to the rounding of decoders and devices."""
    return np.allclose(cached, here, rtol=0, atol=PROBE_TOLERANCE)


def given_teachers(
    names: Sequence[str],
    checkpoints: Sequence[str] | None,
    class_indices: Sequence[int] | None,
    image: Mapping[str, Any],
    prompts: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return the teachers as a recipe names them, with the hash of their weights if these are local files.

    Args:
        image: input of a network from a file, see `ModelArguments.teacher_image`.
        prompts: templates of a zero-shot classifier.
    """
    settings = {"class_indices": class_indices and list(class_indices), "image": dict(image)}
    settings |= {"prompts": list(prompts)} if prompts else {}  # earlier caches have no such entry
    return [
        {"name": name, "files": _files_digest(name, checkpoint), **settings}
        for name, checkpoint in zip(names, checkpoints or [None] * len(names), strict=True)
    ]


def is_public(name: str) -> bool:
    """Return True if a name stands for the same weights on every machine."""
    return hub_id(name) is not None or timm.is_model(name)


def describe_given(given: Mapping[str, Any]) -> str:
    """Return a teacher of `given_teachers` in words, for a message."""
    return given["name"] + (f" with the weights {_short(given['files'])}" if given["files"] else "")


def _files_digest(name: str, checkpoint: str | None) -> str | None:
    """Return the hash of a checkpoint, or of the weights in a folder; None if there are none."""
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
    """Return the hash of the parameters and buffers of networks, with their names."""
    digest = hashlib.sha256()
    for model in models:
        for name, value in sorted(model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(cached: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return the entries in which two descriptions differ, one a line; mappings in them are compared entry by entry."""
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
    """Return a value for a message; of a hash or a long list, the beginning."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..." if isinstance(value, str) else f"{text[:57]}..."
