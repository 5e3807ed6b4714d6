"""ONNX files of lower precision: int8 by static quantisation, float16 by conversion."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import HfkdError, MissingLibraryError
from .formats import INPUT, read_onnx

OLDEST_RUNTIME = "1.23"  # as in setup.cfg
CALIBRATIONS = ("MinMax", "Entropy", "Percentile")
# Additions of a residual are no faster in int8, and their two sides have different scales. LayerNorm, softmax, GELU and
# products of two activations (attention) stay float, too.
OPERATORS = ("Conv", "Gemm", "MatMul")
RANKING_IMAGES = 64  # held-out images for the error of one layer alone
CALIBRATION_BATCH = 16  # the outputs of all layers are held for a batch
BATCH = 50
# Of which one is needed to multiply int8 without a detour, by the names of torch.cpu.get_capabilities.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "dot", "i8mm")


@dataclass(frozen=True)
class Quantization:
    """How an int8 file was made, and what it kept on held-out training images.

    Attributes:
        calibration: method that set the ranges of the activations.
        int8_layers: number of convolutions and linear layers in int8.
        float_layers: names of those that stay float.
        float_operators: other operators of the file, which stay float.
        held_out_top1, held_out_top1_float32: of the int8 and the float32 file, in percent.
    """

    calibration: str
    int8_layers: int
    float_layers: tuple[str, ...]
    float_operators: tuple[str, ...]
    held_out_top1: float
    held_out_top1_float32: float


def check_runtime() -> None:
    """Check that ONNX Runtime is new enough to quantise.

    Raises:
        MissingLibraryError: if it is not, with the command that installs a newer one.
    """
    import onnxruntime
    from packaging.version import Version

    if Version(onnxruntime.__version__) < Version(OLDEST_RUNTIME):
        raise MissingLibraryError(
            f"A lower --precision needs onnxruntime {OLDEST_RUNTIME} or newer, and {onnxruntime.__version__} is "
            'installed: pip install --upgrade "hfkd[export]".'
        )


def has_int8_instructions() -> bool:
    """Return True if this CPU has instructions for dot products of int8."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in INT8_INSTRUCTIONS)


class StaticQuantizer:
    """Search for the calibration and the float layers with which an int8 file keeps the top-1 of its float32 file.

    Args:
        path: the float32 file; files of the search are written beside it.
        calibration: images (N, 3, H, W), from which the ranges of the activations are read.
        held_out: images (M, 3, H, W) on which the int8 files are compared.
        labels: (M,) their classes.

    Raises:
        HfkdError: if ONNX Runtime cannot prepare the file, or finds no layer to quantise.
    """

    def __init__(self, path: Path, calibration: Tensor, held_out: Tensor, labels: Tensor):
        self.calibration, self.held_out, self.labels = calibration, held_out, labels
        self.prepared = path.with_name("prepared.onnx")
        _prepare(path, self.prepared)
        self.layers, self.float_operators = _operators_of(self.prepared)
        self.float_logits = logits_of_file(self.prepared, held_out)
        self.float_top1 = top1(self.float_logits, labels)

    def quantize(self, path: Path, max_drop: float) -> Quantization:
        """Write the int8 file with the fewest float layers, among those tried, that loses at most `max_drop` points.

        If none does, the best one is written.
        """
        ranges = {"MinMax": self._ranges("MinMax")}
        for method in CALIBRATIONS[1:]:
            with contextlib.suppress(ValueError):  # there is no histogram of activations that are all but constant
                ranges[method] = self._ranges(method)
        # The error of the logits tells methods apart better than top-1, of which one image is a tenth of a point.
        method = min(ranges, key=lambda each: self._measure(path, ranges[each], self.layers)[1])
        tried = {}
        for layers in self._choices(path, ranges[method]):
            tried[layers] = kept, _ = self._measure(path, ranges[method], layers)
            if self.float_top1 - kept <= max_drop:
                break
        else:
            layers = max(tried, key=lambda each: (tried[each][0], -tried[each][1]))
            self._write(path, ranges[method], layers)
        float_layers = tuple(each for each in self.layers if each not in layers)
        return Quantization(method, len(layers), float_layers, self.float_operators, tried[layers][0], self.float_top1)

    def _ranges(self, method: str):
        """Return the range of each activation in the calibration images."""
        from onnxruntime.quantization import CalibrationMethod, create_calibrator

        augmented = str(self.prepared.with_name("augmented.onnx"))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            calibrator = create_calibrator(
                self.prepared, OPERATORS, augmented, calibrate_method=CalibrationMethod[method]
            )
            for images in self.calibration.split(CALIBRATION_BATCH):  # at once they would have to be of one size
                calibrator.collect_data(_Reader(images))
            return calibrator.compute_data()

    def _choices(self, path: Path, ranges) -> Iterator[tuple[str, ...]]:
        """Give sets of int8 layers: all, all but the first and last, then without ever more of the sensitive ones."""
        yield self.layers
        inner = self.layers[1:-1]
        if not inner:
            return
        yield inner
        errors = {layer: self._measure(path, ranges, (layer,), RANKING_IMAGES)[1] for layer in inner}
        sensitive = sorted(inner, key=errors.__getitem__, reverse=True)
        count = 1
        while count < len(inner):
            yield tuple(layer for layer in inner if layer not in sensitive[:count])
            count *= 2

    def _measure(self, path: Path, ranges, layers: Sequence[str], images: int | None = None) -> tuple[float, float]:
        """Write a file, and return its top-1 and the mean squared error of its logits on the first held-out images."""
        self._write(path, ranges, layers)
        logits = logits_of_file(path, self.held_out[:images])
        error = (logits - self.float_logits[:images]).square().mean()
        return top1(logits, self.labels[:images]), float(error)

    def _write(self, path: Path, ranges, layers: Sequence[str]) -> None:
        """Write the file with these layers in int8."""
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType

        quantizer = QDQQuantizer(
            onnx.load(self.prepared),
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            # The CPU kernels of x86 take unsigned activations; with signed ones int8 was slower than float32.
            activation_qType=QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=list(layers),
            nodes_to_exclude=[],
            op_types_to_quantize=list(OPERATORS),
            extra_options={"WeightSymmetric": True, "MatMulConstBOnly": True},
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(path), False)


