"""What each process of test_distributed.py runs: trains every method, rank 0 saves what came out."""

import sys

import torch
from helpers import Plain, config, images, train_logs

from hfkd import DistillationTrainer, load_student
from hfkd.data import CenterCrop, RandomResizedCrop, StreamingImageDataset, open_streams
from hfkd.models.base import CIFAR_MEAN, CIFAR_STD

MEANS = {  # losses that are means over the batch: splitting the batch over processes must not change them
    "kd": {"kd": {}},
    "dkd": {"dkd": {"warmup_epochs": 2}},
    "ctkd": {"ctkd": {"weight": 0.9}},
    "ctkd_instance": {"ctkd": {"instance_wise": True}},
}

LEARNT = {  # losses with parts that learn, or that change the student: every one must get a gradient in every step
    "features": {"kd": {}, **{name: {} for name in ("fitnet", "vid", "semckd", "srrl", "at", "sp", "pkt")}},
    "simkd": {"kd": {}, "simkd": {}},
}


def train(losses, world_size, student, teacher, output_dir, **changes):
    args = config(
        output_dir,
        losses=losses,
        per_device_train_batch_size=8 // world_size,
        num_train_epochs=2,
        save_strategy="epoch",
        **changes,
    )
    train_set, eval_set = images(32), images(26, seed=1, augment=False)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=train_set, eval_dataset=eval_set)
    trainer.train()
    metrics = trainer.evaluate()
    result = {"state": trainer.distiller.state_dict(), "logs": train_logs(trainer), "metrics": metrics}
    return {"rank": args.process_index, **result}


class Recorder(DistillationTrainer):
    """Remembers the rows of each epoch, and how the model stood after each step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.rows[int(self.state.epoch or 0)] += inputs["index"].tolist()
        return super().compute_loss(model, inputs, *args, **kwargs)


def stream(data, world_size, output_dir, resume_from_checkpoint=None):
    """Two epochs of a streamed data set, with DataLoader workers and a moving average."""
    torch.manual_seed(0)
    spec = {"image_size": 16, "mean": CIFAR_MEAN, "std": CIFAR_STD}
    splits = open_streams(data)
    train_set, eval_set = (
        StreamingImageDataset(split, transform=transform, seed=1, shuffle_buffer_size=6)
        for split, transform in zip(splits, (RandomResizedCrop(**spec), CenterCrop(**spec)), strict=True)
    )
    args = config(
        output_dir,
        losses={"kd": {}},
        per_device_train_batch_size=4,
        num_train_epochs=2,
        dataloader_num_workers=2,
        ema_decay=0.8,
        save_strategy="steps",
        save_steps=1,
    )
    trainer = Recorder(Plain(), Plain(), args, train_dataset=train_set, eval_dataset=eval_set)
    trainer.rows = {0: [], 1: []}
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    metrics = trainer.evaluate()
    return {"rank": args.process_index, "rows": trainer.rows, "state": trainer.model.state_dict(), "metrics": metrics}


def main(folder, world_size, data):
    results = {"stream": stream(data, world_size, f"{folder}/stream")}
    middle = f"{folder}/stream/checkpoint-{5 // world_size + 1}"
    results["resumed"] = stream(data, world_size, f"{folder}/resumed", resume_from_checkpoint=middle)
    for name, losses in MEANS.items():
        for zscore in (False, True):
            torch.manual_seed(0)
            key = f"{name}_zscore" if zscore else name
            output_dir = f"{folder}/{key}"
            networks = Plain().double(), Plain().double()  # float32 rounds small KL terms in the third digit
            results[key] = train(losses, world_size, *networks, output_dir, logit_standardization=zscore)
    torch.manual_seed(0)
    networks = load_student("cifar_resnet8", num_classes=10), load_student("cifar_resnet14", num_classes=10)
    results["mlkd"] = train({"mlkd": {}}, world_size, *networks, f"{folder}/mlkd")
    crd = {"crd": {"negatives": 20, "dimension": 4}}
    results["crd"] = train(crd, world_size, Plain(), Plain(), f"{folder}/crd")
    for name, losses in LEARNT.items():
        networks = load_student("cifar_resnet8", num_classes=10), load_student("cifar_resnet14", num_classes=10)
        results[name] = train(losses, world_size, *networks, f"{folder}/{name}")
    torch.save(results, f"{folder}/rank{results['kd']['rank']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
