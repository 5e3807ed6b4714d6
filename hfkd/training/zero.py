"""DeepSpeed's ZeRO 1 and 2: optimizer state, with ZeRO-2 gradients as well, are shared out among the processes.

The student stays whole in each. As with FSDP, checkpoints and exports are those of any other run, so a run may go on
with another number of processes, or without DeepSpeed.
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
from ..recipe.arguments import DistillationConfig
from .fsdp import make_alike

COUNT = "step"  # torch's name for the one entry of an optimizer's state that is no tensor of the parameter's shape


def check_zero(plugin, args: DistillationConfig) -> None:
    """
    Args:
        plugin: accelerate's `DeepSpeedPlugin`.

    Raises:
        ValueError: for a setting that hfkd does not train with under DeepSpeed.
    """
    if plugin.zero_stage not in (1, 2):
        raise HfkdError(
            f"zero_stage is {plugin.zero_stage}: set it to 1 or 2. What ZeRO-3 is for, a student that does not fit a "
            "device, FSDP does: recipes/accelerate/fsdp.yaml."
        )
    for key in ("offload_optimizer_device", "offload_param_device"):
        if getattr(plugin, key) not in (None, "none"):
            raise HfkdError(f"{key} is {getattr(plugin, key)}, which was not tried: leave it out.")
    if args.fp16:
        raise HfkdError(
            "With fp16 DeepSpeed trains and exports a student that is rounded to it: set bf16, which is autocast, or "
            "train without DeepSpeed."
        )
    if args.torch_compile:
        raise HfkdError("torch_compile was not tried with DeepSpeed: leave one of them out.")


def check_asked_for(args: DistillationConfig, enabled: bool) -> None:
    """Raises ValueError where accelerate has dropped DeepSpeed: the run would go on without."""
    asked_for = args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true")
    if asked_for and not enabled:
        raise HfkdError(
            f"DeepSpeed was asked for, and accelerate does not run it on {args.device.type}: start it on GPUs, or "
            "leave it out."
        )


def use_zero(accelerator: Accelerator, args: DistillationConfig) -> None:
    """Settles what a launcher's or recipe's DeepSpeed settings leave open.

    Raises:
        ValueError: what `check_zero` does; also where the settings contradict the recipe.
    """
    plugin = accelerator.state.deepspeed_plugin
    check_zero(plugin, args)
    plugin.hf_ds_config.trainer_config_finalize(args, None, 0)  # raises for contradictions
    # DeepSpeed would round the whole student to bf16, norms and losses included: autocast does what it does without.
    plugin.deepspeed_config["bf16"] = {"enabled": False}


def prepare_for_zero(module: nn.Module, accelerator: Accelerator) -> None:
    """What DeepSpeed needs of a module, and to know of it."""
    make_alike(module)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    # Each process holds a buffer of so many gradients: by default 2 GB, many times what there is.
    settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    settings.setdefault("reduce_bucket_size", min(trained, 500_000_000))


class ZeroOptimizer(DeepSpeedOptimizerWrapper):
    """What accelerate makes of DeepSpeed's optimizer, with torch's states of whole tensors.

    DeepSpeed keeps a process's share of the parameters of a group, in float32, end to end in one tensor, and torch's
    optimizer updates that. DeepSpeed can put whole parameters into it and get them out, and the state has its layout:
    so the state goes in and out by way of it.

    Args:
        optimizer: DeepSpeed's.
        parameters: those of each group.
    """

    def __init__(self, optimizer, parameters: Sequence[Sequence[nn.Parameter]]):
        super().__init__(optimizer)
        self._parameters = [list(group) for group in parameters]

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As torch's, on the CPU. All processes must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        groups, states = [], {}
        for group, parameters in zip(self.param_groups, self._parameters, strict=True):
            indices = list(range(len(states), len(states) + len(parameters)))
            groups.append({**group, "params": indices})
            states |= {index: {} for index in indices}
            with self._lent_share(group) as share:
                for key, value in self.state[share].items():
                    if key == COUNT:
                        whole = [value] * len(parameters)
                    else:
                        share.copy_(value)
                        whole = [safe_get_full_fp32_param(parameter).cpu() for parameter in parameters]
                    for index, tensor in zip(indices, whole, strict=True):
                        states[index][key] = tensor
        return {"state": {index: state for index, state in states.items() if state}, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: if it is that of other parameters.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        states = state_dict["state"]
        for group, parameters, given in zip(
            self.param_groups, self._parameters, state_dict["param_groups"], strict=True
        ):
            group.update({key: value for key, value in given.items() if key not in ("params", "fused")})
            with self._lent_share(group) as share:
                for key, first in states.get(given["params"][0], {}).items():
                    for parameter, index in zip(parameters, given["params"], strict=True):
                        if key != COUNT:
                            safe_set_full_fp32_param(parameter, states[index][key].to(parameter.device))
                    self.state[share][key] = first if key == COUNT else share.clone()

    @torch.no_grad()
    def take_weights(self) -> None:
        """Goes on from the parameters as they are, when something has been loaded into them."""
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter in [parameter for group in self._parameters for parameter in group]:
            safe_set_full_fp32_param(parameter, parameter)

    @contextlib.contextmanager
    def _lent_share(self, group: dict[str, Any]) -> Iterator[Tensor]:
        [share] = group["params"]
        weights = share.clone()
        try:
            yield share
        finally:
            share.copy_(weights)
