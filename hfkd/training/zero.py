"""DeepSpeed's ZeRO 1 and 2: sharding of the optimizer state, and with ZeRO-2 of the gradients, among the processes.

The student stays whole in each process. Checkpoints and exports have the same files as without DeepSpeed, so a run can
be resumed with another number of processes, or without DeepSpeed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn

from ..errors import HfkdError
from ..recipe.config import DistillationConfig
from .fsdp import broadcast_state

# torch's name of the only entry in an optimizer's state that does not have the parameter's shape.
STEP_COUNT = "step"


def check_zero(plugin, args: DistillationConfig) -> None:
    """Check that the settings of a run fit DeepSpeed.

    Args:
        plugin: accelerate's `DeepSpeedPlugin`.

    Raises:
        HfkdError: for a setting that hfkd does not support with DeepSpeed.
    """
    if plugin.zero_stage not in (1, 2):
        raise HfkdError(
            f"zero_stage is {plugin.zero_stage}: set it to 1 or 2. For a student that does not fit a device, use FSDP "
            "(recipes/accelerate/fsdp.yaml)."
        )
    for key in ("offload_optimizer_device", "offload_param_device"):
        if getattr(plugin, key) not in (None, "none"):
            raise HfkdError(f"{key} is {getattr(plugin, key)}, which is not supported: leave it out.")
    if args.fp16:
        raise HfkdError(
            "With fp16, DeepSpeed would train and export a student in float16: set bf16, which uses autocast, or train "
            "without DeepSpeed."
        )
    if args.torch_compile:
        raise HfkdError("torch_compile is not supported with DeepSpeed: leave one of them out.")


def check_enabled(args: DistillationConfig, enabled: bool) -> None:
    """Check that accelerate runs DeepSpeed if it was requested; otherwise the run would go on without it.

    Raises:
        HfkdError: if accelerate has dropped DeepSpeed.
    """
    asked_for = args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true")
    if asked_for and not enabled:
        raise HfkdError(
            f"DeepSpeed was requested, and accelerate does not run it on {args.device.type}: start the run on GPUs, "
            "or leave DeepSpeed out."
        )


def configure_zero(accelerator: Accelerator, args: DistillationConfig) -> None:
    """Check the DeepSpeed settings of launcher and recipe, and complete them.

    Raises:
        HfkdError: as `check_zero`.
        ValueError: from transformers, if the settings contradict the recipe.
    """
    plugin = accelerator.state.deepspeed_plugin
    check_zero(plugin, args)
    plugin.hf_ds_config.trainer_config_finalize(args, None, 0)  # raises for contradictions
    # DeepSpeed would round the whole student to bf16, including norms. Without this, autocast chooses the types, as it
    # does without DeepSpeed.
    plugin.deepspeed_config["bf16"] = {"enabled": False}


def prepare_for_zero(module: nn.Module, accelerator: Accelerator) -> None:
    """Make a module the same in all processes, and set the size of DeepSpeed's gradient buffers."""
    broadcast_state(module)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    # Each process allocates a buffer of this many gradients. The default takes 2 GB, many times a small student's.
    settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    settings.setdefault("reduce_bucket_size", min(trained, 500_000_000))


class ZeroOptimizer(DeepSpeedOptimizerWrapper):
    """accelerate's wrapper of DeepSpeed's optimizer, whose state dicts are torch's, with whole tensors.

    DeepSpeed flattens this process's share of a group's parameters into one float32 tensor, the shard, and torch's
    optimizer updates the shard. The optimizer state has the layout of the shard. DeepSpeed can write whole parameters
    into a shard and read them from it, but not optimizer state. So each tensor of the state is copied into the shard
    and read as if it were the parameters, and loaded in the reverse order.

    Args:
        optimizer: DeepSpeed's optimizer.
        parameters: parameters of each group.
    """

    def __init__(self, optimizer, parameters: Sequence[Sequence[nn.Parameter]]):
        super().__init__(optimizer)
        self._parameters = [list(group) for group in parameters]

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict with whole tensors, on the CPU; all processes must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        groups, states = [], {}
        for group, parameters in zip(self.param_groups, self._parameters, strict=True):
            indices = list(range(len(states), len(states) + len(parameters)))
            groups.append({**group, "params": indices})
            states |= {index: {} for index in indices}
            with self._borrowed_shard(group) as shard:
                for key, value in self.state[shard].items():
                    if key == STEP_COUNT:
                        whole = [value] * len(parameters)
                    else:
                        shard.copy_(value)
                        whole = [safe_get_full_fp32_param(parameter).cpu() for parameter in parameters]
                    for index, tensor in zip(indices, whole, strict=True):
                        states[index][key] = tensor
        return {"state": {index: state for index, state in states.items() if state}, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict with whole tensors.

        Raises:
            ValueError: if it belongs to other parameters.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        states = state_dict["state"]
        for group, parameters, given in zip(
            self.param_groups, self._parameters, state_dict["param_groups"], strict=True
        ):
            group.update({key: value for key, value in given.items() if key not in ("params", "fused")})
            with self._borrowed_shard(group) as shard:
                for key, first in states.get(given["params"][0], {}).items():
                    for parameter, index in zip(parameters, given["params"], strict=True):
                        if key != STEP_COUNT:
                            safe_set_full_fp32_param(parameter, states[index][key].to(parameter.device))
                    self.state[shard][key] = first if key == STEP_COUNT else shard.clone()

    @torch.no_grad()
    def take_weights(self) -> None:
        """Copy the parameters into DeepSpeed's shards, after weights were loaded into the parameters."""
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter in [parameter for group in self._parameters for parameter in group]:
            safe_set_full_fp32_param(parameter, parameter)

    @contextlib.contextmanager
    def _borrowed_shard(self, group: dict[str, Any]) -> Iterator[Tensor]:
        """Yield a group's shard of the weights as scratch space, and restore the weights afterwards."""
        [shard] = group["params"]
        weights = shard.clone()
        try:
            yield shard
        finally:
            shard.copy_(weights)
