"""Losses of the user's own in recipes: `module:Class` beside the recipe, and entry points of packages."""

import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from hfkd import load_student
from hfkd.cli import main
from hfkd.commands.compare import compare
from hfkd.commands.evaluate import evaluate
from hfkd.commands.search import search
from hfkd.commands.train import distill
from hfkd.losses import own
from hfkd.recipe.reading import parse_recipe
from hfkd.recipe.yaml_file import dump_yaml, read_yaml

CODE = """
import torch
from torch import nn
from hfkd.losses import DistillationLoss


class LogitMSE(DistillationLoss):
    def __init__(self, scale: float = 1.0, weight: float = 1.0):
        super().__init__(weight)
        self.factor = nn.Parameter(torch.tensor(scale))

    def forward(self, student, teacher, batch):
        ours, theirs = self.logits(student, teacher)
        return nn.functional.mse_loss(self.factor * ours, theirs)


class NoLoss:
    pass
"""
NAME = "my_project.losses:LogitMSE"
RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "teacher_name_or_path": "teacher/model",
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:64]",
    "eval_split": "test[:40]",
    "per_device_train_batch_size": 32,
    "num_train_epochs": 2,
    "optim": "sgd",
    "learning_rate": 0.05,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "disable_tqdm": True,
    "losses": {"kd": {}, NAME: {"weight": 0.1}},
}
SPACE = {f"losses.{NAME}.scale": {"choices": [1.0, 2.0]}, f"losses.{NAME}.weight": {"low": 0.05, "high": 0.2}}


@pytest.fixture(autouse=True)
def project(monkeypatch):
    """A recipe with its module beside it, in a folder that is not the current one."""
    Path("mine/my_project").mkdir(parents=True)
    Path("mine/my_project/losses.py").write_text(CODE)
    Path("mine/broken.py").write_text("import no_such_library")
    Path("mine/r.yaml").write_text(dump_yaml(RECIPE))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("my_project")]:
        del sys.modules[name]


def last(folder):
    return json.loads(Path(folder, "results.json").read_text())["last"]


def test_a_run_with_a_loss_of_ones_own(monkeypatch, capsys):
    torch.manual_seed(1)
    load_student("cifar_resnet8", num_classes=10).save_pretrained("teacher/model")
    monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)  # its figure takes long
    trainer = distill(["mine/r", f"--losses.{NAME}.scale", "2", "--output_dir", "runs/a"])
    row = json.loads(Path("runs/a/results.json").read_text())["epochs"][0]
    assert row["loss_LogitMSE"] > 0 and row["loss_kd"] > 0
    recipe = read_yaml(Path("runs/a/recipe.yaml"))
    assert recipe["losses"] == {"kd": {}, NAME: {"weight": 0.1, "scale": 2}}
    assert trainer.distiller.losses["LogitMSE"].factor.item() != 2, "its parameters are trained"

    whole = last("runs/a")
    words = [f"--losses.{NAME}.scale", "2", "--output_dir", "runs/b"]
    distill(["mine/r", *words, "--max_steps", "4"])
    shutil.rmtree("runs/b/checkpoint-4")
    distill(["mine/r", *words, "--max_steps", "4", "--resume_from_checkpoint", "true"])
    assert last("runs/b")["top1"] == whole["top1"]

    assert evaluate(["runs/a"])["eval_top1"] == pytest.approx(whole["top1"])
    monkeypatch.setattr("hfkd.commands.compare.savings_text", lambda *args: "")
    rows = compare(["runs/a", "runs/b"])
    assert len(rows) == 2 and "max_steps" in rows[1].label

    monkeypatch.syspath_prepend("mine")  # the resolved recipe lies elsewhere
    Path("mine/s.yaml").write_text(dump_yaml({"extends": "r.yaml", "search": SPACE, "num_train_epochs": 1}))
    trials = search(["mine/s", "--n_trials", "2"])
    assert set(trials[0].values) == set(SPACE)
    best = read_yaml(Path("runs/search/s/best.yaml"))
    assert best["extends"] == "../../../mine/s.yaml" and set(best["losses"][NAME]) == {"weight", "scale"}
    assert parse_recipe(["runs/search/s/best.yaml"])[2].losses == best["losses"]


def test_losses_on_the_command_line():
    _, _, config, resolved = parse_recipe(["mine/r", "--losses", f"{NAME}: {{weight: 5e-1}}", "--seed", "3"])
    assert config.losses == resolved["losses"] == {NAME: {"weight": 0.5}}
    assert parse_recipe(["mine/r", f"--losses.{NAME}.weight", "null"])[2].losses[NAME] == {}


def test_the_module_is_looked_for_beside_what_is_extended():
    Path("other").mkdir()
    Path("other/child.yaml").write_text(dump_yaml({"extends": "../mine/r"}))
    assert NAME in parse_recipe(["other/child"])[2].losses


def test_a_method_of_an_installed_package(monkeypatch, capsys):
    entry = importlib.metadata.EntryPoint("mine", "my_project.losses:LogitMSE", own.ENTRY_POINTS)
    monkeypatch.setattr(own, "entry_points", lambda group: [entry] if group == "hfkd.losses" else [])
    own.installed_losses.cache_clear()
    monkeypatch.syspath_prepend("mine")
    try:
        words = ["--losses", "{mine: {weight: 3}}"]
        assert parse_recipe(["mine/r", *words])[2].losses == {"mine": {"weight": 3}}
        assert own.own_loss("mine").__name__ == "LogitMSE"
        with pytest.raises(SystemExit):
            main(["distill", "--help"])
        assert "  mine: of the package my_project.losses\n" in capsys.readouterr().out
        with pytest.raises(ValueError, match="no method 'minn'. Did you mean 'mine'"):
            parse_recipe(["mine/r", "--losses.minn.weight", "3"])
    finally:
        own.installed_losses.cache_clear()


@pytest.mark.parametrize(
    "losses, message",
    [
        (
            {"my_projekt.losses:LogitMSE": {}},
            "there is no module 'my_projekt' beside the recipe, in the",
        ),
        ({"my_project.lossses:LogitMSE": {}}, "there is no module 'my_project.lossses'"),
        ({"my_project.losses:LogitMS": {}}, "my_project.losses has no 'LogitMS'. Did you mean 'LogitMSE'"),
        ({"my_project.losses:NoLoss": {}}, "expected a subclass of hfkd.losses.DistillationLoss, got <class"),
        ({":LogitMSE": {}}, "expected the form module:Class"),
        ({NAME: {"temprature": 1}}, "takes no parameter 'temprature'"),
        ({NAME: {"scale": "much"}}, f"losses.{NAME}.scale is 'much'"),
        ({NAME: {}, "my_project.losses:KDLoss": {}}, "has no 'KDLoss'"),
    ],
)
def test_mistakes(losses, message, capsys):
    Path("mine/r.yaml").write_text(dump_yaml(RECIPE | {"losses": losses}))
    with pytest.raises(SystemExit) as ending:
        main(["distill", "mine/r"])
    error = capsys.readouterr().err
    assert ending.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_two_losses_of_one_name():
    Path("mine/second.py").write_text("from my_project.losses import LogitMSE")
    with pytest.raises(ValueError, match=f"two losses have the name 'LogitMSE': {re.escape(NAME)}, second:LogitMSE"):
        parse_recipe(["mine/r", "--losses", f"{{{NAME}: {{}}, 'second:LogitMSE': {{}}}}"])


def test_an_error_within_the_module_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        parse_recipe(["mine/r", "--losses", "{'broken:Loss': {}}"])
