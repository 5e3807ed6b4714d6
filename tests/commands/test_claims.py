"""A run's folder belongs to one command at a time, and hfkd replaces only what it wrote."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hfkd.cli import main
from hfkd.runs.checkpoints import last_checkpoint
from hfkd.runs.claims import claimed

RECIPE = {
    "student_name_or_path": "cifar_resnet8",
    "dataset_name": "digits",
    "random_flip": False,
    "train_split": "train[:32]",
    "eval_split": "test[:20]",
    "per_device_train_batch_size": 16,
    "num_train_epochs": 2,
    "optim": "sgd",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "disable_tqdm": True,
    "report_to": "none",
}
TRAIN = ["train-teacher", "r.yaml", "--output_dir", "run"]
RESUME = [*TRAIN, "--resume_from_checkpoint", "true"]


@pytest.fixture(autouse=True)
def recipe():
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run under a umask of its own, in a folder with links where partial files might be written."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
        Path("notes.txt").write_text("mine")
        Path("run").mkdir()
        for name in ("recipe.yaml.partial", "results.json.partial", "trainer_state.json.partial"):
            Path("run", name).symlink_to("../notes.txt")
        former = os.umask(0o022)
        try:
            main(TRAIN)
        finally:
            os.umask(former)
    return folder


@pytest.fixture
def run(finished):
    """A copy of the run, whose last epoch is still to be trained."""
    shutil.copytree(finished / "run", "run", symlinks=True)
    shutil.rmtree("run/checkpoint-4")
    return Path("run")


@pytest.fixture
def nothing_loaded(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("something was loaded")

    for name in ("load_splits", "build_student", "load_teachers"):
        monkeypatch.setattr(f"hfkd.commands.build.{name}", fail)


def refused(capsys, argv, message):
    with pytest.raises(SystemExit) as ending:
        main(argv)
    error = capsys.readouterr().err
    assert ending.value.code == 2 and re.search(message, error), error


def content(folder="."):
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


FOREIGN = {
    "student": ("student/model.py", "import torch"),
    "teacher": ("teacher/results.json", "{}"),
    "checkpoint-500": ("checkpoint-500/trainer_state.json", "{}"),
    "recipe.yaml": ("recipe.yaml", "# of last summer\nseed: 1\n"),
    "results.json": ("results.json", '{"accuracy": 1}'),
    "trainer_state.json": ("trainer_state.json", "{}"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_wrote_is_refused(name, capsys, nothing_loaded):
    path, text = FOREIGN[name]
    Path("run", path).parent.mkdir(parents=True)
    Path("run", path).write_text(text)
    if name == "trainer_state.json":
        Path("run/recipe.yaml").write_text("# a comment\n")
    before = content()
    refused(capsys, TRAIN, rf"run holds .*{re.escape(name)}.*, which hfkd did not write")
    assert content() == before


def test_a_foreign_checkpoint_beside_own_ones_is_refused(run, capsys, nothing_loaded):
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1/notes.txt").write_text("mine")
    refused(capsys, RESUME, "run holds checkpoint-1, which hfkd did not write")
    assert (run / "checkpoint-1/notes.txt").is_file()


@pytest.mark.parametrize("name", ["recipe.yaml", "results.json", "trainer_state.json"])
def test_a_folder_in_place_of_a_file_is_refused(name, run, capsys, nothing_loaded):
    (run / name).unlink()
    (run / name).mkdir()
    refused(capsys, RESUME, f"run holds {name}, which hfkd did not write")


def test_a_folder_in_place_of_a_searchs_lock_is_refused(capsys, nothing_loaded):
    Path("found/study.lock").mkdir(parents=True)
    search = ["search", "r.yaml", "--search_dir", "found", "--dataset_name", "digits", "--held_out", "0.5"]
    refused(capsys, search, "found holds study.lock, which hfkd did not write")


@pytest.mark.parametrize("argv", [TRAIN, RESUME])
def test_a_second_command_is_refused_at_once(argv, run, capsys, nothing_loaded):
    with claimed(run, "output_dir"):
        before = content()
        refused(capsys, argv, "output_dir: another command is writing to run")
        assert content() == before


def test_a_claim_ends_with_its_process():
    """Also where a worker that it forked lives on."""
    Path("run").mkdir()
    code = (
        "import os, pathlib, time\nfrom hfkd.runs.claims import claimed\n"
        "with claimed(pathlib.Path('run'), 'output_dir'):\n"
        "    child = os.fork()\n    os.write(1, b'%d\\n' % child)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = max(int(holder.stdout.readline()) for _ in range(2))  # the worker's line: it has let go of the file
    try:
        with pytest.raises(ValueError, match="another command"), claimed(Path("run"), "output_dir"):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        started = time.monotonic()
        with claimed(Path("run"), "output_dir"):
            assert time.monotonic() - started < 1
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_modes_and_links(finished):
    run = finished / "run"
    assert (finished / "notes.txt").read_text() == "mine"
    for path in run.rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    assert not list(run.rglob("*.begun")) and len(list(run.rglob("*.partial"))) == 3


@pytest.mark.parametrize("text", ["", "{"])
def test_damaged_files_do_not_stop_a_run_with_checkpoints(text, run, caplog):
    """And what somebody put beside the exported model stays."""
    for name in ("results.json", "recipe.yaml"):
        (run / name).write_text(text)
    (run / "teacher/notes.txt").write_text("mine")
    main(RESUME)
    assert "run/results.json is" in caplog.text and "run/recipe.yaml is" in caplog.text
    assert json.loads((run / "results.json").read_text())["last"]["step"] == 4
    assert yaml.safe_load((run / "recipe.yaml").read_text())["student_name_or_path"] == "cifar_resnet8"
    assert (run / "teacher/notes.txt").read_text() == "mine"
    assert last_checkpoint("run") == "run/checkpoint-4"


def test_a_run_without_a_checkpoint_protects_nothing():
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"per_device_train_batch_size": 8}, sort_keys=False))
    main([*TRAIN, "--max_steps", "1", "--save_strategy", "no"])
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["per_device_train_batch_size"] == 16
