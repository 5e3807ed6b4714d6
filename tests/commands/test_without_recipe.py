"""Data, teacher and student without a recipe; the short forms of their keys; pretrained students."""

import json
import shlex
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from hfkd.cli import main
from hfkd.commands.next_command import next_command
from hfkd.commands.train import distill, train_teacher
from hfkd.commands.without_recipe import with_recipe
from hfkd.errors import HfkdError
from hfkd.recipe.arguments import DataArguments
from hfkd.recipe.reading import load_recipe, parse_recipe
from hfkd.recipe.yaml_file import dump_yaml, read_yaml

STUDENT = "test_resnet"  # timm's smallest with pretrained weights
SMALL = "--image_size 32 --num_train_epochs 1 --per_device_train_batch_size 4 --dataloader_num_workers 0".split()
SMALL += ["--disable_tqdm", "true"]
NAMES = ["--dataset_name", "photos/", "--teacher", "runs/photos/test_resnet", "--student", "cifar_resnet8"]


@pytest.fixture
def photos():
    """Six training and three test images of three classes."""
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for number in range(count):
                path = Path("photos", split, name, f"{number}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (50, 40), (80 * label + 20, 30 * number, 90)).save(path)


@pytest.fixture
def fetched(monkeypatch):
    """The names of the pretrained models that were fetched; random weights stand in for theirs."""
    names = []

    def create(name, **settings):
        names.append(name)
        return timm.create_model(name, **settings)

    monkeypatch.setattr("hfkd.networks.student_loading.create_pretrained", create)
    return names


def test_a_teacher_and_a_student_for_photographs(photos, fetched, monkeypatch, capsys):
    monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)  # its figure takes long
    train_teacher(["--dataset_name", "photos/", "--student", STUDENT, *SMALL])
    teacher = read_yaml(Path("runs/photos/test_resnet/recipe.yaml"))
    published = timm.get_pretrained_cfg(STUDENT)
    assert fetched == [f"{STUDENT}.{published.tag}"] and teacher["pretrained"] is True
    assert (teacher["crop_pct"], teacher["interpolation"]) == (published.crop_pct, published.interpolation)
    assert "losses" not in teacher or not teacher["losses"]

    following = capsys.readouterr().out.splitlines()[-1].removeprefix("Next: hfkd distill ")
    student = "mobilenetv4_conv_small"
    assert following == f"--dataset_name photos/ --teacher runs/photos/test_resnet/teacher --student {student}"
    trainer = distill([*shlex.split(following.replace(student, "cifar_resnet8")), *SMALL])
    folder = Path("runs/photos/cifar_resnet8")
    results = json.loads((folder / "results.json").read_text())
    assert results["recipe"] == "photographs/student" and results["teacher"] == STUDENT
    assert len(fetched) == 1, "timm has no weights of this student"
    assert (folder / "student/model.safetensors").is_file() and len(list(folder.glob("checkpoint-*"))) == 1
    args = trainer.args
    assert args.lr_scheduler_type == "cosine" and args.warmup_steps == 0.05 and args.load_best_model_at_end
    assert args.eval_strategy == args.save_strategy == args.logging_strategy == "epoch" and args.save_total_limit == 2
    assert args.losses == {"kd": {"temperature": 2.0, "weight": 9.0}} and args.logit_standardization

    recipe = read_yaml(folder / "recipe.yaml")
    Path("edited.yaml").write_text(dump_yaml({**recipe, "learning_rate": 1e-3, "output_dir": "runs/edited"}))
    again = parse_recipe(["edited"])[3]
    assert again == recipe | {"learning_rate": 1e-3, "output_dir": "runs/edited"}


def test_the_command_for_a_student_names_the_images_in_full():
    data = DataArguments("my photos/", train_split="train[:90%]", eval_split="train[90%:]", label_column="kind")
    words = next_command("teacher", Path("runs/photos/teacher"), data_args=data)
    images = "--dataset_name 'my photos/' --train_split 'train[:90%]' --eval_split 'train[90%:]' --label_column kind"
    assert words.startswith(f"hfkd distill {images} --teacher runs/photos/teacher --student ")


