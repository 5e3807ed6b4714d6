"""The benchmark runs and prints a whole table."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
ROWS = {
    "data: weak view",
    "data: weak + strong view",
    "jpeg: one worker, bicubic",
    "jpeg: one worker, bilinear",
    "trainer: resnet20, labels alone",
    "trainer: resnet56 -> resnet20, KD + Z-score",
    "reference: resnet32x4 -> resnet8x4, KD + Z-score",
}


def test_prints_every_row_with_its_numbers():
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ), timeout=300)
    assert run.returncode == 0, run.stderr
    machine, header, rule, *lines = run.stdout.splitlines()
    assert re.search(r"1 threads, batch \d+, 2 rounds$", machine)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    assert {len(cells) for cells in table} == {8} == {len(rule.strip("|").split("|"))}
    assert {cells[0] for cells in table[1:]} == ROWS
    for name, ours, _, theirs, ratio, quartiles, *_ in table[1:]:
        numbers = [float(cell.replace(",", "")) for cell in (ours, theirs, ratio, *quartiles.split(".. "))]
        assert all(math.isfinite(number) and number > 0 for number in numbers), name
        assert numbers[3] <= numbers[2] <= numbers[4], name
