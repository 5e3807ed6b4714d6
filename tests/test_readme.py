"""The README's commands and its program do what it says, on a small data set with CIFAR-100's columns."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from helpers import ROOT
from PIL import Image as PILImage

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"accelerate |python ", line)
]
SMALL = "--num_train_epochs 1 --per_device_train_batch_size 50 --bf16 false --disable_tqdm true".split()
TEACHER = "--teacher_name_or_path runs/cifar100/teachers/resnet56/teacher".split()
# What stands in for a teacher that is not trained here or for the Hub, and for sizes that take minutes.
IN_PLACE_OF = {
    "recipes/cifar100/resnet32x4-resnet8x4/kd_zscore.yaml": TEACHER,
    "recipes/cifar100/resnet32x4-resnet8x4/crd.yaml": TEACHER,
    "recipes/cifar100/resnet32x4-resnet8x4/simkd.yaml": TEACHER,
    "recipes/deit_tiny.yaml": ["--image_size", "64", "--dataloader_num_workers", "1"],
    "recipes/imagenet/resnet34-resnet18/kd_zscore.yaml": [
        *TEACHER,
        *"--image_size 64 --dataloader_num_workers 1 --eval_split test --label_column label".split(),
    ],
}


def run(command, folder):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def run_here(words, monkeypatch):
    """A script in this process: starting one takes far longer than what these have to do."""
    script = next(index for index, word in enumerate(words) if word.startswith("scripts/"))
    monkeypatch.setattr(sys, "argv", words[script:])
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])  # the first of which the scripts take away
    runpy.run_path(words[script], run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory as after the installation, with 100 training and 100 test images."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    labels = {"fine_label": ClassLabel(names=[f"fine {i}" for i in range(100)])}
    labels["coarse_label"] = ClassLabel(names=[f"coarse {i}" for i in range(20)])
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        pixels = generator.integers(0, 255, (100, 32, 32, 3), dtype=np.uint8)
        rows = [
            {"img": PILImage.fromarray(pixels[i]), "fine_label": i, "coarse_label": i // 5} for i in range(len(pixels))
        ]
        data = Dataset.from_list(rows, features=Features({"img": Image(), **labels}))
        data.to_parquet(folder / "cifar100" / f"{split}.parquet")
        for row in rows:
            class_folder = folder / "imagefolder" / split / labels["fine_label"].names[row["fine_label"]]
            class_folder.mkdir(parents=True)
            row["img"].save(class_folder / "0.jpg")
    return folder


def test_the_commands(folder, monkeypatch, capsys):
    """In order, since one needs what the one before left; on two CPU processes where it says several GPUs."""
    monkeypatch.chdir(folder)
    # The first as a person runs it, and the one of several processes; the others without starting Python again.
    started = {COMMANDS[0], next(command for command in COMMANDS if "--num_processes" in command)}
    scripts = [re.search(r"scripts/(\w+)\.py", command).group(1) for command in COMMANDS]
    expected = ["train_teacher", "distill", "evaluate", "distill", "train_teacher", *["distill"] * 6, "benchmark"]
    assert scripts == expected
    for command, script in zip(COMMANDS, scripts, strict=True):
        if script == "benchmark":  # has a test of its own
            continue
        words = shlex.split(command.replace("path/to/", f"{folder}/"))
        if "--dataset_name" not in words and script != "evaluate":  # which finds it in the run's own recipe
            name = "imagefolder" if "recipes/imagenet" in command else "cifar100"
            words += ["--dataset_name", str(folder / name)]
        for recipe, settings in IN_PLACE_OF.items():
            words += settings if recipe in words else []
        if "--num_processes" in words:
            words[words.index("--num_processes") + 1] = "2"
        if "--streaming" in words:
            words += ["--output_dir", "runs/streamed"]
        words += [] if script == "evaluate" else SMALL
        if command in started:
            run(words, folder)
            continue
        run_here(words, monkeypatch)
        if script == "evaluate":
            assert re.search(r"top1: \d", capsys.readouterr().out)
    runs = folder / "runs" / "cifar100"
    for name, role in (("teachers/resnet56", "teacher"), ("resnet56-resnet20/kd_zscore", "student")):
        assert (runs / name / role / "model.safetensors").is_file()
        assert json.loads((runs / name / "results.json").read_text())["role"] == role
    several = json.loads((runs / "resnet32x4-resnet8x4" / "kd_zscore" / "results.json").read_text())
    assert several["devices"] == "2 x cpu"
    pair = "cifar100/resnet32x4-resnet8x4"
    for name in ("deit_tiny", "imagenet/resnet34-resnet18/kd_zscore", "streamed", f"{pair}/crd", f"{pair}/simkd"):
        assert (folder / "runs" / name / "student" / "model.safetensors").is_file()


def test_the_quickstart_then_the_program(folder):
    """quickstart.py is what quickstart.sh runs after installing; the program uses the teacher that it leaves."""
    table = run([sys.executable, "scripts/quickstart.py"], folder)
    rows = re.findall(r"^(teacher|student), .*?\d,\d{3}\s+([\d.]+)\s", table, re.MULTILINE)
    assert [role for role, _ in rows] == ["teacher", "student", "student", "student"]
    accuracies = [float(top1) for _, top1 in rows]
    assert accuracies[0] > 90 and all(accuracy > 50 for accuracy in accuracies)

    (program,) = [block for language, block in BLOCKS if language == "python"]
    assert len(program.strip().splitlines()) <= 15
    assert "eval_agreement" in run([sys.executable, "-c", program], folder)
