"""Simulated int8: files agree with it for a CNN, a ViT and a SimKD student; folders load again."""

import re

import pytest
import timm
import torch
from helpers import aligned
from torch import nn

from hfkd import load_student
from hfkd.commands.export import export
from hfkd.errors import HfkdError
from hfkd.export.formats import FORMATS, write_model
from hfkd.export.int8 import TOLERANCE, for_file, write_int8
from hfkd.export.quantization import logits_of_file
from hfkd.networks.costs import multiply_adds, parameter_count
from hfkd.networks.features import logits_of
from hfkd.networks.int8 import (
    ActivationQuantizer,
    is_int8,
    move_ranges,
    quantize,
    round_weight,
    without_rounding,
)
from hfkd.networks.loading import load_pretrained
from hfkd.networks.wrapping import exported_state_dict, wrap_timm

SIMKD = {"student_width": 32, "teacher_width": 32, "teacher_size": [8, 8], "factor": 2}
SIMKD |= {"architecture": "cifar_resnet8", "stage": 2}


def network(name):
    torch.manual_seed(0)
    if name == "simkd_student":
        model = wrap_timm(timm.create_model(name, num_classes=10, **SIMKD), list(map(str, range(10))), SIMKD)
    elif name == "vit":
        model = load_student("vit_tiny_patch16_224", num_classes=10, image_size=32)
        model.timm_model.blocks = model.timm_model.blocks[:2]
    else:
        model = load_student(name, num_classes=10)
    images = torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        model.train()(images)  # moves the statistics of the norms
    return model.eval(), images


@pytest.mark.parametrize("name", ["cifar_resnet8", "vit", "simkd_student"])
def test_files_agree_with_the_training(tmp_path, name):
    model, images = network(name)
    with torch.no_grad():
        in_float = logits_of(model, images)
    quantize(model, images)
    with torch.no_grad():
        expected, unrounded = logits_of(model, images), logits_of(without_rounding(model), images)
    torch.testing.assert_close(unrounded, in_float, rtol=1e-3, atol=1e-4)
    assert (expected - in_float).abs().max() > 1e-3 * in_float.std()
    made = write_int8(model, tmp_path / "int8.onnx", "", images)
    given = logits_of_file(tmp_path / "int8.onnx", images)
    assert (given - expected).square().mean().sqrt() <= TOLERANCE * expected.std()
    assert (given.argmax(1) == expected.argmax(1)).float().mean() >= 0.95
    assert made["int8_layers"] == len(model.config.int8_layers) and made["float_layers"] == ()
    if name == "cifar_resnet8":
        program = write_model(for_file(model, "torch"), 32, FORMATS["torch"], tmp_path / "model.pt2", "")
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-4)


def test_two_roundings_in_a_row_have_one_range():
    """ONNX Runtime makes one rounding of them: with two ranges a MobileNetV2 gave other logits than simulated."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)
    model = nn.Sequential(*layers, nn.Flatten())
    quantize(model, torch.randn(4, 3, 8, 8))
    move_ranges(model, 0.5)
    for _ in range(3):
        model.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    first, second, _, third, _ = model
    assert torch.equal(second.quantize_input.range, first.quantize_output.range)
    assert third.quantize_input.range[0] == 0 > second.quantize_output.range[0]  # the activation lies between, in place


@pytest.mark.parametrize("low, high", [(-3.0, 2.1), (0.0, 5.1), (-2.0, 0.0), (0.0, 0.0)])
def test_activations_round_as_torch_rounds_them(low, high):
    quantizer = ActivationQuantizer()
    quantizer.range.copy_(torch.tensor([low, high]))
    scale, zero_point = quantizer.scale_and_zero_point()
    halves = torch.arange(-300, 300) * scale + scale / 2  # between two integers, and far outside
    normal = 2 * torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    for x in (halves.view(6, 4, 5, 5), normal, normal.to(memory_format=torch.channels_last)):
        x = x.detach().requires_grad_()
        ours, theirs = quantizer(x), torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
        assert torch.equal(ours, theirs)
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        (our_gradient,), (their_gradient,) = (torch.autograd.grad(out, x, upstream) for out in (ours, theirs))
        assert torch.equal(our_gradient, their_gradient)


def test_a_saved_folder_loads_again(tmp_path):
    model, images = network("cifar_resnet8")
    quantize(model, images)
    model.save_pretrained(tmp_path, state_dict=exported_state_dict(model), save_original_format=False)
    loaded = aligned(load_pretrained(str(tmp_path)).eval())
    assert is_int8(loaded)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(loaded, images), logits_of(model, images))


def test_time_and_parameters_are_those_of_the_float_network(tmp_path, capsys):
    model, images = network("cifar_resnet8")
    expected, parameters = multiply_adds(model, 32), parameter_count(model)
    quantize(model, images)
    plain = without_rounding(model)
    assert not is_int8(plain) and multiply_adds(plain, 32) == expected
    model.save_pretrained(tmp_path / "student", state_dict=exported_state_dict(model), save_original_format=False)
    export([str(tmp_path / "student"), "--format", "torch", "--teacher", str(tmp_path / "student")])
    printed = capsys.readouterr().out
    assert re.search(rf"\| parameters \| +{parameters:,} \| +{parameters:,} \| +1.00 \|", printed), printed
    assert "model.pt2 rounds with operators of float32." in printed and "was not exported" not in printed


def test_an_outlier_channel_of_the_weights():
    weight = torch.rand(4, 3, 1, 1) - 0.5
    weight[0] = 1000
    of_one_scale = (weight / (1000 / 127)).round()
    assert not of_one_scale[1:].any()
    torch.testing.assert_close(round_weight(weight), weight, rtol=0, atol=0.5 / 127 / 2 + 1e-6)


def test_a_model_without_layers_is_refused():
    with pytest.raises(HfkdError, match="quantize needs convolutions"):
        quantize(nn.Flatten(), torch.randn(2, 3, 4, 4))


def test_a_norm_behind_a_change_in_place_is_not_folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    images = torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        model(images)  # moves the statistics of the norm
        expected = logits_of(model.eval(), images)
        quantize(model, images)
        torch.testing.assert_close(logits_of(without_rounding(model), images), expected)
    assert type(model[2]) is nn.BatchNorm2d
