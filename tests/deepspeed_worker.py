"""What each process of test_deepspeed.py runs: trainings whose optimizer DeepSpeed shares out, or not."""

import copy
import os
import sys

import torch
from fsdp_worker import LOSSES, SAVING, vit
from helpers import config, images

from hfkd import DistillationTrainer
from hfkd.training.zero import ZeroOptimizer

SGD = {"optim_args": "momentum=0.9,nesterov=True", "weight_decay": 0.01, "decay_all_parameters": True}
MILESTONES = {"lr_milestones": [1, 1.5], "lr_scheduler_type": "constant"}
# With a larger epsilon than AdamW's, which makes steps of rounding errors where a gradient is zero.
ADAMW = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "ema_decay": 0.9}
STAGES = {"adamw": "1"}  # of ZeRO; else 2
RUNS = {
    "whole": {**SGD, **MILESTONES},
    "adamw": {"optim": "adamw_torch_fused", "optim_args": None, **ADAMW},
    "bf16": {**SGD, "bf16": True, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2},
}


def build(output_dir, world_size, **changes):
    settings = {"losses": LOSSES, "per_device_train_batch_size": 8 // world_size, "num_train_epochs": 2}
    args = config(output_dir, **settings | SAVING | changes)
    data = {"train_dataset": images(32), "eval_dataset": images(26, seed=1, augment=False)}
    # Different weights in each process: the first one's count.
    return DistillationTrainer(vit(args.process_index, 32), vit(5, 48), args, **data)


def train(output_dir, world_size, name, resume_from_checkpoint=None):
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = STAGES.get(name, "2")
    trainer = build(output_dir, world_size, **RUNS[name])
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    metrics = trainer.evaluate()
    zero = isinstance(trainer.optimizer, ZeroOptimizer)
    return trainer, {
        "state": copy.deepcopy(trainer.distiller.state_dict()),
        "top1": metrics["eval_top1"],
        "loss": metrics["eval_loss"],
        "rates": [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry],
        "stage": trainer.accelerator.state.deepspeed_plugin.zero_stage if zero else 0,
        "share": sum(group["params"][0].numel() for group in trainer.optimizer.param_groups) if zero else None,
        "trained": sum(parameter.numel() for parameter in trainer.distiller.parameters()),
    }


def main(folder, world_size, other):
    results = {}
    for name in RUNS:
        trainer, results[name] = train(f"{folder}/{name}", world_size, name)
        results[name]["best"] = trainer.state.best_model_checkpoint
        trainer.export()
    for name in ("whole", "adamw"):
        checkpoint = f"{name}/checkpoint-6"
        _, results[f"{name} resumed"] = train(f"{folder}/{name} resumed", world_size, name, f"{folder}/{checkpoint}")
        if other:  # a run of one process goes on with two
            _, results[f"{name} crossed"] = train(f"{folder}/{name} crossed", world_size, name, f"{other}/{checkpoint}")
    rank = trainer.args.process_index
    torch.save(results, f"{folder}/rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
