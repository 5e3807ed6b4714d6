"""Which checkpoints are whole, which is the last of them, and which are removed or set aside."""

import os
import re
import shutil
from pathlib import Path

import pytest
from interrupting import flip_a_bit

from hfkd.runs.checkpoints import checkpoints, defect, drop_old, last_checkpoint, set_aside_newer, write_manifest


def sealed(step, output_dir="run"):
    folder = Path(output_dir, f"checkpoint-{step}")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    for name in ("trainer_state.json", "unlogged.json"):
        (folder / name).write_text("{}")
    write_manifest(folder)
    return folder


def names(folders):
    return [Path(folder).name for folder in folders]


def manifest_text(text):
    return lambda folder: (folder / "checkpoint.json").write_text(text)


# ---- One checkpoint ------------------------------------------------------------------------------------------------

DAMAGE = {
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 99), "model.safetensors has 99 bytes .* 2304"),
    "flipped": (lambda folder: flip_a_bit(folder / "model.safetensors"), "model.safetensors is damaged"),
    "missing": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "a folder": (
        lambda folder: ((folder / "trainer_state.json").unlink(), (folder / "trainer_state.json").mkdir()),
        "trainer_state.json (has|cannot be read)",
    ),
    "not sealed": (lambda folder: (folder / "checkpoint.json").unlink(), "not written to the end: checkpoint.json"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "not written to the end: checkpoint.json"),
    "gone": (shutil.rmtree, "there is no such folder"),
    "empty manifest": (manifest_text(""), "checkpoint.json cannot be read"),
    "half a manifest": (manifest_text('{"files": {"model.safe'), "checkpoint.json cannot be read"),
    "manifest of bytes": (lambda folder: (folder / "checkpoint.json").write_bytes(b"\xff\x00"), "cannot be read"),
    "no files": (manifest_text("{}"), "checkpoint.json cannot be read"),
    "a list": (manifest_text('{"files": ["model.safetensors"]}'), "checkpoint.json cannot be read"),
    "no facts": (manifest_text('{"files": {"model.safetensors": 3}}'), "checkpoint.json cannot be read"),
    "no size": (manifest_text('{"files": {"model.safetensors": {}}}'), "checkpoint.json cannot be read"),
    "no checksum": (manifest_text('{"files": {"model.safetensors": {"bytes": 2304}}}'), "checksum"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_known(name):
    damage, message = DAMAGE[name]
    folder = sealed(2)
    assert defect(folder) is None and last_checkpoint("run") == "run/checkpoint-2"
    damage(folder)
    assert re.search(message, defect(folder))
    assert last_checkpoint("run") is None


def test_a_file_that_cannot_be_read(monkeypatch):
    """As on a disk with a bad sector."""
    folder = sealed(2)

    def fails(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hfkd.runs.checkpoints.size_and_checksum", fails)
    assert defect(folder) == "model.safetensors cannot be read ([Errno 5] Input/output error)"


# ---- Those of a run ------------------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_steps():
    for step in (10, 9, 2, 100):  # written in this order, so their times say otherwise
        sealed(step)
    Path("run/checkpoint-200").write_text("a file")
    for name in ("checkpoint-x", "superseded-checkpoint-300", "checkpoint-300-copy"):
        shutil.copytree("run/checkpoint-2", f"run/{name}")
    assert names(checkpoints("run")) == ["checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert last_checkpoint("run") == "run/checkpoint-100"
    assert checkpoints("elsewhere") == [] and last_checkpoint("elsewhere") is None


def test_those_left_out_are_named(caplog):
    for step in (2, 4, 6, 8):
        sealed(step)
    flip_a_bit(Path("run/checkpoint-8/model.safetensors"))
    os.remove("run/checkpoint-6/checkpoint.json")
    assert last_checkpoint("run") == "run/checkpoint-4"
    assert "run/checkpoint-8 is left out: model.safetensors is damaged" in caplog.text
    assert "run/checkpoint-6 is left out: it was not written to the end" in caplog.text
    assert "checkpoint-4" not in caplog.text


@pytest.mark.parametrize(
    "limit, keep, left",
    [
        (None, [], [2, 4, 6, 8, 10]),
        (0, [], [2, 4, 6, 8, 10]),
        (5, [10], [2, 4, 6, 8, 10]),
        (4, [10], [2, 4, 8, 10]),
        (3, [10], [4, 8, 10]),
        (2, [10, 2], [2, 10]),
        (1, [10], [10]),
        (1, [10, 2], [2, 10]),
    ],
)
def test_old_ones_are_removed(limit, keep, left):
    """First 6, which is half-written, then the oldest; never those to keep."""
    for step in (2, 4, 6, 8, 10):
        sealed(step)
    os.remove("run/checkpoint-6/checkpoint.json")
    drop_old("run", limit, [os.path.abspath(f"run/checkpoint-{step}") for step in keep])
    assert names(checkpoints("run")) == [f"checkpoint-{step}" for step in left]


def test_later_ones_are_set_aside(caplog):
    for step in (2, 4, 6, 8):
        sealed(step)
    flip_a_bit(Path("run/checkpoint-6/model.safetensors"))
    Path("run/superseded-checkpoint-8").mkdir()
    set_aside_newer("run", 4)
    assert names(checkpoints("run")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert last_checkpoint("run") == "run/checkpoint-4"
    assert defect("run/superseded-checkpoint-8") is None
    assert "run/checkpoint-8 is renamed to superseded-checkpoint-8" in caplog.text
