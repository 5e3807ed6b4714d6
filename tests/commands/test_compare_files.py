"""`hfkd compare --measure onnx`: the files of each run beside the teacher's, and those of other weights left out."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from exported import onnx_file
from finished import KD_ZSCORE, finished_run

from hfkd import load_student
from hfkd.commands.compare import compare
from hfkd.comparison.files import files_text
from hfkd.comparison.rows import compared
from hfkd.errors import MissingLibraryError
from hfkd.export.formats import FORMATS, write_model
from hfkd.networks.costs import parameter_count
from hfkd.runs.finished import find_runs


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A student, its ONNX file, a teacher, and its number of parameters."""
    place = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    for name, role in (("cifar_resnet8", "student"), ("cifar_resnet14", "teacher")):
        model = load_student(name, num_classes=100)
        model.save_pretrained(place / role, save_original_format=False)
        if role == "student":
            write_model(model.eval(), 32, FORMATS["onnx"], place / "model.onnx", "")
    (place / "parameters").write_text(str(parameter_count(model)))
    return place


def run_with_student(networks, folder, seed=1):
    """A run with a student whose teacher lies in `teacher`; returns the student's folder."""
    recipe = {"teacher_name_or_path": [str(networks / "teacher")]}
    parameters = int((networks / "parameters").read_text())
    finished_run(folder, [60.0, 71.0], seed, recipe=recipe, teacher_parameters=parameters)
    return Path(shutil.copytree(networks / "student", Path(folder, "student")))


def table(text):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_files_of_a_run_beside_its_teacher(networks, capsys):
    student = run_with_student(networks, "runs/kd")
    content = (networks / "model.onnx").read_bytes()
    onnx_file(student, "float32", content)
    onnx_file(student, "int8", content)
    compare(["runs", "--measure", "onnx"])
    printed = capsys.readouterr().out
    section = printed.partition("## Files for ONNX Runtime\n")[2]
    full, int8, teacher = table(section)
    assert [(each["run"], each["precision"]) for each in (full, int8, teacher)] == [
        *((KD_ZSCORE, "float32"), (KD_ZSCORE, "int8"), ("teacher cifar_resnet14", "float32"))
    ]
    assert (full["top-1"], full["same class as float32"]) == ("70.27", "100.00")  # measured beside int8
    assert (int8["top-1"], int8["same class as float32"]) == ("70.08", "97.79")
    assert (teacher["top-1"], teacher["same class as float32"]) == ("80.00", "-")
    assert int8["bytes"] == f"{len(content):,}"
    assert 2 < int(teacher["bytes"].replace(",", "")) / int(full["bytes"].replace(",", "")) < 3
    # The same file twice, and a network of 2.2 times its multiply-adds, in turns on one thread.
    times = [float(each["ms, 1 thread"]) for each in (full, int8, teacher)]
    assert times[0] == pytest.approx(times[1], rel=0.5) and times[2] > 1.3 * max(times[:2])
    command = "hfkd export runs/kd/student --format onnx --precision float16"
    assert f"- {KD_ZSCORE}, float16: there is no file. Export it: {command}" in section
    assert "float32: there" not in section and "int8: there" not in section
    assert section.partition("\n\nruns/compare holds")[0].strip() in Path("runs/compare/compare.md").read_text()


def test_files_of_other_weights_are_left_out(networks):
    student = run_with_student(networks, "runs/kd")
    for precision in ("float32", "float16", "int8"):
        onnx_file(student, precision)
    (student / "model.safetensors").write_bytes(b"trained further")
    onnx_file(student, "float32", weights=None)  # of an earlier hfkd
    onnx_file(student, "float16").write_bytes(b"another file")
    text = files_text(compared(find_runs(["runs"])[0]))
    assert "|" not in text  # no figure at all
    for precision, reason in {
        "float32": "onnx/model.onnx does not say which weights it holds",
        "float16": "onnx_float16/model.onnx was replaced since it was measured",
        "int8": "onnx_int8/model.onnx holds other weights than runs/kd/student, which was trained since",
    }.items():
        lower = "" if precision == "float32" else f" --precision {precision}"
        command = re.escape(f"Export it: hfkd export runs/kd/student --format onnx{lower}\n")
        assert re.search(rf"{KD_ZSCORE}, {precision}: \S+{re.escape(reason)}\. {command}", f"{text}\n"), text


def test_no_other_file_is_advised_for_a_student_trained_for_int8(networks):
    shutil.copytree(networks / "student", finished_run("runs/int8", [60.0], quantize="int8") / "student")
    text = files_text(compared(find_runs(["runs"])[0]))
    assert text.count("Export it: ") == 1
    assert text.endswith("Export it: hfkd export runs/int8/student --format onnx --precision int8")


def test_seeds_and_what_is_not_there(networks):
    for seed in (1, 2):
        run_with_student(networks, f"runs/{seed}", seed)
    shutil.rmtree(run_with_student(networks, "runs/3", 3))
    student = Path("runs/1/student")
    onnx_file(student, "float32", (networks / "model.onnx").read_bytes())
    path = onnx_file(student, "int8")
    path.with_name("preprocessing.json").write_text("[]")
    text = files_text(compared(find_runs(["runs"])[0]), rounds=1)
    alone, teacher = table(text)
    assert alone["run"] == f"{KD_ZSCORE}, seed 1" and alone["top-1"] == "70.20"
    assert alone["same class as float32"] == "-" and teacher["run"] == "teacher cifar_resnet14"
    assert "seed 1, int8: " in text and "model.onnx has a damaged description" in text
    assert "seed 2, float32: there is no file" in text and "runs/3 holds no trained model." in text


def test_without_onnx_runtime_it_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(MissingLibraryError, match=r'onnxruntime.*pip install "hfkd\[export\]"'):
        compare(["no/such/run", "--measure", "onnx"])
