"""FSDP2: sharding of the Distiller's parameters, gradients and optimizer state among the processes.

Checkpoints and exports have whole tensors under the same names in the same files as without FSDP. A run can be resumed
with another number of processes, or without FSDP.
"""

from __future__ import annotations

import os

import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import HfkdError
from ..networks.sharding import gathered
from ..recipe.config import DistillationConfig


def check_fsdp(plugin, args: DistillationConfig) -> None:
    """Check that the settings of a run fit a sharded student.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`.

    Raises:
        HfkdError: for a setting that does not.
    """
    if plugin.fsdp_version != 2:
        raise HfkdError(f"fsdp_version is {plugin.fsdp_version}: set it to 2; FSDP1 is not supported.")
    if plugin.cpu_ram_efficient_loading:
        raise HfkdError(
            "fsdp_cpu_ram_efficient_loading broadcasts parameters only, and the student may have BatchNorm "
            "statistics: set it to false."
        )
    if args.ema_decay is not None:
        raise HfkdError("ema_decay needs the whole student on every device: leave it out, or train without FSDP.")
    if args.torch_compile:
        raise HfkdError("torch_compile is not supported with FSDP: leave one of them out.")


def check_enabled(args: DistillationConfig, enabled: bool) -> None:
    """Check that accelerate runs FSDP if it was requested; otherwise every process would hold everything.

    Raises:
        HfkdError: if accelerate has dropped FSDP.
    """
    asked_for = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if asked_for and not enabled:
        raise HfkdError(
            f"FSDP was requested, and accelerate does not run it for {args.world_size} process(es) on "
            f"{args.device.type}: start several processes on GPUs, or leave FSDP out."
        )


def configure_fsdp(accelerator: Accelerator, args: DistillationConfig) -> None:
    """Check the FSDP settings of launcher and recipe, and complete them.

    Raises:
        HfkdError: as `check_fsdp`.
    """
    plugin = accelerator.state.fsdp_plugin
    check_fsdp(plugin, args)
    # accelerate's policy would run everything in bf16, including norms and losses, and round the teacher's logits.
    # Without it, autocast chooses the types, as it does without FSDP.
    plugin.mixed_precision_policy = None


def prepare_for_fsdp(module: nn.Module) -> None:
    """Make a module the same in all processes, and let its `load_state_dict` take whole tensors once it is sharded."""
    broadcast_state(module)
    for part in module.modules():
        part.register_load_state_dict_pre_hook(_shard_parameters)


def broadcast_state(module: nn.Module) -> None:
    """Broadcast the first process's tensors to all processes, as DDP does, in contiguous layout.

    FSDP and DeepSpeed both require the layout.
    """
    module.to(memory_format=torch.contiguous_format)
    for tensor in module.state_dict().values():
        torch.distributed.broadcast(tensor, 0)


def take_whole_states(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of sharded parameters save and load whole tensors.

    Its `state_dict` gathers them, so all processes must call it.
    """
    # Whole tensors in checkpoints do not depend on the number of processes, so a run can be resumed with another one.
    optimizer.register_state_dict_post_hook(lambda optimizer, state: gathered(state))
    optimizer.register_load_state_dict_post_hook(_shard_optimizer_state)


def _shard_parameters(module: nn.Module, state: dict[str, Tensor], prefix: str, *args) -> None:
    """Replace whole tensors in a state dict by this process's shards, before a module loads them."""
    for name, parameter in module.named_parameters(recurse=False):
        key = f"{prefix}{name}"
        if key in state:
            state[key] = _shard_like(state[key], parameter)


def _shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Replace whole tensors in an optimizer's state by this process's shards, after it has loaded them."""
    for group in optimizer.param_groups:
        # Whether the optimizer is fused depends on the device and not on the run that wrote the state.
        if "fused" in group:
            group["fused"] = optimizer.defaults["fused"]
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:  # the step count is not sharded
                state[name] = _shard_like(value, parameter)


def _shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, sharded as the parameter."""
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    # Without a source rank nothing is sent: every process has loaded the whole tensor and keeps its own shard.
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
