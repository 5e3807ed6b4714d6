"""Measure on a lent or rented GPU what only a GPU can show, in one command and a given time.

python scripts/benchmark/gpu.py --out DIR [--minutes 25] [--pair cifar100/resnet32x4-resnet8x4] [--key value ...]
python scripts/benchmark/gpu.py --out DIR --device cpu --quick ...     # in miniature, to see that it runs

Each part has its share of the minutes and ends when that is used up. Whatever the others leave goes to the last one.

tests      The tests that run on CUDA where there is one: no step waits for the device.
data       `run.py --only data`: batches made on the device.
eager      `run.py --only trainer reference`: training steps against a loop by hand, and against the published loop.
compiled   The same with --torch_compile.
released   `run.py --only released`: a training step against the published loop with its own loaders.
rows       `hfkd reproduce PAIR` with the time left. It takes every further `--key value`, such as --methods kd_zscore,
           --dataset_name or --epochs_scale.

The same command again goes on: parts that are done on this hardware are left alone, and stopped trainings are resumed.
DIR holds results.json (hardware, seconds, seed and rows of each part), results.md (the tables), the output of each part
(tests.log ...) and the runs. Nothing needs a network but a data set that is not on the machine.

The exit code is 0 when all parts are done, 75 when the time was up before, and 1 when a part failed; the others still
run. A whole step as one CUDA graph is not measured: the trainer does not have it.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfkd.commands.reproduce import SHORTEST_TIME_LIMIT, UNFINISHED_EXIT_CODE
from hfkd.runs.folder import environment
from hfkd.runs.writing import write_whole

ROOT = Path(__file__).parents[2]
PAIR = "cifar100/resnet32x4-resnet8x4"
CUDA_TESTS = ("tests/training/test_step.py", "tests/data/test_image_dataset.py")
DONE, TIME_UP = "done", "the time was up"
START_OF_PYTHON = 20.0  # seconds, which `hfkd reproduce` does not count
OVERTIME = 60.0  # seconds in which `hfkd reproduce` ends an evaluation and writes a checkpoint
GRACE = 10.0  # seconds from SIGTERM to SIGKILL


@dataclass
class Part:
    """Part of the benchmark.

    Args:
        share: of the minutes, 0 to 1.
        command: words after `python`.
    """

    name: str
    share: float
    command: list[str]


def parts_of(args: argparse.Namespace, keys: Sequence[str]) -> list[Part]:
    """Return all parts, the one that takes the time left last."""

    def speed(*words: str) -> list[str]:
        return [str(ROOT / "scripts/benchmark/run.py"), *["--quick"] * args.quick, "--only", *words]

    tests = [str(ROOT / name) for name in CUDA_TESTS]
    return [
        Part("tests", 0.12, ["-m", "pytest", "-q", *tests, *["-k", "cuda"] * args.quick]),
        Part("data", 0.06, speed("data")),
        Part("eager", 0.10, speed("trainer", "reference")),
        Part("compiled", 0.16, speed("trainer", "reference", "--torch_compile")),
        Part("released", 0.10, speed("released")),
        Part("rows", 0.46, ["-m", "hfkd", "reproduce", args.pair, *keys, "--output_dir", str(args.out / "runs")]),
    ]


# ---- State ---------------------------------------------------------------------------------------------------------


class Results:
    """What is measured so far, in `results.json` and as tables in `results.md`."""

    def __init__(self, folder: Path, hardware: dict[str, Any]):
        self.folder, self.hardware = folder, hardware
        path = folder / "results.json"
        self.parts: dict[str, dict[str, Any]] = json.loads(path.read_text())["parts"] if path.is_file() else {}

    def is_done(self, part: Part) -> bool:
        """Return whether this hardware has done the part with the same command."""
        former = self.parts.get(part.name, {})
        asked = (DONE, part.command, self.hardware)
        return (former.get("state"), former.get("command"), former.get("hardware")) == asked

    def add(self, part: Part, state: str, seconds: float, measured: dict[str, Any]) -> None:
        """Write both files with the results of a part; those of an earlier call are replaced."""
        facts = {"state": state, "seconds": round(seconds, 1), "hardware": self.hardware, "command": part.command}
        self.parts[part.name] = facts | environment() | measured
        write_whole(self.folder / "results.json", json.dumps({"parts": self.parts}, indent=1) + "\n")
        write_whole(self.folder / "results.md", "\n\n".join(map(self._section, self.parts)) + "\n")

    def _section(self, name: str) -> str:
        part = self.parts[name]
        seed = [f"seed {part['seed']}"] if "seed" in part else []
        facts = [part["state"], f"{part['seconds']:,.0f} s", *seed, *part["hardware"].values()]
        return "\n\n".join([f"## {name}", "; ".join(facts), *filter(None, [part.get("table")])])


def hardware(device: str) -> dict[str, str]:
    """Return the names of GPU and CPU, and the number of cores."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    cpu = torch.cpu.get_capabilities().get("cpu_name", "unknown CPU")
    return {"gpu": gpu, "cpu": str(cpu), "cores": f"{os.cpu_count()} cores"}


