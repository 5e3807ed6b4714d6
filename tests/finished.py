"""Runs as distill.py leaves them, written without training."""

import json
from pathlib import Path

import yaml
from helpers import RESULTS

# What resolving recipes/cifar100/resnet56-resnet20/kd_zscore.yaml gives, without what has no effect on the student.
RECIPE = {
    "dataset_name": "path/to/cifar100",
    "label_column": "fine_label",
    "num_train_epochs": 240.0,
    "per_device_train_batch_size": 64,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.05,
    "lr_milestones": [150.0, 180.0, 210.0],
    "weight_decay": 0.0005,
    "decay_all_parameters": True,
    "bf16": True,
    "student_name_or_path": "cifar_resnet20",
    "teacher_name_or_path": ["runs/cifar100/teachers/resnet56/teacher"],
    "ce_weight": 0.1,
    "losses": {"kd": {"temperature": 2.0, "weight": 9.0}},
    "logit_standardization": True,
    "published_top1": 71.43,
}
KD_ZSCORE = "cifar100/resnet56-resnet20/kd_zscore"


def finished_run(folder, top1, seed=1, recipe=None, planned_epochs=None, name=KD_ZSCORE, **facts):
    """Writes a run of as many epochs as `top1` has values, ten steps each, of as many as it was to have.

    Args:
        recipe: changes of the recipe; False: a run from code, which has none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    rows = [
        {"epoch": float(epoch), "step": 10 * epoch, "seconds": 1.0, "images_per_second": 100.0 * seed}
        | {"eval_top1": value, "eval_top5": value + 10, "eval_agreement": value - 10, "eval_teacher_top1": 80.0}
        for epoch, value in enumerate(top1, 1)
    ]
    results = RESULTS | {
        "recipe": None if recipe is False else name,
        "seed": seed,
        "planned_steps": 10 * (planned_epochs or len(top1)),
    }
    results |= {"devices": "1 x cuda", "images_per_second": 100.0 * seed} | facts
    if rows:
        results |= {"best": measured(max(rows, key=lambda row: row["eval_top1"])), "last": measured(rows[-1])}
    (folder / "results.json").write_text(json.dumps(results | {"epochs": rows}))
    if recipe is not False:
        resolved = RECIPE | {"output_dir": str(folder), "seed": seed} | (recipe or {})
        (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved))
    return folder


def measured(row):
    summary = {key.removeprefix("eval_"): row[key] for key in ("epoch", "step", "eval_top1", "eval_top5")}
    return summary | {"agreement": row["eval_agreement"]}
