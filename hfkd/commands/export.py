"""`hfkd export`: a trained model as a file for ONNX Runtime or torch, and its costs beside its teacher's."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..errors import HfkdError, did_you_mean
from ..export.formats import FORMATS, FileFormat, FileModel, output_name, write_model
from ..export.int8 import for_file
from ..export.preprocessing import Preprocessing, preprocessing_of
from ..export.quantization import check_runtime
from ..hub.card import update_card
from ..names import architecture_of
from ..networks.class_matching import class_names_of
from ..networks.costs import latencies, multiply_adds, parameter_count
from ..networks.headless import is_headless
from ..networks.int8 import is_int8, without_rounding
from ..networks.loading import load_network
from ..networks.teacher import Teacher
from ..networks.teacher_loading import load_teacher
from ..recipe.checks import AT_LEAST_1, NOT_NEGATIVE, check_ranges
from ..recipe.parser import ArgumentParser
from ..recipe.reading import load_recipe
from ..runs.claims import check_own
from ..runs.finished import teacher_of
from ..runs.folder import RECIPE_NAME, RESULTS_NAME, check_writable
from ..runs.onnx_files import PRECISIONS, PREPROCESSING_NAME, onnx_folder, weights_digest
from ..runs.reading import read_json, read_results
from ..runs.tables import markdown_table
from ..runs.writing import write_whole
from .arguments import check_trained, parse_with_subject
from .reduced_precision import data_of_run, export_reduced

USAGE = "hfkd export MODEL [--key value ...]"


@dataclass
class ExportArguments:
    """Format and folder of the file, and the teacher to compare with."""

    _argument_group_name = "export"  # in `--help`

    format: str = field(
        default="onnx",
        metadata={
            "help": "onnx: for ONNX Runtime and other readers of ONNX; torch: an archive of torch.export, for torch "
            "without hfkd.",
            "choices": list(FORMATS),
        },
    )
    precision: str = field(
        default="float32",
        metadata={
            "help": "float32, float16 or int8. The last two need format onnx and the data of MODEL's run: ranges of "
            "int8 come from training images, and the file is measured on the evaluation split."
        },
    )
    max_drop: float = field(
        default=0.5,
        metadata={
            "help": "Points of top-1 that the file may lose. Layers of int8 stay float until it loses no more on "
            "held-out training images; if it does on the evaluation split, the exit code is 1."
        },
    )
    calibration_images: int = field(default=128, metadata={"help": "Training images that set the ranges of int8."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the file; by default a folder named after the format, beside MODEL's folder."},
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Teacher whose size and latency are printed beside MODEL's: a folder, a Hub id, or a timm "
            "architecture with weights. By default the teacher in the recipe of MODEL's run."
        },
    )

    def __post_init__(self):
        if self.precision == "bf16":
            raise HfkdError(
                "ONNX Runtime cannot run bf16 on a CPU: it has no kernels for convolutions and matrix products. Give "
                "--precision float16, which is as small, or int8."
            )
        if self.precision not in PRECISIONS:
            raise HfkdError(f"--precision: unknown '{self.precision}'.{did_you_mean(self.precision, PRECISIONS)}")
        check_ranges(self, {"calibration_images": AT_LEAST_1, "max_drop": NOT_NEGATIVE})
        if self.precision != "float32" and self.format != "onnx":
            raise HfkdError(f"--precision {self.precision} needs --format onnx, got {self.format}.")
        if self.precision != "float32" and self.teacher is not None:
            raise HfkdError(f"--precision {self.precision} compares with float32, not with a --teacher. Leave one out.")


def export(argv: list[str] | None = None) -> Path:
    """Write a trained model as one file: `MODEL [--format onnx|torch] [--precision int8] [--output_dir DIR] ...`.

    MODEL is a folder or a Hub id. The file takes batches of any size and returns the logits that evaluation reads (the
    mean of two heads), or the embedding of a network without a classifier. It holds the preprocessing of images, which
    is also in `preprocessing.json` beside it. The command prints size and latency of MODEL and its teacher; for a lower
    precision, those of the file and of float32, with the top-1 of both.

    Returns:
        The path of the file.

    Raises:
        ImportError: if the libraries of the format are not installed.
        FileNotFoundError: if MODEL is no model.
        ValueError: if the format cannot express the model; for an unknown key or value.
        RuntimeError: if the file cannot be written.
    """
    argv = sys.argv[1:] if argv is None else argv
    name, args = parse_with_subject(argv, ArgumentParser((ExportArguments,), USAGE))
    file_format = FORMATS[args.format]
    file_format.check_installed()
    check_trained(name)
    folder = Path(args.output_dir or _beside(name) / _folder_name(args))
    check_writable(folder, "output_dir")
    names = (file_format.file_name, PREPROCESSING_NAME)
    check_own(folder, names, _is_export(folder / PREPROCESSING_NAME), "output_dir")
    data_args = None
    if args.precision != "float32":
        check_runtime()
        data_args = data_of_run(name)
    model = load_network(name).eval()
    trained = is_int8(model)
    if trained and args.format == "onnx" and args.precision != "int8":
        raise HfkdError(f"{name} was trained for int8: give --precision int8, or --format torch.")
    preprocessing = preprocessing_of(model)
    if data_args is not None and is_headless(model):
        raise HfkdError(
            f"--precision {args.precision} is judged by the top-1, and {name} has no classifier. Fine-tune "
            "it first, or export it in float32."
        )
    if data_args is not None:
        path, facts = folder / file_format.file_name, _facts(name, model, preprocessing)
        try:
            return export_reduced(args.precision, model, data_args, facts, path, args.calibration_images, args.max_drop)
        finally:  # a file that loses too much is there, too
            update_card(Path(name))
    teacher = find_teacher(name, args.teacher)
    text = json.dumps(_facts(name, model, preprocessing), indent=2, ensure_ascii=False) + "\n"
    path = folder / file_format.file_name
    written = for_file(model, args.format) if trained else model
    exported = write_model(written, preprocessing.image_size, file_format, path, text)
    write_whole(folder / PREPROCESSING_NAME, text)
    update_card(Path(name))
    how = folder / PREPROCESSING_NAME
    print(f"{path} gives the model's {output_name(model)}; {how} says how to prepare its images.\n")
    size, in_float = path.stat().st_size, without_rounding(model)
    sides = {"student": Side(in_float, parameter_count(model), preprocessing.image_size, exported, size)}
    if teacher is not None:
        sides = {"teacher": side_of_teacher(teacher, file_format)} | sides
    print(cost_table(sides, file_format))
    if trained:
        print(f"{path.name} rounds with operators of float32. `hfkd export {name} --precision int8` computes in int8.")
    return path


def _folder_name(args: ExportArguments) -> str:
    return onnx_folder(args.precision) if args.format == "onnx" else args.format


def _is_export(path: Path) -> bool:
    """Return True if a description beside a file is one of hfkd."""
    try:
        return "hfkd_version" in read_json(path)
    except (HfkdError, TypeError):
        return False


def _beside(name: str) -> Path:
    """Return the folder above MODEL; for a Hub id, a folder of its name in the current one."""
    return Path(name).resolve().parent if Path(name).is_dir() else Path(Path(name).name)


def _facts(name: str, model: nn.Module, preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the description that is written into the file; unknown entries are None."""
    path = Path(name, RESULTS_NAME)
    results = read_results(path) if path.is_file() else {}
    dataset = results.get("dataset") or {}
    return {
        "architecture": architecture_of(model),
        **asdict(preprocessing),
        "preparation": preprocessing.text,
        "class_names": [] if is_headless(model) else class_names_of(model),
        "top1": results.get(results.get("exported"), {}).get("top1"),
        "dataset": dataset.get("name"),
        "eval_split": dataset.get("eval_split"),
        "weights": weights_digest(Path(name)),
        "hfkd_version": __version__,
    }


