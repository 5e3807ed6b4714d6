"""A model as one file: what the formats cannot express, and a file that is left whole or not at all."""

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import Plain
from torch import nn

from hfkd import load_student
from hfkd.export.formats import FORMATS, FileModel, write_model

ONNX, TORCH = FORMATS["onnx"], FORMATS["torch"]


@torch.library.custom_op("hfkd_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


class CustomOperator(Plain):
    def forward(self, pixel_values):
        return twice(super().forward(pixel_values))


class DecidesByValues(Plain):
    def forward(self, pixel_values):
        if pixel_values.sum() > 0:
            return super().forward(pixel_values)
        return super().forward(-pixel_values)


class OneBatchSize(Plain):
    def forward(self, pixel_values):
        return super().forward(pixel_values).flatten().view(2, 10)


def write(model, file_format, folder="out"):
    return write_model(model.eval(), 32, file_format, Path(folder, file_format.file_name), "{}")


def left(folder="out"):
    return [path.name for path in Path(folder).glob("*")]


def test_an_operator_that_onnx_does_not_have():
    with pytest.raises(ValueError, match="ONNX cannot express the operator hfkd_tests.twice.*--format torch"):
        write(CustomOperator(), ONNX)
    assert left() == []
    model, images = CustomOperator(), torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(write(model, TORCH)(images), model(images))


@pytest.mark.parametrize("file_format", [ONNX, TORCH], ids=list(FORMATS))
def test_a_forward_that_cannot_be_followed(file_format):
    branch = r"the forward of DecidesByValues.*test_formats.py, line \d+: `if pixel_values.sum\(\) > 0:`.*torch.where"
    with pytest.raises(ValueError, match=branch):
        write(DecidesByValues(), file_format)
    with pytest.raises(ValueError, match="the forward of OneBatchSize.*a fixed batch size"):
        write(OneBatchSize(), file_format)
    assert left() == []


@pytest.mark.parametrize("file_format", [ONNX, TORCH], ids=list(FORMATS))
def test_a_backbone_gives_its_embedding(file_format):
    model, images = load_student("cifar_resnet8", num_classes=0), torch.randn(3, 3, 32, 32)
    embedding = write(model, file_format)(images)
    assert embedding.shape == (3, 64)
    torch.testing.assert_close(embedding, model(images).pooler_output.detach(), rtol=1e-4, atol=1e-4)
    if file_format is ONNX:
        import onnx

        graph = onnx.load("out/model.onnx").graph
        assert [output.name for output in graph.output] == ["embedding"]
        assert not any(node.metadata_props for node in graph.node), "notes on the lines of code"


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="Sequential must return logits"):
        write(nn.Sequential(nn.Conv2d(3, 4, 3)), TORCH)


def test_other_logits_leave_the_file_before(monkeypatch):
    write(Plain(), TORCH)
    before = Path("out/model.pt2").read_bytes()
    wrong = FileModel(lambda images: torch.zeros(len(images), 10))
    torch_that_errs = type(TORCH)(**vars(TORCH) | {"read": lambda path: wrong})
    with pytest.raises(ValueError, match="of Plain gives other logits than the model, by up to 0.*at most 0.0001"):
        write(Plain(), torch_that_errs)
    assert left() == ["model.pt2"] and Path("out/model.pt2").read_bytes() == before


def test_a_difference_of_2e_4_is_found():
    model = Plain()
    with torch.no_grad():
        model.fc.weight.zero_(), model.fc.bias.zero_()
    nearly = type(TORCH)(**vars(TORCH) | {"read": lambda path: FileModel(lambda images: model(images) + 2e-4)})
    with pytest.raises(ValueError, match="by up to 0.0002 in a batch of 1"):
        write(model, nearly)


def test_a_full_disk_leaves_the_file_before():
    def full(program, path, preprocessing):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    write(Plain(), TORCH)
    before = Path("out/model.pt2").read_bytes()
    with pytest.raises(RuntimeError, match="out/model.pt2 could not be written .No space left on device"):
        write(Plain(), type(TORCH)(**vars(TORCH) | {"write": full}))
    assert left() == ["model.pt2"] and Path("out/model.pt2").read_bytes() == before


def test_more_weights_than_one_onnx_file_holds(monkeypatch):
    monkeypatch.setattr("hfkd.export.formats.LARGEST_ONNX", 1_000)
    with pytest.raises(ValueError, match="The weights take 0.0 GB.*--format torch"):
        write(Plain(), ONNX)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_libraries(missing, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ImportError, match=rf'needs {missing}, .*pip install "hfkd\[export\]"'):
        write(Plain(), ONNX)
