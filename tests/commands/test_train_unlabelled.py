"""Whole runs on images without labels, and on images with and without labels, through the command line."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, BitImageProcessor, Dinov2Config, Dinov2Model

from hfkd import load_student
from hfkd.cli import main
from hfkd.commands.evaluate import evaluate
from hfkd.commands.train import distill
from hfkd.networks.wrapping import exported_state_dict

DINO = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
SETTINGS = {
    "student": "cifar_resnet8",
    "teacher": "teacher",
    "image_size": 16,
    "crop_pct": 1.0,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A teacher, 24 photographs in a folder, and 12 + 6 of three classes in class folders."""
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(1)
    model = load_student("cifar_resnet8", ["bee", "dog", "ant", "cat"], image_size=16)
    model.save_pretrained(folder / "teacher", state_dict=exported_state_dict(model), save_original_format=False)
    names = [f"flat/{number}.png" for number in range(24)]
    names += [f"labelled/train/{name}/{number}.png" for name in ("ant", "bee", "cat") for number in range(4)]
    names += [f"labelled/test/{name}/{number}.png" for name in ("ant", "bee", "cat") for number in range(2)]
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), (9 * index % 256, 200 - 4 * index, 77)).save(path)
    return folder


@pytest.fixture(autouse=True)
def in_shared(shared):
    for path in shared.iterdir():
        Path(path.name).symlink_to(path)


def words(dataset_name, **changes):
    """The words of a command line without a recipe."""
    settings = {"dataset_name": dataset_name, **SETTINGS, "output_dir": "run"} | changes
    return [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]


def results(folder="run"):
    return json.loads(Path(folder, "results.json").read_text())


def refused(capsys, argv, message):
    with pytest.raises(SystemExit) as ending:
        main(argv)
    error = capsys.readouterr().err
    assert ending.value.code == 2 and re.search(message, error), error


def same_weights(one, other):
    one, other = (load_file(f"{run}/student/model.safetensors") for run in (one, other))
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_folder_of_photographs_is_distilled_and_then_fine_tuned(capsys):
    distill(words("flat", disable_tqdm=False))
    shown = capsys.readouterr().out
    assert "data      flat: 23 training images, 1 evaluation image without labels, 4 classes" in shown
    assert "labels    none in training: ce_weight is 0" in shown and "Top-1" not in shown
    assert re.search(r"  eval_kd [\d.e+-]+", shown) and not re.search(r"  kd .*  kd ", shown), shown
    assert (
        re.search(r"Loss of the evaluation images: [\d.]+ at its best", shown)
        and "train-teacher --dataset_name LABELLED --student run/student" in shown
    )
    found = results()
    assert found["ce_weight"] == 0 and found["best_by"] == {"metric": "loss", "greater_is_better": False}
    assert found["dataset"]["unlabelled_images"] == 23 and "train_images" not in found["dataset"]
    best = min(found["epochs"], key=lambda row: row["eval_loss"])
    assert found["best"]["loss"] == best["eval_loss"] == best["eval_loss_kd"] and "top1" not in found["best"]
    card = Path("run/student/README.md").read_text()
    assert "No accuracy was measured" in card and "top-1" not in card.lower() and "accuracy" not in card.split("---")[1]
    student = AutoModelForImageClassification.from_pretrained("run/student")
    assert list(student.config.id2label.values()) == ["bee", "dog", "ant", "cat"]
    main(["compare", "run"])
    assert "agreement" in capsys.readouterr().out

    distill(words("labelled", student="run/student", image_size=None, output_dir="tuned", num_train_epochs=1))
    assert {"top1", "agreement"} <= results("tuned")["best"].keys() and results("tuned")["ce_weight"] == 1


def test_a_teacher_that_does_not_name_its_classes():
    """An architecture with weights from a file; images whose labels are not read are evaluated with them later."""
    torch.manual_seed(1)
    save_file(
        load_student("cifar_resnet8", num_classes=3, image_size=16).timm_model.state_dict(), "weights.safetensors"
    )
    settings = {"teacher": "cifar_resnet8", "teacher_checkpoint": "weights.safetensors", "num_train_epochs": 1}
    distill(words("labelled", label_column="none", **settings))
    assert results()["dataset"]["classes"] == 3 and "agreement" in results()["best"]
    assert "eval_top1" in evaluate(["run", "--label_column", "label"])


def test_a_teacher_without_a_classifier(capsys):
    """The student is a backbone; its best checkpoint has the lowest loss of the images held out."""
    torch.manual_seed(1)
    Dinov2Model(DINO).save_pretrained("dino")
    sides = {"height": 16, "width": 16}
    BitImageProcessor(size=sides, crop_size=sides).save_pretrained("dino")
    distill(words("flat", teacher="dino", losses="{token_mse: {}, feature_queue: {size: 16}}"))
    found = results()
    assert (
        found["best"]["loss"] == min(row["eval_loss"] for row in found["epochs"]) and "agreement" not in found["best"]
    )
    assert {"loss_token_mse", "loss_feature_queue"} <= found["best"]["others"].keys()
    assert not found["has_classifier"] and found["dataset"]["classes"] == 0
    assert "Loss of the evaluation images" in capsys.readouterr().out
    distill(words("labelled", student="run/student", image_size=None, output_dir="tuned", num_train_epochs=1))
    assert "top1" in results("tuned")["best"]


