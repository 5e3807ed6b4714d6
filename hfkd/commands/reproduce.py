"""`hfkd reproduce`: cells of the published tables on one machine, a slice of time after the other."""

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
from ..comparison.table import LEGEND, Gap, csv_text, text_table
from ..errors import HfkdError
from ..recipe.keys import SCHEDULE_KEYS, SEEDS
from ..recipe.parser import ArgumentParser
from ..recipe.reading import ARGUMENT_CLASSES
from ..runs.folder import write_whole
from ..runs.published_cells import RUNS, Cell, planned_cells, recipe_folder, recipes_of
from ..training.preemption import EXIT_CODE
from .arguments import parse_known, split_subject
from .train import train

USAGE = "hfkd reproduce PAIR [--methods a,b] [--seeds N] [--epochs_scale S] [--time_limit SECONDS] [--key value ...]"
DESCRIPTION = (
    "Runs cells of a published table: PAIR is a folder of recipes such as resnet32x4-resnet8x4. Its teacher is\n"
    "trained first, then every method with every seed; what was stopped goes on, what is done is not run again. Any\n"
    "other `--key value` of `hfkd distill` goes to every run. Prints measured beside published, and writes it as\n"
    "reproduce.md and reproduce.csv into the pair's folder.\n\n"
    "Ends with exit code 0 when all is done, 75 when the time is up before, 1 when a run failed."
)
WORK_IS_LEFT = 75  # what sysexits.h calls a temporary failure: try again
SHORTEST_SLICE = 30.0  # seconds; the networks and images of a run take about ten to load
SETTLED = {  # keys that `reproduce` sets or keeps, with the reason
    **dict.fromkeys(SEEDS, "--seeds N takes the recipe's own seed and the N - 1 after it"),
    **dict.fromkeys(SCHEDULE_KEYS, "--epochs_scale shortens all that is counted in epochs alike"),
    "resume_from_checkpoint": "every run goes on where it was stopped",
    **dict.fromkeys(
        ("student_name_or_path", "losses", "logit_standardization", "ce_weight"),
        "it is what makes the recipe, and `hfkd distill` changes one",
    ),
}


@dataclass
class ReproductionArguments:
    """Which cells, and for how long."""

    _argument_group_name = "reproduction"  # in `--help`

    methods: str | None = field(
        default=None,
        metadata={"help": "Recipes of the pair, such as kd,kd_zscore; by default all of which a top-1 was published."},
    )
    seeds: int = field(default=1, metadata={"help": "How many: the recipe's own and those that follow it."})
    epochs_scale: float = field(
        default=1.0,
        metadata={
            "help": "Share of the published epochs, teacher included; learning rate, warm-ups and curricula follow. "
            "What is run so lies in a folder of its own, and says so."
        },
    )
    time_limit: float | None = field(
        default=None,
        metadata={
            "help": "Seconds after which to end with a checkpoint, a twentieth of them kept for that; the same command "
            "goes on. An evaluation under way is waited for, and starting Python comes on top."
        },
    )
    output_dir: str = field(
        default=str(RUNS),
        metadata={"help": "Folder of all that is kept: runs below it as `hfkd distill` places them below runs."},
    )


class Slice:
    """A share of time, from now on.

    Attributes:
        seconds: how long; None: without end.
        ended: was it found to be over?
    """

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self.ended = False
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._started

    def is_over(self) -> bool:
        """Is there no more time than a checkpoint takes?"""
        if self.seconds is not None:
            self.ended = self.elapsed > self.seconds - max(5.0, 0.05 * self.seconds)
        return self.ended


def reproduce(argv: list[str] | None = None) -> list[Row]:
    """Runs cells of the published tables: `PAIR [--methods ...] [--seeds N] [--epochs_scale S] [--time_limit SECONDS]`.

    Returns:
        The rows of the table.

    Raises:
        FileNotFoundError: if the recipes are not there.
        ValueError: for an unknown pair, method or key, a number out of range, or a folder that holds other runs.
        SystemExit: with 75 when the time is up and work is left, 1 when a run failed.
    """
    argv = sys.argv[1:] if argv is None else argv
    pair, args, overrides = parse(argv)
    clock = Slice(args.time_limit)
    folder = recipe_folder(pair)
    recipes = recipes_of(folder, [name.strip() for name in args.methods.split(",")] if args.methods else [])
    root = Path(args.output_dir)
    if args.epochs_scale != 1:
        root /= f"epochs_x{args.epochs_scale:g}"
    cells = planned_cells(recipes, args.seeds, args.epochs_scale, root, overrides)
    for cell in cells:
        cell.check_folder()
    failures = run_cells(cells, clock)
    name = f"{folder.parent.name}/{folder.name}"
    rows = report(name, cells, failures, args.epochs_scale, root / name)
    left = sum(not cell.is_done() for cell in cells)
    print(f"\n{len(cells) - left} of {len(cells)} trainings are done, in {clock.elapsed:,.0f} s of this call.", end=" ")
    print(f"The same command goes on with the other{'s' * (left > 1)}." if left else "Nothing is left to run.")
    if clock.seconds is not None and clock.elapsed > clock.seconds:
        print(
            f"That is more than --time_limit {clock.seconds:g}: networks and images are loaded, and a step, an "
            "evaluation and a checkpoint ended, however long it takes. Where calls do little else, give more."
        )
    if left:
        raise SystemExit(1 if failures else WORK_IS_LEFT)
    return rows


