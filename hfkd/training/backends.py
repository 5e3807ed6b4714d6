"""Backends: one device or DDP, FSDP2, or DeepSpeed's ZeRO, behind one interface.

Trainer asks in many places which of them runs. The trainer of hfkd asks once, when it is built, and calls its backend
from then on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from ..errors import HfkdError
from ..networks.features import prediction_of
from ..networks.wrapping import exported_state_dict
from ..recipe.config import DistillationConfig
from . import fsdp, zero
from .distiller import Distiller


class OneDevice:
    """One device, or several with DDP, which accelerate runs without help.

    The methods are called in the order in which they stand here; the other backends override what they need.
    """

    def __init__(self, accelerator: Accelerator, args: DistillationConfig):
        self.accelerator, self.args = accelerator, args

    def before_prepare(self, distiller: Distiller) -> None:
        """Ready student and losses for `accelerator.prepare`."""

    def optimizer_created(self, optimizer: torch.optim.Optimizer) -> None:
        """Adapt a new optimizer, before `accelerator.prepare`."""

    def optimizer_prepared(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer to use in place of what `accelerator.prepare` has made."""
        return optimizer

    def after_prepare(self, distiller: Distiller) -> None:
        """Complete student and losses after `accelerator.prepare`."""

    def weights_loaded(self, optimizer: torch.optim.Optimizer) -> None:
        """Take up weights that were loaded into the parameters from a checkpoint."""

    def whole_state(self, student: nn.Module) -> dict[str, Tensor] | None:
        """Return the student's weights gathered from all processes; None where each process has them all."""

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of a forward pass in the precision of the run."""
        return self.accelerator.autocast()

    def predict(self, distiller: Distiller, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the function from images (B, 3, H, W) to what the model is evaluated by: logits or embeddings."""
        return functools.partial(prediction_of, model)


class FullyShardedDataParallel(OneDevice):
    """FSDP2: parameters, gradients and optimizer state are sharded among the processes."""

    def __init__(self, accelerator: Accelerator, args: DistillationConfig):
        super().__init__(accelerator, args)
        fsdp.configure_fsdp(accelerator, args)
        self._is_first = True

    def before_prepare(self, distiller: Distiller) -> None:
        self._is_first = not isinstance(distiller, FSDPModule)  # a second `train()` finds it sharded
        if self._is_first:
            fsdp.prepare_for_fsdp(distiller)

    def optimizer_created(self, optimizer: torch.optim.Optimizer) -> None:
        fsdp.take_whole_states(optimizer)

    def after_prepare(self, distiller: Distiller) -> None:
        if self._is_first:
            register_fsdp_forward_method(distiller, "logits")
            register_fsdp_forward_method(distiller, "evaluate")

    def whole_state(self, student: nn.Module) -> dict[str, Tensor] | None:
        return exported_state_dict(student)

    def predict(self, distiller: Distiller, model: nn.Module) -> Callable[[Tensor], Tensor]:
        return distiller.logits  # FSDP gathers parameters only for a registered forward of the wrapped module


class ZeroRedundancy(OneDevice):
    """DeepSpeed's ZeRO 1 and 2: optimizer state, and gradients in 2, are sharded among the processes."""

    def __init__(self, accelerator: Accelerator, args: DistillationConfig):
        super().__init__(accelerator, args)
        zero.configure_zero(accelerator, args)

    def before_prepare(self, distiller: Distiller) -> None:
        zero.prepare_for_zero(distiller, self.accelerator)

    def optimizer_created(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameter_groups = [list(group["params"]) for group in optimizer.param_groups]

    def optimizer_prepared(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return zero.ZeroOptimizer(optimizer.optimizer, self._parameter_groups)

    def weights_loaded(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.take_weights()

    def autocast(self) -> contextlib.AbstractContextManager:
        # accelerate's is empty with DeepSpeed.
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)


def backend_of(accelerator: Accelerator, args: DistillationConfig) -> OneDevice:
    """Return the backend that an accelerator runs.

    Raises:
        HfkdError: for a setting that does not go with it, or a backend that was asked for and is not run.
    """
    kind = accelerator.distributed_type  # a plugin alone does not tell: accelerate may have dropped it
    fsdp.check_enabled(args, kind == DistributedType.FSDP)
    zero.check_enabled(args, kind == DistributedType.DEEPSPEED)
    if kind == DistributedType.FSDP:
        return FullyShardedDataParallel(accelerator, args)
    if args.shard_teacher:
        raise HfkdError(
            "shard_teacher goes with FSDP: start with --config_file recipes/accelerate/fsdp.yaml, or leave it out."
        )
    return (ZeroRedundancy if kind == DistributedType.DEEPSPEED else OneDevice)(accelerator, args)
