"""`hfkd compare`: runs side by side in a table and a figure, and the savings of students over their teachers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from ..comparison.figure import save_comparison
from ..comparison.files import files_text
from ..comparison.rows import Row, compared, evaluated_on
from ..comparison.savings import savings_text
from ..comparison.table import csv_text, is_report, legend, terminal_table, text_table
from ..errors import HfkdError, unknown_key_error
from ..export.formats import FORMATS
from ..recipe.parser import ArgumentParser
from ..runs.claims import check_own
from ..runs.finished import find_runs
from ..runs.folder import check_writable
from ..runs.tables import plain
from ..runs.writing import write_whole
from .arguments import parse_known

NAMES = ("compare.md", "compare.csv", "compare.png")
USAGE = "hfkd compare RUN [RUN ...] [--output_dir DIR] [--teacher NAME_OR_PATH] [--measure onnx]"
DESCRIPTION = (
    "Each RUN is a run's folder or one with runs below it. Runs that differ only in their seed are one row. The\n"
    "report is also written as compare.md, with compare.csv and the curves in compare.png."
)


@dataclass
class ComparisonArguments:
    """Settings of the comparison."""

    _argument_group_name = "comparison"  # in `--help`

    output_dir: str = field(
        default="runs/compare", metadata={"help": "Folder of the report, its table and its figure."}
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder, Hub id or timm architecture of the teacher, to measure its multiply-adds and time if it "
            "is not where a run's recipe says."
        },
    )
    measure: str | None = field(
        default=None,
        metadata={
            "help": "onnx: a second table, of the float32, float16 and int8 files that `hfkd export` left in each run, "
            "and of the teacher: top-1, agreement with float32, bytes and latency.",
            "choices": ["onnx"],
        },
    )


def compare(argv: list[str] | None = None) -> list[Row]:
    """Compare runs, print and write the comparison: `RUN [RUN ...] [--output_dir DIR] [--measure onnx] ...`.

    Returns:
        The rows of the table.

    Raises:
        FileNotFoundError: if a folder does not exist, or no folder holds a run.
        ValueError: for runs that were evaluated on different images, or an unknown key.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser((ComparisonArguments,), USAGE, DESCRIPTION)
    parser.answer_help(argv)
    args, paths = parse_known(argv, parser)
    options = [path for path in paths if path.startswith("-")]
    if options:
        raise unknown_key_error(
            options[0].lstrip("-").partition("=")[0], ["output_dir", "teacher", "measure"], "the command line"
        )
    if not paths:
        raise HfkdError(f"Name the runs to compare: {USAGE}.")
    if args.measure == "onnx":
        FORMATS["onnx"].check_installed()
    folder = Path(args.output_dir)
    check_own(folder, NAMES, is_report(folder / NAMES[0]), "output_dir")
    logging.disable_progress_bar()  # for loading weights
    runs, left_out = find_runs(paths)
    rows = compared(runs)
    check_writable(folder, "output_dir")
    report(rows, left_out, args, folder)
    return rows


def report(rows: Sequence[Row], left_out: Sequence[str], args: ComparisonArguments, folder: Path) -> None:
    """Print the comparison and write its files."""
    known = next((run for row in rows for run in row.runs if run.results["dataset"] is not None), None)
    title = f"# {plain(evaluated_on(known)) if known else 'Data set not recorded'}"
    table, shown = text_table(rows), terminal_table(rows)
    more = ["Left out:\n" + "\n".join(f"- {reason}" for reason in left_out)] if left_out else []
    parts = [title, table, legend(table), *more]
    print("\n\n".join([title, shown, legend(shown), *more]), flush=True)
    savings = savings_text(rows, args.teacher)
    if savings:
        parts.append("## Savings of the students\n\n" + "\n".join(f"- {plain(line)}" for line in savings.splitlines()))
        print(f"\n{parts[-1]}")
    if args.measure == "onnx":
        parts.append(f"## Files for ONNX Runtime\n\n{files_text(rows, args.teacher)}")
        print(f"\n{parts[-1]}")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / NAMES[0], "\n\n".join(parts) + "\n")
    write_whole(folder / NAMES[1], csv_text(rows))
    if not any("eval_top1" in row for each in rows for run in each.runs for row in run.results["epochs"]):
        (folder / NAMES[2]).unlink(missing_ok=True)
        print(f"\n{folder} holds compare.md and compare.csv. No run was evaluated with labels, so there is no figure.")
        return
    save_comparison(rows, folder / NAMES[2])
    print(f"\n{folder} holds compare.md, compare.csv and compare.png.")
