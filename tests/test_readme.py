"""README and pages: every command is understood, one of each kind runs on a small data set, and the blocks work."""

import ast
import contextlib
import io
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
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from helpers import ROOT, run_script
from hub_stand_in import writable_hub
from interrupting import in_child
from PIL import Image as PILImage

from hfkd.cli import COMMANDS as VERBS
from hfkd.cli import main
from hfkd.losses import build_losses
from hfkd.recipe.reading import load_recipe, parse_recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page.relative_to(ROOT).as_posix(), language, text)
    for page in PAGES
    for language, text in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.DOTALL)
]
COMMANDS = [
    re.sub(r"^while |;.*", "", line)
    for _, language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"(while )?(accelerate |python |hfkd |torchrun )", line)
]
# A missing teacher's own recipe would train it for 240 epochs.
BEFORE = ["python scripts/train_teacher.py recipes/cifar100/teachers/resnet56.yaml"]
RECIPES = {  # on the pages: the two files of one's own data
    name: block
    for _, language, block in BLOCKS
    if language == "yaml"
    for name in re.findall(r"^# (\w+\.yaml)$", block, re.MULTILINE)
}
SMALL = "--num_train_epochs 1 --per_device_train_batch_size 50 --bf16 false --disable_tqdm true".split()
SEVERAL = "--train_split train[:16] --per_device_train_batch_size 8".split()  # processes
TEACHER = "--teacher_name_or_path runs/cifar100/teachers/resnet56/teacher".split()
WORKERS = "--image_size 64 --dataloader_num_workers 1".split()
# What stands in for a teacher that is not trained here or for the Hub, and for sizes that take minutes.
IN_PLACE_OF = {
    "resnet32x4-resnet8x4/kd_zscore": TEACHER,
    "cache-teacher": ["--epochs", "2"],
    "deit_tiny": [*TEACHER, *WORKERS],
    "imagenet/": [*TEACHER, *WORKERS, *"--eval_split test --label_column label".split()],
}
# One recipe's second run needs another folder.
OUTPUT_OF = {
    "--streaming": "runs/streamed",
    "--push_to_hub": "runs/pushed",
    "--nnodes": "runs/two_nodes",
    "--teacher_cache": "runs/cached",
}
# Options that make a command one of another kind. All others are only checked to be known.
KINDS = {*OUTPUT_OF, "--num_processes", "--resume_from_checkpoint", "--help", "teacher.yaml", "student.yaml"}
KINDS |= {"scripts/distill.py"}  # here with a vision transformer
# Without a recipe: architectures without weights to fetch.
STAND_INS = {"runs/photos/resnet50": "runs/photos/cifar_resnet14", "resnet50": "cifar_resnet14"}
STAND_INS["mobilenetv4_conv_small"] = "cifar_resnet8"
TESTED_APART = {
    "scripts/benchmark/run.py",
    "scripts/benchmark/gpu.py",
    "choose",
    "export",
    "reproduce",
    "search",
    "visualize",
}  # each takes long
RESULTS = "results.json"
FEW_DIGITS = '"digits", train_split="train[:64]", eval_split="test[:32]"'
TRAINS = {"distill", "train-teacher", "cache-teacher"}


def verb_and_rest(words):
    """Return the command of hfkd that a line runs, also through a script, and its words; None for other programs."""
    place = next(index for index, word in enumerate(words) if word == "hfkd" or word.startswith("scripts/"))
    program, rest = words[place], words[place + 1 :]
    if program == "hfkd":
        return rest[0], rest[1:]
    verb = Path(program).stem.replace("_", "-")
    return verb if verb in VERBS else None, rest


def as_file(word):
    """Return the file of a recipe's name, such as cifar100/resnet56-resnet20/kd_zscore."""
    if word == "mine.yaml":  # a copy of it
        word = "deit_tiny"
    file = f"recipes/{word}.yaml"
    return file if (ROOT / file).is_file() else word


