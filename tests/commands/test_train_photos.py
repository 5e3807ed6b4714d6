"""Whole runs on photographs in folders: decoded on demand and streamed, any teacher, bad files."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import Plain, config, images
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hfkd import DistillationTrainer, load_student
from hfkd.commands.build import load_splits
from hfkd.commands.evaluate import evaluate
from hfkd.commands.train import build_trainer, distill
from hfkd.networks.wrapping import exported_state_dict
from hfkd.recipe.reading import parse_recipe

CLASSES = ["ant", "bee", "cat"]
RECIPE = {
    "student_name_or_path": "resnet10t",
    "dataset_name": "photos",
    "image_size": 32,
    "augmentation": "random_resized_crop",
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "crop_pct": 0.875,
    "teacher_name_or_path": "teacher",
    "losses": {"kd": {"weight": 0.9}},
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "disable_tqdm": True,
    "report_to": "none",
    "seed": 3,
}


@pytest.fixture(autouse=True)
def photos():
    """Twelve training and six test JPEGs of three classes."""
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(CLASSES):
            folder = Path("photos", split, name)
            folder.mkdir(parents=True)
            for number in range(count):
                colour = (80 * label + 20, 30 * number, 90)
                Image.new("RGB", (50, 40), colour).save(folder / f"{number}.jpg")


@pytest.fixture(autouse=True)
def teacher():
    """Of the data set's classes in another order and one more, at 24 px, in the folder `teacher`."""
    save_teacher("teacher", ["bee", "dog", "ant", "cat"])


def save_teacher(folder, class_names):
    torch.manual_seed(1)
    model = load_student("cifar_resnet8", class_names, image_size=24)
    model.save_pretrained(folder, state_dict=exported_state_dict(model), save_original_format=False)


def recipe(**changes):
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    return "recipe.yaml"


def test_a_run_on_photographs():
    trainer = distill([recipe()])
    assert trainer.train_dataset.augmented and not trainer.eval_dataset.augmented
    results = json.loads(Path("runs/recipe/results.json").read_text())
    assert [row["epoch"] for row in results["epochs"]] == [1, 2] and results["teacher"] == "cifar_resnet8"
    student = AutoModelForImageClassification.from_pretrained("runs/recipe/student")
    assert student.config.pretrained_cfg["crop_pct"] == 0.875 and student.config.id2label[2] == "cat"
    metrics = evaluate(["runs/recipe/student"])  # which finds data and preparation in the run's recipe
    assert metrics["eval_top1"] == pytest.approx(results["last"]["top1"])
    assert metrics["eval_loss"] == pytest.approx(results["epochs"][-1]["eval_loss"], rel=1e-4)


def test_workers_do_not_change_a_run():
    weights = []
    for workers in ("0", "2"):
        distill([recipe(), "--dataloader_num_workers", workers, "--output_dir", workers])
        weights.append(load_file(f"{workers}/student/model.safetensors"))
    assert [name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])] == []


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_resumed_is_identical(streaming):
    settings = ["--streaming", streaming, "--save_strategy", "steps", "--save_steps", "1", "--ema_decay", "0.8"]
    settings += ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true"]
    path = recipe()
    distill([path, *settings, "--output_dir", "whole"])
    distill([path, *settings, "--output_dir", "cut", "--resume_from_checkpoint", "whole/checkpoint-2"])
    whole, cut = (load_file(f"{run}/student/model.safetensors") for run in ("whole", "cut"))
    assert [name for name, value in whole.items() if not torch.equal(value, cut[name])] == []


def test_a_stream_evaluates_as_what_is_not_streamed():
    expected = distill([recipe(), "--num_train_epochs", "1"]).evaluate()
    given = evaluate(["runs/recipe/student", "--streaming", "true", "--num_workers", "1", "--batch_size", "4"])
    for key in ("eval_top1", "eval_top5", "eval_loss"):
        assert given[key] == pytest.approx(expected[key], rel=1e-4)


def test_an_ensemble_of_runs():
    save_teacher("second", CLASSES)
    *arguments, recipe_given = parse_recipe([recipe(teacher_name_or_path=["teacher", "second"])])
    assert recipe_given["teacher_name_or_path"] == ["teacher", "second"]
    trainer = build_trainer(*arguments)
    batch = trainer.train_dataset.__getitems__([0, 5])
    members = [member(batch).logits for member in trainer.teacher.members]
    torch.testing.assert_close(trainer.teacher(batch).logits, (members[0] + members[1]) / 2)
    distill(["recipe.yaml", "--max_steps", "1"])
    assert json.loads(Path("runs/recipe/results.json").read_text())["teacher"] == "cifar_resnet8 + cifar_resnet8"


