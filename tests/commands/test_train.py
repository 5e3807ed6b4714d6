"""Whole runs from a recipe: what they leave behind, and what they refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hfkd import load_student
from hfkd.cli import main
from hfkd.commands.build import evaluation_set, load_splits
from hfkd.commands.evaluate import evaluate
from hfkd.commands.train import build_trainer, distill, train_teacher
from hfkd.networks.input_spec import input_spec
from hfkd.recipe.arguments import DataArguments
from hfkd.recipe.reading import parse_recipe
from hfkd.runs.folder import environment

RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:128]",
    "eval_split": "test[:50]",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 64,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.05,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "save_total_limit": 2,
    "disable_tqdm": True,
    "report_to": "none",
}
KD = {"losses": {"kd": {"temperature": 4.0, "weight": 0.9}}, "ce_weight": 0.1, "teacher_name_or_path": "teacher"}


def recipe(path="recipes/digits/run.yaml", **changes):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(RECIPE | changes))
    return path


@pytest.fixture
def teacher():
    """An (untrained) teacher of ten classes in the folder `teacher`."""
    torch.manual_seed(1)
    load_student("cifar_resnet14", num_classes=10).save_pretrained("teacher")


def test_what_a_run_leaves(teacher, capsys):
    trainer = distill([recipe(published_top1=71.43, **KD), "--seed", "3"])
    folder = "runs/digits/run"
    device, data, student, taught_by, training, top1, *_, end, following = capsys.readouterr().out.splitlines()
    assert device.startswith("device    ") and device.endswith(", float32")
    assert data == "data      digits: 128 training images, 50 evaluation images, 10 classes, 32 x 32 pixels"
    parameters, of_teacher = (trainer.results.facts[key] for key in ("parameters", "teacher_parameters"))
    assert student == f"student   cifar_resnet8, {parameters:,} parameters, random weights"
    assert taught_by == f"teacher   cifar_resnet14, {of_teacher:,} parameters, weights from the folder teacher"
    assert training == f"training  4 steps of 64 images, into {folder}"
    assert top1.startswith("The teacher cifar_resnet14 has a top-1 of ")
    assert end.startswith("Top-1: ") and end.endswith(f"{folder}/student holds the best.")
    assert following == f"Next: hfkd visualize {folder}, or hfkd export {folder}/student for one ONNX file"

    results = json.loads(open(f"{folder}/results.json").read())
    assert [row["epoch"] for row in results["epochs"]] == [1, 2]
    assert results["last"]["top1"] == results["epochs"][-1]["eval_top1"]
    assert results["best"]["top1"] == max(row["eval_top1"] for row in results["epochs"])
    assert {"top1", "top5", "agreement", "epoch", "step"} <= results["best"].keys()
    assert results["published_top1"] == 71.43 and results["exported"] == "best" and results["role"] == "student"
    assert results["seconds"] > 0 and results["images_per_second"] > 0
    assert results["parameters"] == sum(value.numel() for value in trainer.model.parameters())
    assert torch.__version__.startswith(results["versions"]["torch"]) and "git_commit" in results
    assert {"loss_ce", "loss_kd", "learning_rate"} <= results["epochs"][0].keys()

    resolved = yaml.safe_load(open(f"{folder}/recipe.yaml"))
    assert resolved["seed"] == 3 and resolved["losses"] == KD["losses"] and resolved["output_dir"] == folder
    history = json.loads(open(f"{folder}/trainer_state.json").read())["log_history"]
    assert sum("loss_kd" in entry for entry in history) == 2

    best = evaluate([f"{folder}/student"])
    assert best["eval_top1"] == pytest.approx(results["best"]["top1"])


def test_train_teacher_then_distil():
    train_teacher([recipe("recipes/teachers/t.yaml")])
    results = json.loads(open("runs/teachers/t/results.json").read())
    assert results["role"] == "teacher" and results["teacher"] is None and "agreement" not in results["best"]
    distill([recipe(**KD | {"teacher_name_or_path": "runs/teachers/t/teacher"})])
    last = json.loads(open("runs/digits/run/results.json").read())["epochs"][-1]
    assert last["eval_teacher_top1"] == pytest.approx(results["best"]["top1"])
    with pytest.raises(ValueError, match="labels alone"):
        train_teacher([recipe(**KD)])


def test_methods_that_need_no_teacher(capsys):
    distill([recipe(losses={"uskd": {}, "tf_kd": {}}), "--num_train_epochs", "1"])
    results = json.loads(open("runs/digits/run/results.json").read())
    assert results["teacher"] is None and {"loss_uskd_target", "loss_tf_kd"} <= results["epochs"][0].keys()
    card = open("runs/digits/run/student/README.md").read()
    assert "The method is `tf_kd` + `uskd`, which needs no teacher." in card and "`None`" not in card
    evaluate(["runs/digits/run/student"])
    main(["compare", "runs"])
    assert "None" not in capsys.readouterr().out


def test_resume_keeps_the_rows_and_ends_alike(teacher):
    path = recipe(**KD)
    distill([path, "--output_dir", "whole"])
    with pytest.raises(ValueError, match="holds a run of this recipe.*--resume_from_checkpoint true"):
        distill([path, "--output_dir", "whole"])

    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoint-4")
    resolved = yaml.safe_load(open("cut/recipe.yaml")) | {"output_dir": "cut"}
    open("cut/recipe.yaml", "w").write(yaml.safe_dump(resolved))
    distill([path, "--output_dir", "cut", "--resume_from_checkpoint", "true"])
    whole, cut = (json.loads(open(f"{name}/results.json").read())["epochs"] for name in ("whole", "cut"))
    assert [row["step"] for row in cut] == [row["step"] for row in whole] == [2, 4]
    assert cut[0] == whole[0] and cut[1]["eval_loss"] == whole[1]["eval_loss"] and cut[1]["loss"] == whole[1]["loss"]


def test_the_seed_decides_the_initial_weights():
    weights = []
    for seed in ("3", "3", "4"):
        torch.rand(7)  # whatever was drawn before
        model = build_trainer(*parse_recipe([recipe(), "--seed", seed])[:3]).model
        weights.append(model.timm_model.conv1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_best_epoch_is_exported(teacher):
    """The second epoch is ruined by its learning rate, so the first is the best, and what student/ holds."""
    path = recipe(**KD | {"lr_milestones": [1], "lr_gamma": 1e2, "lr_scheduler_type": "constant"})
    trainer = distill([path])
    results = json.loads(open("runs/digits/run/results.json").read())
    assert results["best"]["checkpoint"] == "checkpoint-2" and results["last"]["checkpoint"] == "checkpoint-4"
    assert Path("runs/digits/run/checkpoint-2").is_dir() and Path("runs/digits/run/checkpoint-4").is_dir()
    assert trainer.evaluate()["eval_top1"] == results["best"]["top1"]
    exported, best = (load_file(f"runs/digits/run/{name}/model.safetensors") for name in ("student", "checkpoint-2"))
    assert all(torch.equal(exported[name], best[name]) for name in best)
    assert not list(Path("runs").rglob("training_args.bin"))  # it would hold the Hub token


def test_results_without_evaluation_during_training(teacher):
    changes = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "num_train_epochs": 1}
    distill([recipe(**KD | changes)])
    results = json.loads(open("runs/digits/run/results.json").read())
    assert results["exported"] == "last" and "top1" in results["last"]
    with pytest.raises(ValueError, match="holds a run of this recipe"):
        distill([recipe(**KD | changes)])


def test_no_git_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert environment()["git_commit"] is None


def test_a_teacher_with_its_classes_in_another_order():
    reordered = load_student("cifar_resnet14", class_names=[str(i) for i in range(10)][::-1])
    reordered.save_pretrained("teacher")
    trainer = build_trainer(*parse_recipe([recipe(**KD)])[:3])
    batch = trainer.train_dataset.__getitems__([0, 1])
    expected = reordered.eval()(trainer.teacher.convert(batch["pixel_values"])).logits.flip(1)
    torch.testing.assert_close(trainer.teacher(batch).logits, expected)


def test_another_recipes_folder_is_refused(teacher):
    path = recipe(**KD)
    distill([path, "--num_train_epochs", "1"])
    with pytest.raises(ValueError, match="(?s)another recipe.*num_train_epochs: 1.0 there, 2.0 here.*--output_dir"):
        distill([path])
    with pytest.raises(ValueError, match="another recipe"):
        distill([path, "--resume_from_checkpoint", "true"])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"teacher_name_or_path": "runs/no/teacher"}, ValueError, "no existing folder.*hfkd train-teacher"),
        ({"teacher_name_or_path": "cifar_resnet14"}, ValueError, "no pretrained weights.*teacher_checkpoint"),
        ({"student_name_or_path": "cifar_resnet21"}, ValueError, "'cifar_resnet21' is no timm.*cifar_resnet"),
        ({"losses": {"dk": {}}}, ValueError, "no method 'dk'.*kd"),
        ({"losses": {"kd": {"temprature": 4}}}, ValueError, "temprature.*temperature"),
        ({"losses": {"kd": {"temperature": 0}}}, ValueError, "temperature"),
        ({"losses": {"kd": {"temperature": -2}}}, ValueError, "temperature"),
        ({"label_column": "lable"}, ValueError, "lable.*label"),
        ({"eval_split": "tset"}, ValueError, "tset.*test"),
        ({"dataset_name": "no/such/folder/here"}, ValueError, "no/such/folder/here"),
    ],
)
def test_bad_input_fails_before_training(teacher, changes, error, message):
    with pytest.raises(error, match=message):
        distill([recipe(**KD | changes)])


def test_a_checkpoint_of_another_architecture(teacher):
    torch.save({"model": load_student("cifar_resnet20", num_classes=10).timm_model.state_dict()}, "t.pth")
    with pytest.raises(ValueError, match=r"t.pth does not fit CifarResNet:\n  36 unexpected: layer1.2.conv1.weight"):
        changes = {"teacher_name_or_path": "cifar_resnet14", "teacher_checkpoint": "t.pth"}
        distill([recipe(**KD | changes)])
    with pytest.raises(ValueError, match="is for a timm architecture"):
        distill([recipe(**KD | {"teacher_checkpoint": "t.pth"})])


def test_a_published_checkpoint_teaches():
    torch.save({"model": load_student("cifar_resnet20", num_classes=10).timm_model.state_dict(), "epoch": 240}, "t.pth")
    changes = {"teacher_name_or_path": "cifar_resnet20", "teacher_checkpoint": "t.pth", "num_train_epochs": 1}
    trainer = distill([recipe(**KD | changes)])
    assert trainer.teacher.name == "cifar_resnet20"


def test_teacher_with_other_classes():
    load_student("cifar_resnet14", num_classes=7).save_pretrained("teacher")
    with pytest.raises(ValueError, match="teacher has 7 classes and the student 10"):
        distill([recipe(**KD)])


@pytest.fixture
def animals(tmp_path):
    """A Parquet folder with CIFAR-100's columns and two classes a level."""
    features = Features(
        {
            "img": Image(),
            "fine_label": ClassLabel(names=["cat", "dog", "eel"]),
            "coarse_label": ClassLabel(names=["mammal", "fish"]),
        }
    )
    for split in ("train", "test"):
        grey = [PILImage.new("RGB", (32, 32), (i, i, i)) for i in range(12)]
        rows = [{"img": image, "fine_label": i % 3, "coarse_label": i % 2} for i, image in enumerate(grey)]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "animals" / f"{split}.parquet")
    return str(tmp_path / "animals")


def test_evaluating_finds_the_labels_that_a_model_knows(animals, capsys):
    """Nothing but the model's own class names says which of two columns of labels is meant."""
    load_student("cifar_resnet8", class_names=["cat", "dog", "eel"]).save_pretrained("model")
    metrics = evaluate(["model", "--dataset_name", animals, "--batch_size", "5"])
    printed = capsys.readouterr().out
    assert f"top1: {metrics['eval_top1']:.4f}" in printed and "top5: " in printed
    model = AutoModelForImageClassification.from_pretrained("model").eval()
    data_args = DataArguments(animals, train_split=None, label_column="fine_label")
    _, split = load_splits(data_args)
    batch = evaluation_set(split, input_spec(model), data_args).__getitems__(list(range(12)))
    correct = (model(batch["pixel_values"]).logits.argmax(1) == batch["labels"]).float().mean().item()
    assert metrics["eval_top1"] == pytest.approx(100 * correct)
    with pytest.raises(ValueError, match="batch_sise.*batch_size"):
        evaluate(["model", "--dataset_name", animals, "--batch_sise", "5"])
