"""`hfkd visualize`: what it draws of a run, what it leaves out, what it refuses."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file

from hfkd import load_student
from hfkd.commands.train import distill
from hfkd.commands.visualize import FIGURES, some_rows, visualize

DIGITS = [str(digit) for digit in range(10)]
RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:128]",
    "eval_split": "test[:60]",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
    "losses": {"ctkd": {"weight": 0.9}},
    "ce_weight": 0.1,
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A student of digits, trained by CTKD for an epoch. Its teacher has the classes in reverse order."""
    folder = tmp_path_factory.mktemp("visualize")
    torch.manual_seed(1)
    load_student("cifar_resnet8", class_names=DIGITS[::-1]).save_pretrained(folder / "teacher")
    (folder / "run.yaml").write_text(yaml.safe_dump(RECIPE | {"teacher_name_or_path": str(folder / "teacher")}))
    distill([str(folder / "run.yaml"), "--output_dir", str(folder / "run")])
    return folder


@pytest.fixture
def run(trained):
    """The run, to be changed at will, in the working directory."""
    shutil.copytree(trained / "run", "run")
    return Path("run")


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(path, name):
    return np.array([float(row[name]) for row in rows_of(path)])


def test_all_figures(run, capsys):
    paths = visualize([f"{run}/student", "--tsne_perplexity", "5"])
    assert [path.stem for path in paths] == list(FIGURES) and paths[0].parent == run / "figures"
    assert "left out" not in capsys.readouterr().out
    for path in paths:
        pixels = np.asarray(PILImage.open(path).convert("L"), dtype=float)
        assert pixels.shape[1] >= 1600 and pixels.std() > 5
    assert {path.name for path in (run / "figures").iterdir()} == {
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "csv")
    }

    measured = json.loads((run / "results.json").read_text())["epochs"][0]
    table = rows_of(run / "figures" / "reliability.csv")
    for network, name in (("student", "eval_top1"), ("teacher", "eval_teacher_top1")):
        right = [float(row["accuracy"] or 0) * int(row["images"]) for row in table if row["network"] == network]
        assert sum(right) / 60 == pytest.approx(measured[name], abs=1e-3)
    spread = run / "figures" / "logit_spread.csv"
    np.testing.assert_array_equal(column(spread, "image"), np.arange(60))
    np.testing.assert_allclose(column(spread, "teacher_std_standardized"), 1, rtol=1e-4)
    assert len(rows_of(run / "figures" / "tsne.csv")) == 60
    # Two steps of 64 images are logged.
    assert [row["curve"] for row in rows_of(run / "figures" / "temperature.csv")] == ["measured"] * 2


def test_the_teachers_classes_are_matched(run, trained):
    """The student itself with its classes in another order is no different from it."""
    model = load_student("cifar_resnet8", class_names=DIGITS[::-1])
    model.timm_model.load_state_dict(load_file(run / "student" / "model.safetensors"))
    classifier = model.timm_model.get_classifier()
    with torch.no_grad():
        classifier.weight.copy_(classifier.weight.flip(0))
        classifier.bias.copy_(classifier.bias.flip(0))
    model.save_pretrained("mirrored")
    for teacher, same in (("mirrored", True), (str(trained / "teacher"), False)):
        visualize([f"{run}", "--teacher", teacher, "--figures", "class_matrices", "--output_dir", "out"])
        differences = [column("out/class_matrices.csv", f"{digit} {digit}") for digit in range(10)]
        assert (np.max(differences) < 1e-4) == same
    assert [path.name for path in Path("out").iterdir() if path.suffix == ".png"] == ["class_matrices.png"]


def test_what_is_left_out(run, capsys):
    """Of a model alone: no run, no teacher, and too few images for t-SNE."""
    shutil.copytree(run / "student", "alone/model")
    paths = visualize(["alone/model", "--dataset_name", "digits", "--eval_split", "test[:60]", "--max_images", "20"])
    assert paths == [Path("figures/model", f"{name}.png") for name in ("logit_spread", "reliability")]
    printed = capsys.readouterr().out
    assert "temperature is left out: only CTKD learns a temperature" in printed
    assert "class_matrices is left out: there is no teacher" in printed
    assert "tsne is left out: t-SNE with a perplexity of 30 needs more images" in printed
    header = rows_of("figures/model/logit_spread.csv")[0]
    assert "student_std" in header and "teacher_std" not in header
    np.testing.assert_array_equal(column("figures/model/logit_spread.csv", "image"), some_rows(60, 20))
    with pytest.raises(ValueError, match="no teacher"):
        visualize(["alone/model", "--dataset_name", "digits", "--figures", "class_matrices"])


def test_an_ensemble_has_no_embedding(run, trained):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["teacher_name_or_path"] = [str(trained / "teacher")] * 2
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    visualize([f"{run}/student", "--figures", "tsne", "reliability", "--tsne_perplexity", "5"])
    assert list(rows_of(run / "figures" / "tsne.csv")[0]) == ["image", "label", "class", "student_x", "student_y"]
    assert rows_of(run / "figures" / "reliability.csv")[15]["network"] == "teacher"


def test_a_stream(tmp_path):
    """The same images as of a data set that is not streamed."""
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "eel"])})
    grey = [PILImage.new("RGB", (32, 32), (10 * index,) * 3) for index in range(12)]
    rows = [{"image": image, "label": index % 3} for index, image in enumerate(grey)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "animals" / "test.parquet")
    load_student("cifar_resnet8", class_names=["cat", "dog", "eel"]).save_pretrained("model")
    shared = ["model", "--dataset_name", str(tmp_path / "animals"), "--augmentation", "random_resized_crop"]
    shared += ["--figures", "logit_spread", "--max_images", "5", "--batch_size", "4"]
    visualize([*shared, "--output_dir", "all"])
    visualize([*shared, "--output_dir", "streamed", "--streaming", "true"])
    all_of_them, streamed = (f"{folder}/logit_spread.csv" for folder in ("all", "streamed"))
    names = list(rows_of(all_of_them)[0])
    assert names == list(rows_of(streamed)[0])
    for name in ("image", "label", "class"):
        assert [row[name] for row in rows_of(streamed)] == [row[name] for row in rows_of(all_of_them)]
    for name in names[3:]:
        # A stream has batches of other images and other sizes, and how float32 rounds depends on them; six digits are
        # written.
        np.testing.assert_allclose(column(streamed, name), column(all_of_them, name), rtol=2e-5)
    np.testing.assert_array_equal(column(all_of_them, "image"), some_rows(12, 5))


def test_bad_input(run, monkeypatch, capsys):
    load_student("cifar_resnet8", num_classes=7).save_pretrained("seven")
    for words, message in (
        (["--figures", "tsen"], "There is no figure 'tsen'. Did you mean 'tsne'"),
        (["--max_images", "0"], "max_images is 0"),
        (["--teacher_checkpoint", "t.pth"], "go with --teacher"),
        (["--teacher", "seven", "--figures", "reliability"], "teacher has 7 classes and the student 10"),
        (["--figures", "tsne", "--tsne_classes", "1"], "there are 7"),
    ):
        with pytest.raises(ValueError, match=message):
            visualize([f"{run}/student", *words])
    assert not (run / "figures").exists()
