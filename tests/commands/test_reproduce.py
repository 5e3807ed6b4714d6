"""Cells of the published tables: what is run, in which slices, at which length, and what is said of it."""

import csv
import functools
import json
import os
import re
import signal
import statistics
from pathlib import Path

import datasets
import pytest
import yaml
from interrupting import differences, left_in

import hfkd.commands.reproduce
import hfkd.data.datasets
from hfkd.commands.reproduce import TimeLimit
from hfkd.commands.train import distill, train_teacher
from hfkd.recipe.reading import parse_recipe
from hfkd.runs.checkpoints import checkpoints
from hfkd.runs.published import published_runs
from hfkd.runs.published_cells import find_pair, planned_cells, recipes_of

BASE = {
    "dataset_name": "digits",
    "image_size": 8,
    "random_flip": False,
    "train_split": "train[:96]",
    "eval_split": "test[:50]",
    "num_train_epochs": 2,
    "lr_milestones": [1],
    "per_device_train_batch_size": 32,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.05,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "disable_tqdm": True,
}
STUDENT = {
    "extends": "../base.yaml",
    "student_name_or_path": "cifar_resnet8",
    "teacher_name_or_path": "runs/cifar100/teachers/tall/teacher",
    "teacher_recipe": "cifar100/teachers/tall",
}
PAIR = Path("runs/cifar100/tall-short")
DIGITS = functools.cache(hfkd.data.datasets._digits)


def published(top1, student="cifar_resnet8", **settings):
    kept = {key: value for key, value in BASE.items() if key not in ("train_split", "disable_tqdm")}
    kept |= {"student_name_or_path": student, "teacher": "cifar_resnet14", "num_train_epochs": 2} | settings
    return hfkd.runs.published.PublishedRun(top1, settings=kept)


@pytest.fixture
def recipes(monkeypatch):
    """A tree of recipes of one pair, two of them published."""
    folder = Path("recipes/cifar100")
    losses = {"kd": {"kd": {"temperature": 4.0}}, "ctkd": {"ctkd": {"curriculum_epochs": 2}}, "mine": {"sp": {}}}
    files = {"base": BASE, "teachers/tall": {"extends": "../base.yaml", "student_name_or_path": "cifar_resnet14"}}
    files |= {f"tall-short/{method}": STUDENT | {"losses": each} for method, each in losses.items()}
    for name, content in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    runs = {"cifar100/teachers/tall": published(30.0, "cifar_resnet14", teacher=None)}
    runs |= {f"cifar100/tall-short/{method}": published(20.0, losses=losses[method]) for method in ("kd", "ctkd")}
    for module in ("runs.published_cells", "comparison.rows"):
        monkeypatch.setattr(f"hfkd.{module}.published_runs", lambda: runs)
    monkeypatch.setitem(hfkd.runs.published.IMAGE_COUNTS, "digits", (10, 96))
    monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)  # its figure takes long
    monkeypatch.setattr("hfkd.data.datasets._digits", DIGITS)  # so does scikit-learn


@pytest.fixture
def trained(monkeypatch):
    """The folders of what is trained, in their order."""
    folders, train = [], hfkd.commands.reproduce.train

    def recorded(model_args, data_args, config, *args, **kwargs):
        folders.append(config.output_dir)
        return train(model_args, data_args, config, *args, **kwargs)

    monkeypatch.setattr("hfkd.commands.reproduce.train", recorded)
    return folders


def reproduce(*argv):
    """The exit code."""
    try:
        hfkd.commands.reproduce.reproduce(["tall-short", *argv])
    except SystemExit as end:
        return end.code
    return 0


def table(folder=PAIR):
    return {row["run"]: row for row in csv.DictReader((folder / "reproduce.csv").open())}


def results(folder):
    return json.loads(Path(folder, "results.json").read_text())


