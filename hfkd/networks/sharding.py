"""Sharded networks: sharing a frozen one out, and gathering whole tensors."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only


def share_out(model: nn.Module) -> None:
    """Shares out a network that only predicts, and moves this process's part of it to its device.

    What the model's lists of modules hold (blocks, stages) is gathered for its own forward and given up again, so that
    little more than one block is whole at a time.
    """
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    parts = [part for parts in lists for part in parts if not isinstance(part, nn.ModuleList)]
    parts = [part for part in dict.fromkeys(parts) if any(True for _ in part.parameters())]
    for part in [*reversed(parts), model]:  # FSDP2 asks for the inner ones first
        fully_shard(part, reshard_after_forward=True)


def gathered(state: dict) -> dict:
    """A state dict with whole tensors. All processes must call it; without FSDP it is `state` again."""
    return tree_map_only(DTensor, lambda value: value.full_tensor().cpu(), state)