def find_teacher(name: str, given: str | None) -> Teacher | None:
    """Load the teacher to compare with: the one given, else the one in the run's recipe; print why if there is none."""
    if given is not None:
        return load_teacher(given)
    paths = [path for path in (Path(name).parent / RECIPE_NAME, Path(name, RECIPE_NAME)) if path.is_file()]
    teacher = teacher_of(load_recipe(paths[0]) if paths else {})
    members = teacher.members
    if not members:
        why = f"{paths[0]} names none" if paths else "there is no recipe of the run"
    elif len(members) > 1:
        why = f"{paths[0]} names an ensemble"
    else:
        try:
            return load_teacher(*members[0], **teacher.image)
        except (ValueError, OSError) as error:
            why = f"the one in {paths[0]} could not be loaded ({str(error).rstrip('.')})"
    print(f"Not compared with a teacher: {why}. Name it with --teacher NAME_OR_PATH.")
    return None


# ---- Costs -------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """Model in the table of costs, the student or its teacher.

    Attributes:
        model: network whose time is measured in torch.
        parameters: of the model as it is loaded.
        image_size: side of its square images in pixels.
        file_model, file_size: the model in its file, and the file's bytes; None if the format cannot express it.
    """

    model: nn.Module
    parameters: int
    image_size: int
    file_model: FileModel | None = None
    file_size: int | None = None


def side_of_teacher(teacher: Teacher, file_format: FileFormat) -> Side:
    """Export the teacher to the student's format, so that the networks are compared and not the runtimes."""
    network = without_rounding(teacher.network)
    side = Side(network, parameter_count(teacher.network), teacher.input_spec.image_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, file_format.file_name)
        try:
            side.file_model = write_model(side.model, side.image_size, file_format, path, "")
            side.file_size = path.stat().st_size
        except ValueError as error:
            print(f"The teacher was not exported. {error}")
    return side