class _Reader:
    """One batch of calibration images, as onnxruntime's calibrators read it."""

    def __init__(self, images: Tensor):
        self.batches = iter([{INPUT: images.numpy()}])

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def _prepare(source: Path, path: Path) -> None:
    """Infer shapes and fold batch norms into the convolutions, as the library advises before it quantises."""
    from onnxruntime.quantization import quant_pre_process

    try:
        quant_pre_process(source, path)
    except Exception as error:  # the library raises plain ones
        reason = str(error).strip().partition("\n")[0]
        raise HfkdError(
            f"ONNX Runtime cannot prepare this model for int8 ({reason}). Give --precision float16."
        ) from error


def _operators_of(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the layers that int8 knows, and the types of the other operators.

    Raises:
        HfkdError: if there is no layer.
    """
    import onnx

    graph = onnx.load(path).graph
    constants = {initializer.name for initializer in graph.initializer}
    layers = [node for node in graph.node if node.op_type in OPERATORS and node.input[1] in constants]
    names = {layer.name for layer in layers}
    others = sorted({node.op_type for node in graph.node if node.name not in names})
    if not layers:
        raise HfkdError(
            "int8 needs convolutions or linear layers with constant weights, and this model has none. Its operators: "
            f"{', '.join(others)}. Give --precision float16."
        )
    return tuple(layer.name for layer in layers), tuple(others)


def write_float16(source: Path, path: Path) -> None:
    """Convert a float32 file to float16; images and logits stay float32.

    Raises:
        HfkdError: if ONNX Runtime cannot run the converted file.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    try:
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)
        read_onnx(path)
    except OSError:
        raise
    except Exception as error:  # each library raises its own
        reason = str(error).strip().partition("\n")[0]
        raise HfkdError(f"ONNX Runtime cannot run this model in float16 ({reason}). Keep float32.") from error


def set_metadata(path: Path, key: str, text: str) -> None:
    """Write a text into the metadata of an ONNX file."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {key: text})
    onnx.save(model, path)


def logits_of_file(path: Path, images: Tensor) -> Tensor:
    """Return the logits (N, C) that an ONNX file gives for images (N, 3, H, W)."""
    model = read_onnx(path)
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def top1(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is that of their class, in percent."""
    return 100 * float((logits.argmax(1) == labels).float().mean())