def test_a_row_of_the_table(recipes, trained, capsys):
    assert reproduce("--seeds", "2") == 0
    names = ["ctkd", "kd", "ctkd-seed43", "kd-seed43"]
    assert trained == ["runs/cifar100/teachers/tall", *(str(PAIR / name) for name in names)]
    printed = capsys.readouterr().out
    assert "5 of 5 trainings are done" in printed and "Nothing is left" in printed
    assert "[5/5] cifar100/tall-short/kd, seed 43: not begun" in printed

    rows = table()
    assert list(rows) == ["cifar100/teachers/tall", "cifar100/tall-short/ctkd", "cifar100/tall-short/kd"]
    for method in ("ctkd", "kd"):
        both = [results(PAIR / name) for name in (method, f"{method}-seed43")]
        assert [each["seed"] for each in both] == [42, 43] and both[0]["epochs"] != both[1]["epochs"]
        row = rows[f"cifar100/tall-short/{method}"]
        for when in ("best", "last"):
            top1 = [each[when]["top1"] for each in both]
            assert float(row[f"{when} top-1"]) == pytest.approx(statistics.mean(top1))
            assert float(row[f"{when} top-1 deviation"]) == pytest.approx(statistics.stdev(top1))
        assert row["published"] == "20.0" and row["note"] == ""
        assert float(row["difference"]) == pytest.approx(float(row["best top-1"]) - 20)
    top1 = {results(PAIR / name)["epochs"][-1]["eval_teacher_top1"] for name in names}
    assert top1 == {results("runs/cifar100/teachers/tall")["best"]["top1"]}, "all had the same teacher"
    kept = Path(datasets.config.HF_DATASETS_CACHE).rglob("hfkd_teacher_outputs/*/epoch-*/*.safetensors")
    assert len(list(kept)) == 2 * 2, "of each seed and epoch once: the second method reads what the first one has kept"
    assert printed.count("\ncache     ") == 4
    text = (PAIR / "reproduce.md").read_text()
    assert text in printed and "Not finished" not in text and "epochs_scale" not in text

    trained.clear()
    assert reproduce("--seeds", "2", "--methods", "kd") == 0 and trained == []
    assert list(table()) == ["cifar100/teachers/tall", "cifar100/tall-short/kd"]
    assert reproduce("--seeds", "3", "--methods", "kd, mine") == 0
    assert trained == [str(PAIR / name) for name in ("mine", "mine-seed43", "kd-seed44", "mine-seed44")]
    assert table()["cifar100/tall-short/mine"]["published"] == ""


def test_what_distill_has_run_counts(recipes, trained):
    train_teacher(["recipes/cifar100/teachers/tall.yaml"])
    distill(["recipes/cifar100/tall-short/kd.yaml"])
    assert reproduce("--methods", "kd") == 0 and trained == []
    assert reproduce("--methods", "kd", "--seeds", "2") == 0 and trained == [str(PAIR / "kd-seed43")]
    assert table()["cifar100/tall-short/kd"]["seeds"] == "42 43"


def test_slices_come_to_the_same(recipes, trained, monkeypatch, capsys):
    """Slices end within an epoch, at its end, and before the export; the same command goes on."""
    whole, sliced = ["--methods", "ctkd"], ["--methods", "ctkd", "--time_limit", "600", "--output_dir", "sliced"]
    assert reproduce(*whole) == 0

    def is_over(clock):
        clock.asked = getattr(clock, "asked", 0) + 1
        clock.ended = clock.asked > 3
        return clock.ended

    monkeypatch.setattr(TimeLimit, "is_over", is_over)
    trained.clear()
    codes, reports = [], []
    while not codes or codes[-1] == 75:
        codes.append(reproduce(*sliced))
        reports.append(capsys.readouterr().out)
    assert codes == [75] * 5 + [0]
    assert trained == ["sliced/cifar100/teachers/tall"] * 3 + ["sliced/cifar100/tall-short/ctkd"] * 4
    stops = [re.findall(r"^(?:\[|-).*: stopped at step (\d) of 6", report, re.M) for report in reports]
    assert stops == [["3"], ["3", "6"], ["6", "2"], ["2", "4"], ["4", "6"], ["6"]]
    folders = [("cifar100/teachers/tall", "teacher"), ("cifar100/tall-short/ctkd", "student")]
    for folder, role in folders:
        ends = [left_in(Path(root, folder), role) for root in ("runs", "sliced")]
        assert differences(*ends) == [], folder
        assert len(checkpoints(Path("sliced", folder))) <= 2
    gap = "| cifar100/tall-short/ctkd | "
    assert gap in reports[0] and "not measured yet: seed 42" in reports[0]
    assert "0 of 2 trainings are done" in reports[0] and "Run the same command again" in reports[0]


def test_sigterm_is_no_slice(recipes, monkeypatch):
    """Who ends a job is to see 143 and not a command that says it ended by itself."""
    asked = []

    def is_over(clock):
        asked.append(clock)
        if len(asked) == 2:  # after the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    monkeypatch.setattr(TimeLimit, "is_over", is_over)
    assert reproduce("--methods", "kd") == 143
    assert not (PAIR / "reproduce.md").exists()


