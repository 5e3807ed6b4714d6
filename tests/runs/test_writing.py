"""Whole writes: modes, links, other people's files, killed processes."""

import os
from pathlib import Path

import pytest

from hfkd.errors import HfkdError
from hfkd.runs.checkpoints import begin_checkpoint, defect, drop_old, set_aside_newer, write_manifest
from hfkd.runs.reading import read_json, read_results
from hfkd.runs.writing import PARTIAL, beside, leftovers, use_umask, write_whole, writing_by_name


@pytest.fixture(params=[0o022, 0o077])
def umask(request):
    former = os.umask(request.param)
    yield request.param
    os.umask(former)


def mode(path):
    return os.stat(path).st_mode & 0o777


def test_files_get_the_mode_of_the_umask(umask):
    write_whole(Path("a.txt"), "a")
    with writing_by_name(Path("b.txt")) as path:
        path.write_text("b")
        path.chmod(0o600)
    Path("c.txt").touch(0o600)
    use_umask([Path("c.txt")])
    assert {mode(name) for name in ("a.txt", "b.txt", "c.txt")} == {0o666 & ~umask}
    assert sorted(os.listdir()) == ["a.txt", "b.txt", "c.txt"]


def test_nothing_is_written_through_a_link():
    Path("notes.txt").write_text("mine")
    for name in ("recipe.yaml", "recipe.yaml.partial"):
        Path(name).symlink_to("notes.txt")
    write_whole(Path("recipe.yaml"), "seed: 1")
    assert Path("notes.txt").read_text() == "mine" and Path("recipe.yaml").read_text() == "seed: 1"
    assert Path("recipe.yaml.partial").is_symlink()


def test_a_write_that_fails_leaves_the_former_file():
    write_whole(Path("a.txt"), "former")
    with pytest.raises(RuntimeError), writing_by_name(Path("a.txt")) as path:
        path.write_text("half")
        raise RuntimeError
    assert Path("a.txt").read_text() == "former" and os.listdir() == ["a.txt"]


def test_leftovers_are_known_by_their_names():
    Path("model.partial").touch()
    Path("model.bin.0.partial").touch()
    left = beside(Path("model.bin"), PARTIAL)
    left.touch()
    assert leftovers(Path("model.bin"), PARTIAL) == [left]


def test_checkpoints_of_other_programs_stay():
    for name in ("checkpoint-1", "checkpoint-2", "superseded-checkpoint-3"):
        Path("run", name).mkdir(parents=True)
        Path("run", name, "trainer_state.json").write_text("{}")
    for step in (3, 4):
        begin_checkpoint(Path(f"run/checkpoint-{step}"))
        write_manifest(f"run/checkpoint-{step}")
    drop_old("run", 1, ["run/checkpoint-4"])
    assert sorted(os.listdir("run")) == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "superseded-checkpoint-3"]
    begin_checkpoint(Path("run/checkpoint-3"))
    write_manifest("run/checkpoint-3")
    set_aside_newer("run", 2)
    assert Path("run/superseded-checkpoint-3/trainer_state.json").is_file()
    assert defect("run/superseded-checkpoint-3-2") is None
    with pytest.raises(RuntimeError, match="run/checkpoint-2 is in the way of a checkpoint"):
        begin_checkpoint(Path("run/checkpoint-2"))


@pytest.mark.parametrize("name", ["../notes.txt", "/dev/zero", "pipe"])
def test_a_manifest_reaches_no_other_files(name):
    begin_checkpoint(Path("checkpoint-1"))
    os.mkfifo("checkpoint-1/pipe")
    entry = f'{{"files": {{"{name}": {{"bytes": 0, "crc32": 0}}}}}}'
    Path("checkpoint-1/checkpoint.json").write_text(entry)
    assert "elsewhere" in defect("checkpoint-1") or "it is no file" in defect("checkpoint-1")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"epochs": 5}', "its epochs is a int"),
        ('{"epochs": [5]}', "is no mapping"),
        ("[]", "lacks epochs"),
    ],
)
def test_results_of_others(text, message):
    Path("results.json").write_text(text)
    with pytest.raises(HfkdError, match=message):
        read_results(Path("results.json"), ["epochs"])


def test_a_file_far_too_large_is_not_read():
    with open("huge.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(HfkdError, match="more than hfkd writes"):
        read_json(Path("huge.json"))


def test_control_characters_do_not_reach_a_terminal():
    Path("results.json").write_text(
        '{"recipe": "a\\u001b[2Jb\\nc", "epochs": [], "versions": {"x\\u0007": "\\u009b1"}}'
    )
    assert read_results(Path("results.json")) == {"recipe": "a [2Jb c", "epochs": [], "versions": {"x ": " 1"}}
