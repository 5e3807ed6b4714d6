"""README: its commands and programs work on a small data set with CIFAR-100's columns; its table has every method."""

import inspect
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from helpers import ROOT, run_script
from hub_stand_in import writable_hub
from interrupting import in_child
from PIL import Image as PILImage

from hfkd.cli import main
from hfkd.losses import LOSSES
from hfkd.losses.regions import CITATION as REGIONS_CITATION
from hfkd.losses.standardize import CITATION

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"accelerate |python |hfkd |torchrun ", line)
]
RECIPES = {  # in the README: the two files of one's own data
    name: block
    for language, block in BLOCKS
    if language == "yaml"
    for name in re.findall(r"^# (\w+\.yaml)$", block, re.MULTILINE)
}
SMALL = "--num_train_epochs 1 --per_device_train_batch_size 50 --bf16 false --disable_tqdm true".split()
TEACHER = "--teacher_name_or_path runs/cifar100/teachers/resnet56/teacher".split()
SMALL_PHOTOS = "--image_size 32 --dataloader_num_workers 1 --pretrained false".split()
# What stands in for a teacher that is not trained here or for the Hub, and for sizes that take minutes.
IN_PLACE_OF = {
    "recipes/cifar100/resnet32x4-resnet8x4/kd_zscore.yaml": TEACHER,
    "30": ["--epochs", "2"],  # of the cache
    "recipes/cifar100/resnet32x4-resnet8x4/crd.yaml": TEACHER,
    "recipes/cifar100/resnet32x4-resnet8x4/simkd.yaml": TEACHER,
    "resnet50": SMALL_PHOTOS,
    "mobilenetv4_conv_small": SMALL_PHOTOS,
    "recipes/deit_tiny.yaml": ["--image_size", "64", "--dataloader_num_workers", "1"],
    "recipes/imagenet/resnet34-resnet18/kd_zscore.yaml": [
        *TEACHER,
        *"--image_size 64 --dataloader_num_workers 1 --eval_split test --label_column label".split(),
    ],
}
# One recipe's second run needs another folder.
OUTPUT_OF = {
    "--streaming": "runs/streamed",
    "--push_to_hub": "runs/pushed",
    "--nnodes": "runs/two_nodes",
    "--teacher_cache": "runs/cached",
}
TESTED_APART = {"scripts/benchmark/run.py", "export", "reproduce", "search", "visualize"}  # each takes long
EVALUATES = ("evaluate", "compare", "push", "recipes", "--help")  # commands that train nothing


def paper(citation):
    """Return "Hinton et al., Distilling the Knowledge in a Neural Network, 2015" from a BibTeX entry."""
    fields = {key: " ".join(text.split()) for key, text in re.findall(r"(\w+) = \{(.*?)\},\n", citation, re.DOTALL)}
    families = [author.partition(",")[0] for author in fields["author"].split(" and ")]
    authors = " and ".join(families) if len(families) < 3 else f"{families[0]} et al."
    acronyms = re.findall(r"\w*[A-Z]{3}\w*", fields.get("booktitle", ""))  # of which the last is the conference's
    where = " ".join([*acronyms[-1:], fields["year"]])
    return f"{authors}, {re.sub('[{}]', '', fields['title'])}, {where}"


def parameters(loss):
    """Return a loss's parameters as a recipe has them, with defaults where there are any."""
    given = inspect.signature(loss).parameters.values()
    return ", ".join(p.name if p.default is p.empty else f"{p.name}: {json.dumps(p.default)}" for p in given)


def test_the_table_of_methods():
    """Every loss has one row. The message of a failure holds the rows to copy into the README."""
    section = README.partition("\n## Methods\n")[2].partition("\n## ")[0]
    _, *rows = [row for row in section.splitlines() if row.startswith("| ")]
    expected = [f"| `{name}` | {paper(loss.citation)} | `{parameters(loss)}` |" for name, loss in LOSSES.items()]
    expected.append(f"| `regions: [1, 2, 4]` | {paper(REGIONS_CITATION)} | of the logit methods that have it |")
    expected.append(f"| `logit_standardization: true` | {paper(CITATION)} | over every logit loss |")
    missing, outdated = set(expected) - set(rows), set(rows) - set(expected)
    assert not missing and not outdated, "\n".join(["add:", *missing, "remove:", *outdated])
    assert len(rows) == len(expected)


def start(command, folder):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(command, folder):
    process = start(command, folder)
    output = process.communicate()[0]
    assert process.returncode == 0, output[-4000:]


