"""FSDP2: the Distiller's parameters, gradients and optimizer state are shared out among the processes.

Checkpoints and exports are those of any other run: whole tensors under the same names in the same files. So a run may
go on with another number of processes, or without FSDP.
"""

from __future__ import annotations

import os

import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import HfkdError
from ..networks.sharding import gathered
from ..recipe.arguments import DistillationConfig


def check_fsdp(plugin, args: DistillationConfig) -> None:
    """
    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`.

    Raises:
        ValueError: for a setting that does not go with a sharded student.
    """
    if plugin.fsdp_version != 2:
        raise HfkdError(f"fsdp_version is {plugin.fsdp_version}: set it to 2; FSDP1 is not supported.")
    if plugin.cpu_ram_efficient_loading:
        raise HfkdError(
            "fsdp_cpu_ram_efficient_loading shards parameters alone, and the student may have BatchNorm statistics: "
            "set it to false."
        )
    if args.ema_decay is not None:
        raise HfkdError("ema_decay needs the whole student on every device: leave it out, or train without FSDP.")
    if args.torch_compile:
        raise HfkdError("torch_compile was not tried with FSDP: leave one of them out.")


def check_asked_for(args: DistillationConfig, enabled: bool) -> None:
    """Raises ValueError where accelerate has dropped FSDP: the run would go on, with everything in every process."""
    asked_for = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if asked_for and not enabled:
        raise HfkdError(
            f"FSDP was asked for, and accelerate does not run it for {args.world_size} process(es) on "
            f"{args.device.type}: start several on GPUs, or leave FSDP out."
        )


def use_fsdp(accelerator: Accelerator, args: DistillationConfig) -> None:
    """Settles what a launcher's or recipe's FSDP settings leave open. Raises what `check_fsdp` does."""
    plugin = accelerator.state.fsdp_plugin
    check_fsdp(plugin, args)
    # accelerate's policy would run all in bf16, norms and losses included, and round the teacher's logits: autocast
    # does what it does without FSDP.
    plugin.mixed_precision_policy = None


def prepare_to_shard(module: nn.Module) -> None:
    """What FSDP2 needs of a module, once, and what makes its `load_state_dict` take whole tensors from then on."""
    make_alike(module)
    for part in module.modules():
        part.register_load_state_dict_pre_hook(_shard_parameters)


def make_alike(module: nn.Module) -> None:
    """Gives every process the first one's tensors, as DDP does, in the layout that FSDP and DeepSpeed ask for."""
    module.to(memory_format=torch.contiguous_format)
    for tensor in module.state_dict().values():
        torch.distributed.broadcast(tensor, 0)


def take_whole_states(optimizer: torch.optim.Optimizer) -> None:
    """Lets an optimizer of sharded parameters load whole tensors; its `state_dict` gives them, if all processes call
    it."""
    optimizer.register_state_dict_post_hook(lambda optimizer, state: gathered(state))
    optimizer.register_load_state_dict_post_hook(_shard_optimizer_state)


def _shard_parameters(module: nn.Module, state: dict[str, Tensor], prefix: str, *args) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        key = f"{prefix}{name}"
        if key in state:
            state[key] = _shard_like(state[key], parameter)


def _shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if "fused" in group:  # a state brings along what the run that wrote it could use
            group["fused"] = optimizer.defaults["fused"]
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:  # else a count of steps
                state[name] = _shard_like(value, parameter)


def _shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor."""
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
