"""ONNX files of lower precision: int8 by static quantisation, float16 by conversion."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .formats import INPUT, read_onnx

CALIBRATIONS = ("MinMax", "Entropy", "Percentile")
OPERATORS = ("Conv", "Gemm", "MatMul")  # LayerNorm, softmax, GELU and residual additions stay float
RANKING_IMAGES = 32  # for the error of one layer alone
BATCH = 32


@dataclass(frozen=True)
class Quantization:
    """How a file was quantised, and its top-1 on held-out training images.

    Attributes:
        calibration: method that set the ranges of the activations.
        float_nodes: nodes of OPERATORS that stay float.
        top1, float_top1: of the int8 and the float32 file, in percent.
    """

    calibration: str
    float_nodes: tuple[str, ...]
    top1: float
    float_top1: float


class StaticQuantizer:
    """Search for the calibration and the float layers with which an int8 file keeps the top-1 of its float32 file.

    Args:
        path: the float32 file.
        calibration: images (N, 3, H, W), from which the ranges of the activations are read.
        held_out: images (M, 3, H, W) on which the int8 files are compared.
        labels: (M,) their classes.
    """

    def __init__(self, path: Path, calibration: Tensor, held_out: Tensor, labels: Tensor):
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.calibration, self.held_out, self.labels = calibration, held_out, labels
        self.folded = path.with_name("folded.onnx")  # batch norms are in the convolutions, as when it runs
        quant_pre_process(path, self.folded, skip_symbolic_shape=True)
        self.nodes = _quantizable(self.folded)
        self.float_logits = logits_of_file(self.folded, held_out)
        self.float_top1 = top1(self.float_logits, labels)

    def quantize(self, path: Path, max_drop: float) -> Quantization:
        """Write the int8 file with the fewest float layers among those tried that loses at most `max_drop` points.

        If none does, the best one is written.
        """
        method = max(CALIBRATIONS, key=lambda each: self._score(path, each, ()))
        best = None
        for float_nodes in self._choices(method):
            score = self._score(path, method, float_nodes)
            if best is None or score > best[0]:
                best = score, float_nodes
            if self.float_top1 - score[0] <= max_drop:
                best = score, float_nodes
                break
        score, float_nodes = best
        self._write(path, method, float_nodes, self.calibration)
        return Quantization(method, float_nodes, score[0], self.float_top1)

    def _choices(self, method: str) -> Iterator[tuple[str, ...]]:
        """Give sets of float nodes: none, the first and last, then ever more of those with the largest error."""
        ends = tuple(dict.fromkeys((self.nodes[0], self.nodes[-1])))
        yield ()
        yield ends
        inner = sorted(set(self.nodes) - set(ends), key=lambda node: self._error_of(node, method), reverse=True)
        count = 1
        while count < len(inner):  # at least one layer is int8
            yield (*ends, *inner[:count])
            count *= 2

    def _error_of(self, node: str, method: str) -> float:
        """Return the mean squared error of the logits with only this node in int8."""
        images = self.held_out[:RANKING_IMAGES]
        others = tuple(each for each in self.nodes if each != node)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "one.onnx")
            self._write(path, method, others, self.calibration[:RANKING_IMAGES])
            logits = logits_of_file(path, images)
        return float((logits - self.float_logits[: len(images)]).square().mean())

    def _score(self, path: Path, method: str, float_nodes: tuple[str, ...]) -> tuple[float, float]:
        """Return top-1 and, for equal ones, the negative error of the logits; larger is better."""
        self._write(path, method, float_nodes, self.calibration)
        logits = logits_of_file(path, self.held_out)
        return top1(logits, self.labels), -float((logits - self.float_logits).square().mean())

    def _write(self, path: Path, method: str, float_nodes: tuple[str, ...], images: Tensor) -> None:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        quantize_static(
            self.folded,
            path,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(float_nodes),
            calibrate_method=CalibrationMethod[method],
            extra_options={"WeightSymmetric": True},
        )


class _Reader:
    """Calibration images, as onnxruntime's quantiser reads them."""

    def __init__(self, images: Tensor):
        self.batches = iter(images.split(BATCH))

    def get_next(self) -> dict | None:
        images = next(self.batches, None)
        return None if images is None else {INPUT: images.numpy()}


def _quantizable(path: Path) -> list[str]:
    import onnx

    return [node.name for node in onnx.load(path).graph.node if node.op_type in OPERATORS]


def write_float16(source: Path, path: Path) -> None:
    """Convert a float32 file to float16; images and logits stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)


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