def test_a_slice_leaves_time_for_a_checkpoint(monkeypatch):
    now = 100.0
    monkeypatch.setattr("hfkd.commands.reproduce.time.monotonic", lambda: now)
    endless, short, long = TimeLimit(None), TimeLimit(60.0), TimeLimit(600.0)
    for elapsed, expected in ((0, [0, 0, 0]), (54, [0, 0, 0]), (56, [0, 1, 0]), (569, [0, 1, 0]), (571, [0, 1, 1])):
        now = 100.0 + elapsed
        assert [clock.is_over() for clock in (endless, short, long)] == expected
    assert long.elapsed == 571 and long.ended and not endless.ended


def test_a_shortened_table_says_so(recipes, trained, capsys):
    assert reproduce("--methods", "ctkd", "--epochs_scale", "0.5") == 0
    folder = Path("runs/epochs_x0.5/cifar100")
    assert trained == [str(folder / "teachers/tall"), str(folder / "tall-short/ctkd")]
    recipe = yaml.safe_load((folder / "tall-short/ctkd/recipe.yaml").read_text())
    assert recipe["num_train_epochs"] == 1 and recipe["lr_milestones"] == [0.5]
    assert recipe["losses"] == {"ctkd": {"curriculum_epochs": 1}}
    assert recipe["teacher_name_or_path"] == [str(folder / "teachers/tall/teacher")]
    assert yaml.safe_load((folder / "teachers/tall/recipe.yaml").read_text())["num_train_epochs"] == 1
    row = table(folder / "tall-short")["cifar100/tall-short/ctkd"]
    assert row["note"].startswith("1 of 2 epochs") and row["difference"] == "" and row["published"] == "20.0"
    text = (folder / "tall-short/reproduce.md").read_text()
    assert (
        text.startswith("# cifar100/tall-short, 0.5 of the published epochs") and "not the published protocol" in text
    )


def test_a_run_that_fails_is_marked(recipes, trained, monkeypatch, capsys):
    real = hfkd.commands.reproduce.train

    def train(model_args, data_args, config, *args, **kwargs):
        if config.output_dir == broken:
            raise RuntimeError("the disk is gone\nand so on")
        return real(model_args, data_args, config, *args, **kwargs)

    monkeypatch.setattr("hfkd.commands.reproduce.train", train)
    broken = "runs/cifar100/teachers/tall"
    assert reproduce() == 1 and trained == []
    text = (PAIR / "reproduce.md").read_text()
    assert "- cifar100/teachers/tall, seed 42: failed: the disk is gone\n" in text
    assert "- cifar100/tall-short/kd, seed 42: not begun" in text

    broken = str(PAIR / "ctkd")
    assert reproduce() == 1 and trained == ["runs/cifar100/teachers/tall", str(PAIR / "kd")]
    rows = table()
    assert rows["cifar100/tall-short/ctkd"]["note"] == "not measured yet: seed 42"
    assert rows["cifar100/tall-short/ctkd"]["best top-1"] == "" and rows["cifar100/tall-short/kd"]["best top-1"] != ""
    assert "ctkd, seed 42: failed: the disk is gone" in capsys.readouterr().out


def test_a_given_teacher(recipes, trained):
    """None is trained; the students' other settings go to all runs."""
    train_teacher(["recipes/cifar100/teachers/tall.yaml", "--output_dir", "elsewhere"])
    given = [
        "--teacher_name_or_path",
        "elsewhere/teacher",
        "--per_device_eval_batch_size",
        "25",
        "--learning-rate=0.02",
    ]
    assert reproduce("--methods", "kd", *given) == 0 and trained == [str(PAIR / "kd")]
    recipe = yaml.safe_load((PAIR / "kd/recipe.yaml").read_text())
    assert recipe["teacher_name_or_path"] == ["elsewhere/teacher"] and recipe["learning_rate"] == 0.02
    assert recipe["per_device_eval_batch_size"] == 25
    with pytest.raises(ValueError, match="(?s)other settings:\n  learning_rate: 0.02 there, 0.05 here.*--output_dir"):
        reproduce("--methods", "kd", *given[:2])
    assert reproduce("--methods", "kd", *given[:2], "--allow_recipe_change", "true") == 0

    Path("runs/cifar100/teachers/tall").mkdir(parents=True)
    Path("elsewhere/teacher").rename("runs/cifar100/teachers/tall/teacher")  # without the run that it is from
    trained.clear()
    assert reproduce("--methods", "ctkd") == 0 and trained == [str(PAIR / "ctkd")]


