"""Every recipe that ships: loads, builds its networks and losses, and takes a step."""

import json
import re

import pytest
import timm
import torch
import yaml
from helpers import ROOT, images

from hfkd import DistillationTrainer
from hfkd.recipe import parse_recipe

RECIPES = sorted(
    path for path in (ROOT / "recipes").rglob("*.yaml") if path.name != "base.yaml" and path.parent.name != "accelerate"
)
PAIRS = sorted(path.name for path in (ROOT / "recipes" / "cifar100").iterdir() if "-" in path.name)
METHODS = [method + suffix for method in ("kd", "dkd", "mlkd", "ctkd") for suffix in ("", "_zscore")]


def name(path):
    return str(path.relative_to(ROOT / "recipes").with_suffix(""))


def teacher_architecture(path):
    """The architecture that a recipe's teacher folder holds: that of the recipe that trains it."""
    folder = yaml.safe_load(path.read_text()).get("teacher_name_or_path")
    if folder is None:
        return None
    teacher_recipe = ROOT / "recipes" / folder.removeprefix("runs/").removesuffix("/teacher")
    return yaml.safe_load(teacher_recipe.with_suffix(".yaml").read_text())["student_name_or_path"]


def test_the_published_pairs_are_complete():
    assert len(PAIRS) == 14
    for pair in PAIRS:
        assert sorted(path.stem for path in (ROOT / "recipes" / "cifar100" / pair).glob("*.yaml")) == sorted(METHODS)
    assert len(list((ROOT / "recipes" / "cifar100" / "teachers").glob("*.yaml"))) == 6
    students = {pair.split("-")[1] for pair in PAIRS}
    assert {path.stem for path in (ROOT / "recipes" / "cifar100" / "students").glob("*.yaml")} == students


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_one_step(path):
    overrides = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--bf16", "false", "--disable_tqdm", "true"]
    overrides += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    model_args, data_args, config, recipe = parse_recipe([str(path), *overrides])
    assert f"recipes/{name(path)}.yaml" in path.read_text(), "the header gives the command"
    assert recipe["output_dir"] == f"runs/{name(path)}"
    classes = {"digits": 10, "uoft-cs/cifar100": 100}[data_args.dataset_name]
    torch.manual_seed(0)
    student = timm.create_model(model_args.student_name_or_path, num_classes=classes)
    architecture = teacher_architecture(path)
    teacher = architecture and timm.create_model(architecture, num_classes=classes)
    trainer = DistillationTrainer(student, teacher, config, train_dataset=images(4, classes=classes))
    trainer.train()
    log = trainer.state.log_history[0]
    terms = [value for key, value in log.items() if key.startswith("loss_")]
    assert len(terms) == (1 if teacher is None else 4 if "mlkd" in config.losses else 2)
    assert all(torch.tensor(terms).isfinite()) and log["loss"] == pytest.approx(sum(terms), rel=1e-4)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_published_settings(pair):
    """The rules of the protocols, and each published run's own temperature and weight."""
    teacher, student = pair.split("-")
    published = json.loads((ROOT / "tests" / "golden" / "published_cifar100.json").read_text())[pair]
    for method in METHODS:
        path = ROOT / "recipes" / "cifar100" / pair / f"{method}.yaml"
        _, _, config, recipe = parse_recipe([str(path)])
        loss, zscore = method.removesuffix("_zscore"), method.endswith("_zscore")
        settings = config.losses[loss]
        light = student in ("mobilenetv2", "shufflenetv2")
        assert config.logit_standardization is zscore
        assert config.published_top1 == published[method]["top1"]
        assert config.learning_rate == (0.01 if light else 0.025 if loss == "mlkd" else 0.05)
        assert config.lr_milestones == [150, 180, 210] and config.weight_decay == 5e-4 and config.decay_all_parameters
        assert config.per_device_train_batch_size == 64 and config.optim == "sgd"
        assert config.optim_args == "momentum=0.9" and config.max_grad_norm == 0
        assert config.num_train_epochs == published[method].get("epochs", 240)
        if loss in ("kd", "ctkd") or (loss == "mlkd" and zscore):
            assert config.ce_weight == 0.1
        else:
            assert config.ce_weight == 1.0
        default = {"kd": 0.9, "ctkd": 0.9, "dkd": None, "mlkd": 1.0}[loss]
        assert settings.get("weight") == (published[method]["weight"] if zscore else default)
        if loss == "ctkd":
            assert "temperature" not in settings
        else:
            assert settings["temperature"] == (published[method]["temperature"] if zscore else 4.0)
        if loss == "dkd":
            from_rule = 2.0 if re.match("resnet(56|110)", teacher) else 8.0
            from_rule = 6.0 if teacher == "vgg13" or (teacher == "wrn_40_2" and "wrn" in student) else from_rule
            assert settings["beta"] == from_rule and settings["alpha"] == 1 and settings["warmup_epochs"] == 20
