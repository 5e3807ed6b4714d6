"""`hfkd export`: a trained model as a file for ONNX Runtime or torch, and what it costs beside its teacher."""

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
from ..errors import HfkdError, NotFoundError
from ..export.formats import FORMATS, PREPROCESSING_NAME, FileFormat, FileModel, write_model
from ..export.preprocessing import Preprocessing, preprocessing_of
from ..names import architecture_of, hub_id
from ..networks.costs import latencies, multiply_adds
from ..networks.loading import load_pretrained, load_teacher
from ..networks.teacher import Teacher
from ..recipe.parser import ArgumentParser
from ..recipe.reading import load_recipe
from ..runs.folder import RECIPE_NAME, RESULTS_NAME, write_whole

USAGE = "hfkd export MODEL [--key value ...]"


@dataclass
class ExportArguments:
    """What to write, where, and what to compare it with."""

    _argument_group_name = "export"  # in `--help`

    format: str = field(
        default="onnx",
        metadata={
            "help": "onnx: for ONNX Runtime and what else reads ONNX; torch: an archive of torch.export, for torch "
            "without hfkd.",
            "choices": list(FORMATS),
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the file. By default one named by the format, beside MODEL's folder."},
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Whose size and latency to print beside MODEL's: a folder, a Hub id, or a timm architecture with "
            "weights. By default the one in the recipe of the run that MODEL lies in."
        },
    )


def export(argv: list[str] | None = None) -> Path:
    """Writes a trained model as one file: `MODEL [--format onnx|torch] [--output_dir DIR] [--teacher NAME]`.

    MODEL is a folder or a Hub id. The file takes batches of any size, gives the logits that evaluation reads (the mean
    of two heads) and says how images are prepared, as `preprocessing.json` beside it does. Size and latency of MODEL
    and its teacher are printed.

    Returns:
        The path of the file.

    Raises:
        ImportError: without the libraries of the format.
        FileNotFoundError: if MODEL is no model.
        ValueError: if the format cannot express it; for a key or a value that is unknown.
        RuntimeError: if the file cannot be written.
    """
    name, args = _parse(sys.argv[1:] if argv is None else argv)
    file_format = FORMATS[args.format]
    file_format.check_installed()
    _check_model(name)
    model = load_pretrained(name)
    preprocessing = preprocessing_of(model)
    teacher = find_teacher(name, args.teacher)
    folder = Path(args.output_dir or _beside(name) / args.format)
    text = json.dumps(_facts(name, model, preprocessing), indent=2, ensure_ascii=False) + "\n"
    path = folder / file_format.file_name
    exported = write_model(model, preprocessing.image_size, file_format, path, text)
    write_whole(folder / PREPROCESSING_NAME, text)
    print(f"{path} gives the model's logits; {folder / PREPROCESSING_NAME} says how to prepare its images.\n")
    sides = {"student": Side(model, preprocessing.image_size, exported, path.stat().st_size)}
    if teacher is not None:
        sides = {"teacher": side_of_teacher(teacher, file_format)} | sides
    print(cost_table(sides, file_format))
    return path


def _parse(argv: list[str]) -> tuple[str, ExportArguments]:
    """MODEL, and what is said of it."""
    parser = ArgumentParser((ExportArguments,), usage=USAGE)
    parser.answer_help(argv)
    if not argv or argv[0].startswith("-"):
        given = argv[0] if argv else ""
        raise HfkdError(f"The first argument must be the model's folder or Hub id, got '{given}'. Usage: {USAGE}")
    return argv[0], *parser.parse(argv[1:])


def _check_model(name: str) -> None:
    folder = Path(name)
    if not folder.is_dir():
        if hub_id(name) is None:
            raise NotFoundError(f"There is no model at {name}: give the folder of a trained model, or a Hub id.")
        return
    if (folder / "config.json").is_file():
        return
    near = [folder / role for role in ("student", "teacher") if (folder / role / "config.json").is_file()]
    hint = f"Did you mean {near[0]}?" if near else "Give the folder of a trained model, such as runs/.../student."
    raise NotFoundError(f"{name} holds no model (config.json). {hint}")


