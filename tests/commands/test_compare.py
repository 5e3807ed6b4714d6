"""Runs side by side: means over seeds, comparison with the published, the figure, and the savings in sentences."""

import csv
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from finished import KD_ZSCORE, finished_run
from helpers import RESULTS
from matplotlib.colors import same_color
from PIL import Image

from hfkd import load_student
from hfkd.cli import main
from hfkd.commands.compare import compare
from hfkd.commands.train import distill, train_teacher
from hfkd.comparison.figure import comparison_figure
from hfkd.comparison.rows import compared
from hfkd.comparison.savings import savings_text
from hfkd.comparison.table import csv_text, legend, terminal_table, text_table
from hfkd.networks.costs import multiply_adds
from hfkd.runs.claims import claimed
from hfkd.runs.finished import find_runs
from hfkd.runs.published import published_runs

CURVE = published_runs()[KD_ZSCORE].test_top1


def rows_of(*folders):
    return compared(find_runs(folders)[0])


def cells(text):
    """The first table of a text: a dict for each row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]]


def test_seeds_of_one_recipe_are_one_row():
    for seed, top1 in ((1, [60.0, 71.0, 70.0]), (2, [60.0, 72.0, 71.0]), (4, [60.0, 74.0, 73.0])):
        finished_run(f"runs/{seed}", top1, seed)
    finished_run("runs/other", [71.5], losses={}, recipe={"losses": {"kd": {"temperature": 4.0, "weight": 9.0}}})
    mean, other = rows_of("runs")
    assert [run.results["seed"] for run in mean.runs] == [1, 2, 4] and len(other.runs) == 1

    best = (71 + 72 + 74) / 3
    deviation = math.sqrt(((71 - best) ** 2 + (72 - best) ** 2 + (74 - best) ** 2) / 2)
    assert mean.value("best", "top1").mean == pytest.approx(best)
    assert mean.value("best", "top1").deviation == pytest.approx(deviation)
    assert mean.value("last", "top5").mean == pytest.approx(best + 9) and mean.images_per_second.mean == 700 / 3
    assert mean.difference == pytest.approx(best - 71.43)
    assert other.value("best", "top1").deviation is None, "one run has no spread"

    first, second = cells(text_table([mean, other]))
    assert first["run"] == f"{KD_ZSCORE} (losses.kd.temperature 2)"
    assert second["run"] == f"{KD_ZSCORE} (losses.kd.temperature 4)"
    assert first["best top-1"] == "72.33 ± 1.53" and first["last top-1"] == "71.33 ± 1.53"
    assert first["best top-5"] == "82.33 ± 1.53" and first["agreement"] == "62.33 ± 1.53"
    assert first["published"] == "71.43" and first["difference"] == "+0.90" and first["note"] == ""
    assert (first["seeds"], first["parameters"], first["images/s"]) == ("1, 2, 4 (n = 3)", "278,324", "233 ± 153")
    assert second["best top-1"] == "71.50" and second["seeds"] == "1"
    assert (second["published"], second["difference"], second["note"]) == ("71.43", "-", "other losses.kd.temperature")


def test_runs_without_a_recipe_are_named_by_their_folders():
    for folder, changes in {
        "small": {},
        "long": {"num_train_epochs": 30.0},
        "again/long": {"learning_rate": 0.5},
    }.items():
        finished_run(f"runs/{folder}", [60.0], recipe=changes, name="photographs/student")
    names = [row["run"] for row in cells(text_table(rows_of("runs")))]
    assert sorted(names) == [
        "long (learning_rate 0.05, num_train_epochs 30)",
        "long (learning_rate 0.5, num_train_epochs 240)",
        "small",
    ]


def test_the_csv_equals_the_table():
    finished_run("runs/1", [60.0, 71.0], 1)
    finished_run("runs/2", [60.0, 72.5], 2)
    finished_run("runs/short", [61.123456], recipe={"num_train_epochs": 1.0})
    finished_run("runs/cut", [50.0], 3, planned_epochs=240)
    rows = rows_of("runs")
    records = list(csv.DictReader(csv_text(rows).splitlines()))
    for record, shown in zip(records, cells(text_table(rows)), strict=True):
        assert record["run"] == shown["run"] and record["note"] == shown["note"]
        for name in ("best top-1", "best top-5", "last top-1", "last top-5", "agreement", "teacher top-1"):
            text = f"{float(record[name]):.2f}"
            text += f" ± {float(record[f'{name} deviation']):.2f}" if record[f"{name} deviation"] else ""
            assert text == shown[name], name
        assert (f"{float(record['difference']):+.2f}" if record["difference"] else "-") == shown["difference"]
        assert int(record["parameters"]) == int(shown["parameters"].replace(",", "")) == 278_324
    assert [record["n"] for record in records] == ["2", "1", "1"]
    assert {record["folders"] for record in records} == {"runs/1 runs/2", "runs/short", "runs/cut"}
    assert "61.123456" in csv_text(rows)


def test_what_is_no_row_of_the_published():
    """Other schedules, unfinished runs and runs from code are marked, and nothing is subtracted."""
    finished_run("runs/1", [60.0, 71.0], 1)
    finished_run("runs/2", [60.0, 72.0], 2)
    finished_run("runs/cut", [60.0, 80.0], 3, planned_epochs=240)
    finished_run("runs/short", [60.0], recipe={"num_train_epochs": 10.0})
    finished_run("runs/code", [60.0], recipe=False, dataset=None, published_top1=None)
    finished_run("runs/mine", [60.0], name="mine")
    by_name = {row["run"]: row for row in cells(text_table(rows_of("runs")))}
    assert len(by_name) == 5
    whole = by_name.pop(f"{KD_ZSCORE} (num_train_epochs 240)")
    assert whole["best top-1"] == "71.50 ± 0.71", "the one that was stopped is not among them"
    assert all(row["difference"] == "-" for row in by_name.values())
    assert by_name[f"{KD_ZSCORE} (num_train_epochs 240, stopped at step 20 of 2400)"]["best top-1"] == "80.00"
    assert by_name[f"{KD_ZSCORE} (num_train_epochs 10)"]["note"] == "10 of 240 epochs"
    assert by_name["code"]["note"] == "data set not recorded" and by_name["code"]["published"] == "-"
    assert by_name["mine"]["note"] == "published schedule not known" and by_name["mine"]["published"] == "71.43"


def test_a_run_under_way_is_not_called_stopped():
    folder = finished_run("runs/mine", [60.0], planned_epochs=240, name="mine")
    with claimed(folder, "output_dir"):
        (under_way,) = rows_of("runs")
    assert under_way.label == "mine (under way, measured at step 10 of 2400)"
    assert rows_of("runs")[0].label == "mine (stopped at step 10 of 2400)"


def test_a_table_fits_the_terminal(monkeypatch):
    """Names and notes move below the table, dispensable columns are named; nothing is explained that is not shown."""
    finished_run("runs/short", [60.0, 61.0], recipe={"num_train_epochs": 10.0, "learning_rate": 0.1})
    finished_run("runs/mine", [62.0], name="a/recipe/with/a/very/long/name" * 3, published_top1=None)
    rows = rows_of("runs")
    whole = text_table(rows)
    assert terminal_table(rows) == whole, "standard output is no terminal"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    shown = terminal_table(rows)
    assert max(map(len, shown.splitlines()[:4])) <= 80 and "The file also has: parameters, devices" in shown
    by_number = {row["run"]: row["best top-1"] for row in cells(shown)}
    assert by_number == {str(number): row["best top-1"] for number, row in enumerate(cells(whole), 1)}
    assert f"1. {rows[0].label}" in shown and "10 of 240 epochs" in shown
    monkeypatch.setenv("COLUMNS", "1000")
    assert terminal_table(rows) == whole
    assert "Difference" not in legend(whole) and "images/s:" in legend(whole) and "images/s:" not in legend(shown)


def test_processes_tell_runs_apart():
    finished_run("runs/1", [71.0], 1)
    finished_run("runs/2", [72.0], 2, devices="2 x cuda")
    one, two = rows_of("runs")
    assert one.label == f"{KD_ZSCORE} (processes 1)" and two.label == f"{KD_ZSCORE} (processes 2)"
    assert one.note == "" and two.note == "other batch size"


def test_runs_of_different_images_are_refused():
    finished_run("runs/a", [71.0])
    finished_run("runs/b", [72.0], 2)
    finished_run("runs/c", [72.0], dataset=RESULTS["dataset"] | {"eval_split": "test[:10%]"})
    finished_run("runs/d", [99.0], dataset=RESULTS["dataset"] | {"name": "digits", "classes": 10})
    message = (
        "different images.*\n  cifar100, split test, 100 classes: runs/a, runs/b\n"
        r"  cifar100, split test\[:10%\], 100 classes: runs/c\n  digits, split test, 10 classes: runs/d\nName those"
    )
    with pytest.raises(ValueError, match=message):
        compare(["runs"])
    assert not Path("runs/compare").exists()


def test_the_figure_has_the_curves(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    curves = {1: [60.0, 71.0, 70.0], 2: [62.0, 72.0, 71.0]}
    for seed, top1 in curves.items():
        finished_run(f"runs/{seed}", top1, seed)
    finished_run("runs/code", [50.0, 55.0], recipe=False)
    figure = comparison_figure(rows_of("runs"))
    axes = figure.axes[0]
    thin, other, mean, published, code = axes.lines
    assert list(thin.get_ydata()) == curves[1] and list(other.get_ydata()) == curves[2]
    assert list(mean.get_xdata()) == [1, 2, 3] and list(mean.get_ydata()) == [61, 71.5, 70.5]
    assert list(published.get_xdata()) == [1, 2, 3] and tuple(published.get_ydata()) == CURVE[:3]
    assert published.get_linestyle() == ":" and mean.get_linestyle() != ":"
    assert all(same_color(line.get_color(), mean.get_color()) for line in (thin, other, published))
    assert published.get_zorder() < mean.get_zorder()
    assert list(code.get_ydata()) == [50, 55] and not same_color(code.get_color(), mean.get_color())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        f"{KD_ZSCORE}\nmean of 2 seeds",
        f"{KD_ZSCORE}\npublished, the first 3 of 240 epochs",
        "code",
    ]
    assert axes.get_xlabel() == "epoch" and axes.get_ylabel() == "top-1 (% of the evaluation images)"
    assert len(figure.axes) == 1
    figure.savefig("f.png")
    assert np.asarray(Image.open("f.png").convert("L")).std() > 10


def test_long_runs_are_enlarged():
    """The same curves in both panels; the second shows what lies in the last quarter."""
    finished_run("runs/long", [40.0 + epoch for epoch in range(20)])
    finished_run("runs/again", [30.0 + epoch for epoch in range(20)], recipe={"learning_rate": 0.1})
    whole, enlarged = comparison_figure(rows_of("runs")).axes
    assert len(whole.lines) == len(enlarged.lines) == 3, "of the published there is one curve"
    assert enlarged.get_xlim() == (15, 20)
    published = CURVE[15:20]
    low, high = enlarged.get_ylim()
    assert whole.get_ylim()[0] < low < min(45.0, *published) < max(59.0, *published) < high < 62


@pytest.fixture
def pair():
    """A run whose student and teacher are there, with networks of two sizes."""
    torch.manual_seed(0)
    for name, folder in (("cifar_resnet20", "runs/kd/student"), ("cifar_resnet56", "runs/t/teacher")):
        load_student(name, num_classes=100).save_pretrained(folder, save_original_format=False)
    path = Path("written")
    finished_run(path, [60.0, 76.0], recipe={"teacher_name_or_path": ["runs/t/teacher"]})
    for file in path.iterdir():
        file.rename(Path("runs/kd", file.name))
    path.rmdir()


def test_the_savings(pair):
    rows = rows_of("runs/kd")
    text = savings_text(rows, rounds=2)
    expected = (
        rf"^{KD_ZSCORE}: 95.0 % of the teacher's top-1 \(76.00 of 80.00\), 67.7 % fewer parameters "
        r"\(278,324 of 861,620\), 67.5 % fewer multiply-adds \(40.8 of 125.8 million an image, at 32 px\), "
        r"(\S+ % less) time on the CPU \(([\d.]+) of ([\d.]+) ms an image\)\.\n"
        r"Time of a forward of one image in float32 on this CPU, 1 thread: the fastest of 2 rounds"
    )
    found = re.search(expected, text)
    assert found, text
    ours, theirs = map(float, found.group(2, 3))
    assert float(found.group(1).split()[0]) == pytest.approx(100 * (1 - ours / theirs), abs=0.5)


def test_missing_networks_are_said_to_be_unknown(pair):
    """Another network where the teacher was, or none, is a gap; the one given steps in."""
    Path("runs/t").rename("moved")
    text = savings_text(rows_of("runs/kd"), rounds=1)
    assert "67.7 % fewer parameters" in text and "multiply-adds and time on the CPU unknown: teacher not" in text
    assert text.endswith("found at runs/t/teacher: give the teacher with --teacher.") and "million" not in text
    for given in ("moved/teacher", "cifar_resnet56"):
        assert "40.8 of 125.8 million" in savings_text(rows_of("runs/kd"), given, rounds=1)
    text = savings_text(rows_of("runs/kd"), "cifar_resnet110", rounds=1)
    assert re.search(r"cifar_resnet110 has [\d,]+ parameters, the teacher had 861,620", text) and "million" not in text
    Path("runs/kd/student/model.safetensors").write_bytes(b"half")
    assert "unknown: " in savings_text(rows_of("runs/kd"), "moved/teacher", rounds=1)
    Path("runs/kd/student/model.safetensors").unlink()
    assert "runs/kd holds no trained model" in savings_text(rows_of("runs/kd"), "moved/teacher", rounds=1)


def test_an_ensemble_costs_its_members(pair):
    recipe = yaml.safe_load(Path("runs/kd/recipe.yaml").read_text())
    Path("runs/kd/recipe.yaml").write_text(yaml.safe_dump(recipe | {"teacher_name_or_path": 2 * ["runs/t/teacher"]}))
    results = Path("runs/kd/results.json")
    results.write_text(results.read_text().replace('"teacher_parameters": 861620', '"teacher_parameters": 1723240'))
    assert "40.8 of 251.5 million" in savings_text(rows_of("runs/kd"), rounds=1)


def test_a_comparison_from_the_command_line(capsys, monkeypatch):
    """A real teacher and student, with folders that hold no run beside them."""
    recipe = {"student_name_or_path": "cifar_resnet8", "dataset_name": "digits", "random_flip": False}
    recipe |= {"train_split": "train[:64]", "eval_split": "test[:50]", "num_train_epochs": 1, "eval_strategy": "epoch"}
    recipe |= {"save_strategy": "no", "disable_tqdm": True, "report_to": "none", "image_size": 16}
    Path("recipes").mkdir()
    teacher = recipe | {"student_name_or_path": "cifar_resnet14"}
    Path("recipes/teacher.yaml").write_text(yaml.safe_dump(teacher))
    losses = {"losses": {"kd": {"temperature": 4.0}}, "teacher_name_or_path": "runs/teacher/teacher"}
    Path("recipes/kd.yaml").write_text(yaml.safe_dump(recipe | losses))
    train_teacher(["recipes/teacher.yaml"])
    trainer = distill(["recipes/kd.yaml", "--seed", "7"])
    Path("runs/cache").mkdir()
    capsys.readouterr()

    paths = sorted(map(str, Path("runs").iterdir()))
    main(["compare", *paths])
    printed = capsys.readouterr().out
    assert "# digits, split test[:50], 10 classes" in printed and "- runs/cache holds no run." in printed
    student, taught_by = cells(printed)
    assert student["run"] == "kd" and student["seeds"] == "7" and "published" not in student
    assert taught_by["run"] == "teacher" and taught_by["agreement"] == "-"
    assert student["teacher top-1"] == taught_by["last top-1"]
    millions = multiply_adds(trainer.model, 16) / 1e6
    assert f"({millions:.1f} of " in printed and "million an image, at 16 px" in printed
    assert "thread: the fastest" in printed
    written = Path("runs/compare/compare.md").read_text()
    assert cells(written) == [student, taught_by] and printed.startswith(written.split("\n\n##")[0])
    assert np.asarray(Image.open("runs/compare/compare.png").convert("L")).std() > 10


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "Name the runs to compare: hfkd compare RUN"),
        (["runs", "--output_dri", "x"], "'output_dri'.*'output_dir'"),
        (["no/such/run"], "no folder no/such/run"),
    ],
)
def test_bad_input(argv, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare(argv)


def test_help(capsys):
    with pytest.raises(SystemExit):
        compare(["--help"])
    printed = capsys.readouterr().out
    assert "RUN is a run's folder" in printed and "--teacher" in printed