def test_teacher_class_indices():
    save_teacher("other", ["x", "y", "z", "w"])
    with pytest.raises(ValueError, match="no 'ant', 'bee', 'cat'.*Set teacher_class_indices"):
        distill([recipe(teacher_name_or_path="other")])
    trainer = build_trainer(*parse_recipe([recipe(teacher_name_or_path="other", teacher_class_indices=[3, 0, 1])])[:3])
    batch = trainer.train_dataset.__getitems__([0, 5])
    expected = trainer.teacher.model(trainer.teacher.convert(batch["pixel_values"])).logits[:, [3, 0, 1]]
    torch.testing.assert_close(trainer.teacher(batch).logits, expected)
    with pytest.raises(ValueError, match="needs one teacher, and teacher_name_or_path names 2"):
        distill([recipe(teacher_name_or_path=["other", "teacher"], teacher_class_indices=[3, 0, 1])])


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_bad_file(streaming):
    Path("photos/train/bee/1.jpg").write_bytes(b"no picture")
    settings = ["--streaming", streaming, "--num_train_epochs", "1"]
    with pytest.raises(ValueError, match="bee/1.jpg.*skip_bad_images"):
        distill([recipe(), *settings, "--output_dir", "strict"])
    with pytest.warns(UserWarning, match="bee/1.jpg"):
        trainer = distill([recipe(), *settings, "--skip_bad_images", "true", "--output_dir", "lenient"])
    assert next(log["skipped_images"] for log in trainer.state.log_history if "loss" in log) == 1


def test_a_bad_test_file_does_not_count():
    expected = distill([recipe(), "--num_train_epochs", "1", "--save_strategy", "no"]).evaluate()
    Path("photos/test/bee/9.jpg").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="bee/9.jpg"):
        given = evaluate(["runs/recipe/student", "--skip_bad_images", "true"])
    assert given["eval_skipped_images"] == 1 and "eval_skipped_images" not in expected
    assert given["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


def test_mixing_guidance_and_two_heads_in_one_recipe():
    changes = {
        "student_name_or_path": "deit_tiny_distilled_patch16_224",
        "patch_size": 16,
        "drop_path_rate": 0.1,
        "losses": {"kd": {}, "locality_guidance": {"student_layers": [0, 11], "teacher_layers": [1, 3]}},
        "logit_standardization": True,
        "mixup": 0.8,
        "cutmix": 1.0,
        "dataloader_drop_last": True,
        "ema_decay": 0.9,
        "num_train_epochs": 1,
    }
    distill([recipe(**changes)])
    row = json.loads(Path("runs/recipe/results.json").read_text())["epochs"][0]
    assert {"loss_ce", "loss_kd", "loss_locality_guidance"} <= row.keys()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"auto_augment": "rund-m9"}, "rund-m9"),
        ({"augmentation": "crop"}, "crop_pct needs augmentation: random_resized_crop"),
        ({"crop_pct": 1.5}, "crop_pct must be above 0 and at most 1, got 1.5"),
        ({"random_erasing": 25}, "random_erasing must be 0 or above and at most 1, got 25"),
        ({"image_size": 40, "student_name_or_path": "deit_tiny_patch16_224"}, "patches of 16 pixels.*divide 40"),
        ({"patch_size": 4}, "resnet10t does not take patch_size"),
        ({"teacher_name_or_path": ["teacher"], "teacher_checkpoint": ["a.pth", "b.pth"]}, "2 files.* 1 teachers"),
        ({"streaming": True, "train_split": "train[:50%]"}, "train.:50%.*stream"),
    ],
)
def test_bad_settings_fail_before_training(changes, message):
    with pytest.raises(ValueError, match=message):
        distill([recipe(**changes)])


def test_an_empty_class_folder():
    for file in Path("photos/train/bee").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="train/bee"):
        distill([recipe()])


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_has_three_names(streaming):
    """The ImageNet recipes say validation, as the Hub does; most folders are called val."""
    Path("photos/test").rename("photos/val")
    data_args = parse_recipe([recipe(eval_split="validation", streaming=streaming)])[1]
    assert len(load_splits(data_args)[1].class_names) == 3
    with pytest.raises(ValueError, match="no split 'test'"):
        load_splits(parse_recipe([recipe(eval_split="test", streaming=streaming)])[1])


def test_a_stream_that_begins_with_bad_files():
    for file in list(Path("photos/train/ant").iterdir())[:3]:
        file.write_bytes(b"no picture")
    settings = ["--streaming", "true", "--skip_bad_images", "true", "--num_train_epochs", "1"]
    with pytest.warns(UserWarning, match="ant"):
        trainer = distill([recipe(per_device_train_batch_size=12), *settings])
    assert next(log["skipped_images"] for log in trainer.state.log_history if "loss" in log) == 3


def test_a_stream_is_evaluated_whole_beside_a_training_set_in_memory():
    """Whose last, smaller batch must not say how many rows of the stream count."""
    stream = build_trainer(*parse_recipe([recipe(streaming=True)])[:3]).eval_dataset
    trainer = DistillationTrainer(
        Plain(classes=3), None, config(), train_dataset=images(10, classes=3), eval_dataset=stream
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert trainer.predict(stream).predictions.shape == (6, 3)
    rate = metrics["eval_samples_per_second"] * metrics["eval_runtime"]
    assert rate == pytest.approx(6, rel=0.1)
