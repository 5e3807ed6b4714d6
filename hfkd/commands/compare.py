"""`hfkd compare`: runs side by side in one table and one figure, and what distillation gained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from ..comparison.figure import save_comparison
from ..comparison.gain import gain_text
from ..comparison.rows import Row, compared, evaluated_on
from ..comparison.table import LEGEND, csv_table, text_table
from ..errors import HfkdError, require, unknown_key_error
from ..recipe.parser import ArgumentParser
from ..runs.finished import find_runs
from ..runs.folder import write_whole

USAGE = "hfkd compare RUN [RUN ...] [--output_dir DIR] [--teacher NAME_OR_PATH]"
DESCRIPTION = (
    "Each RUN is a run's folder or one with runs below it. Runs that differ in their seed alone are one row. What is\n"
    "printed is written, too, as compare.md, with compare.csv and the curves in compare.png."
)


@dataclass
class ComparisonArguments:
    """How to compare."""

    _argument_group_name = "comparison"  # in `--help`

    output_dir: str = field(default="runs/compare", metadata={"help": "Folder of what is written."})
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder, Hub id or timm architecture of the teacher, to measure its multiply-adds and time where "
            "it is not at the place that a run's recipe names."
        },
    )


def compare(argv: list[str] | None = None) -> list[Row]:
    """Prints and writes the comparison of runs: `RUN [RUN ...] [--output_dir DIR] [--teacher NAME_OR_PATH]`.

    Returns:
        The rows of the table.

    Raises:
        FileNotFoundError: if a folder does not exist, or there is no run in any.
        ValueError: for runs that were evaluated on different images, or an unknown key.
        ImportError: without matplotlib, after the tables were printed and written.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser((ComparisonArguments,), USAGE, DESCRIPTION)
    parser.answer_help(argv)
    args, paths = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    options = [path for path in paths if path.startswith("-")]
    if options:
        raise unknown_key_error(options[0].lstrip("-").partition("=")[0], ["output_dir", "teacher"], "the command line")
    if not paths:
        raise HfkdError(f"Name the runs to compare: {USAGE}.")
    logging.disable_progress_bar()  # of loading weights
    runs, left_out = find_runs(paths)
    rows = compared(runs)
    report(rows, left_out, args)
    return rows


def report(rows: Sequence[Row], left_out: Sequence[str], args: ComparisonArguments) -> None:
    """Prints the comparison and writes its files."""
    known = next((run for row in rows for run in row.runs if run.results["dataset"] is not None), None)
    title = f"# {evaluated_on(known) if known else 'Data set not recorded'}"
    parts = [title, text_table(rows), LEGEND]
    if left_out:
        parts.append("Left out:\n" + "\n".join(f"- {reason}" for reason in left_out))
    print("\n\n".join(parts), flush=True)
    gain = gain_text(rows, args.teacher)
    if gain:
        parts.append("## What the students gain\n\n" + "\n".join(f"- {line}" for line in gain.splitlines()))
        print(f"\n{parts[-1]}")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "compare.md", "\n\n".join(parts) + "\n")
    write_whole(folder / "compare.csv", csv_table(rows))
    require("matplotlib", "figures")
    save_comparison(rows, folder / "compare.png")
    print(f"\n{folder} holds compare.md, compare.csv and compare.png.")
