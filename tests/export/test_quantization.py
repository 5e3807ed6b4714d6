"""Static quantisation: outliers in weights, layers that must stay float, and models that have none to quantise."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from hfkd.errors import HfkdError, MissingLibraryError
from hfkd.export.formats import FORMATS, write_model
from hfkd.export.quantization import StaticQuantizer, check_runtime, logits_of_file


def quantizer_of(model, images, folder):
    """Export a model, and compare on images whose labels are its own classes."""
    path = folder / "float32.onnx"
    write_model(model.eval(), images.shape[-1], FORMATS["onnx"], path, "")
    with torch.inference_mode():
        labels = model(images).argmax(1)
    return StaticQuantizer(path, images[:40], images, labels)


class OutlierWeights(nn.Module):
    """Convolution with one huge weight, which reads an empty channel: one scale for all rounds the others to 0."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        with torch.no_grad():
            self.conv.weight[0] = torch.tensor([0.0, 0.0, 1000.0]).view(3, 1, 1)

    def forward(self, pixel_values):
        return self.head(self.conv(pixel_values).relu().mean((2, 3)))


def test_an_outlier_channel_of_the_weights(tmp_path):
    model = OutlierWeights()
    weights = model.conv.weight.detach()
    of_one_scale = (weights / (weights.abs().max() / 127)).round()
    assert of_one_scale[0].any() and not of_one_scale[1:].any()
    images = 2 * torch.rand(64, 3, 8, 8) * torch.rand(64, 3, 1, 1)
    images[:, 2] = 0
    quantizer = quantizer_of(model, images, tmp_path)
    made = quantizer.quantize(tmp_path / "int8.onnx", max_drop=100)
    assert made.int8_layers == 2 and made.float_layers == ()
    error = logits_of_file(tmp_path / "int8.onnx", images) - quantizer.float_logits
    spread = quantizer.float_logits.std(0).mean()
    assert spread > 0.02  # there is something to lose
    assert error.abs().max() < 0.1 * spread


class OutlierActivations(nn.Module):
    """Five layers, of which the second adds a constant that hides all else from a scale of the whole tensor."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if index == 0 else 8, 8, 1) for index in range(4))
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.layers[1].bias[0] = 1e5
            self.layers[2].weight[:, 0] = 0

    def forward(self, pixel_values):
        x = self.layers[0](pixel_values).relu()
        x = self.layers[2](self.layers[1](x)).relu()
        return self.head(self.layers[3](x).mean((2, 3)))


def test_sensitive_layers_stay_float(tmp_path):
    model = OutlierActivations()
    with torch.no_grad():  # four classes that occur
        images = torch.randn(64, 3, 8, 8) + 3 * torch.randn(64, 3, 1, 1)
        logits = model(images)
        model.head.bias -= logits.mean(0)
        model.head.weight /= logits.std()
        model.head.bias /= logits.std()
    quantizer = quantizer_of(model, images, tmp_path)
    made = quantizer.quantize(tmp_path / "int8.onnx", max_drop=3)
    # The tensor between the second and the third layer is float only if both are; the ends were tried before them.
    assert made.float_layers == tuple(quantizer.layers[index] for index in (0, 1, 2, 4)) and made.int8_layers == 1
    assert made.held_out_top1_float32 == 100 and made.held_out_top1 >= 97
    kept = (logits_of_file(tmp_path / "int8.onnx", images).argmax(1) == quantizer.labels).float().mean()
    assert 100 * float(kept) == pytest.approx(made.held_out_top1)
    # Where no set keeps the top-1, the best is written and its top-1 told.
    without = quantizer.quantize(tmp_path / "int8.onnx", max_drop=-1)
    assert without.held_out_top1 >= made.held_out_top1


NO_LAYERS = """<ir_version: 10, opset_import: ["": 20]>
graph (float[N, 3, 8, 8] pixel_values) => (float[N, 3, 8, 8] logits) { logits = Relu(pixel_values) }"""


def test_a_model_without_layers_is_refused(tmp_path):
    onnx.save(onnx.parser.parse_model(NO_LAYERS), tmp_path / "float32.onnx")
    with pytest.raises(HfkdError, match="int8 needs convolutions or linear layers .* Its operators: Relu"):
        StaticQuantizer(tmp_path / "float32.onnx", torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_an_operator_that_onnx_runtime_does_not_know_is_refused(tmp_path):
    unknown = NO_LAYERS.replace('"": 20', '"": 20, "mine": 1').replace("Relu(", "mine.Unknown(")
    onnx.save(onnx.parser.parse_model(unknown), tmp_path / "float32.onnx")
    with pytest.raises(HfkdError, match="cannot prepare this model for int8 .Incomplete symbolic shape.*float16"):
        StaticQuantizer(tmp_path / "float32.onnx", torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_activations_without_a_histogram(tmp_path):
    """Dead units: all outputs of the first layer are the same large number but for its last digits."""
    model = OutlierWeights()
    with torch.no_grad():
        model.conv.bias.fill_(-1e6)
    quantizer = quantizer_of(model, torch.randn(48, 3, 8, 8), tmp_path)
    made = quantizer.quantize(tmp_path / "int8.onnx", max_drop=0)
    assert made.calibration == "MinMax" and made.held_out_top1 == 100


def test_an_old_onnx_runtime_is_refused(monkeypatch):
    check_runtime()
    monkeypatch.setattr(onnxruntime, "__version__", "1.9.0")
    with pytest.raises(MissingLibraryError, match=r"needs onnxruntime 1.23 or newer, and 1.9.0 .*pip install"):
        check_runtime()
