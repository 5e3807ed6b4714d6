"""`hfkd reproduce`: runs of the published tables on one machine, in slices of time."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..comparison.rows import Row, compared
from ..comparison.table import BESIDE_PUBLISHED, Gap, csv_text, is_report, legend, terminal_table, text_table
from ..errors import HfkdError
from ..recipe.keys import AUTO_CACHE, SCHEDULE_KEYS, SEEDS
from ..recipe.parser import ArgumentParser
from ..recipe.reading import ARGUMENT_CLASSES
from ..runs.claims import InUseError, check_own, wait_until_free
from ..runs.planned import PlannedRun
from ..runs.published_cells import find_pair, planned_cells, recipes_of
from ..runs.writing import write_whole
from ..training.preemption import EXIT_CODE
from .arguments import parse_known, split_subject
from .train import train

USAGE = "hfkd reproduce PAIR [--methods a,b] [--seeds N] [--epochs_scale S] [--time_limit SECONDS] [--key value ...]"
DESCRIPTION = (
    "Repeat the runs of a published table. PAIR is a file of recipes such as resnet32x4-resnet8x4 (`hfkd recipes`\n"
    "lists them). Its teacher is trained first, then every method with every seed. Stopped runs are resumed and\n"
    "finished runs are skipped. Any other `--key value` of `hfkd distill` is passed to every run. The measured values\n"
    "are printed beside the published ones, and written to the pair's folder as reproduce.md and reproduce.csv.\n\n"
    "The exit code is 0 when all runs are finished, 75 when the time was up before, and 1 when a run failed."
)
REPORTS = ("reproduce.md", "reproduce.csv")
UNFINISHED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, try again
SHORTEST_TIME_LIMIT = 30.0  # seconds; the networks and images of a run take about ten to load
RESERVED_KEYS = {  # keys that cannot be given to `reproduce`, with the reason
    **dict.fromkeys(SEEDS, "--seeds N takes the recipe's own seed and the N - 1 after it"),
    **dict.fromkeys(SCHEDULE_KEYS, "--epochs_scale shortens all settings that are counted in epochs"),
    "resume_from_checkpoint": "every stopped run is resumed",
    **dict.fromkeys(
        ("student_name_or_path", "student", "losses", "logit_standardization", "ce_weight"),
        "it defines the recipe; to change it, use `hfkd distill`",
    ),
}


@dataclass
class ReproductionArguments:
    """Settings of the reproduction."""

    _argument_group_name = "reproduction"  # in `--help`

    methods: str | None = field(
        default=None,
        metadata={"help": "Recipes of the pair, such as kd,kd_zscore; by default all with a published top-1."},
    )
    seeds: int = field(default=1, metadata={"help": "Number of seeds: the recipe's own and the ones after it."})
    epochs_scale: float = field(
        default=1.0,
        metadata={
            "help": "Share of the published epochs, also for the teacher; learning rate drops, warm-ups and curricula "
            "are scaled with it. Shortened runs are written to their own folder, and their tables say so."
        },
    )
    time_limit: float | None = field(
        default=None,
        metadata={
            "help": "Seconds after which to stop, of which a twentieth is kept for writing a checkpoint; the same "
            "command resumes. A running evaluation is finished first, and the start of Python is not counted."
        },
    )
    output_dir: str = field(
        default="runs",
        metadata={"help": "Folder of all results; runs lie below it as `hfkd distill` places them below runs."},
    )


class TimeLimit:
    """Time limit of one call, counted from the creation of the object.

    Attributes:
        seconds: the limit in seconds; None for no limit.
        ended: whether `is_over` found the time to be over.
    """

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self.ended = False
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def is_over(self) -> bool:
        """Return whether the time left is only enough for a checkpoint."""
        if self.seconds is not None:
            self.ended = self.elapsed > self.seconds - max(5.0, 0.05 * self.seconds)
        return self.ended


def reproduce(argv: list[str] | None = None) -> list[Row]:
    """Repeat published runs: `PAIR [--methods ...] [--seeds N] [--epochs_scale S] [--time_limit SECONDS]`.

    Returns:
        The rows of the table.

    Raises:
        HfkdError: for an unknown pair, method or key, a number out of range, or a folder that holds other runs.
        SystemExit: with 75 if the time was up before all runs were finished, 1 if a run failed.
    """
    argv = sys.argv[1:] if argv is None else argv
    pair, args, overrides = parse(argv)
    limit = TimeLimit(args.time_limit)
    pair = find_pair(pair)
    recipes = recipes_of(pair, [name.strip() for name in args.methods.split(",")] if args.methods else [])
    root = Path(args.output_dir)
    if args.epochs_scale != 1:
        root /= f"epochs_x{args.epochs_scale:g}"
    cells = planned_cells(recipes, args.seeds, args.epochs_scale, root, overrides)
    for cell in cells:
        cell.check_folder()
    check_own(root / pair, REPORTS, is_report(root / pair / REPORTS[0]), "output_dir")
    failures = run_cells(cells, limit)
    rows = report(pair, cells, failures, args.epochs_scale, root / pair)
    left = sum(not cell.is_done() for cell in cells)
    print(f"\n{len(cells) - left} of {len(cells)} trainings are done, in {limit.elapsed:,.0f} s of this call.", end=" ")
    print("Run the same command again to continue." if left else "Nothing is left to run.")
    if limit.seconds is not None and limit.elapsed > limit.seconds:
        print(
            f"That is more than --time_limit {limit.seconds:g}: loading networks and images, a step, an evaluation "
            "and a checkpoint are not cut short. If calls do little else, give more time."
        )
    if left:
        raise SystemExit(1 if failures else UNFINISHED_EXIT_CODE)
    return rows


def parse(argv: list[str]) -> tuple[str, ReproductionArguments, list[str]]:
    """Return the pair, the settings of the reproduction and the keys for every run.

    Raises:
        HfkdError: if the pair is missing, for a number out of range, or for a key in `RESERVED_KEYS`.
    """
    parser = ArgumentParser((ReproductionArguments,), USAGE, DESCRIPTION)
    pair, rest = split_subject(argv, parser, "a pair")
    parser.check_keys(rest, ArgumentParser(ARGUMENT_CLASSES, USAGE))
    args, overrides = parse_known(rest, parser)
    if args.seeds < 1:
        raise HfkdError(f"seeds is {args.seeds}: give 1 or more.")
    if not 0 < args.epochs_scale <= 1:
        raise HfkdError(f"epochs_scale is {args.epochs_scale:g}: give a share above 0 and at most 1.")
    if args.time_limit is not None and not args.time_limit >= SHORTEST_TIME_LIMIT:
        raise HfkdError(
            f"time_limit is {args.time_limit:g} s, which is only enough to load networks and images: give "
            f"{SHORTEST_TIME_LIMIT:g} or more."
        )
    for token, following in zip(overrides, [*overrides[1:], ""], strict=False):
        key = token.lstrip("-").partition("=")[0].partition(".")[0].replace("-", "_")
        if token.startswith("--") and key in RESERVED_KEYS:
            raise HfkdError(f"{token.partition('=')[0]} cannot be given here: {RESERVED_KEYS[key]}.")
        if token.startswith("--") and key == "teacher_cache" and AUTO_CACHE in (token.partition("=")[2], following):
            raise HfkdError("reproduce keeps what its teachers say by itself: leave --teacher_cache auto out.")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise HfkdError(
            f"reproduce runs in one process, and these are {processes}. On several GPUs, train the teacher first, and "
            "then start one command for each GPU (CUDA_VISIBLE_DEVICES) with other --methods. For one run on all GPUs, "
            "use `accelerate launch -m hfkd distill`."
        )
    return pair, args, overrides


def run_cells(cells: Sequence[PlannedRun], limit: TimeLimit) -> dict[Path, str]:
    """Train all unfinished runs until the time is up.

    Returns:
        The error messages of failed runs, by the folder of the run.
    """
    failures: dict[Path, str] = {}
    for number, cell in enumerate(cells, 1):
        if cell.is_done():
            continue
        if limit.is_over():
            break
        print(f"\n[{number}/{len(cells)}] {cell.title}: {cell.state()}", flush=True)
        failure = attempt(cell, limit)
        gc.collect()  # a trainer has reference cycles, which would keep its networks and images on the device
        if failure is not None:
            failures[cell.folder] = failure
        if cell.role == "teacher" and not cell.is_done():
            break  # the students need it
    return failures


def attempt(cell: PlannedRun, limit: TimeLimit) -> str | None:
    """Train one run until the time is up; return its error message, if it fails, so that the others still run."""
    model_args = cell.settings[0]
    model_args.keeps_outputs = model_args.teacher_cache is None  # the next method reads what this one's teacher says
    try:
        waiting = True
        while waiting:
            try:
                train(*cell.settings, role=cell.role, name=cell.name, time_is_up=limit.is_over)
                waiting = False
            except InUseError:  # by a command for another GPU, which may finish it
                print(f"{cell.title}: another command is training it; waiting.", flush=True)
                wait_until_free(cell.folder, limit.is_over)
                waiting = not (cell.is_done() or limit.is_over())
    except SystemExit as end:
        if end.code != EXIT_CODE or not limit.ended:
            raise
    except Exception as error:
        if isinstance(error, HfkdError):
            print(f"{cell.title}: error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        return f"failed: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None


def report(
    name: str, cells: Sequence[PlannedRun], failures: Mapping[Path, str], scale: float, folder: Path
) -> list[Row]:
    """Print the measured beside the published values, write them as Markdown and CSV, and return the rows."""
    runs = [run for run in (cell.run() for cell in cells) if run is not None]
    rows, gaps = compared(runs), _gaps(cells)
    schedule = "" if scale == 1 else f", {scale:g} of the published epochs"
    table = text_table(rows, gaps)
    parts = [f"# {name}{schedule}: {BESIDE_PUBLISHED}", table, legend(table)]
    if scale != 1:
        parts.append("Shortened runs, including a shortened teacher, are not the published protocol.")
    unfinished = [cell for cell in cells if not cell.is_done()]
    if unfinished:
        states = [failures.get(cell.folder) or cell.state() for cell in unfinished]
        lines = [f"- {cell.title}: {state}" for cell, state in zip(unfinished, states, strict=True)]
        parts.append("Not finished:\n" + "\n".join(lines))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / REPORTS[0], "\n\n".join(parts) + "\n")
    write_whole(folder / REPORTS[1], csv_text(rows, gaps))
    shown = terminal_table(rows, gaps)
    text = "\n\n".join([parts[0], shown, legend(shown), *parts[3:]])
    print(f"\n{text}\n\n{folder} holds this as reproduce.md and reproduce.csv.")
    return rows


def _gaps(cells: Sequence[PlannedRun]) -> list[Gap]:
    """Return a row for every recipe with seeds that are not measured yet."""
    seeds: dict[str, list[int]] = {}
    published = {}
    for cell in cells:
        if cell.run() is None and not cell.is_done():
            seeds.setdefault(cell.name, []).append(cell.config.seed)
            published[cell.name] = cell.published_top1
    return [
        Gap(name, published[name], f"not measured yet: seed {', '.join(map(str, each))}")
        for name, each in seeds.items()
    ]
