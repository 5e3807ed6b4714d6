"""Student and losses are prepared as one module, which FSDP or DeepSpeed may share out among the processes."""

from __future__ import annotations

import contextlib

import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from ..errors import HfkdError
from ..networks.loading import exported_state_dict
from . import zero
from .exports import SavingTrainer
from .fsdp import check_asked_for, prepare_to_shard, take_whole_states, use_fsdp


class PreparingTrainer(SavingTrainer):
    """What `DistillationTrainer` needs of whatever runs it: one device, DDP, FSDP2 or DeepSpeed's ZeRO.

    Attributes:
        shards, zero: whether FSDP, or DeepSpeed, runs it.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.shards = self.accelerator.distributed_type == DistributedType.FSDP  # not where there is but a plugin
        check_asked_for(self.args, self.shards)
        if self.shards:
            use_fsdp(self.accelerator, self.args)
            # In its branches for FSDP Trainer takes `self.model` for what is sharded, which is the distiller, and
            # writes checkpoints that other runs cannot read. The others do, since accelerate shards in `prepare`.
            self.is_fsdp_enabled = False
        elif self.args.shard_teacher:
            raise HfkdError(
                "shard_teacher goes with FSDP: start with --config_file recipes/accelerate/fsdp.yaml, or leave it out."
            )
        self.zero = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        zero.check_asked_for(self.args, self.zero)
        if self.zero:
            zero.use_zero(self.accelerator, self.args)
            self.is_deepspeed_enabled = False  # likewise: accelerate hands over to DeepSpeed in `prepare`

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # Optimizer, DDP and compile must cover student and losses together: two modules prepared side by side train
        # the losses wrongly. So the distiller stands in for the student while Trainer prepares "the model".
        self.distiller.student = student = self.model
        first = self.shards and not isinstance(self.distiller, FSDPModule)
        if first:
            prepare_to_shard(self.distiller)
        if self.zero:
            zero.prepare_for_zero(self.distiller, self.accelerator)
        self.model = self.model_wrapped = self.distiller
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            self.model = student
        if first:
            register_fsdp_forward_method(self.distiller, "logits")
        self.callback_handler.model = student
        return prepared

    def create_optimizer(self, model=None):
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created:
            # DeepSpeed drops empty groups, and schedules count them: checkpoints are to fit either way.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        if created and self.shards:
            take_whole_states(optimizer)
        if created and self.zero:
            self._parameter_groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.zero:  # called first where all else of the optimizer is settled
            self.optimizer = zero.ZeroOptimizer(self.optimizer.optimizer, self._parameter_groups)
        return super().create_scheduler(num_training_steps, optimizer)

    def save_model(self, output_dir=None, _internal_call=False):
        # Every process takes part in gathering; transformers 5.20 has only the first one come to `_save`, later all.
        self._whole_state = exported_state_dict(self.model) if self.shards else None
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._whole_state = None

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, self._whole_state if state_dict is None else state_dict)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.zero:
            self.optimizer.take_weights()

    def _autocast(self) -> contextlib.AbstractContextManager:
        """In `prepare` accelerate leaves it out with FSDP and DeepSpeed, and with the latter it has none at all."""
        if self.zero:
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)
        return self.accelerator.autocast()
