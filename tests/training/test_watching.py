"""What trackers show of a run: TensorBoard's files read back, and trackers that cannot be used."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import Plain, config, images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hfkd import DistillationTrainer, load_student
from hfkd.commands.train import distill
from hfkd.recipe.reading import parse_recipe

RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "teacher_name_or_path": "teacher",
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:128]",
    "eval_split": "test[:50]",
    "losses": {"kd": {"weight": 0.9}, "ctkd": {}},
    "num_train_epochs": 2,
    "per_device_train_batch_size": 64,
    "optim": "sgd",
    "learning_rate": 0.05,
    "eval_strategy": "epoch",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "tensorboard",
}
TOKEN = "hf_ThisTokenIsSecret"


@pytest.fixture
def recipe():
    """A recipe, and the (untrained) teacher that it names."""
    torch.manual_seed(1)
    load_student("cifar_resnet14", num_classes=10).save_pretrained("teacher")
    Path("watched.yaml").write_text(yaml.safe_dump(RECIPE))
    return "watched.yaml"


def test_tensorboard_shows_every_term(recipe):
    trainer = distill([recipe, "--hub_token", TOKEN])
    events = EventAccumulator("runs/watched/tensorboard").Reload()
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    history = json.loads(Path("runs/watched/trainer_state.json").read_text())["log_history"]
    training = ("loss", "loss_ce", "loss_kd", "loss_ctkd", "ctkd_temperature", "learning_rate", "images_per_second")
    evaluation = ("loss", "top1", "top5", "agreement", "teacher_top1")
    names = {f"train/{key}": key for key in training} | {f"eval/{key}": f"eval_{key}" for key in evaluation}
    for tag, key in names.items():
        logged = [(entry["step"], entry[key]) for entry in history if key in entry]
        assert [step for step, _ in logged] == ([2, 4] if tag.startswith("eval/") else [1, 2, 3, 4])
        # An event holds a float32.
        assert shown[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged], tag

    rows = json.loads(Path("runs/watched/results.json").read_text())["epochs"]
    for tag, key in names.items():
        last_of_each_epoch = [value for step, value in shown[tag] if step in (2, 4)]
        assert last_of_each_epoch == [pytest.approx(row[key], rel=1e-6) for row in rows], tag

    assert trainer.args.hub_token == TOKEN
    assert "<HUB_TOKEN>" in events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    written = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []


def test_lines_without_bars(capsys):
    """Standard output is no terminal here; a run of some steps counts these."""
    set_up = config(disable_tqdm=False, max_steps=2, logging_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = DistillationTrainer(Plain(), None, set_up, train_dataset=images(32), eval_dataset=images(10))
    trainer.train()
    trainer.evaluate()
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith(("step", "epoch"))]
    assert [line.partition("  ")[0] for line in lines] == ["step 2/2"] * 2 and "top1" in lines[1]
    assert "it/s" not in printed.err and "%|" not in printed.err


@pytest.mark.parametrize(
    "names, message",
    [
        ("tensorbord", "no tracker 'tensorbord'.*'tensorboard'.*wandb.*'all'.*'none'"),
        (["tensorboard", "comet"], "no tracker 'comet'.*comet_ml"),
        (["tensorboard", "none"], "no tracker 'none'"),
    ],
)
def test_an_unknown_tracker(names, message):
    with pytest.raises(ValueError, match=message):
        config(report_to=names)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed(monkeypatch, name):
    find_spec = importlib.util.find_spec
    missing = {name, "tensorboardX"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda *args: None if args[0] in missing else find_spec(*args))
    with pytest.raises(ValueError, match=f"report_to: '{name}' cannot be used here; `pip install {name}`"):
        config(report_to=name)


def test_trackers_of_a_recipe(monkeypatch):
    """One, several, all that are installed, or none."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", TrainerCallback)
    for given, expected in (("tensorboard", ["tensorboard"]), (["tensorboard", "wandb"], ["tensorboard", "wandb"])):
        Path("r.yaml").write_text(yaml.safe_dump(RECIPE | {"report_to": given}))
        assert parse_recipe(["r.yaml"])[2].report_to == expected
    assert parse_recipe(["r.yaml", "--report_to", "wandb", "tensorboard"])[2].report_to == ["wandb", "tensorboard"]
    assert parse_recipe(["r.yaml", "--report_to", "none"])[2].report_to == []
    assert "tensorboard" in parse_recipe(["r.yaml", "--report_to", "all"])[2].report_to
    Path("r.yaml").write_text(yaml.safe_dump({key: RECIPE[key] for key in RECIPE if key != "report_to"}))
    assert parse_recipe(["r.yaml"])[2].report_to == [] == config(report_to="none").report_to
