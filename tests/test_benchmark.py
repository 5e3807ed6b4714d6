"""Benchmark: it prints whole tables, and counts tensors and seconds of a step correctly."""

import contextlib
import importlib.util
import json
import math
import re
import sys
import time

import pytest
import torch
from helpers import ROOT, run_script
from interrupting import in_child

import hfkd.data.datasets
from hfkd.cli import main as hfkd_main
from hfkd.losses import LOSSES
from hfkd.recipe.finding import packaged_names
from hfkd.recipe.reading import load_recipe

SPEED_ROWS = {
    "data: weak view",
    "data: weak + strong view",
    "jpeg: one worker, bicubic",
    "jpeg: one worker, bilinear",
    "trainer: resnet20, labels alone",
    "trainer: resnet56 -> resnet20, KD + Z-score",
    "reference: resnet32x4 -> resnet8x4, KD + Z-score",
    "released: resnet32x4 -> resnet8x4, KD + Z-score",
    "cache: resnet20, KD from all logits",
    "cache: resnet20, KD from the largest 16",
}
PAIR = "cifar100/resnet32x4-resnet8x4"
PARTS = {
    "data",
    "teacher, forward",
    "student, forward",
    "losses",
    "backward",
    "optimizer",
    "Trainer, accelerate, the rest",
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The cells of the three tables, without header and rule."""
    printed = tmp_path_factory.mktemp("benchmark") / "printed.txt"

    def benchmark():
        sections = "methods data jpeg trainer reference released cache profile".split()
        torch.compiler.set_stance("force_eager")  # compiling takes longer than all of this; other tests do
        with printed.open("w") as file, contextlib.redirect_stdout(file):
            words = ("--quick", "--threads", "1", "--torch_compile", "--json", str(printed.with_name("rows.json")))
            run_script("benchmark/run.py", *words, "--only", *sections)

    assert in_child(benchmark) == 0
    first, *others = printed.read_text().splitlines()
    assert re.search(r"1 threads, batch \d+, compiled, 2 rounds$", first)
    lines = [line.strip("|").split("|") for line in others if line.startswith("|")]
    rows = [[cell.strip() for cell in cells] for cells in lines]
    rules = [number for number, cells in enumerate(rows) if set("".join(cells)) == set("-:")]
    headers = [number - 1 for number in rules]
    tables = [rows[start:end] for start, end in zip(headers, [*headers[1:], None], strict=True)]
    assert headers[0] == 0 and [{len(cells) for cells in table} for table in tables] == [{7}, {8}, {3}]
    written = json.loads(printed.with_name("rows.json").read_text())["rows"]
    assert [row["name"] for row in written] == [cells[0] for table in tables for cells in table[2:]]
    assert all(min(row["ours"] + row["theirs"]) > 0 for row in written if "ours" in row)
    return [table[2:] for table in tables]


def check_numbers(name, ours, theirs, ratio, quartiles):
    numbers = [float(cell.replace(",", "")) for cell in (ours, theirs, ratio, *quartiles.split(".. "))]
    assert all(math.isfinite(number) and number > 0 for number in numbers), name
    assert numbers[3] <= numbers[2] <= numbers[4], name


def test_prints_every_speed_with_its_numbers(tables):
    _, rows, _ = tables
    assert {cells[0] for cells in rows} == SPEED_ROWS
    for name, ours, _, theirs, ratio, quartiles, _, _ in rows:
        check_numbers(name, ours, theirs, ratio, quartiles)


def test_prints_what_every_method_costs(tables):
    rows, _, _ = tables  # the sections come in the order given
    peak, more = ({cells[0]: float(cells[column].replace(",", "")) for cells in rows} for column in (5, 6))
    recipes = [f"{PAIR}/{method}" for method in LOSSES if f"{PAIR}/{method}" in packaged_names()]
    kd, *others = [" + ".join(load_recipe(name)["losses"]) for name in recipes]
    assert list(peak) == [kd, "kd + Z-score", *others]
    assert {"kd", "mlkd", "kd + crd", "simkd"} <= set(peak)
    for name, ours, theirs, ratio, quartiles, _, _ in rows:
        check_numbers(name, ours, theirs, ratio, quartiles)
        assert peak[name] - more[name] == pytest.approx(peak["kd"] - more["kd"], abs=0.11), "KD alone, rounded"
    assert more["kd + crd"] > 2, "two memories of 1,000 images, and 8 x 16,385 rows drawn of them"
    assert abs(more["kd + pkt"]) < 0.1, "8 x 8 probabilities"
    assert more["mlkd"] > 0.5 * peak["kd"], "what the backward pass needs, of two views"


def test_prints_where_the_time_goes(tables):
    _, _, rows = tables
    assert {name for name, _, _ in rows} == PARTS
    shares = {name: float(share) for name, share, _ in rows}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert 90 < sum(shares.values()) < 110, "medians of two steps"
    assert min(shares["backward"], shares["teacher, forward"]) > shares["data"]


def benchmark_module(name, monkeypatch):
    """A file of the benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/benchmark/{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look up its types
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def meters(monkeypatch):
    return benchmark_module("meters", monkeypatch)


def test_step_bytes_counts_what_lives_at_one_moment(meters):
    def steps(kept):
        while True:
            first = kept + 1
            second = first + 1
            first.add_(1).view(10, -1)  # no memory of their own
            del first
            third = second + 1
            del second, third
            yield

    assert meters.step_bytes(steps(torch.zeros(1000))) == 3 * 4000


def test_step_bytes_counts_what_the_backward_pass_needs(meters):
    weight = torch.zeros(1000, requires_grad=True)

    def steps():
        while True:
            loss = weight.exp().sum()  # only autograd holds the 1000 exponentials
            torch.zeros(5000)
            loss.backward()
            weight.grad = None
            yield

    assert meters.step_bytes(steps()) == 4000 + 4000 + 4 + 20000


def test_step_bytes_counts_what_is_touched_after_the_peak(meters):
    """An optimizer's momentum, for one: it lives all the time."""

    def steps(momentum):
        while True:
            torch.zeros(1000)
            momentum.add_(1)
            yield

    assert meters.step_bytes(steps(torch.zeros(500))) == 4000 + 2000


def test_a_part_within_another_is_taken_out_of_it(meters, monkeypatch):
    now = 0

    def work(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(meters.time, "perf_counter", lambda: now)
    clock = meters.StepClock("rest")
    inner = clock.timed("inner", work)

    def outer():
        work(1)
        inner(10)
        work(2)

    clock.timed("outer", outer)()
    work(5)
    assert clock.take() == {"rest": 5, "inner": 10, "outer": 3}
    inner(4)
    assert clock.take() == {"rest": 0, "inner": 4, "outer": 0}, "counted from the last call"


# ---- Everything that a GPU is lent for, on a CPU -------------------------------------------------------------------

GPU = ("--out", "out", "--device", "cpu", "--quick", "--minutes", "10", "--pair", "cifar100/resnet56-resnet20")
TRAINING = {
    "methods": "kd",
    "epochs_scale": "0.005",
    "dataset_name": "digits",
    "label_column": "label",
    "image_size": "8",
    "random_flip": "false",
    "train_split": "train[:64]",
    "eval_split": "test[:10]",
}


@pytest.fixture
def gpu(monkeypatch):
    """The command, and the seconds given to each part that it starts.

    Trainings run in a forked process; the other parts end with the codes of `ends`, which the tests of `run.py` cover.
    """
    module = benchmark_module("gpu", monkeypatch)
    digits = hfkd.data.datasets._digits()
    monkeypatch.setattr("hfkd.data.datasets._digits", lambda: digits)
    monkeypatch.setattr("hfkd.training.exports.write_card", lambda *args, **kwargs: None)  # its figure takes long
    ends = dict.fromkeys(("tests", "data", "eager", "compiled", "released"), 0)
    asked = {}

    def call(command, log, seconds, changes):
        assert changes == {"CUDA_VISIBLE_DEVICES": ""}
        asked[log.stem] = seconds
        log.write_text("| ratio |\n3 passed")
        if log.stem == "rows":
            return in_child(lambda: hfkd_main(command[2:]))
        if "--json" in command and ends[log.stem] == 0:
            module.Path(command[-1]).write_text(json.dumps({"seed": 0, "rows": [{"name": log.stem}]}))
        return ends[log.stem]

    def run():
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["gpu.py", *GPU, *(f"--{key}={TRAINING[key]}" for key in TRAINING)])
        try:
            module.main()
        except SystemExit as end:
            return end.code, dict(asked)
        return 0, dict(asked)

    module.ends, module.run_once, module.real_call = ends, run, module.call
    monkeypatch.setattr(module, "call", call)
    return module


def test_a_gpu_is_measured_in_parts_that_go_on(gpu, capsys):
    gpu.ends |= {"tests": 1, "eager": None}
    code, asked = gpu.run_once()
    assert code == 1 and list(asked) == ["tests", "data", "eager", "compiled", "released", "rows"]
    assert [asked[name] for name in list(asked)[:-1]] == pytest.approx([72, 36, 60, 96, 60]), "their share of 600 s"
    assert 500 < asked["rows"] < 700, "what the others left"
    parts = json.loads(gpu.Path("out/results.json").read_text())["parts"]
    assert parts["tests"]["state"] == "failed with exit code 1, see tests.log"
    assert parts["eager"]["state"] == "the time was up" and "rows" not in parts["eager"]
    assert parts["data"]["rows"] == [{"name": "data"}] and parts["data"]["seed"] == 0
    assert [row["run"] for row in parts["rows"]["rows"]] == ["cifar100/teachers/resnet56", GPU[-1] + "/kd"]
    assert parts["rows"]["hardware"]["gpu"] == "no GPU" and parts["rows"]["seconds"] > 0

    gpu.ends["tests"] = 0
    assert gpu.run_once() == (75, {"tests": 72, "eager": 60}), "the others are done"
    gpu.ends["eager"] = 0
    capsys.readouterr()
    assert gpu.run_once() == (0, {"eager": 60})
    assert "6 of 6 parts are done" in capsys.readouterr().out
    tables = gpu.Path("out/results.md").read_text()
    assert tables.count("| ratio |") == 4 and "3 passed" in tables and "| cifar100/resnet56-resnet20/kd |" in tables

    parts = json.loads(gpu.Path("out/results.json").read_text())["parts"]
    parts["data"]["hardware"]["gpu"] = "another"
    gpu.Path("out/results.json").write_text(json.dumps({"parts": parts}))
    assert gpu.run_once() == (0, {"data": 36}), "measured by another machine"


def test_a_part_ends_when_its_time_is_up(gpu):
    log, started = gpu.Path("log"), time.monotonic()
    assert gpu.real_call(["-c", "import os; print(os.environ['X']); exit(3)"], log, 60, {"X": "seen"}) == 3
    assert log.read_text() == "seen\n"
    waits = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60); print(1)'])"
    assert gpu.real_call(["-c", waits], log, 1, {}) is None
    assert time.monotonic() - started < 30 and log.read_text() == ""


def test_a_gpu_must_be_there(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", "out"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "no CUDA device is found. Give --device cpu --quick" in capsys.readouterr().err
    assert not gpu.Path("out").exists()
