"""Frozen parts of a student, found by patterns of their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import HfkdError, nearest
from ..networks.features import timm_model_of
from ..networks.simkd_student import SimKDStudent

# What the latest trainer has frozen of each network: another one may train it all. The keys are weak, so that the table
# keeps no network alive.
_FROZEN: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()


def freeze(student: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Freeze the parameters of a student that patterns name, and return the norms whose statistics are frozen, too.

    What an earlier trainer has frozen is trained again, unless it is named again.

    Args:
        patterns: glob patterns of parameters or modules (`layer1`, `blocks.[0-5].*`), by the names of the network
            itself, without transformers' wrapper around a timm model. A module stands for all within.

    Raises:
        HfkdError: for a pattern that names no part of the network, or if nothing is left to train.
    """
    frozen = frozen_names(student, patterns)
    network = _named_network(student)
    for parameter in _FROZEN.pop(network, ()):
        parameter.requires_grad_(True)
    _FROZEN[network] = [each for each in map(network.get_parameter, frozen) if each.requires_grad]
    for parameter in _FROZEN[network]:
        parameter.requires_grad_(False)
    return [
        module
        for path, module in network.named_modules()
        if isinstance(module, _NormBase) and (_is_named(path, patterns) or _holds_only(module, path, frozen))
    ]


def frozen_names(student: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the names of the parameters that `freeze` freezes.

    Raises:
        HfkdError: as `freeze`.
    """
    network = _named_network(student)
    for pattern in patterns:
        _check_pattern(network, pattern)
    frozen = {name for name, _ in network.named_parameters() if _is_named(name, patterns)}
    if patterns and all(name in frozen for name, _ in network.named_parameters()):
        raise HfkdError(
            f"freeze: {' '.join(patterns)} names every parameter of {type(network).__name__}, and nothing would be "
            "trained. Leave out a part, such as its classifier."
        )
    return frozen


def _named_network(student: nn.Module) -> nn.Module:
    """Return the network whose names count: of a student that is rebuilt for a loss, the one that was given."""
    network = timm_model_of(student)
    return network.backbone if isinstance(network, SimKDStudent) else network


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern names a parameter or module, or a module around it."""
    parts = name.split(".")
    paths = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)


def _check_pattern(network: nn.Module, pattern: str) -> None:
    if any(_is_named(name, [pattern]) for name, _ in network.named_parameters()):
        return
    modules = [path for path, module in network.named_modules() if path and any(True for _ in module.parameters())]
    near = nearest(pattern.rstrip(".*"), modules, n=3, cutoff=0.4) or [path for path in modules if "." not in path][:6]
    raise HfkdError(
        f"freeze: {type(network).__name__} has no parameter or module '{pattern}'. Near are {', '.join(near)}."
    )


def _holds_only(module: nn.Module, path: str, frozen: set[str]) -> bool:
    own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
    return bool(own) and frozen.issuperset(own)