@pytest.mark.parametrize(
    "teacher, student",
    [
        ("cifar100/teachers/resnet56", "cifar100/resnet56-resnet20/kd_zscore"),
        ("cifar100/teachers/wrn_40_2", "cifar100/wrn_40_2-mobilenetv2/kd_zscore"),
        ("mine/teacher", "RECIPE"),
    ],
)
def test_the_command_for_a_student_names_its_recipe(teacher, student):
    words = next_command("teacher", Path("runs/t/teacher"), recipe=teacher)
    assert words == f"hfkd distill {student} --teacher_name_or_path runs/t/teacher"


def test_what_suits_the_machine_and_the_student(monkeypatch):
    words = with_recipe([*NAMES[:-1], STUDENT])
    assert words[0] == "photographs/student" and "--bf16=False" in words
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert "--bf16=True" in with_recipe(NAMES)
    preprocessing = f"--interpolation={timm.get_pretrained_cfg(STUDENT).interpolation}"
    assert {"--pretrained=true", preprocessing} <= set(with_recipe([*NAMES[:-1], STUDENT]))
    monkeypatch.undo()
    given = ["--output_dir", "mine", "--crop_pct", "0.5", "--pretrained", "false", "--dataloader_num_workers", "null"]
    model_args, data_args, config, _ = parse_recipe(with_recipe([*NAMES[:-1], STUDENT, *given]))
    assert config.output_dir == "mine" and data_args.crop_pct == 0.5 and not model_args.pretrained
    assert config.dataloader_num_workers == 0 and model_args.teacher_name_or_path == ["runs/photos/test_resnet"]
    for whole in (["r.yaml", *NAMES], ["--help"], ["--seed", "3"], []):
        assert with_recipe(whole) == whole


@pytest.mark.parametrize(
    "argv, message",
    [
        (["distill", *NAMES[:2]], "Without a recipe, --student and --teacher must be given as well: --dataset_name"),
        (["distill", *NAMES[2:]], "Without a recipe, --dataset_name must be given as well"),
        (
            ["train-teacher", "--student", STUDENT],
            "--dataset_name must be given as well: --dataset_name NAME --student NAME.",
        ),
        (["search", *NAMES[:4]], "Without a recipe, --student must be given as well"),
        (["cache-teacher", *NAMES[:4]], "Without a recipe, --student must be given as well"),
        (
            ["distill", "--sed", "3"],
            "must be a recipe, got '--sed': .* give --dataset_name, --teacher and",
        ),
        (["distill", *NAMES], "'runs/photos/test_resnet' is no timm architecture, no existing folder and no Hub id"),
        (["distill", *NAMES, "--pretrained", "true"], "'runs/photos/test_resnet' is no timm"),
        (["distill", "both.yaml"], "both.yaml has student and student_name_or_path, which are the same key"),
    ],
)
def test_mistakes(argv, message, monkeypatch, capsys):
    Path("both.yaml").write_text("{student: a, student_name_or_path: b}")
    monkeypatch.setattr("hfkd.commands.build.load_splits", None)
    with pytest.raises(SystemExit) as ending:
        main(argv)
    error = capsys.readouterr().err
    assert ending.value.code == 2
    assert message.partition(" .* ")[0] in error and message.rpartition(" .* ")[2] in error


def test_short_forms():
    keys = {"dataset_name": "digits", "student": "cifar_resnet8", "teacher": "t/teacher", "losses": {"kd": {}}}
    Path("r.yaml").write_text(dump_yaml(keys))
    long = {"student_name_or_path": "cifar_resnet8", "teacher_name_or_path": "t/teacher"}
    assert load_recipe("r").items() >= long.items() and "student" not in load_recipe("r")
    model_args, _, _, resolved = parse_recipe(["r", "--student", "cifar_resnet14", "--teacher", "a", "b"])
    assert resolved["student_name_or_path"] == "cifar_resnet14" and model_args.teacher_name_or_path == ["a", "b"]
    assert parse_recipe(["r", "--teacher=null", "--losses", "null"])[0].teacher_name_or_path is None


def test_pretrained_students(fetched):
    from hfkd import load_student

    load_student(STUDENT, num_classes=3, pretrained=True)
    load_student(f"{STUDENT}.r160_in1k", num_classes=3)
    load_student(STUDENT, num_classes=3)
    assert fetched == [f"{STUDENT}.r160_in1k"] * 2
    with pytest.raises(HfkdError, match="cifar_resnet8 has no pretrained weights in timm: leave pretrained out"):
        load_student("cifar_resnet8", num_classes=3, pretrained=True)
