"""What each process of test_distributed.py runs: trains every method, rank 0 saves what came out."""

import sys

import torch
from helpers import Plain, config, images, train_logs

from hfkd import DistillationTrainer, load_student

MEANS = {  # losses that are means over the batch: splitting the batch over processes must not change them
    "kd": {"kd": {}},
    "dkd": {"dkd": {"warmup_epochs": 2}},
    "ctkd": {"ctkd": {"weight": 0.9}},
    "ctkd_instance": {"ctkd": {"instance_wise": True}},
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


def main(folder, world_size):
    results = {}
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
    torch.save(results, f"{folder}/rank{results['kd']['rank']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
