"""A disk that is full loses nothing but what could not be written."""

import ctypes
import os
import resource
from pathlib import Path

import pytest
from interrupting import Moments, build, differences, end_of, in_child
from safetensors import SafetensorError
from safetensors.torch import load_file

from hfkd.runs.checkpoints import checkpoints, defect

EACH_OTHER_STEP = {"save_strategy": "steps", "save_steps": 2, "ema_decay": 0.7}
NEW_USER, NEW_MOUNTS, REMOUNT = 0x10000000, 0x00020000, 32  # of unshare(2) and mount(2)
NOT_PERMITTED = 77


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = build(tmp_path_factory.mktemp("whole"), **EACH_OTHER_STEP)
    trainer.train()
    return end_of(trainer), trainer.moments.passed


def limit_files(size=resource.RLIM_INFINITY):
    """No file of this process may become larger: a quota, to which the kernel says 'File too large'."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def assert_it_goes_on(expected):
    resumed = build("run", **EACH_OTHER_STEP)
    resumed.train(resume_from_checkpoint=True)
    assert differences(expected, end_of(resumed)) == []


@pytest.mark.parametrize("size", [1000, 4000, 9000])  # model, optimizer, and random state are larger
def test_a_checkpoint_that_cannot_be_written(whole, size):
    expected, moments = whole

    def run():
        trainer = build("run", Moments(moments.index(("step_begin", 3)), lambda: limit_files(size)), **EACH_OTHER_STEP)
        unwritten = r"run/checkpoint-4 could not be written \(.*[0-9] MiB are free"
        with pytest.raises(RuntimeError, match=unwritten) as failure:
            trainer.train()
        limit_files()
        assert "stands at run/checkpoint-2: go on from there (resume_from_checkpoint: true)" in str(failure.value)
        assert sorted(path.name for path in Path("run").iterdir()) == ["checkpoint-2", "results.json"]
        assert defect("run/checkpoint-2") is None
        assert '"step": 3' in Path("run/results.json").read_text()
        assert_it_goes_on(expected)

    assert in_child(run) == 0


def test_results_that_cannot_be_written(whole):
    before = []

    def fill_up():
        before.append(Path("run/results.json").read_text())
        limit_files(1000)

    def run():
        trainer = build("run", Moments(whole[1].index(("step_begin", 5)), fill_up))
        with pytest.raises(RuntimeError, match=r"run could not be written \(.*File too large.*run/checkpoint-3: go on"):
            trainer.train()
        limit_files()
        assert sorted(path.name for path in Path("run").iterdir()) == ["checkpoint-3", "results.json"]
        assert [Path("run/results.json").read_text()] == before

    assert in_child(run) == 0


def test_the_first_checkpoint_cannot_be_written(whole):
    def run():
        limit_files(1000)
        with pytest.raises(RuntimeError, match="run/checkpoint-2 could not.*There is no checkpoint yet: start again"):
            build("run", **EACH_OTHER_STEP).train()
        assert checkpoints("run") == []

    assert in_child(run) == 0


def mount(path, size, flags=0):
    """A file system of this size in memory, which only this process sees."""
    libc = ctypes.CDLL(None)
    if not flags:
        identity = f"0 {os.getuid()} 1", f"0 {os.getgid()} 1"
        if libc.unshare(NEW_USER | NEW_MOUNTS):
            raise SystemExit(NOT_PERMITTED)
        for name, text in zip(("setgroups", "uid_map", "gid_map"), ("deny", *identity), strict=True):
            Path("/proc/self", name).write_text(text)
        Path(path).mkdir()
    if libc.mount(b"tmpfs", path.encode(), b"tmpfs", flags, f"size={size}".encode()):
        raise SystemExit(NOT_PERMITTED)


def test_a_full_file_system(whole):
    """Of 128 KiB, which three checkpoints fill."""

    def run():
        mount("run", "128k")
        with pytest.raises(RuntimeError, match=r"could not be written \(.* 0 MiB are free") as failure:
            build("run", **EACH_OTHER_STEP | {"save_steps": 1}).train()
        *others, last = checkpoints("run")
        assert f"stands at {last}: go on" in str(failure.value)
        assert others and not any(defect(folder) for folder in (*others, last))
        mount("run", "64m", REMOUNT)
        assert_it_goes_on(whole[0])

    code = in_child(run)
    if code == NOT_PERMITTED:
        pytest.skip("this system lets no user mount a file system")
    assert code == 0


def content_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("fails", ["weights", "card"])
def test_an_export_that_cannot_be_written(monkeypatch, fails):
    """The former one stays as it is."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def run():
        monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)
        build("run").export()
        before = content_of("run/student")
        trainer = build("run")
        trainer.train()
        if fails == "weights":
            limit_files(1000)
        else:
            monkeypatch.setattr("hfkd.training.exports.write_card", full)
        with pytest.raises((OSError, RuntimeError, SafetensorError)):
            trainer.export()
        limit_files()
        assert content_of("run/student") == before
        assert not list(Path("run").glob("*.partial"))
        monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)
        trainer.export()
        exported, last = load_file("run/student/model.safetensors"), load_file("run/checkpoint-6/model.safetensors")
        assert differences(last, exported) == []

    assert in_child(run) == 0
