"""ONNX files beside the folder of a trained model, and whether they hold its present weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HfkdError
from .folder import WEIGHTS_NAME
from .reading import read_json

ONNX_NAME = "model.onnx"
PREPROCESSING_NAME = "preprocessing.json"  # beside a file, and in a torch.export archive
PRECISIONS = ("float32", "float16", "int8")


@dataclass(frozen=True)
class OnnxFile:
    """ONNX file of a model's present weights.

    Attributes:
        facts: content of preprocessing.json beside the file.
    """

    precision: str
    path: Path
    facts: dict[str, Any]


def onnx_folder(precision: str) -> str:
    """Return the name of the folder of an ONNX file."""
    return "onnx" if precision == "float32" else f"onnx_{precision}"


def weights_digest(model: Path) -> str | None:
    """Return a digest of the weights in a model's folder; None where they are elsewhere, or in several files."""
    path = model / WEIGHTS_NAME
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def onnx_files(model: Path) -> tuple[list[OnnxFile], dict[str, str]]:
    """Find the ONNX files of a trained model where `hfkd export` writes them by default, beside its folder.

    Returns:
        The files of the model's present weights; and by precision why another file that is there is none of them.
    """
    files, reasons = [], {}
    for precision in PRECISIONS:
        path = model.resolve().parent / onnx_folder(precision) / ONNX_NAME
        if not path.is_file():
            continue
        try:
            files.append(OnnxFile(precision, path, _facts_of(path, precision, model)))
        except (HfkdError, OSError, LookupError, TypeError, AttributeError) as error:
            reasons[precision] = str(error) if isinstance(error, HfkdError) else f"{path} has a damaged description"
    return files, reasons


def _facts_of(path: Path, precision: str, model: Path) -> dict[str, Any]:
    """Read what is known of a file.

    Raises:
        HfkdError: if it holds other weights, or does not say which.
    """
    facts = read_json(path.with_name(PREPROCESSING_NAME))
    if facts.get("weights") is None or facts.get("precision", "float32") != precision:
        raise HfkdError(f"{path} does not say which weights it holds")
    if facts["weights"] != weights_digest(model):
        raise HfkdError(f"{path} holds other weights than {model}, which was trained since")
    if "measured" in facts and facts["measured"][precision]["bytes"] != path.stat().st_size:
        raise HfkdError(f"{path} was replaced since it was measured")
    return facts


def measured(files: Sequence[OnnxFile]) -> dict[str, dict[str, Any]]:
    """Return by precision what was measured at the export: top1, agreement with float32, bytes and latencies.

    float32 is measured beside a lower precision. Of a float32 file alone only the bytes are known, and the run's top-1.
    """
    figures: dict[str, dict[str, Any]] = {}
    for file in files:
        if "measured" in file.facts:
            figures = {"float32": file.facts["measured"]["float32"]} | figures
            figures[file.precision] = file.facts["measured"][file.precision]
    if files and files[0].precision == "float32":
        known = figures.get("float32", {"top1": files[0].facts.get("top1")})
        figures["float32"] = known | {"bytes": files[0].path.stat().st_size}
    return {precision: figures[precision] for precision in PRECISIONS if precision in figures}


def export_command(model: Path, precision: str) -> str:
    """Return the command that writes the file of a precision."""
    lower = "" if precision == "float32" else f" --precision {precision}"
    return f"hfkd export {model} --format onnx{lower}"
