"""File formats of an exported model, ONNX and torch.export, with the preprocessing inside."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import HfkdError, RunError, require
from ..names import architecture_of
from ..networks.features import prediction_of
from ..networks.headless import is_headless
from ..runs.onnx_files import ONNX_NAME, PREPROCESSING_NAME
from ..runs.writing import writing_by_name

INPUT = "pixel_values"
OUTPUT = "output_name"  # key in the meta data of a program's graph
METADATA = "preprocessing"  # key in an ONNX file
TOLERANCE = 1e-4
LARGEST_ONNX = 2**31  # bytes, the limit of a protobuf message


class FileModel(nn.Module):
    """Model read from a file: images (B, 3, H, W) -> logits (B, C), or the embedding (B, D)."""

    def __init__(self, run: Callable[[Tensor], Tensor]):
        super().__init__()
        self.run = run

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.run(pixel_values)


@dataclass(frozen=True)
class FileFormat:
    """Format of `--format`.

    Attributes:
        file_name: name of the file.
        runtime: name of the program that runs the file.
        libraries: libraries of the extra `export` that it needs.
        write: writes an exported program and the text on preprocessing to a path.
        read: reads the model at a path.
    """

    file_name: str
    runtime: str
    libraries: tuple[str, ...]
    write: Callable[[ExportedProgram, Path, str], None]
    read: Callable[[Path], FileModel]

    def check_installed(self) -> None:
        """Check that the libraries are installed.

        Raises:
            ImportError: if one is not, with the command that installs it.
        """
        for library in self.libraries:
            require(library, "export")


def write_model(
    model: nn.Module, image_size: int, file_format: FileFormat, path: Path, preprocessing: str
) -> FileModel:
    """Write a model as one file that takes batches of any size; the file is written whole or not at all.

    Args:
        model: model in evaluation mode, of any library.
        image_size: side of its square images, in pixels.
        preprocessing: text that goes into the file.

    Returns:
        The model read from the file.

    Raises:
        ImportError: if the format's libraries are not installed, with the command that installs them.
        ValueError: if the format cannot express the model, or the file returns other logits.
        RuntimeError: if the file cannot be written.
    """
    file_format.check_installed()
    program = captured(model, image_size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_by_name(path) as partial:
            file_format.write(program, partial, preprocessing)
            _check_logits(file_format.read(partial), model, image_size)
    except OSError as error:
        raise RunError(f"{path} could not be written ({error}). An earlier file is unchanged.") from error
    return file_format.read(path)


def output_name(model: nn.Module) -> str:
    """Return the name of the output of a model's file."""
    return "embedding" if is_headless(model) else "logits"


class _Prediction(nn.Module):
    """Module that returns the logits that evaluation reads, or the embedding, with the name of the file's input."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return prediction_of(self.model, pixel_values)


@torch.no_grad()
def captured(model: nn.Module, image_size: int) -> ExportedProgram:
    """Trace the model for batches of any size, and remove the paths of source files from the program."""
    images = torch.zeros(2, 3, image_size, image_size)
    prediction = _Prediction(model).eval()
    prediction(images)  # an error of the model itself is raised here, not as one of the export
    try:
        program = torch.export.export(prediction, (images,), dynamic_shapes={INPUT: {0: Dim("batch")}})
    except Exception as error:  # tracing runs the model's own code and raises errors of many kinds
        raise HfkdError(
            f"torch.export cannot follow the forward of {architecture_of(model)}, which both formats need: "
            f"{_first_line(error)}{_line_of_code(error)} Write a branch on the values of a tensor with torch.where or "
            "torch.cond, and remove a fixed batch size or a conversion to numpy."
        ) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes:
            node.meta.pop("stack_trace", None)
    program.graph_module.meta[OUTPUT] = output_name(model)
    return program


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _line_of_code(error: Exception) -> str:
    """Return the line of code at which torch.export stopped, as a sentence; empty if it is unknown."""
    places = re.findall(r'File "(.*)", line (\d+), in \w+\n +(.+)', str(error))
    return " In {}, line {}: `{}`.".format(*places[-1]) if places else ""


@torch.inference_mode()
def _check_logits(file_model: FileModel, model: nn.Module, image_size: int) -> None:
    """Compare a file with its model, on batches of other sizes than the traced one.

    Raises:
        ValueError: if their logits differ.
    """
    generator = torch.Generator().manual_seed(0)
    for batch_size in (1, 3):
        images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
        expected, given = prediction_of(model, images), file_model(images)
        if not torch.allclose(given, expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise HfkdError(
                f"The file of {architecture_of(model)} gives other {output_name(model)} than the model, by up to "
                f"{(given - expected).abs().max():.2g} in a batch of {batch_size}: expected at most {TOLERANCE:g}. "
                "It was removed. Try the other --format."
            )


def _write_onnx(program: ExportedProgram, path: Path, preprocessing: str) -> None:
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    if size >= LARGEST_ONNX:
        raise HfkdError(
            f"The weights take {size / 1e9:.1f} GB, and one ONNX file holds less than 2 GiB: give --format torch."
        )
    try:
        axes = ({0: "batch"},)  # of an exported program torch takes the names alone
        output = program.graph_module.meta[OUTPUT]
        converted = torch.onnx.export(
            program, input_names=[INPUT], output_names=[output], dynamic_shapes=axes, verbose=False
        )
    except torch.onnx.errors.OnnxExporterError as error:
        found = re.search(r"op='([\w.]+)'|target=torch\.ops\.([\w.]+)", str(error))
        operator = f"the operator {found[1] or found[2]}" if found else f"this model ({_first_line(error)})"
        raise HfkdError(
            f"ONNX cannot express {operator}. Write that part of the model with other operators of torch, or give "
            "--format torch."
        ) from error
    for node in converted.model.graph:  # which line made it: up to half of a small file, with paths of this machine
        node.metadata_props.clear()
    converted.model.metadata_props[METADATA] = preprocessing
    converted.save(path, external_data=False)


def read_onnx(path: Path, threads: int | None = None) -> FileModel:
    """Open an ONNX file with ONNX Runtime on the CPU; by default with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Otherwise its threads keep spinning for a while and slow down the next work.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return FileModel(lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0]))


def _write_torch(program: ExportedProgram, path: Path, preprocessing: str) -> None:
    torch.export.save(program, path, extra_files={PREPROCESSING_NAME: preprocessing})


def _read_torch(path: Path) -> FileModel:
    module = torch.export.load(path).module()
    return FileModel(lambda images: module(images))  # as a submodule it would refuse eval()


FORMATS = {
    "onnx": FileFormat(ONNX_NAME, "ONNX Runtime", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, read_onnx),
    "torch": FileFormat("model.pt2", "torch.export", (), _write_torch, _read_torch),
}