def measured_by(part: Part, folder: Path) -> dict[str, Any]:
    """Return rows and table of a part that has ended, and its seed; rows of trainings have their own."""
    printed = (folder / f"{part.name}.log").read_text(errors="replace").splitlines()
    if part.name == "tests":
        return {"table": printed[-1] if printed else ""}
    if part.name == "rows":
        reports = list((folder / "runs").rglob("reproduce.csv"))
        rows = [row for report in reports for row in csv.DictReader(report.open())]
        return {"rows": rows, "table": "\n\n".join(report.with_suffix(".md").read_text() for report in reports)}
    path = folder / f"{part.name}.json"
    table = "\n".join(line for line in printed if line.startswith("|"))
    return json.loads(path.read_text()) | {"table": table} if path.is_file() else {}


# ---- Running -------------------------------------------------------------------------------------------------------


def call(command: Sequence[str], log: Path, seconds: float, changes: dict[str, str]) -> int | None:
    """Run Python with these words and its output in a file.

    Args:
        changes: of the environment.

    Returns:
        The exit code, or None if it was ended after these seconds.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=file, env=os.environ | changes, start_new_session=True
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """End a process and those that it has started, if it still runs."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(part: Part, seconds: float, args: argparse.Namespace, results: Results) -> None:
    """Run a part for at most these seconds, and write down what it has measured."""
    words = list(part.command)
    if part.name == "rows":  # it ends by itself, with a checkpoint
        words += ["--time_limit", f"{seconds:.0f}"]
        seconds += START_OF_PYTHON + OVERTIME
    elif part.name != "tests":
        path = args.out / f"{part.name}.json"
        path.unlink(missing_ok=True)
        words += ["--json", str(path)]
    changes = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {"HFKD_TEST_GPU": "0"}
    started = time.monotonic()
    code = call(words, args.out / f"{part.name}.log", seconds, changes)
    failed = f"failed with exit code {code}, see {part.name}.log"
    state = {0: DONE, None: TIME_UP, UNFINISHED_EXIT_CODE: TIME_UP}.get(code, failed)
    results.add(part, state, time.monotonic() - started, measured_by(part, args.out))


def run_all(parts: Sequence[Part], args: argparse.Namespace, results: Results) -> None:
    """Run the parts that are not done, each in its share of the time and the last one in what is left."""
    ends = time.monotonic() + 60 * args.minutes
    for part in parts:
        left = ends - time.monotonic()
        seconds = left - START_OF_PYTHON if part is parts[-1] else min(left, 60 * args.minutes * part.share)
        if results.is_done(part):
            print(f"{part.name}: done before", flush=True)
        elif seconds < (SHORTEST_TIME_LIMIT if part is parts[-1] else 1):
            print(f"{part.name}: no time is left for it; run the same command again", flush=True)
        else:
            print(f"{part.name}: at most {seconds:,.0f} s ...", flush=True)
            run(part, seconds, args, results)
            print(f"{part.name}: {results.parts[part.name]['state']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Folder of all results.")
    parser.add_argument("--minutes", type=float, default=25.0, help="Time for all parts together (25).")
    parser.add_argument("--pair", default=PAIR, help=f"Table of `hfkd reproduce` ({PAIR}).")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to see that it runs.")
    parser.add_argument("--quick", action="store_true", help="Small networks and few rounds.")
    args, keys = parser.parse_known_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is found. Give --device cpu --quick to see that the benchmark runs.")
    if not args.minutes > 0:
        parser.error(f"--minutes is {args.minutes:g}: give more than 0.")
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out, hardware(args.device))
    parts = parts_of(args, keys)
    run_all(parts, args, results)
    states = [results.parts.get(part.name, {}).get("state") for part in parts]
    print(f"{states.count(DONE)} of {len(parts)} parts are done. {args.out / 'results.md'} holds the tables.")
    if set(states) != {DONE}:
        raise SystemExit(UNFINISHED_EXIT_CODE if set(states) <= {DONE, TIME_UP, None} else 1)


if __name__ == "__main__":
    main()