def _beside(name: str) -> Path:
    """The folder that MODEL lies in; of one on the Hub, one of its name here."""
    return Path(name).resolve().parent if Path(name).is_dir() else Path(Path(name).name)


def _facts(name: str, model: nn.Module, preprocessing: Preprocessing) -> dict[str, Any]:
    """What a file says of itself; null where nothing is known."""
    path = Path(name, RESULTS_NAME)
    results = json.loads(path.read_text()) if path.is_file() else {}
    dataset = results.get("dataset") or {}
    return {
        "architecture": architecture_of(model),
        **asdict(preprocessing),
        "preparation": preprocessing.text,
        "class_names": [model.config.id2label[index] for index in range(model.config.num_labels)],
        "top1": results.get(results.get("exported"), {}).get("top1"),
        "dataset": dataset.get("name"),
        "eval_split": dataset.get("eval_split"),
        "hfkd_version": __version__,
    }


def find_teacher(name: str, given: str | None) -> Teacher | None:
    """The teacher to compare with: the one given, else that of the run's recipe; without one it prints why."""
    if given is not None:
        return load_teacher(given)
    paths = [path for path in (Path(name).parent / RECIPE_NAME, Path(name, RECIPE_NAME)) if path.is_file()]
    recipe = load_recipe(paths[0]) if paths else {}
    names, checkpoints = (recipe.get(key) or [] for key in ("teacher_name_or_path", "teacher_checkpoint"))
    names, checkpoints = ([value] if isinstance(value, str) else value for value in (names, checkpoints))
    if not names:
        why = f"{paths[0]} names none" if paths else "there is no recipe of the run"
    elif len(names) > 1:
        why = f"{paths[0]} names an ensemble"
    else:
        try:
            return load_teacher(names[0], *checkpoints)
        except (ValueError, OSError) as error:
            why = f"that of {paths[0]} could not be loaded ({str(error).rstrip('.')})"
    print(f"Not compared with a teacher: {why}. --teacher NAME_OR_PATH says with which.")
    return None


# ---- Costs -------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One of two models that are compared.

    Attributes:
        file_model, file_size: the file that was written of it, and its bytes; None where the format cannot express it.
    """

    model: nn.Module
    image_size: int
    file_model: FileModel | None = None
    file_size: int | None = None


def side_of_teacher(teacher: Teacher, file_format: FileFormat) -> Side:
    """The teacher in the student's format as well: else the runtime would be compared, not the network."""
    side = Side(teacher.model, teacher.input_spec.image_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, file_format.file_name)
        try:
            side.file_model = write_model(side.model, side.image_size, file_format, path, "")
            side.file_size = path.stat().st_size
        except ValueError as error:
            print(f"The teacher was not exported. {error}")
    return side


def cost_table(sides: dict[str, Side], file_format: FileFormat) -> str:
    """A markdown table: a column for each side, and behind two their ratio.

    Latencies are measured in turns, in one run.
    """
    eager = {role: side.model for role, side in sides.items()}
    from_file = {f"{role} file": side.file_model for role, side in sides.items() if side.file_model is not None}
    sizes = {role: side.image_size for role, side in sides.items()}
    times = latencies(eager | from_file, sizes | {f"{role} file": size for role, size in sizes.items()})
    rows = {
        "parameters": ([sum(value.numel() for value in model.parameters()) for model in eager.values()], "{:,.0f}"),
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
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {label} | {' | '.join(_cells(*row))} |" for label, row in rows.items()]
    threads = torch.get_num_threads()
    note = f"Latency: CPU, {threads} thread{'s' if threads > 1 else ''}, float32, one image at a time, fastest of 30."
    return "\n".join(lines) + f"\n\n{note}"


def _cells(values: list[float | None], form: str) -> list[str]:
    cells = ["–" if value is None else form.format(value) for value in values]
    if len(values) == 2:
        cells.append("–" if None in values else f"{values[0] / values[1]:.2f}")
    return cells
