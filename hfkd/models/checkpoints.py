"""Loading of checkpoints into models, without running code that a file may contain."""

import re
from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import HfkdError, NotFoundError

TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".bin")
MAX_LISTED = 5  # names listed for each kind of mismatch; the rest is counted


def load_checkpoint(model: nn.Module, path: str | PathLike) -> nn.Module:
    """Load the weights in `path` into `model`, strictly, and return the model.

    It reads `.safetensors` files, and `.pth`, `.pt`, `.tar` or `.bin` files of `torch.save` that hold a state dict. The
    state dict may stand alone or under "model" or "state_dict" beside other entries (epoch, optimizer, ...), as
    mdistiller, RepDistiller, CTKD and SimKD publish it. The prefix `module.`, which DataParallel adds to every name, is
    dropped.

    Raises:
        NotFoundError: the file does not exist.
        HfkdError: the file is no checkpoint, holds objects other than tensors and plain values, or has names or shapes
            that differ from the model's.
    """
    path = Path(path)
    return _load(model, _read_state_dict(path), path)


def load_architecture(architecture: str, path: str | PathLike) -> nn.Module:
    """Create a timm architecture with as many classes as the checkpoint in `path`, and load its weights.

    Raises:
        NotFoundError, HfkdError: see `load_checkpoint`.
    """
    path = Path(path)
    state_dict = _read_state_dict(path)
    classifier = timm.get_pretrained_cfg(architecture).classifier  # a tuple of names for a model with two heads
    names = classifier if isinstance(classifier, tuple) else (classifier,)
    heads = [state_dict[f"{name}.weight"] for name in names if f"{name}.weight" in state_dict]
    classes = {"num_classes": len(heads[0])} if heads else {}
    return _load(timm.create_model(architecture, **classes), state_dict, path)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NotFoundError(f"no checkpoint file at {path}")
    return _drop_module_prefix(_find_state_dict(_read(path), path))


def _load(model: nn.Module, given: dict[str, Tensor], path: Path) -> nn.Module:
    expected = model.state_dict()
    # PyTorch 0.4.1 added BatchNorm's counter. Some published files are older, and no code of hfkd reads it.
    counters = {name: tensor for name, tensor in expected.items() if name.endswith("num_batches_tracked")}
    given = counters | given
    _check_fit(model, given, expected, path)
    model.load_state_dict(given)
    return model


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise HfkdError(f"{path} is not a safetensors file: {error}") from error
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise HfkdError(f"{path} is not a checkpoint: its name must end in .safetensors, {', '.join(TORCH_SUFFIXES)}")


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # torch.save writes a zip archive, before PyTorch 1.6 a pickle
        raise HfkdError(f"{path} is not a checkpoint: torch.save did not write it")
    try:
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


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    found = content
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            found = content[key]
            break
    if not isinstance(found, dict):
        held = type(found).__name__
    elif found and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
        return found
    else:
        held = f"the keys [{_shorten([repr(key) for key in found])}]"
    raise HfkdError(
        f"{path} holds no state dict: expected names and tensors, alone or under 'model' or 'state_dict', got {held}"
    )


def _drop_module_prefix(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith("module.") for name in state_dict):
        return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    return state_dict


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