def run_on_two_nodes(words, folder):
    """Two machines are two launchers here, each of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [address if word.startswith("HOST:") else word for word in words]
    words[words.index("--nproc_per_node") + 1] = "1"
    nodes = [start(words, folder) for _ in range(2)]
    outputs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-4000:]


def run_here(words):
    """A command in this process: starting one takes far longer than what these have to do."""
    if words[0] == "hfkd":
        try:
            main(words[1:])
        except SystemExit as end:  # of --help
            assert not end.code
        return
    script = next(index for index, word in enumerate(words) if word.startswith("scripts/"))
    run_script(words[script].removeprefix("scripts/"), *words[script + 1 :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory as after the installation, with 100 training and 100 test images."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "photos").symlink_to(folder / "imagefolder")
    for name, recipe in RECIPES.items():
        (folder / name).write_text(recipe.replace("path/to/flowers", str(folder / "imagefolder")))
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


def in_small(command, folder):
    """The words of a command, with what makes it small and local."""
    words = shlex.split(command.replace("path/to/", f"{folder}/"), comments=True)
    if any(word in words for word in EVALUATES):
        return words
    if "--dataset_name" not in words and not any(name in words for name in RECIPES):
        words += ["--dataset_name", str(folder / ("imagefolder" if "recipes/imagenet" in command else "cifar100"))]
    for recipe, settings in IN_PLACE_OF.items():
        words += settings if recipe in words else []
    if "--num_processes" in words:
        words[words.index("--num_processes") + 1] = "2"
    for option, output in OUTPUT_OF.items():
        words += ["--output_dir", output] if option in words else []
    return words + SMALL


def test_the_commands(folder, monkeypatch, capsys):
    """In order, since one needs what the one before left; on two CPU processes where it says several GPUs."""
    monkeypatch.chdir(folder)
    verbs = [re.search(r"hfkd ([\w-]+)|scripts/([\w/]+)\.py", command).group(1, 2) for command in COMMANDS]
    expected = "train_teacher distill evaluate distill distill distill train-teacher distill train-teacher distill"
    expected += " train_teacher distill distill distill distill distill recipes recipes distill distill cache-teacher"
    expected += " distill benchmark/run compare visualize export reproduce search distill push"
    assert [verb for pair in verbs for verb in pair if verb] == expected.split()
    with writable_hub(folder / "hub", monkeypatch) as hub:
        for command in COMMANDS:
            words = in_small(command, folder)
            if not TESTED_APART.isdisjoint(words):
                continue
            if "torchrun" in words:
                run_on_two_nodes(words, folder)
            elif "--num_processes" in words:
                run(words, folder)
            else:
                run_here(words)
            if "evaluate" in words:
                assert re.search(r"top1: \d", capsys.readouterr().out)
            if "--help" in words:
                assert "--logit_standardization" in capsys.readouterr().out
    runs = folder / "runs"
    for name, role in (("teachers/resnet56", "teacher"), ("resnet56-resnet20/kd_zscore", "student")):
        assert (runs / "cifar100" / name / role / "model.safetensors").is_file()
        assert json.loads((runs / "cifar100" / name / "results.json").read_text())["role"] == role
    pair = "cifar100/resnet32x4-resnet8x4"
    assert json.loads((runs / "cached" / "results.json").read_text())["teacher_cache"] == {"epochs": 2, "top_k": None}
    for name in (f"{pair}/kd_zscore", "two_nodes"):
        assert json.loads((runs / name / "results.json").read_text())["devices"] == "2 x cpu"
    students = ["student", "deit_tiny", "imagenet/resnet34-resnet18/kd_zscore", "streamed"]
    for name in [*students, f"{pair}/crd", f"{pair}/simkd"]:
        assert (runs / name / "student" / "model.safetensors").is_file()
    for name in ("me/deit-tiny-cifar100-kd", "me/resnet20-cifar100-kd"):
        assert {"README.md", "model.safetensors", "config.json"} <= hub.repositories[name].files().keys()


def test_the_quickstart_then_the_programs(folder, monkeypatch, capfd):
    """quickstart.py is what quickstart.sh runs after installing; the program uses the teacher that it leaves."""
    monkeypatch.chdir(folder)
    assert in_child(lambda: run_script("quickstart.py")) == 0
    table = capfd.readouterr().out
    rows = re.findall(r"^(teacher|student), .*?\d,\d{3}\s+([\d.]+)\s", table, re.MULTILINE)
    assert [role for role, _ in rows] == ["teacher", "student", "student", "student"]
    accuracies = [float(top1) for _, top1 in rows]
    assert accuracies[0] > 90 and all(accuracy > 50 for accuracy in accuracies)

    program, loading, method = [block for language, block in BLOCKS if language == "python"]
    assert len(program.strip().splitlines()) <= 15
    PILImage.new("RGB", (40, 32)).save(folder / "photo.jpg")
    loading = loading.replace("me/resnet20-cifar100-kd", "runs/digits/kd/student")
    # The method trains on with the program's networks and data.
    program = program.replace("num_train_epochs=5", "num_train_epochs=1, logging_steps=100")
    programs = "\n".join([program, method, "print(trainer.state.log_history)", loading])
    assert in_child(lambda: exec(programs, {"__name__": "__main__"})) == 0
    output = capfd.readouterr().out
    assert "eval_agreement" in output and "loss_mse" in output and "'score'" in output
