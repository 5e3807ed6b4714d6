"""Batch norms folded into the convolutions before them, for a teacher that only gives logits.

In eval mode a batch norm scales and shifts each channel, which a convolution can do as well: `w' = w * scale` and
`b' = (b - mean) * scale + bias` with `scale = weight / sqrt(var + eps)`. The network then reads and writes each map
once less. Which batch norm follows which convolution is seen in a forward pass, since modules do not tell what calls
them. In a float32 run nothing is folded: there the plain network is the exact one, while under autocast both round.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .features import logits_of
from .frozen import frozen_copy

NORMS = (nn.BatchNorm2d, BatchNormAct2d)  # subclasses may compute something else
IMAGES = 4  # of noise, the same in every run, so that live runs and caches come to the same decision
# Largest distance of the logits from the plain network's, both in float32: right folds are below 5e-5.
FLOAT32 = 1e-3
# Largest distance under autocast from float32, as a multiple of the plain network's: the two are about equal, 0.5 to
# 1.9 times over 40 networks, since both round, but not the same numbers.
MULTIPLE = 2.0


@dataclass(frozen=True)
class Folded:
    """A network with folded batch norms, and how far it and the plain network are from the plain one in float32.

    Attributes:
        norms: number of batch norms that are folded.
        error, plain: distances of their logits under autocast, as a share of the norm.
        is_exact: True if something is folded and the logits are as good as the plain network's.
    """

    network: nn.Module
    norms: int
    error: float = 0.0
    plain: float = 0.0
    is_exact: bool = False

    def __str__(self) -> str:
        error, plain = 100 * self.error, 100 * self.plain
        return f"{self.norms} batch norms folded (logits {error:.2g} % from float32, unfolded {plain:.2g} %)"


@torch.no_grad()
def fold(
    model: nn.Module, device: torch.device, autocast_dtype: torch.dtype, channels_last: bool, image_size: int
) -> Folded:
    """Return a frozen network with folded batch norms, in the precision and layout of a run, and its exactness.

    Args:
        model: a classifier in eval mode, in float32; it is left as it is.
        image_size: of the images that it will be shown.
    """
    plain = frozen_copy(model).to(device)
    if channels_last:
        plain.to(memory_format=torch.channels_last)
    noise = torch.randn(IMAGES, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN would round to TF32
        folded, norms = fold_norms(plain, noise)
        if not norms:
            return Folded(folded, norms)
        if channels_last:
            folded.to(memory_format=torch.channels_last)
        reference = logits_of(plain, noise)
        is_right = _distance(logits_of(folded, noise), reference) <= FLOAT32  # False for NaN
    to_precision(folded, autocast_dtype)
    to_precision(plain, autocast_dtype)
    with torch.autocast(device.type, autocast_dtype):
        error, rounding = (_distance(logits_of(network, noise), reference) for network in (folded, plain))
    return Folded(folded, norms, error, rounding, is_exact=is_right and error <= MULTIPLE * rounding)


@torch.no_grad()
def fold_norms(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """Return a frozen copy of a network with folded batch norms, and their number.

    A batch norm is folded if it alone reads what a convolution makes, and each of both runs once in a forward pass.

    Args:
        model: a classifier in eval mode; it is left as it is.
        images: (B, 3, H, W), for that forward pass.
    """
    folded, pairs = frozen_copy(model), conv_norm_pairs(model, images)
    for conv_name, norm_name in pairs:
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))  # type: ignore[type-var]  # see `conv_norm_pairs`
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        folded.set_submodule(norm_name, rest)
    return frozen_copy(folded), len(pairs)


def to_precision(model: nn.Module, autocast_dtype: torch.dtype | None) -> None:
    """Convert the weights that autocast would convert again in every forward pass."""
    for module in model.modules():
        if autocast_dtype is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(autocast_dtype)


def has_foldable_norms(model: nn.Module) -> bool:
    """Return True for a network with batch norms of which all weights are in float32."""
    return any(type(module) in NORMS for module in model.modules()) and all(
        weight.dtype == torch.float32 for weight in model.parameters()
    )


def _distance(logits: Tensor, reference: Tensor) -> float:
    """Return the distance of logits from those of float32, as a share of their norm."""
    return ((logits.float() - reference).norm() / reference.norm()).item()


class _Uses(TorchFunctionMode):
    """Counter of the operations that compute something from a tensor, by the tensor's id."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # not where a shape is read
            self.counts.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
        return result


def conv_norm_pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Return the names of each convolution and the batch norm that alone reads it, each run once in a forward pass.

    Args:
        model: a classifier in eval mode. Modules with hooks, or with several names, are in no pair.
        images: (B, 3, H, W), for that forward pass.
    """
    names = dict(_single_modules(model))
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    uses = _Uses()

    def record(name, module, given, made):
        calls[name].append((given[0], made))
        uses.counts[id(made)] = 0  # an earlier tensor, no longer there, may have had this id

    hooks = [module.register_forward_hook(functools.partial(record, name)) for name, module in names.items()]
    try:
        with uses:
            logits_of(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    once = {name: found[0] for name, found in calls.items() if len(found) == 1}  # one object is used once
    makers = {id(made): name for name, (_, made) in once.items() if type(names[name]) is nn.Conv2d}
    return [
        (makers[id(given)], name)
        for name, (given, _) in once.items()
        if type(names[name]) in NORMS and id(given) in makers and uses.counts[id(given)] == 1
    ]


def _single_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the convolutions and batch norms that can be folded, by name: without hooks and with one name each."""
    owners = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        plain = owners[id(module)] == 1 and not (module._forward_hooks or module._forward_pre_hooks)
        if plain and (type(module) is nn.Conv2d or (type(module) in NORMS and module.running_var is not None)):
            yield name, module