def has_recipe(words):
    return not verb_and_rest(words)[1][:1] == ["--dataset_name"]


def kind_of(command):
    words = [as_file(word) for word in shlex.split(command, comments=True)]
    data = "imagenet" if "imagenet/" in command else "cifar"
    return (verb_and_rest(words)[0], data, has_recipe(words), *sorted(KINDS.intersection(words)))


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
    verb, own = verb_and_rest(words)
    if "hfkd" not in words:
        run_script(next(word for word in words if word.startswith("scripts/")).removeprefix("scripts/"), *own)
        return
    try:
        main([verb, *own])
    except SystemExit as end:  # of --help
        assert not end.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory as after the installation, with 100 training and 100 test images."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "photos").symlink_to("imagefolder")
    for name, recipe in RECIPES.items():
        (folder / name).write_text(recipe.replace("path/to/flowers", str(folder / "imagefolder")))
    (folder / "my_project").mkdir()
    (folder / "my_project" / "losses.py").write_text(python_block("docs/own_method.md").partition("\nlosses = ")[0])
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
    words = [as_file(word) for word in shlex.split(command.replace("path/to/", f"{folder}/"), comments=True)]
    if verb_and_rest(words)[0] not in TRAINS or "--help" in words:
        return words
    if not has_recipe(words):
        words = [STAND_INS.get(word, word) for word in words]
    if "--dataset_name" not in words and not any(name in words for name in RECIPES):
        words += ["--dataset_name", str(folder / ("imagefolder" if "imagenet/" in command else "cifar100"))]
    for part, settings in IN_PLACE_OF.items():
        words += settings if part in command else []
    if "--num_processes" in words:
        words[words.index("--num_processes") + 1] = "2"
    for option, output in OUTPUT_OF.items():
        words += ["--output_dir", output] if option in words else []
    return words + SMALL + (SEVERAL if {"--num_processes", "--nnodes"} & {*words} else [])


def test_every_command_is_understood(folder, monkeypatch, capsys):
    """Its recipe exists, its options are known, and the values of a training have the right types."""
    monkeypatch.chdir(folder)
    options = {}
    for command in COMMANDS:
        words = [as_file(word) for word in shlex.split(command.replace("path/to/", f"{folder}/"), comments=True)]
        verb, own = verb_and_rest(words)
        if verb is None:  # the benchmark
            continue
        if verb not in options:
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as help_text:
                main([verb, "--help-all"])
            options[verb] = set(re.findall(r"--\w+", help_text.getvalue())) | {"--help"}
        given = {word for word in own if re.match(r"--\w+$", word)}
        assert given <= options[verb], f"{command}: {given - options[verb]}"
        if verb in ("distill", "train-teacher") and "--help" not in own and has_recipe(words):
            parse_recipe(own)
    assert len(options) >= 8


def test_a_command_of_each_kind(folder, monkeypatch, capsys):
    """In order, since one needs what the one before left; on two CPU processes where it says several GPUs."""
    monkeypatch.chdir(folder)
    of_kind = {}
    for command in [*BEFORE, *COMMANDS]:
        of_kind.setdefault(kind_of(command), command)
    with writable_hub(folder / "hub", monkeypatch) as hub:
        for command in of_kind.values():
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
    results = {path.parent.relative_to(runs).as_posix(): json.loads(path.read_text()) for path in runs.rglob(RESULTS)}
    pair = "cifar100/resnet32x4-resnet8x4/kd_zscore"
    assert results["cifar100/teachers/resnet56"]["role"] == "teacher"
    assert results["cached"]["teacher_cache"] == {"epochs": 2, "top_k": None}
    assert {results[name]["devices"] for name in (pair, "two_nodes")} == {"2 x cpu"}
    students = ["student", "pushed", "cifar100/resnet56-resnet20/kd_zscore", "streamed"]
    for name in [*students, "imagenet/resnet34-resnet18/kd_zscore"]:
        assert results[name]["role"] == "student" and (runs / name / "student" / "model.safetensors").is_file()
    for name in ("me/deit-tiny-cifar100-kd", "me/resnet20-cifar100-kd"):
        assert {"README.md", "model.safetensors", "config.json"} <= hub.repositories[name].files().keys()