def cost_table(sides: dict[str, Side], file_format: FileFormat) -> str:
    """Return a Markdown table of the costs: a column for each side, then, if there are two, their ratio.

    All latencies are measured together, in turns.
    """
    eager = {role: side.model for role, side in sides.items()}
    from_file = {f"{role} file": side.file_model for role, side in sides.items() if side.file_model is not None}
    sizes = {role: side.image_size for role, side in sides.items()}
    times = latencies(eager | from_file, sizes | {f"{role} file": size for role, size in sizes.items()})
    rows = {
        "parameters": ([side.parameters for side in sides.values()], "{:,.0f}"),
        "multiply-adds of an image": (
            [multiply_adds(side.model, side.image_size) for side in sides.values()],
            "{:,.0f}",
        ),
        f"{file_format.file_name}, MB": (
            [None if side.file_size is None else side.file_size / 1e6 for side in sides.values()],
            "{:,.2f}",
        ),
        "torch, ms an image": ([times[role] for role in sides], "{:.2f}"),
        f"{file_format.runtime}, ms an image": ([times.get(f"{role} file") for role in sides], "{:.2f}"),
    }
    heads = [f"{role}: {architecture_of(side.model)}" for role, side in sides.items()]
    heads += ["teacher / student"] if len(sides) == 2 else []
    table = markdown_table(["", *heads], [[label, *_cells(*row)] for label, row in rows.items()], compact=True)
    threads = torch.get_num_threads()
    note = f"Latency: CPU, {threads} thread{'s' if threads > 1 else ''}, float32, one image at a time, fastest of 30."
    return f"{table}\n\n{note}"


def _cells(values: list[float | None], form: str) -> list[str]:
    cells = ["–" if value is None else form.format(value) for value in values]
    if len(values) == 2:
        cells.append("–" if None in values else f"{values[0] / values[1]:.2f}")
    return cells
