"""`scripts/fuzz.py`: it tells good ends of a command from bad ones, and hfkd passes it in miniature."""

import mmap
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, run_script
from interrupting import in_child

import hfkd.cli
from hfkd.errors import HfkdError, RunError


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from fuzzing import cases

    monkeypatch.setattr(cases, "TIME_LIMIT", 3)
    monkeypatch.setattr(cases, "PEAK", 64 << 20)
    return cases


def refuse(error, times=1):
    print(*[f"hfkd distill: error: {error}"] * times, sep="\n", file=sys.stderr)
    raise SystemExit(error.exit_code)


def fill_memory():
    """Memory of its own: that of a list might be what an earlier test has left."""
    with mmap.mmap(-1, 1 << 27) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1


@pytest.mark.parametrize(
    "expected, command, outcome",
    [
        ("run", lambda: None, "ran"),
        ("refuse", lambda: refuse(HfkdError("no")), "refused"),
        ("either", lambda: refuse(RunError("no")), "refused"),
        ("refuse", lambda: None, "silent"),
        ("run", lambda: refuse(HfkdError("no")), "refused wrongly"),
        ("refuse", lambda: refuse(RunError("no")), "late"),
        ("refuse", lambda: refuse(HfkdError("no"), times=2), "no message"),
        ("refuse", lambda: sys.exit(3), "no message"),
        ("either", lambda: [][0], "traceback"),
        ("either", lambda: time.sleep(60), "hang"),
        ("either", lambda: os.kill(os.getpid(), signal.SIGKILL), "killed"),
        ("either", fill_memory, "memory"),
        ("run", lambda: Path("notes.txt").write_text("mine"), "foreign files"),
        ("run", lambda: Path("out/data/own.bin").unlink(), "foreign files"),
        ("run", lambda: Path("left.tmp").touch(), "foreign files"),
        ("run", lambda: Path("out/results.json").touch(), "ran"),
        ("run", lambda: Path("out/wrong").touch(), "wrong result"),
    ],
)
def test_judgement(expected, command, outcome, cases, tmp_path, monkeypatch):
    monkeypatch.setattr(hfkd.cli, "main", lambda argv: command())

    def check(records):
        return "wrong" if Path("out/wrong").exists() else None

    sort = SimpleNamespace(build=lambda case, ground, folder: cases.Plan([], expected, check))
    for name in ("ground", "case"):
        (tmp_path / name).mkdir()
    assert cases.run_case(sort, {}, tmp_path / "ground", tmp_path / "case").name == outcome


def test_in_miniature(tmp_path):
    """A handful of cases of each sort."""

    def fuzz():
        with (tmp_path / "printed.txt").open("w") as file:
            sys.stdout = sys.stderr = file
            run_script("fuzz.py", "--recipes", "12", "--data", "4", "--runs", "4", "--jobs", "2")

    exit_code = in_child(fuzz)
    printed = (tmp_path / "printed.txt").read_text()
    assert exit_code == 0, printed
    assert [line.split("|")[1:3] for line in printed.splitlines()[2:5]] == [
        [" recipes ", " 12 "],
        [" data ", " 4 "],
        [" runs ", " 4 "],
    ]
