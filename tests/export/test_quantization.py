"""Static quantisation: calibration rows, and an outlier channel that only a scale per channel survives."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from hfkd.commands.reduced_precision import calibration_rows
from hfkd.errors import HfkdError
from hfkd.export.formats import FORMATS, write_model
from hfkd.export.quantization import StaticQuantizer


class Outlier(nn.Module):
    """Convolution with one channel of weights a thousand times as large, which adds a constant to all logits."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        with torch.no_grad():
            self.conv.weight[0] *= 1000
            self.head.weight[:, 0] = 0

    def forward(self, pixel_values):
        return self.head(self.conv(pixel_values).mean((2, 3)))


def test_an_outlier_channel_of_the_weights(tmp_path):
    torch.manual_seed(0)
    model = Outlier().eval()
    write_model(model, 8, FORMATS["onnx"], tmp_path / "model.onnx", "")
    images = torch.randn(64, 3, 8, 8)
    quantizer = StaticQuantizer(tmp_path / "model.onnx", images[:32], images[32:], torch.zeros(32, dtype=torch.int64))
    assert len(quantizer.nodes) == 2
    quantizer.quantize(tmp_path / "int8.onnx", max_drop=100)
    initializers = map(onnx.numpy_helper.to_array, onnx.load(tmp_path / "int8.onnx").graph.initializer)
    (scales,) = [
        each
        for each in initializers
        if each.shape == (8,) and each.dtype == np.float32 and (each > 0).all() and each.max() > 100 * each.min()
    ]
    assert scales.argmax() == 0


def test_calibration_and_held_out_rows_are_apart():
    calibration, held_out = calibration_rows(50, 20)
    assert len(calibration) == 20 and sorted(calibration + held_out) == list(range(50))
    with pytest.raises(HfkdError, match="has 20 images, and calibration takes 20.*smaller --calibration_images"):
        calibration_rows(20, 20)
