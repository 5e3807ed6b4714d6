"""Benchmark: it prints whole tables, and counts tensors and seconds of a step correctly."""

import contextlib
import importlib.util
import math
import re

import pytest
import torch
from helpers import ROOT, run_script
from interrupting import in_child

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
        sections = "methods data jpeg trainer reference cache profile".split()
        torch.compiler.set_stance("force_eager")  # compiling takes longer than all of this; other tests do
        with printed.open("w") as file, contextlib.redirect_stdout(file):
            run_script("benchmark/run.py", "--quick", "--threads", "1", "--torch_compile", "--only", *sections)

    assert in_child(benchmark) == 0
    first, *others = printed.read_text().splitlines()
    assert re.search(r"1 threads, batch \d+, compiled, 2 rounds$", first)
    lines = [line.strip("|").split("|") for line in others if line.startswith("|")]
    rows = [[cell.strip() for cell in cells] for cells in lines]
    rules = [number for number, cells in enumerate(rows) if set("".join(cells)) == set("-:")]
    headers = [number - 1 for number in rules]
    tables = [rows[start:end] for start, end in zip(headers, [*headers[1:], None], strict=True)]
    assert headers[0] == 0 and [{len(cells) for cells in table} for table in tables] == [{7}, {8}, {3}]
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


@pytest.fixture(scope="module")
def meters():
    spec = importlib.util.spec_from_file_location("meters", ROOT / "scripts/benchmark/meters.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