def test_the_blocks_of_yaml(folder, monkeypatch):
    """Every key is known, and every loss can be built."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # which reading a command does; here only its parts are called
    blocks = [block for _, language, block in BLOCKS if language == "yaml"]
    for number, block in enumerate(blocks):
        file = folder / "blocks" / f"{number}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(block.replace("extends: teacher.yaml", "extends: ../teacher.yaml"))
        sections = yaml.safe_load(block).get("recipes", {})
        for name in [f"{file.with_suffix('')}/{section}" for section in sections] or [file]:
            recipe = load_recipe(name)
            build_losses(recipe.get("losses") or {}, logit_standardization=False)
    assert len(blocks) >= 6


def test_the_blocks_of_python():
    """Each is valid, and what it imports exists."""
    blocks = [(place, block) for place, language, block in BLOCKS if language == "python"]
    for place, block in blocks:
        for node in ast.walk(ast.parse(block, place)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(compile(ast.Module([node], []), place, "exec"), {})
    assert len(blocks) >= 6


def python_block(page):
    (block,) = [block for place, language, block in BLOCKS if (place, language) == (page, "python")]
    return block


def test_the_quickstart_then_the_programs(folder, monkeypatch, capfd):
    """quickstart.py is what quickstart.sh runs after installing; the programs use the teacher that it leaves."""
    monkeypatch.chdir(folder)
    assert in_child(lambda: run_script("quickstart.py")) == 0
    table = capfd.readouterr().out
    rows = re.findall(r"^(teacher|student), .*?\d,\d{3}\s+([\d.]+)\s", table, re.MULTILINE)
    assert [role for role, _ in rows] == ["teacher", "student", "student", "student"]
    accuracies = [float(top1) for _, top1 in rows]
    assert accuracies[0] > 90 and all(accuracy > 50 for accuracy in accuracies)

    program = python_block("README.md")
    assert len(program.strip().splitlines()) <= 15
    PILImage.new("RGB", (40, 32)).save(folder / "photo.jpg")
    # The method trains on with the program's networks and data.
    program = program.replace("num_train_epochs=5", "num_train_epochs=1, logging_steps=100")
    method = python_block("docs/own_method.md")
    loading = python_block("docs/hub.md").replace("me/resnet20-cifar100-kd", "runs/digits/kd/student")
    programs = "\n".join([program, method, "print(trainer.state.log_history)", loading, guide_in_small(), notebook()])
    assert in_child(lambda: exec(programs, {"__name__": "__main__"})) == 0
    output = capfd.readouterr().out
    assert "eval_agreement" in output and "loss_mse" in output and "'score'" in output
    assert json.loads((folder / "my-awesome-model" / RESULTS).read_text())["losses"]["kd"]["temperature"] == 5
    assert re.search(r"KD and Z-score +\d", output)


def guide_in_small():
    """The program in place of transformers' guide, with the demonstration's teacher, on digits."""
    guide = python_block("docs/coming_from.md")
    assert f"in {len(guide.strip().splitlines())} lines" in (ROOT / "docs" / "coming_from.md").read_text()
    guide = guide.replace("merve/beans-vit-224", "runs/digits/teacher/teacher").replace("30", "1")
    return guide.replace('"AI-Lab-Makerere/beans", eval_split="validation"', FEW_DIGITS)


def notebook():
    """The cells of code of the notebook, with few images."""
    cells = json.loads((ROOT / "docs" / "digits.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return re.sub(r"num_train_epochs=\d", "num_train_epochs=1", code.replace('"digits"', FEW_DIGITS))
