"""What each process of test_fsdp.py runs: trainings whose networks and losses are shared out, or not."""

import copy

import timm
import torch
from accelerate.utils import DistributedType
from helpers import config, images
from torch.distributed.tensor import DTensor

from hfkd import DistillationTrainer, Teacher
from hfkd.networks.sharding import gathered
from hfkd.networks.wrapping import wrap_timm

LOSSES = {"kd": {}, "ctkd": {"instance_wise": True}}  # no projector with BatchNorm: a batch may be split
SAVING = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "load_best_model_at_end": True,
}


def vit(seed, width):
    torch.manual_seed(seed)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 2}
    overlay = {"input_size": (3, 32, 32)}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, pretrained_cfg_overlay=overlay, **shape)
    return wrap_timm(model, [f"class {index}" for index in range(10)], shape)


def build(output_dir, world_size, **changes):
    settings = {"losses": LOSSES, "per_device_train_batch_size": 8 // world_size, "num_train_epochs": 2}
    args = config(output_dir, **settings | changes)
    if world_size > 1:
        # accelerate has FSDP for accelerators alone and drops it on CPUs, where torch has it as well.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    data = {"train_dataset": images(32), "eval_dataset": images(26, seed=1, augment=False)}
    # Different weights in each process: the first one's count.
    return DistillationTrainer(vit(args.process_index, 32), vit(5, 48), args, **data)


def train(output_dir, world_size, resume_from_checkpoint=None, **changes):
    trainer = build(output_dir, world_size, **changes)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    sharded = [value for value in trainer.distiller.state_dict().values() if isinstance(value, DTensor)]
    metrics = trainer.evaluate()
    return trainer, {
        "state": copy.deepcopy(gathered(trainer.distiller.state_dict())),
        "top1": metrics["eval_top1"],
        "loss": metrics["eval_loss"],
        "sharded": len(sharded),
        "parameters": len(list(trainer.distiller.parameters())),
    }


def part_of(model):
    """How many of a network's parameters lie in this process."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in model.parameters()]
    return sum(value.numel() for value in local)


def share_out_the_teacher(folder, world_size):
    """A training whose teacher is shared out where there are several processes."""
    teachers = {dtype: Teacher(vit(5, 48)) for dtype in (None, torch.bfloat16)}
    pixels = images(8).__getitems__(list(range(8)))["pixel_values"]
    logits = {}
    for dtype, teacher in teachers.items():
        # To the bit, so not in channels_last: a teacher that is shared out stays as it was, and another memory format
        # is other arithmetic.
        teacher.prepare(torch.device("cpu"), dtype, False, shard=world_size > 1)
        logits[dtype] = teacher({"pixel_values": pixels}).logits
    trainer, results = train(f"{folder}/taught", world_size, shard_teacher=world_size > 1, **SAVING)
    before = trainer.evaluate()
    if trainer.args.process_index == 1:  # it has forgotten what the teacher said, and the other has not
        trainer.teacher_memory.current.fill_(-1)
    forgetful = trainer.evaluate()
    measured = [{key: entry[key] for key in ("eval_agreement", "eval_teacher_top1")} for entry in (before, forgetful)]
    held, whole = part_of(trainer.teacher.model), trainer.teacher.parameter_count()
    return results | {"logits": logits, "measured": measured, "held": held, "whole": whole}


def main(folder, world_size, other):
    results = {}
    trainer, results["whole"] = train(f"{folder}/whole", world_size, **SAVING)
    results["best"] = trainer.state.best_model_checkpoint
    trainer.export()
    checkpoint = "whole/checkpoint-6"
    _, results["resumed"] = train(f"{folder}/resumed", world_size, f"{folder}/{checkpoint}", **SAVING)
    _, results["bf16"] = train(f"{folder}/bf16", world_size, bf16=True, max_grad_norm=0.5)
    parts = {"freeze": ["patch_embed", "blocks.0.*"], "layer_decay": 0.5}
    _, results["partly"] = train(f"{folder}/partly", world_size, **parts)
    results["taught"] = share_out_the_teacher(folder, world_size)
    if other:  # a run that is not shared out goes on shared out
        _, results["crossed"] = train(f"{folder}/crossed", world_size, f"{other}/{checkpoint}", **SAVING)
    rank = trainer.args.process_index
    torch.save(results, f"{folder}/rank{rank}.pt")
