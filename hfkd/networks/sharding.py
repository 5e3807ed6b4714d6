"""Sharding of a frozen network among processes, and gathering of sharded tensors."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only


def shard_frozen(model: nn.Module) -> None:
    """Shard a frozen network among the processes (FSDP2), and move this process's shard to its device.

    Each member of the model's module lists (blocks, stages) is gathered for its own forward pass and released after it,
    so that little more than one block is whole at a time.
    """
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    parts = [part for parts in lists for part in parts if not isinstance(part, nn.ModuleList)]
    parts = [part for part in dict.fromkeys(parts) if any(True for _ in part.parameters())]
    for part in [*reversed(parts), model]:  # FSDP2 requires inner modules before outer ones
        fully_shard(part, reshard_after_forward=True)


def gathered(state: dict) -> dict:
    """Return a state dict with whole tensors; without FSDP, `state` itself.

    All processes must call it, since gathering is a collective operation.
    """
    return tree_map_only(DTensor, lambda value: value.full_tensor().cpu(), state)