@pytest.mark.parametrize("data", ["stream", "mixed"])
def test_resumed_is_identical(data):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "load_best_model_at_end": False}
    if data == "stream":
        name, settings["streaming"], settings["label_column"] = "labelled", True, "none"
    else:
        name, settings["unlabelled_dataset_name"], settings["unlabelled_share"] = "labelled", "flat", 0.25
    distill(words(name, output_dir="whole", **settings))
    distill(words(name, output_dir="cut", resume_from_checkpoint="whole/checkpoint-2", **settings))
    assert results("whole")["planned_steps"] == 4 and same_weights("whole", "cut")
    assert ("top1" in results("whole")["best"]) == (data == "mixed")


def test_evaluation_images_with_labels_tell_the_accuracy(shared):
    folder = Path("both")
    folder.mkdir()
    (folder / "train").symlink_to(shared / "flat")
    (folder / "test").symlink_to(shared / "labelled" / "test")
    trainer = distill(words("both", num_train_epochs=1))
    assert trainer.train_dataset.class_names == trainer.eval_dataset.class_names == ["bee", "dog", "ant", "cat"]
    assert results()["epochs"][0]["eval_teacher_top1"] == pytest.approx(trainer.teacher_top1())
    assert sorted(trainer.eval_dataset.labels.tolist()) == [0, 0, 2, 2, 3, 3]


def test_a_cached_teacher_and_images_without_labels(shared, capsys):
    folder = Path("both")
    folder.mkdir()
    (folder / "train").symlink_to(shared / "flat")
    (folder / "test").symlink_to(shared / "labelled" / "test")
    main(["cache-teacher", *words("both", cache_dir="cache", output_dir=None, num_train_epochs=1)])
    distill(words("both", teacher_cache="cache", num_train_epochs=1))
    assert results()["teacher_cache"]["epochs"] == 1 and "agreement" in results()["best"]
    argv = ["distill", *words("both", teacher_cache="cache", label_column="none", output_dir="other")]
    refused(capsys, argv, "have no labels, so that the losses are measured on them, and a teacher cache")


@pytest.mark.parametrize(
    "dataset_name, changes, message",
    [
        (
            "labelled",
            {"label_column": "none", "ce_weight": 1},
            "ce_weight is 1, .* with label_column none .* have none",
        ),
        ("labelled", {"label_column": "none", "losses.dkd.weight": 1}, r"The losses \['dkd'\] read labels"),
        ("labelled", {"unlabelled_dataset_name": "flat", "streaming": True}, "set streaming: false"),
        ("flat", {"unlabelled_dataset_name": "flat", "label_column": "none"}, "goes with images that have labels"),
        ("labelled", {"unlabelled_dataset_name": "flat", "unlabelled_share": 1}, "unlabelled_share must be above 0"),
    ],
)
def test_refused_before_anything_is_loaded(dataset_name, changes, message, capsys, monkeypatch):
    for name in ("load_splits", "build_student", "load_teachers"):
        monkeypatch.setattr(f"hfkd.commands.build.{name}", lambda *args: pytest.fail("something was loaded"))
    refused(capsys, ["distill", *words(dataset_name, **changes)], message)


@pytest.mark.parametrize(
    "command, dataset_name, changes, message",
    [
        ("distill", "flat", {"ce_weight": 1}, "ce_weight is 1, .* and the images of flat, split 'train.*' have none"),
        ("distill", "flat", {"losses": "{nkd: {}}"}, r"The losses \['nkd'\] read labels, and the images of flat"),
        ("distill", "flat", {"metric_for_best_model": "top1"}, "no evaluation gives 'top1'.*Valid: loss, loss_kd, agr"),
        ("distill", "flat", {"unlabelled_dataset_name": "flat"}, "goes with images that have labels"),
        ("train-teacher", "flat", {"teacher": None}, "images of flat.* have no labels, and there is no loss to learn"),
        (
            "distill",
            "labelled",
            {"unlabelled_dataset_name": "flat", "mixup": 0.2, "dataloader_drop_last": True},
            "mixup and cutmix would mix images with labels and images without",
        ),
        (
            "distill",
            "labelled",
            {"unlabelled_dataset_name": "flat", "unlabelled_share": 0.01},
            "A batch of 8 images would hold 0 without labels",
        ),
    ],
)
def test_refused(command, dataset_name, changes, message, capsys):
    refused(capsys, [command, *words(dataset_name, **changes)], message)
    assert not Path("run/student").exists()


def test_an_accuracy_needs_labels(capsys):
    refused(capsys, ["evaluate", "teacher", "--dataset_name", "flat", "--eval_split", "train"], "train.* has no labels")
