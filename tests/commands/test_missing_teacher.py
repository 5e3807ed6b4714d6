"""A teacher that is missing is trained first, by the recipe that a student's recipe names for it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from interrupting import in_two_processes

from hfkd.cli import main
from hfkd.commands.train import distill
from hfkd.errors import HfkdError
from hfkd.recipe.finding import packaged_names
from hfkd.recipe.reading import load_recipe, parse_recipe
from hfkd.recipe.yaml_file import dump_yaml, read_yaml
from hfkd.runs.planned import missing_teacher

TEACHER = {
    "student_name_or_path": "cifar_resnet8",
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:64]",
    "eval_split": "test[:40]",
    "per_device_train_batch_size": 32,
    "num_train_epochs": 2,
    "optim": "sgd",
    "learning_rate": 0.05,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "disable_tqdm": True,
}
STUDENT = {
    "extends": "teacher",
    "teacher_name_or_path": "runs/teacher/teacher",
    "teacher_recipe": "teacher.yaml",
    "num_train_epochs": 1,
    "save_strategy": "no",
    "losses": {"kd": {}},
}
RUN = Path("runs/teacher")


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    """Recipes of a teacher and of a student, in a folder of their own."""
    Path("mine").mkdir()
    write("teacher", **TEACHER)
    write("student", **STUDENT)
    monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)  # its figure takes long


def write(name, **keys):
    Path(f"mine/{name}.yaml").write_text(dump_yaml(keys))


def results(folder):
    return json.loads(Path(folder, "results.json").read_text())


def test_the_teacher_is_trained_first_and_once(capsys):
    distill(["mine/student", "--eval_split", "test[:30]", "--seed", "3"])
    assert (
        "There is no teacher at runs/teacher/teacher yet. Its recipe teacher is trained first"
        in capsys.readouterr().out
    )
    assert results(RUN)["role"] == "teacher" and results(RUN)["recipe"] == "teacher"
    assert [row["epoch"] for row in results(RUN)["epochs"]] == [1, 2] and results(RUN)["seed"] == 42
    assert read_yaml(RUN / "recipe.yaml")["eval_split"] == "test[:30]", "the same images"
    last = results("runs/student")["last"]
    assert last["epoch"] == 1 and results("runs/student")["epochs"][0]["eval_teacher_top1"] == pytest.approx(
        results(RUN)["last"]["top1"]
    )
    assert read_yaml(Path("runs/student/recipe.yaml"))["teacher_recipe"] == "mine/teacher.yaml"
    before = (RUN / "results.json").stat().st_mtime_ns
    write("other", **STUDENT | {"seed": 4})
    distill(["mine/other"])
    distill(["runs/other/recipe.yaml", "--output_dir", "runs/again"])
    assert (RUN / "results.json").stat().st_mtime_ns == before
    assert "There is no teacher" not in capsys.readouterr().out


def test_a_stopped_teacher_is_resumed():
    distill(["mine/student"])
    rows = results(RUN)["epochs"]
    shutil.rmtree(RUN / "teacher")
    shutil.rmtree(RUN / "checkpoint-4")
    shutil.rmtree("runs/student")
    distill(["mine/student"])
    again = results(RUN)["epochs"]
    assert again[0] == rows[0] and again[1]["eval_loss"] == rows[1]["eval_loss"]


def test_two_processes_train_both():
    assert in_two_processes(lambda rank: distill(["mine/student"])) == [0, 0]
    assert results(RUN)["devices"] == results("runs/student")["devices"] == "2 x cpu"
    assert results("runs/student")["epochs"][0]["eval_teacher_top1"] == results(RUN)["last"]["top1"]


def test_choose_shows_the_epochs_of_a_teacher_that_it_trains_first(capsys):
    write("teacher", **TEACHER | {"disable_tqdm": False})
    with pytest.raises(SystemExit):
        main(["choose", "mine/student", "--minutes", "0.01"])
    told = capsys.readouterr()
    assert "minutes: 0.01 are too few" in told.err
    assert "epoch 2/2  top1" in told.out and "{'eval_top1'" not in told.out


def refused(capsys, argv):
    """The message of a command that must be refused before anything is written."""
    with pytest.raises(SystemExit) as ending:
        main(argv)
    assert ending.value.code == 2 and not (RUN / "recipe.yaml").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--train_missing_teacher", "false", "--dataset_name", "photos", "--bf16", "false", "--seed", "3"],
            "no teacher at runs/teacher/teacher, and train_missing_teacher is false. Train it with "
            "`hfkd train-teacher mine/teacher.yaml --dataset_name photos --bf16 False`, or",
        ),
        (["--teacher_recipe", "mine/techer"], "no recipe at mine/techer. Did you mean mine/teacher.yaml"),
        (["--teacher_recipe", "mine/student"], "trains from the labels alone"),
        (["--student_name_or_path", "cifar_resnet9"], "'cifar_resnet9' is no timm architecture"),
        (["--output_dir", "mine/teacher.yaml"], "output_dir: mine/teacher.yaml cannot be written"),
    ],
)
@pytest.mark.parametrize("command", ["distill", "cache-teacher", "search"])
def test_mistakes_are_found_before_any_data_are_loaded(command, words, message, monkeypatch, capsys):
    for module in ("build", "cache_teacher", "search"):
        monkeypatch.setattr(f"hfkd.commands.{module}.load_splits", None)
    if command != "distill" and "--output_dir" in words:
        pytest.skip("not a key of this command")
    assert message in refused(capsys, [command, "mine/student", *words])


def test_a_teacher_with_other_settings(capsys):
    distill(["mine/student"])
    shutil.rmtree(RUN / "teacher")
    with pytest.raises(
        HfkdError, match=f"(?s){RUN} holds a run with other settings:\n  train_split: 'train.:64.' there"
    ):
        distill(["mine/student", "--train_split", "train[:32]", "--output_dir", "runs/other"])


def test_every_recipe_that_ships_says_what_trains_its_teacher():
    """Only a Hub id needs no recipe, and several teachers have none: one recipe trains one."""
    named = 0
    for name in packaged_names():
        recipe = load_recipe(name)
        teacher = recipe.get("teacher_name_or_path")
        if teacher is None or isinstance(teacher, list) or re.match("timm/", teacher):
            assert recipe.get("teacher_recipe") is None
            continue
        named += 1
        assert teacher == f"runs/{recipe['teacher_recipe']}/teacher"
        assert recipe["teacher_recipe"] in packaged_names()
    assert named > 180
    settings = parse_recipe(["deit_tiny", "--bf16", "false", "--dataset_name", "path/to/cifar100"])
    planned = missing_teacher("deit_tiny", settings[0], settings[3])
    expected = load_recipe("cifar100/teachers/resnet56_cosine") | {"dataset_name": "path/to/cifar100", "bf16": False}
    expected |= {"output_dir": "runs/cifar100/teachers/resnet56_cosine", "losses": {}}
    assert planned.settings[3] == {key: value for key, value in expected.items() if value is not None}
    assert planned.name == "cifar100/teachers/resnet56_cosine" and planned.role == "teacher"