def test_a_teacher_with_other_settings(recipes):
    train_teacher(["recipes/cifar100/teachers/tall.yaml", "--num_train_epochs", "1"])
    message = "(?s)num_train_epochs: 1.0 there, 2.0 here.*--teacher_name_or_path runs/cifar100/teachers/tall/teacher"
    with pytest.raises(ValueError, match=message):
        reproduce()


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "must be a pair, got ''"),
        (["--methods", "kd"], "must be a pair, got '--methods'"),
        (["tall-shirt"], "no recipes of the pair 'tall-shirt'. Did you mean 'tall-short'"),
        (["imagenet/resnet34-resnet81"], "Did you mean 'imagenet/resnet34-resnet18'"),
        (["tall-short", "--methods", "kd,ctdk"], "no recipe 'ctdk' of tall-short. Did you mean 'ctkd'.* mine"),
        (["tall-short", "--seeds", "0"], "seeds is 0"),
        (["tall-short", "--seeds", "many"], "seeds"),
        (["tall-short", "--epochs_scale", "0"], "epochs_scale is 0"),
        (["tall-short", "--epochs_scale", "1.5"], "epochs_scale is 1.5"),
        (
            ["tall-short", "--epochs_scale", "0.4"],
            "leaves 0.8 of the 2 epochs of cifar100/teachers/tall: .* 0.5, which",
        ),
        (["tall-short", "--time_limit", "5"], "time_limit is 5 s.*30"),
        (["tall-short", "--time_limit", "nan"], "time_limit is nan"),
        (["tall-short", "--seed", "3"], "--seed cannot be given here: --seeds N"),
        (["tall-short", "--num-train-epochs=1"], "--num-train-epochs cannot be given here: --epochs_scale"),
        (["tall-short", "--losses.kd.weight", "3"], "--losses.kd.weight cannot be given here"),
        (["tall-short", "--teacher_cache", "auto"], "by itself: leave --teacher_cache auto out"),
        (["tall-short", "--learning_rat", "3"], "learning_rat.*learning_rate"),
    ],
)
def test_bad_input(recipes, trained, argv, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        hfkd.commands.reproduce.reproduce(argv)
    assert trained == [] and not Path("runs").exists()


def test_one_process(recipes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, and these are 2"):
        reproduce()


# ---- The recipes that ship -----------------------------------------------------------------------------------------


def test_the_names_of_a_pair():
    for name in ("resnet56-resnet20", "cifar100/resnet56-resnet20", "recipes/cifar100/resnet56-resnet20/"):
        assert find_pair(name) == "cifar100/resnet56-resnet20"
    assert find_pair("resnet34-resnet18") == "imagenet/resnet34-resnet18"


def pairs():
    names = sorted({"/".join(name.split("/")[:2]) for name in published_runs() if "-" in name.partition("/")[2]})
    assert len(names) > 20
    return names


@pytest.mark.parametrize("pair", pairs())
def test_every_published_recipe_can_be_shortened(pair):
    """At 0.05 all that is counted in epochs is a twentieth, and nothing else is another; at 1 nothing is."""
    recipes = recipes_of(pair, [])
    assert recipes == sorted(name for name in published_runs() if f"{pair}/" in name)
    ends = {}
    for scale in (1, 0.05):
        ends[scale] = planned_cells(recipes, 1, scale, Path("runs"), ["--bf16", "false"])
        assert len(ends[scale]) == len(recipes) + (not pair.startswith("imagenet/"))
    teacher = [f"runs/{ends[1][0].name}/teacher"] if not pair.startswith("imagenet/") else None
    for whole, short in zip(ends[1], ends[0.05], strict=True):
        assert whole.settings[3] == parse_recipe([whole.name, "--bf16", "false"])[3], "as hfkd distill runs it"
        expected = dict(whole.settings[3])
        expected["num_train_epochs"] *= 0.05
        if "lr_milestones" in expected:
            expected["lr_milestones"] = [0.05 * epoch for epoch in expected["lr_milestones"]]
        losses = {method: dict(parameters) for method, parameters in (expected.get("losses") or {}).items()}
        for parameters in losses.values():
            if "warmup_epochs" in parameters:
                assert parameters["warmup_epochs"] in (1, 20)
                parameters["warmup_epochs"] *= 0.05
        if "ctkd" in losses:
            losses["ctkd"]["curriculum_epochs"] = 0.05 * losses["ctkd"].get("curriculum_epochs", 10)
        assert "warmup_steps" not in expected or expected["warmup_steps"] < 1
        assert short.config.num_train_epochs == pytest.approx(expected.pop("num_train_epochs"))
        assert short.config.lr_milestones == pytest.approx(expected.pop("lr_milestones", None))
        assert short.config.losses == losses
        if whole.role == "student" and teacher:
            assert whole.settings[0].teacher_name_or_path == teacher
        changed = {"num_train_epochs", "lr_milestones", "losses"}
        assert {key: value for key, value in short.settings[3].items() if key not in changed} == {
            key: value for key, value in expected.items() if key != "losses"
        }