def parse(argv: list[str]) -> tuple[str, ReproductionArguments, list[str]]:
    """The pair, how to run it, and what goes to every run.

    Raises:
        ValueError: without a pair, for a number out of range, or a key that is settled already.
    """
    parser = ArgumentParser((ReproductionArguments,), USAGE, DESCRIPTION)
    pair, rest = split_subject(argv, parser, "a pair")
    parser.check_keys(rest, ArgumentParser(ARGUMENT_CLASSES, USAGE))
    args, overrides = parse_known(rest, parser)
    if args.seeds < 1:
        raise HfkdError(f"seeds is {args.seeds}: give 1 or more.")
    if not 0 < args.epochs_scale <= 1:
        raise HfkdError(f"epochs_scale is {args.epochs_scale:g}: give a share above 0 and at most 1.")
    if args.time_limit is not None and not args.time_limit >= SHORTEST_SLICE:
        raise HfkdError(
            f"time_limit is {args.time_limit:g} s, in which nothing is done but to load networks and images: give "
            f"{SHORTEST_SLICE:g} or more."
        )
    for token in overrides:
        key = token.lstrip("-").partition("=")[0].partition(".")[0].replace("-", "_")
        if token.startswith("--") and key in SETTLED:
            raise HfkdError(f"{token.partition('=')[0]} cannot be given here: {SETTLED[key]}.")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise HfkdError(
            f"reproduce runs in one process, and these are {processes}. On several GPUs start it on each "
            "(CUDA_VISIBLE_DEVICES) with other --methods, once the teacher is trained; for one run on all of them "
            "`accelerate launch -m hfkd distill`."
        )
    return pair, args, overrides


def run_cells(cells: Sequence[Cell], clock: Slice) -> dict[Path, str]:
    """Trains what is not done until all is or the time is up.

    Returns:
        What went wrong, by the folder of the run.
    """
    failures: dict[Path, str] = {}
    for number, cell in enumerate(cells, 1):
        if cell.is_done():
            continue
        if clock.is_over():
            break
        print(f"\n[{number}/{len(cells)}] {cell.title}: {cell.state()}", flush=True)
        failure = attempt(cell, clock)
        gc.collect()  # a trainer is full of cycles, and holds its networks and images on the device
        if failure is not None:
            failures[cell.folder] = failure
        if cell.role == "teacher" and not cell.is_done():
            break  # nobody teaches the others
    return failures


def attempt(cell: Cell, clock: Slice) -> str | None:
    """Trains as far as the time allows; what went wrong, so that other cells are run all the same."""
    try:
        train(*cell.settings, role=cell.role, name=cell.name, time_is_up=clock.is_over)
    except SystemExit as end:
        if end.code != EXIT_CODE or not clock.ended:
            raise
    except Exception as error:
        if isinstance(error, HfkdError):
            print(f"{cell.title}: error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        return f"failed: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None


def report(name: str, cells: Sequence[Cell], failures: Mapping[Path, str], scale: float, folder: Path) -> list[Row]:
    """Prints measured beside published, writes it into a folder as markdown and csv, and returns the rows."""
    runs = [run for run in (cell.run() for cell in cells) if run is not None]
    rows, gaps = compared(runs), _gaps(cells)
    schedule = "" if scale == 1 else f", {scale:g} of the published epochs"
    parts = [f"# {name}{schedule}: measured beside published", text_table(rows, gaps), LEGEND]
    if scale != 1:
        parts.append("Shortened runs, the teacher's too where it is among them, are not the published protocol.")
    unfinished = [cell for cell in cells if not cell.is_done()]
    if unfinished:
        states = [failures.get(cell.folder) or cell.state() for cell in unfinished]
        lines = [f"- {cell.title}: {state}" for cell, state in zip(unfinished, states, strict=True)]
        parts.append("Not finished:\n" + "\n".join(lines))
    text = "\n\n".join(parts)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "reproduce.md", text + "\n")
    write_whole(folder / "reproduce.csv", csv_text(rows, gaps))
    print(f"\n{text}\n\n{folder} holds this as reproduce.md and reproduce.csv.")
    return rows


def _gaps(cells: Sequence[Cell]) -> list[Gap]:
    """A row for every recipe with seeds of which nothing is measured yet."""
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
