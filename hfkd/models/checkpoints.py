"""Loading of checkpoints into models, without running code that a file may contain."""

import argparse
import re
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import HfkdError, NotFoundError

STATE_DICT_KEYS = ("model", "state_dict", "net", "model_state_dict", "student", "ema", "state_dict_ema", "model_ema")
# What DataParallel, torch.compile and classes that hold the network put before the names of its weights.
PREFIXES = ("module.", "_orig_mod.", "model.", "student.")
# Plain values beside the tensors: timm's settings, and NumPy's numbers. Reading them runs no code.
PLAIN_TYPES = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")),
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
MAX_LISTED = 5  # names listed for each kind of mismatch; the rest is counted


def load_checkpoint(model: nn.Module, path: str | PathLike) -> nn.Module:
    """Load the weights in `path` into `model`, strictly, and return the model.

    It reads files of safetensors and of `torch.save`, whatever their suffix. The state dict may stand alone or under
    one of STATE_DICT_KEYS beside other entries (epoch, optimizer, ...), as mdistiller, RepDistiller, CTKD, SimKD and
    timm publish it. If several entries fit, the first key counts. PREFIXES that every name has are dropped if the rest
    fits the model exactly.

    Raises:
        NotFoundError: the file does not exist.
        HfkdError: the file is no checkpoint, holds objects other than tensors and plain values, or has names or shapes
            that differ from the model's.
    """
    return _load_fitting(Path(path), lambda state_dict: model)


def load_architecture(architecture: str, path: str | PathLike) -> nn.Module:
    """Create a timm architecture with as many classes as the checkpoint in `path`, perhaps none, and load its weights.

    Raises:
        NotFoundError, HfkdError: see `load_checkpoint`.
    """
    classifier = timm.get_pretrained_cfg(architecture).classifier  # a tuple of names for a model with two heads
    names = classifier if isinstance(classifier, tuple) else (classifier,)
    models: dict[int, nn.Module] = {}

    def create(state_dict):
        heads = [state_dict[f"{name}.weight"] for name in names if f"{name}.weight" in state_dict]
        classes = len(heads[0]) if heads and heads[0].ndim else 0
        if classes not in models:
            models[classes] = timm.create_model(architecture, num_classes=classes)
        return models[classes]

    return _load_fitting(Path(path), create)


def _load_fitting(path: Path, create: Callable[[dict[str, Tensor]], nn.Module]) -> nn.Module:
    """Load the first state dict of a file that fits, under its names without prefixes, into a model made for it.

    Raises:
        HfkdError: none fits; the message is about the first.
    """
    if not path.is_file():
        raise NotFoundError(f"no checkpoint file at {path}")
    content = _read(path)
    for found in _state_dicts(content):
        for given in _without_prefixes(found):
            model = create(given)
            expected = model.state_dict()
            given = _with_counters(given, expected)
            if given.keys() == expected.keys() and all(given[name].shape == expected[name].shape for name in expected):
                model.load_state_dict(given)
                return model
    versions = list(_without_prefixes(_find_state_dict(content, path)))
    model, given = max(
        ((create(given), given) for given in versions),
        key=lambda pair: len(pair[0].state_dict().keys() & pair[1].keys()),
    )
    expected = model.state_dict()
    _check_fit(model, _with_counters(given, expected), expected, path)
    raise AssertionError("a state dict that fits was not loaded")


def _with_counters(given: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with BatchNorm's counters, which PyTorch 0.4.1 added.

    Some published files are older, and no code of hfkd reads the counters.
    """
    return {name: tensor for name, tensor in expected.items() if name.endswith("num_batches_tracked")} | given


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(9)
    # safetensors begins with the length of its header, in 8 bytes, and the header, which is JSON.
    is_safetensors = start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    # torch.save writes a zip archive, before PyTorch 1.6 a pickle.
    if not is_safetensors and (start[:2] == b"PK" or start[:1] == b"\x80"):
        return _read_torch(path)
    if not is_safetensors and path.suffix != ".safetensors":
        raise HfkdError(f"{path} is not a checkpoint: neither torch.save nor safetensors wrote it")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise HfkdError(f"{path} is not a safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(PLAIN_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes can fail anywhere in the unpickler
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise HfkdError(
                f"{path} is not a whole checkpoint: it is cut short or damaged, get the file again"
            ) from error
        raise HfkdError(
            f"{path} holds pickled objects beside its tensors (first: {refused[1]}), and reading them can run any "
            "code. If you trust the file, save its tensors to a new file in an environment that has this class: "
            f"torch.save(torch.load({str(path)!r}, weights_only=False)['model'], 'new.pth'). Leave out ['model'] if "
            "the file is the state dict itself, and add .state_dict() if it is a whole model"
        ) from error


def _state_dicts(content: Any, depth: int = 2) -> Iterator[dict[str, Tensor]]:
    """Yield the state dicts in a file: alone, or under STATE_DICT_KEYS."""
    if not isinstance(content, dict):
        return
    if _is_state_dict(content):
        yield content
    elif depth:
        for key in STATE_DICT_KEYS:
            yield from _state_dicts(content.get(key), depth - 1)


def _is_state_dict(found: dict) -> bool:
    return bool(found) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items())


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the first state dict in a file.

    Raises:
        HfkdError: there is none.
    """
    for found in _state_dicts(content):
        return found
    entries = [
        content[key] for key in STATE_DICT_KEYS if isinstance(content, dict) and isinstance(content.get(key), dict)
    ]
    shown = entries[0] if entries else content
    held = f"the keys [{_shorten([repr(key) for key in shown])}]" if isinstance(shown, dict) else type(shown).__name__
    raise HfkdError(
        f"{path} holds no state dict: expected names and tensors, alone or under one of "
        f"{', '.join(STATE_DICT_KEYS)}, got {held}"
    )


def _without_prefixes(state_dict: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a state dict as it is, and without each further prefix that all of its names have."""
    while True:
        yield state_dict
        prefix = next((each for each in PREFIXES if all(name.startswith(each) for name in state_dict)), None)
        if prefix is None:
            return
        state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}


def _check_fit(model: nn.Module, given: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    reshaped = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    if not (missing or unexpected or reshaped):
        return
    if not missing and not unexpected and _is_classifier(model, reshaped, given, expected):
        classes, wanted = len(given[reshaped[0]]), len(expected[reshaped[0]])
        raise HfkdError(
            f"{path} fits {type(model).__name__} except for the classifier ({', '.join(reshaped)}): "
            f"the checkpoint has {classes} classes, the model {wanted}. Create the model with num_classes={classes}, "
            f"load, and call reset_classifier({wanted}) for a fresh classifier on the loaded features"
        )
    shapes = [f"{name} {tuple(given[name].shape)} for {tuple(expected[name].shape)}" for name in reshaped]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape (given for expected)": shapes}
    lines = [f"  {len(names)} {kind}: {_shorten(names)}" for kind, names in kinds.items() if names]
    advice = "It comes from another architecture: create that model, or give a checkpoint of this one"
    raise HfkdError("\n".join([f"{path} does not fit {type(model).__name__}:", *lines, advice]))


def _is_classifier(model: nn.Module, names: list[str], given: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Return True if all tensors are linear layers' and differ in the number of classes only."""
    if not all(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear) for name in names):
        return False
    pairs = [(given[name].shape, expected[name].shape) for name in names]
    same_input = all(len(shape) == len(wanted) and shape[1:] == wanted[1:] for shape, wanted in pairs)
    return same_input and len({(shape[0], wanted[0]) for shape, wanted in pairs}) == 1


def _shorten(names: list[str]) -> str:
    rest = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
